"""Every method over its range of settings: same native model, images, number format, kernels and MAC counter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokengame import kernels
from tokengame.backbone import Backbone
from tokengame.baselines import ATS, EViT, ToMe
from tokengame.config import GameConfig
from tokengame.data import Batch
from tokengame.dynamicvit import DynamicViT, pruned_by
from tokengame.evaluate import Method, Scores, at_ratios, run, score, timed, written_out
from tokengame.heuristics import AtBudgets, KeepBest, Random, attention
from tokengame.policy import Policy
from tokengame.runtime import by_rule, prune
from tokengame.state import Observation

KEEP = (0.95, 0.9, 0.8, 0.7, 0.6)
"""shares kept at each of three stages by methods that have such a setting"""
TOME = (2, 4, 6, 8, 10, 13, 16)
"""r for 196 tokens and 12 blocks; scaled to others"""
ATS_SHARES = (2.0, 1.3, 0.9, 0.7, 0.55, 0.45, 0.35)
"""points at which ATS inverts the distribution, relative to the number of tokens"""
SECOND_LOOK = 0.15
"""margin with which a policy that looks once is also shown looking twice (chosen in docs/LOG.md)"""
LEVELS = (0.90, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97)
"""agreements at which speed is compared"""
TIMED_BATCHES = 3
"""batches on whose images speed is measured"""
WARM_UP = 3
"""rounds on them that a method goes through before it is timed; the native model, whose shapes never change, one"""


@dataclass
class Entry:
    """One method at one setting, and what was measured of it."""

    method: str
    setting: str
    runs: Method
    published: bool = True
    """from a paper, so that the fastest of these is the one to beat"""
    is_timed: bool = True
    scores: Scores = field(default_factory=Scores)


def peers(model: nn.Module) -> list[Entry]:
    """What needs no training: the native model's exact exit, random, attention, EViT, ToMe, ATS."""
    backbone = Backbone(model)
    drop = GameConfig(stage_count=3)
    merge = GameConfig(stages=drop.blocks(backbone.depth), transition="merge")  # the same blocks, for comparison
    entries = [Entry("all tokens, exact exit", "", by_rule(model, drop, everybody, features=False), False)]
    for keep in KEEP:
        shares = (keep, keep**2, keep**3)
        name = f"keep {keep:g}"
        entries += [
            Entry("random, drop", name, by_rule(model, drop, KeepBest(Random(), shares), features=False), False),
            Entry("attention, drop", name, by_rule(model, drop, KeepBest(attention, shares)), False),
            Entry("attention, merge", name, by_rule(model, merge, KeepBest(attention, shares)), False),
            Entry("EViT", name, EViT(model, keep)),
            Entry("EViT, not fusing", name, EViT(model, keep, fuse=False)),
        ]
    for r in sorted({max(1, round(r * backbone.patches / 196 * 12 / backbone.depth)) for r in TOME}):
        entries.append(Entry("ToMe", f"r {r}", ToMe(model, (r,) * backbone.depth)))
    for share in ATS_SHARES:
        samples = max(1, round(share * backbone.patches))
        entries.append(Entry("ATS", f"{samples} samples", ATS(model, samples)))
    return entries


def dynamic_entries(model: nn.Module, dynamic: DynamicViT) -> list[Entry]:
    """A trained DynamicViT over its keep ratios."""
    entries = []
    for keep in KEEP:
        other = copy.copy(dynamic)  # the same predictors
        other.keep = keep
        entries.append(Entry("DynamicViT, frozen", f"keep {keep:g}", pruned_by(model, other)))
    return entries


def policy_entries(model: nn.Module, name: str, policy: Policy, dials: Sequence[float], budgets: bool) -> list[Entry]:
    """A policy over its dials as its card has it, and with the other number of looks; with `budgets`, also attention
    and chance at the numbers that the policy, looking once, has in each image."""
    once, twice = looking(policy, 0.0), looking(policy, SECOND_LOOK)
    other = (f"{name}, one look", once) if policy.game.second_look else (f"{name}, two looks", twice)
    entries = []
    for dial in dials:
        setting = f"dial {dial:g}"
        for method, its in ((name, policy), other):
            entries.append(Entry(method, setting, prune(model, its, dial), False))
        if budgets:
            single = prune(model, once, dial)
            for rule, scorer in (("attention", attention), ("random", Random())):
                method = f"{rule} at the budgets of {name}"
                entries.append(Entry(method, setting, AtBudgets(single, scorer), False, is_timed=False))
    return entries


def looking(policy: Policy, margin: float) -> Policy:
    """The same policy with another `second_look`."""
    return Policy(policy.actor, policy.card | {"game": policy.card["game"] | {"second_look": margin}})


def compare(
    model: nn.Module,
    entries: list[Entry],
    batches: Iterable[Batch],
    track: Callable[[list[Entry]], Iterable[Entry]] = iter,
) -> list[dict[str, Any]]:
    """Run all entries on all batches, natively too; then time one entry after the other on the first batches.

    Args:
        model: the native one.
        entries: methods at their settings.
        batches: to measure on.
        track: goes through the entries to be timed, for who wants to watch.

    Returns:
        One row an entry: method, setting, published and the keys of `eval`. Native's speed is that of the faster of
        fused and written-out attention.
    """
    images = _score(model, entries, batches)
    timed_ones = [entry for entry in entries if entry.is_timed]
    for entry in track(timed_ones) if timed_ones else ():
        entry.scores.seconds, entry.scores.seconds_pytorch = race(model, entry.runs, images)
    return [
        {"method": entry.method, "setting": entry.setting, "published": entry.published} | entry.scores.summary()
        for entry in entries
    ]


@torch.inference_mode()
def _score(model: nn.Module, entries: list[Entry], batches: Iterable[Batch]) -> list[Tensor]:
    """What all entries make of all batches; returns the images of the first ones."""
    weight = next(model.parameters())
    first: list[Tensor] = []
    for batch in batches:
        images = batch.images.to(weight.device, weight.dtype)
        native = model(images).float()
        for entry in entries:
            end, logits = run(entry.runs, images)
            score(entry.scores, entry.runs, batch, native, logits.float(), end)
        first += [images] if len(first) < TIMED_BATCHES else []
    return first


@torch.inference_mode()
def race(
    model: nn.Module, method: Method, batches: list[Tensor], rounds: int = 5
) -> tuple[list[tuple[int, float, float]], list[float]]:
    """Size, native and the method's seconds of each call; native is the faster of its two forms. And where the method
    runs on kernels of our own, its seconds on PyTorch's.

    These alone, in turn: on CPUs each shape's kernels are made at its first call, and in turns with dozens of other
    methods they are forgotten again. Every round deals the images into other batches, so that who keeps a different
    number in every image meets other shapes each time, as in use; the first ones, for which nearly every kernel is new,
    are not counted (`WARM_UP`).
    """
    calls: dict[str, Callable[[Tensor], Any]] = {
        "fused": model, "written out": written_out(model), "method": partial(run, method)
    }  # fmt: skip
    if kernels.take(batches[0]):
        calls["on PyTorch's"] = partial(_on_pytorch, method)
    times: dict[str, list[float]] = {name: [] for name in calls}
    pool, size, order = torch.cat(batches), max(map(len, batches)), list(calls)
    generator, sizes = torch.Generator().manual_seed(0), []
    for number in range(-WARM_UP, rounds):
        dealt = pool[torch.randperm(len(pool), generator=generator).to(pool.device)].split(size)
        for images in dealt[: max(1, len(pool) // size)]:
            for name in [name for name in order if number >= -1 or name not in ("fused", "written out")]:
                seconds = timed(images.device, calls[name], images)[1]
                if number >= 0:
                    times[name].append(seconds)
            sizes += [len(images)] if number >= 0 else []
            order = order[1:] + order[:1] if number >= -1 else order
    native = min((times["fused"], times["written out"]), key=median)
    return list(zip(sizes, native, times["method"], strict=True)), times.get("on PyTorch's", [])


def _on_pytorch(method: Method, images: Tensor) -> Any:
    with kernels.on_pytorch():
        return run(method, images)


def everybody(obs: Observation) -> Tensor:
    """[A] keep logits of a game without losers."""
    return torch.ones(len(obs.agent), device=obs.agent.device)


def qualities(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each method agreement and KL at the same compute."""
    methods = dict.fromkeys(row["method"] for row in rows)
    return [{"method": m} | at_ratios([row for row in rows if row["method"] == m]) for m in methods]


def speed_at(rows: list[dict[str, Any]], agreement: float, key: str = "speedup") -> float | None:
    """Speed-up of one method at a wanted agreement, linear between its neighbouring settings; None if out of reach."""
    rows = sorted((row for row in rows if row.get(key)), key=lambda row: -row["gmacs_ratio"])
    found = [row[key] for row in rows if row["agreement"] >= agreement]
    for one, other in pairwise(rows):
        ends = sorted((r["agreement"], r[key]) for r in (one, other))
        if ends[0][0] <= agreement <= ends[1][0]:
            found.append(float(np.interp(agreement, [e[0] for e in ends], [e[1] for e in ends])))
    return max(found, default=None)


def speeds(rows: list[dict[str, Any]], levels: Sequence[float] = LEVELS) -> list[dict[str, Any]]:
    """For each agreement the speed-up of every timed method (None: out of reach), and the fastest one of a paper.

    Where all run on our own kernels, also the fastest of a paper on PyTorch's.
    """
    published = {row["method"]: row["published"] for row in rows if row.get("speedup")}
    table = []
    for level in levels:
        line: dict[str, Any] = {"agreement": level}
        for key, mark in (("speedup", ""), ("speedup_pytorch", "_pytorch")):
            speed = {m: speed_at([row for row in rows if row["method"] == m], level, key) for m in published}
            peers = {m: s for m, s in speed.items() if published[m] and s is not None}
            best = max(peers, key=lambda m: peers[m], default=None)
            if best or not mark:
                line |= {f"fastest_peer{mark}": best, f"fastest_peer{mark}_speedup": peers.get(best or "")}
            line |= speed if not mark else {}
        table.append(line)
    return table
