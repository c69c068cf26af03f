"""Timing the fastest native model against the pruned one, interleaved in one process, policy included."""

from __future__ import annotations

import copy
import itertools
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokengame import kernels
from tokengame.backbones import unfused, wrap
from tokengame.baselines.tome import ToMe, tome_at
from tokengame.config import GameConfig
from tokengame.errors import first_line
from tokengame.measure.against import Rivals
from tokengame.measure.conditions import conditions, engines
from tokengame.measure.in_turn import REST, interleave
from tokengame.measure.kinds import kind_of
from tokengame.measure.neighbours import neighbours
from tokengame.measure.profile import peak_memory, time_shares
from tokengame.measure.synthetic import SyntheticDecisions, require_shares, synthetic_model
from tokengame.packed.attention import padded_attention
from tokengame.runtime import PrunedViT, prune
from tokengame.runtime.macs import native_macs, pruned_macs
from tokengame.runtime.rule import RULE, Rule

DRAWS = 8
"""batches of different counts that follow one another"""


@dataclass(frozen=True)
class Plan:
    """What to time. `keep`: see `SyntheticDecisions`; `seconds` for each row, shared by all variants."""

    game: GameConfig
    keep: tuple[float, ...] = (0.7, 0.49, 0.34)
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    seconds: float = 20.0
    seed: int = 0
    compiled: bool = True
    """also time what torch.compile makes of both models"""
    tome: bool = False
    """also time ToMe at equal GMACs"""
    keeps_memory: bool = False
    """that `keep_freed_memory` was called, for the file's name"""
    policy: str | None = None
    """rule: the starting rule decides; None: `SyntheticDecisions` do"""
    rivals: bool = False
    """also time what other engines make of the native model"""
    neighbours: int = 0
    """busy processes beside what is timed"""


def bench(
    model: nn.Module, name: str, plan: Plan, report: Callable[[str, float], Any] = lambda _name, _share: None
) -> Iterator[dict[str, Any]]:
    """Time native against pruned; one row with the JSON keys of `bench` for each number format and batch size.

    Args:
        model: of a supported family.
        name: for the rows.
        plan: what to time.
        report: called with the name of the current step and the share of it that is done: a row, and before it the
            building of its rivals.

    Raises:
        TokenGameError: model not supported, shares do not fit the stages.
    """
    for dtype, batch_size in itertools.product(plan.dtypes, plan.batch_sizes):
        which = f"{str(dtype).removeprefix('torch.')}, batch {batch_size}"
        fast = pruned_by_plan(copy.deepcopy(model).to(dtype), plan)
        settings = {
            "backbone": name,
            "dtype": str(dtype).removeprefix("torch."),
            "transition": plan.game.transition,
            "stages": list(fast.game.stages),
            "device": fast.game.backbone.device.type,
        }
        row = _row(fast, batch_size, plan, report, which)
        yield settings | row | conditions(dtype, fast.game.backbone.device) | (engines() if plan.rivals else {})


def pruned_by_plan(model: nn.Module, plan: Plan) -> PrunedViT:
    """`model` with the decisions of a plan, by the starting rule or synthetic, at the shares `plan.keep`.

    Raises:
        TokenGameError: not one share for each stage.
    """
    if plan.policy != RULE:
        return synthetic_model(model, plan.game, plan.keep, plan.seed)
    rule = Rule(wrap(model), game=plan.game)
    require_shares(plan.keep, len(rule.game.stages))
    return prune(model, rule.with_budgets([after / before for before, after in pairwise((1.0, *plan.keep))]))


@torch.inference_mode()
def _row(
    fast: PrunedViT, batch_size: int, plan: Plan, report: Callable[[str, float], Any], which: str
) -> dict[str, Any]:
    backbone = fast.game.backbone
    generator = torch.Generator().manual_seed(plan.seed)
    x = torch.randn(batch_size, 3, *backbone.input_size, generator=generator)
    x = x.to(backbone.device, backbone.dtype)
    decisions, total = fast.actor, fast.game.reset(x[:1]).total
    if isinstance(decisions, SyntheticDecisions):
        kept = decisions.fit(fast, x, DRAWS)
    else:
        kept = torch.stack(fast.predict(x).kept).cpu()
    macs, native_cost = float(pruned_macs(fast.game, decisions, kept, total).mean()), native_macs(backbone, total)
    tome = tome_at(backbone.model, macs, total) if plan.tome else None
    if plan.compiled:
        torch.compiler.reset()
    rivals = _rivals(fast, x, plan, partial(report, f"{which}: building rivals")) if plan.rivals else None
    report(which, 0.0)
    variants = _variants(fast, x, plan, tome, rivals)
    with neighbours(plan.neighbours):
        times = interleave(variants, x.device, plan.seconds, partial(report, which), plan.seed, REST * plan.rivals)
    native, pruned = (_fastest(times, side) for side in ("native", "pruned"))
    slow, quick = statistics.median(times[native]), statistics.median(times[pruned])
    low, _, high = statistics.quantiles([a / b for a, b in zip(times[native], times[pruned], strict=True)], n=4)
    row = {
        "batch_size": batch_size,
        "neighbours": plan.neighbours,
        "keep": [round(float(k.float().mean()) / total, 4) for k in kept],
        "images_per_second_native": batch_size / slow,
        "images_per_second_pruned": batch_size / quick,
        "speedup": slow / quick,
        "speedup_quartiles": [low, high],
        "gmacs_native": native_cost / 1e9,
        "gmacs_speedup": native_cost / macs,
        "efficiency": slow / quick * macs / native_cost,
        "verdict": "faster" if slow > quick else "slower",
        "efficiency_over_sdpa": min(statistics.median(times[n]) for n in SDPA if n in times)
        / quick
        * macs
        / native_cost,
        "native": native[1],
        "pruned": pruned[1],
        "speedup_over_unpruned": statistics.median(times[UNPRUNED]) / quick,
        "rounds": len(times[native]),
        "milliseconds": {" ".join(name): statistics.median(t) * 1e3 for name, t in times.items()},
        "tokens_kept": [{"least": int(k.min()), "median": int(k.median()), "most": int(k.max())} for k in kept],
        "time_shares": time_shares(fast, x),
        "peak_memory_mib_native": peak_memory(partial(fast.model, x), x.device),
        "peak_memory_mib_pruned": peak_memory(variants["pruned", "eager"], x.device),
    }
    if rivals is not None:
        row |= _of_rivals(rivals, times, native[1])
    if tome is not None:
        best = _fastest(times, "tome")
        row["tome"], row["tome_gmacs_speedup"] = best[1], native_cost / tome.macs_at(total)
        row["tome_speedup"] = slow / statistics.median(times[best])
        row["speedup_over_tome"] = statistics.median(times[best]) / quick
        row["speedup_over_tome_fused"] = statistics.median(times["tome", "fused"]) / quick
    return row


Name = tuple[str, str]
"""which model, and in which form"""
Variants = dict[Name, Callable[[], Any]]
"""one forward pass each"""
SDPA: tuple[Name, ...] = (("native", "fused"), ("native", "eager, fused"), ("native", "compiled"))
"""the native model as timm runs it"""
UNPRUNED: Name = ("unpruned", "tuned")
"""all tokens on the packed runtime's kernels: the part of a speed-up that is not due to fewer tokens"""
COMPILED = {"fused": "compiled", "unfused": "unfused compiled"}
"""names of native forms under torch.compile"""


def _fastest(times: dict[Name, list[float]], side: str) -> Name:
    return min((name for name in times if name[0] == side), key=lambda name: statistics.median(times[name]))


def _variants(fast: PrunedViT, x: Tensor, plan: Plan, tome: ToMe | None, rivals: Rivals | None) -> Variants:
    """All that is timed; of each model the fastest form counts."""
    unpruned = ToMe(fast.model, (0,) * fast.game.backbone.depth)
    variants: Variants = {("pruned", "eager"): _drawing(fast, fast, x), UNPRUNED: partial(unpruned, x)}
    compiled: Variants = {}
    if rivals is not None:
        variants |= {(_side(rivals, name), name): call for name, call in rivals.calls(x).items()}
    else:
        for name, form in {"fused": fast.model, "unfused": unfused(fast.model)}.items():
            variants["native", name] = partial(form, x)
            if plan.compiled:
                compiled["native", COMPILED[name]] = partial(torch.compile(form), x)
    if tome is not None:
        fused = ToMe(fast.model, tome.merges, padded_attention)
        variants["tome", "fused"] = partial(fused, x)
        variants["tome", "tuned"] = partial(tome, x)  # on the game's own kernels
        if plan.compiled:
            compiled["tome", "compiled"] = partial(torch.compile(fused), x)
    if plan.compiled and len(x) == 1:  # batches are pruned eagerly under torch.compile too
        compiled["pruned", "compiled"] = _drawing(fast, torch.compile(fast), x)
    return variants | _if_it_compiles(compiled)


def _rivals(fast: PrunedViT, x: Tensor, plan: Plan, tick: Callable[[float], Any]) -> Rivals:
    """The rivals of the native model for batches like x."""
    rivals = Rivals(plan.compiled)
    rivals.build(fast.model, x, kind_of(fast.game.backbone), tick)
    return rivals


def _side(rivals: Rivals, name: str) -> str:
    """Of a rival: "native" in the model's own precision, and another one that is never counted as native."""
    precision = rivals.ready[name].precision
    return "native" if precision == rivals.precision else precision


def _of_rivals(rivals: Rivals, times: dict[Name, list[float]], native: str) -> dict[str, Any]:
    """What they add to a row, `native` being the fastest."""
    found = {name: statistics.median(times[_side(rivals, name), name]) for name in rivals.ready}
    return {
        "speedup_over": native,
        "own_kernels_speedup": found[native] / statistics.median(times[UNPRUNED]),
        "rivals": rivals.rows({name: 1e3 * seconds for name, seconds in found.items()}),
    }


def _drawing(fast: PrunedViT, call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Calls with other counts every time, where decisions are synthetic."""
    decisions, numbers = fast.actor, itertools.count()

    def drawn() -> Tensor:
        if isinstance(decisions, SyntheticDecisions):
            decisions.draw(next(numbers))
        return call(x)

    return drawn


def _if_it_compiles(compiled: Variants) -> Variants:
    """Compiling needs a C++ compiler (on CPUs) or Triton; without them only eager models are compared."""
    try:
        for call in compiled.values():
            call()
    except RuntimeError as error:
        warnings.warn(f"nothing is compiled: {first_line(error)}", stacklevel=2)
        return {}
    return compiled


def csv_path(folder: str | Path, name: str, plan: Plan, stages: tuple[int, ...], device: torch.device) -> Path:
    """Where a bench of backbone `name` is written; the file name holds the conditions."""
    lists = {
        "stages": stages,
        "keep": plan.keep,
        "batch": plan.batch_sizes,
        "": [str(dtype).removeprefix("torch.") for dtype in plan.dtypes],
    }
    machine = f"cpu-{torch.get_num_threads()}threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    parts = [name, plan.game.transition, *(f"{key}{'-'.join(map(str, values))}" for key, values in lists.items())]
    marks = {
        "rule": plan.policy == RULE,
        "tome": plan.tome,
        "rivals": plan.rivals,
        "eager": not plan.compiled,
        "pytorch-kernels": device.type == "cpu" and not kernels.available(),
        "keeps-memory": plan.keeps_memory,
        f"neighbours{plan.neighbours}": plan.neighbours > 0,
    }
    parts += [*(mark for mark, holds in marks.items() if holds), machine]
    return Path(folder) / ("_".join(["bench", *parts]).replace(" ", "-").replace("/", "-") + ".csv")
