"""Every method over its range of settings: same native model, images, number format, kernels and MAC counter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokengame import kernels
from tokengame.backbones import unfused, wrap
from tokengame.baselines import BASELINES
from tokengame.baselines.dynamicvit import DynamicViT
from tokengame.baselines.dynamicvit import settings as dynamicvit_settings
from tokengame.baselines.heuristics import AtBudgets, Random, attention
from tokengame.baselines.rule import thresholds
from tokengame.data.batches import Batch
from tokengame.files import Progress, silent
from tokengame.measure.evaluate import at_ratios, timed
from tokengame.measure.kinds import Kind, kind_of
from tokengame.measure.scores import Measured, Scores
from tokengame.policies import Policy
from tokengame.ranges import require
from tokengame.runtime import prune
from tokengame.runtime.method import Method

CASCADE_MARGIN = 0.15
"""margin with which a policy without a cascade is also shown with one (chosen in docs/LOG.md)"""
LEVELS = (0.90, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97)
"""agreements at which speed is compared"""
COSINE_LEVELS = (0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
"""cosines, likewise"""
TIMED_BATCHES = 3
"""batches on whose images speed is measured"""
WARM_UP = 3
"""rounds of a method before it is timed; one of them for the native model, whose shapes never change"""


@dataclass
class Entry:
    """One method at one setting, and what was measured of it."""

    method: str
    setting: str
    model: Method
    published: bool = True
    """from a paper, so that the fastest of these is the one to compare with"""
    is_timed: bool = True
    scores: Measured = field(default_factory=Scores)


def baseline_entries(model: nn.Module, names: Sequence[str] = ()) -> list[Entry]:
    """The baselines of these names that need no training, over their settings; without names all.

    Raises:
        TokenGameError: there is no baseline of a name.
    """
    known = [baseline.name for baseline in BASELINES]
    for name in names:
        require(name in known, f"no baseline {name!r}; there are: {', '.join(known)}")
    return [
        Entry(baseline.name, setting, method, baseline.published)
        for baseline in BASELINES
        if not names or baseline.name in names
        for setting, method in baseline.settings(model)
    ]


def rule_entries(model: nn.Module, images: Sequence[Tensor], progress: Progress = silent) -> list[Entry]:
    """The starting rule with thresholds that are set on batches of `images`; none of them may be measured on."""
    settings = thresholds(model, images, progress=progress)
    return [Entry("rule, thresholds", setting, method, False) for setting, method in settings]


def dynamicvit_entries(model: nn.Module, dynamic: DynamicViT) -> list[Entry]:
    """A trained DynamicViT over its keep ratios."""
    return [Entry("DynamicViT, frozen", setting, method) for setting, method in dynamicvit_settings(model, dynamic)]


def policy_entries(model: nn.Module, name: str, policy: Policy, dials: Sequence[float], budgets: bool) -> list[Entry]:
    """A policy over its dials as its card has it, and with the cascade switched; with `budgets`, also attention and
    random at the numbers that the policy, without the cascade, keeps in each image."""
    without, cascaded = with_margin(policy, 0.0), with_margin(policy, CASCADE_MARGIN)
    other = (f"{name}, no cascade", without) if policy.game.cascade_margin else (f"{name}, cascade", cascaded)
    entries = []
    shown = [(name, policy), other] if policy.keeps == "logits" else [(name, policy)]
    for dial in dials:
        setting = f"dial {dial:g}"
        for method, which in shown:
            entries.append(Entry(method, setting, prune(model, which, dial), False))
        if budgets:
            single = prune(model, without, dial)
            for rule, scorer in (("attention", attention), ("random", Random())):
                method = f"{rule} at the budgets of {name}"
                entries.append(Entry(method, setting, AtBudgets(single, scorer), False, is_timed=False))
    return entries


def with_margin(policy: Policy, margin: float) -> Policy:
    """The same policy with another `cascade_margin`."""
    return Policy(policy.actor, policy.card | {"game": policy.card["game"] | {"cascade_margin": margin}})


def compare(
    model: nn.Module, entries: list[Entry], batches: Iterable[Batch], number: int, progress: Progress = silent,
    keep: Callable[[list[dict[str, Any]]], None] | None = None, kind: Kind | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run all entries on all batches, natively too; then time one entry after the other on the first batches.

    Args:
        model: the native one.
        entries: methods at their settings.
        batches: to measure on.
        number: how many those are.
        progress: shows a step for every entry on every batch, then for every entry that is timed.
        keep: is given the rows without their speed before anything is timed, lest they are lost then.
        kind: what is compared; by default what the model gives. Methods that do not give it are left out.

    Returns:
        One row an entry: method, setting, published and the keys of `eval`. Native's speed is that of the faster of
        fused and unfused attention.
    """
    kind = kind or kind_of(wrap(model))
    entries = [entry for entry in entries if kind.measures(entry.model)]
    for entry in entries:
        entry.model, entry.scores = kind.method(entry.model), kind.scores()
    images = _score(model, entries, batches, number, progress, kind)
    if keep is not None:
        keep(_rows(entries))
    timed_ones = [entry for entry in entries if entry.is_timed]

    def called(form: nn.Module) -> Callable[[Tensor], Any]:
        return partial(kind.native, wrap(form))

    for entry in progress(timed_ones, "timing", len(timed_ones)) if timed_ones else ():
        entry.scores.seconds, entry.scores.seconds_pytorch = time_method(model, entry.model, images, native_of=called)
    return _rows(entries)


def _rows(entries: list[Entry]) -> list[dict[str, Any]]:
    return [
        {"method": entry.method, "setting": entry.setting, "published": entry.published} | entry.scores.summary()
        for entry in entries
    ]


@torch.inference_mode()
def _score(
    model: nn.Module, entries: list[Entry], batches: Iterable[Batch], number: int, progress: Progress, kind: Kind
) -> list[Tensor]:
    """Score all entries on all batches; returns the images of the first batches."""
    weight, backbone = next(model.parameters()), wrap(model)
    first: list[Tensor] = []

    def steps() -> Iterator[tuple[Batch, Tensor, Tensor, Entry]]:
        for batch in batches:
            images = batch.images.to(weight.device, weight.dtype)
            if len(first) < TIMED_BATCHES:
                first.append(images)
            native = kind.native(backbone, images).float()
            for entry in entries:
                yield batch, images, native, entry

    for batch, images, native, entry in progress(steps(), "comparing", number * len(entries)):
        entry.scores.add(entry.model, batch, native, entry.model.predict(images))
    return first


@torch.inference_mode()
def time_method(
    model: nn.Module, method: Method, batches: list[Tensor], rounds: int = 5,
    native_of: Callable[[nn.Module], Callable[[Tensor], Any]] = lambda model: model,
) -> tuple[list[tuple[int, float, float]], list[float]]:  # fmt: skip
    """Time a method beside the native model, call by call in turn.

    Each method is timed on its own: on CPUs the kernels of a shape are compiled at its first call, and among dozens of
    other methods they would be forgotten again. Every round deals the images into other batches, so that a method that
    keeps a different number in every image meets new shapes each time, as in use. The first rounds, for which nearly
    every kernel is new, are not counted (`WARM_UP`).

    Args:
        model: the native one.
        method: what is timed.
        batches: of images.
        rounds: that are counted.
        native_of: from a form of the model to what is called of it.

    Returns:
        size, native seconds and the method's seconds of each call, native being the faster of its two forms; and where
        compiled kernels run, the method's seconds on PyTorch's.
    """
    calls: dict[str, Callable[[Tensor], Any]] = {
        "fused": native_of(model), "unfused": native_of(unfused(model)), "method": method.predict
    }  # fmt: skip
    if kernels.usable(batches[0]):
        calls["on PyTorch's"] = lambda images: _on_pytorch(method, images)
    times: dict[str, list[float]] = {name: [] for name in calls}
    pool, size, order = torch.cat(batches), max(map(len, batches)), list(calls)
    generator, sizes = torch.Generator().manual_seed(0), []
    for number in range(-WARM_UP, rounds):
        dealt = pool[torch.randperm(len(pool), generator=generator).to(pool.device)].split(size)
        for images in dealt[: max(1, len(pool) // size)]:
            for name in [name for name in order if number >= -1 or name not in ("fused", "unfused")]:
                seconds = timed(images.device, calls[name], images)[1]
                if number >= 0:
                    times[name].append(seconds)
            sizes += [len(images)] if number >= 0 else []
            order = order[1:] + order[:1] if number >= -1 else order
    native = min((times["fused"], times["unfused"]), key=median)
    return list(zip(sizes, native, times["method"], strict=True)), times.get("on PyTorch's", [])


def _on_pytorch(method: Method, images: Tensor) -> Any:
    with kernels.disabled():
        return method.predict(images)


def qualities(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each method what is lost at the same compute."""
    methods = dict.fromkeys(row["method"] for row in rows)
    return [{"method": m} | at_ratios([row for row in rows if row["method"] == m]) for m in methods]


def likeness(row: dict[str, Any]) -> str:
    """The figure of a row that says how like native a method is, so that speeds are compared where it is equal."""
    return next(name for name in ("agreement", "cosine", "feature_cosine") if name in row)


def speed_at(rows: list[dict[str, Any]], level: float, key: str = "speedup") -> float | None:
    """Speed-up of one method at a wanted likeness, linear between its neighbouring settings; None if out of reach."""
    rows = sorted((row for row in rows if row.get(key)), key=lambda row: -row["gmacs_ratio"])
    figure = likeness(rows[0]) if rows else ""
    found = [row[key] for row in rows if row[figure] >= level]
    for one, other in pairwise(rows):
        ends = sorted((r[figure], r[key]) for r in (one, other))
        if ends[0][0] <= level <= ends[1][0]:
            found.append(float(np.interp(level, [e[0] for e in ends], [e[1] for e in ends])))
    return max(found, default=None)


def speeds(rows: list[dict[str, Any]], levels: Sequence[float] | None = None) -> list[dict[str, Any]]:
    """The speed-up of every timed method at each of `levels` of agreement, or of cosine (None: out of reach).

    Each row also names the fastest published method.

    Where all run on the compiled kernels, also the fastest one of a paper on PyTorch's.
    """
    published = {row["method"]: row["published"] for row in rows if row.get("speedup")}
    table, figure = [], likeness(rows[0])
    for level in levels or (LEVELS if figure == "agreement" else COSINE_LEVELS):
        line: dict[str, Any] = {figure: level}
        for key, mark in (("speedup", ""), ("speedup_pytorch", "_pytorch")):
            speed = {m: speed_at([row for row in rows if row["method"] == m], level, key) for m in published}
            peers = {m: s for m, s in speed.items() if published[m] and s is not None}
            best = max(peers, key=lambda m: peers[m], default=None)
            if best or not mark:
                line |= {f"fastest_peer{mark}": best, f"fastest_peer{mark}_speedup": peers.get(best or "")}
            line |= speed if not mark else {}
        table.append(line)
    return table
