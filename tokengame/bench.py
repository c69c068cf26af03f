"""Honest timing: the fastest native model against the pruned one, interleaved in one process, policy included."""

from __future__ import annotations

import copy
import csv
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokengame.anatomy import peak_memory, time_shares
from tokengame.attention import padded_attention
from tokengame.baselines import ToMe, tome_at
from tokengame.config import ActorConfig, GameConfig
from tokengame.errors import TokenGameError, first_line
from tokengame.macs import native_macs, pruned_macs
from tokengame.networks import Actor, build_actor
from tokengame.policy import Policy
from tokengame.runtime import PrunedViT
from tokengame.state import Observation

SPREAD = 0.15
"""standard deviation of an image's share kept, relative to the mean: what learned policies show on ImageNet"""
WARM_UP = 2
"""rounds thrown away"""


class ForcedKeep(nn.Module):
    """An actor at its full cost whose decisions come out as wished: different shares of tokens for every image.

    `force` plays one batch and finds for each image and stage the logit below which tokens must leave; from then on the
    actor's logits are shifted by it, so that what is timed is what a learned policy does.

    Args:
        actor: whose logits rank the tokens.
        keep: share of the first tokens alive after each stage, on average over images.
        seed: of which image gets which place in the spread.
    """

    def __init__(self, actor: Actor, keep: tuple[float, ...], seed: int = 0):
        super().__init__()
        if any(not 0 < k <= 1 for k in keep) or list(keep) != sorted(keep, reverse=True):
            raise TokenGameError(f"--keep wants shares between 0 and 1 that do not grow, not {list(keep)}")
        self.actor, self.keep, self.seed, self.total = actor, keep, seed, 0
        self.cuts: list[Tensor] = []
        self.rows, self.table = torch.empty(0), torch.empty(0)

    def forward(self, obs: Observation) -> Tensor:
        """[A] logits; above 0 for those who stay."""
        logits = self.actor(obs)
        if len(self.table):
            return logits - self.table[obs.stage, self.rows].index_select(0, obs.scene)
        cut = self._cut(obs, logits)
        self.cuts.append(cut)
        return logits - cut[obs.scene]

    def force(self, fast: PrunedViT, images: Tensor) -> None:
        """Find the shifts for a batch [B, channels, height, width]."""
        self.cuts, self.table = [], torch.empty(0)
        fast.play(images)
        self.table, self.rows = torch.stack(self.cuts), torch.arange(len(images), device=images.device)

    def _cut(self, obs: Observation, logits: Tensor) -> Tensor:
        """[B] half-way between the last to stay and the first to go."""
        layout, stage = obs.layout, len(self.cuts)
        assert layout is not None
        self.total = layout.longest if stage == 0 else self.total
        middle = (torch.arange(layout.images, dtype=torch.double) + 0.5) / layout.images
        places = torch.special.ndtri(middle)[
            torch.randperm(layout.images, generator=torch.Generator().manual_seed(self.seed))
        ]
        share = self.keep[stage]
        spread = min(SPREAD, (1 / share - 1) / 2)  # nobody can keep more than all
        wanted = (share * self.total * (1 + spread * places.clamp(-2, 2))).round().long().clamp(min=1)
        wanted = torch.minimum(wanted.to(logits.device), layout.count)[:, None]
        ranked = layout.pad(logits.float(), float("-inf")).sort(1, descending=True).values
        ranked = torch.nn.functional.pad(ranked, (0, 1), value=float("-inf"))
        last, first = ranked.gather(1, wanted - 1).squeeze(1), ranked.gather(1, wanted).squeeze(1)
        return torch.where(first.isfinite(), (last + first) / 2, last - 1)

    def macs_per_agent(self) -> int:
        """Those of the actor."""
        return self.actor.macs_per_agent()


def forced_model(model: nn.Module, game: GameConfig, keep: tuple[float, ...], seed: int = 0) -> PrunedViT:
    """`model` under an untrained policy whose decisions are forced to `keep`; speed does not depend on weights.

    Raises:
        TokenGameError: not one share for each stage.
    """
    fast = PrunedViT(model, Policy(nn.Identity(), _blank_card(game)), dial=0.5)  # type: ignore[arg-type]
    backbone, stages = fast.game.backbone, len(fast.game.stages)
    if stages != len(keep):
        raise TokenGameError(f"{len(keep)} shares to keep for {stages} stages: give one for each")
    shape = {"dim": backbone.dim, "heads": backbone.heads, "agents": backbone.patches, "stages": stages}
    actor = build_actor(ActorConfig("context", (32,)), shape).eval().to(backbone.device)
    fast.actor = ForcedKeep(actor, keep, seed)  # type: ignore[assignment]
    return fast


def _blank_card(game: GameConfig) -> dict[str, Any]:
    return {"game": asdict(game), "actor": {"observation": "context"}}


@dataclass(frozen=True)
class Plan:
    """What is to be timed. `keep`: forced shares, see `ForcedKeep`; `seconds` for each row, shared by all variants."""

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


def bench(
    model: nn.Module, name: str, plan: Plan, report: Callable[[str], Any] = lambda _: None
) -> list[dict[str, Any]]:
    """Time native against pruned; one row with the JSON keys of `bench` for each number format and batch size.

    Args:
        model: supported timm model.
        name: for the rows.
        plan: what to time.
        report: told what comes next.

    Raises:
        TokenGameError: model not supported, shares do not fit the stages.
    """
    rows = []
    for dtype in plan.dtypes:
        for batch_size in plan.batch_sizes:
            report(f"{str(dtype).removeprefix('torch.')}, batch {batch_size}")
            fast = forced_model(copy.deepcopy(model).to(dtype), plan.game, plan.keep, plan.seed)
            conditions = {
                "backbone": name,
                "dtype": str(dtype).removeprefix("torch."),
                "transition": plan.game.transition,
                "stages": list(fast.game.stages),
                "device": fast.game.backbone.device.type,
                "threads": torch.get_num_threads(),
            }
            rows.append(conditions | _row(fast, batch_size, plan))
    return rows


@torch.inference_mode()
def _row(fast: PrunedViT, batch_size: int, plan: Plan) -> dict[str, Any]:
    backbone = fast.game.backbone
    generator = torch.Generator().manual_seed(plan.seed)
    x = torch.randn(batch_size, 3, *backbone.model.patch_embed.img_size, generator=generator)
    x = x.to(backbone.device, backbone.dtype)
    forced: Any = fast.actor
    forced.force(fast, x)
    state = fast.play(x)
    kept = torch.stack(state.kept).cpu()
    macs = float(pruned_macs(fast.game, forced, kept, state.total).mean())
    native = native_macs(backbone, state.total)
    variants = _variants(fast, x, plan, macs, state.total)
    _drop_what_cannot_compile(variants)
    times = interleave(variants, x.device, plan.seconds)
    best = {side: min((n for n in times if n[0] == side), key=lambda n: statistics.median(times[n])) for side in
            {n[0] for n in times}}  # fmt: skip
    slow, quick = times[best["native"]], times[best["pruned"]]
    speedup, gmacs_speedup = statistics.median(slow) / statistics.median(quick), native / macs
    low, _, high = statistics.quantiles([a / b for a, b in zip(slow, quick, strict=True)], n=4)
    row = {
        "batch_size": batch_size,
        "keep": [round(float(k.float().mean()) / state.total, 4) for k in kept],
        "images_per_second_native": batch_size / statistics.median(slow),
        "images_per_second_pruned": batch_size / statistics.median(quick),
        "speedup": speedup,
        "speedup_quartiles": [low, high],
        "gmacs_native": native / 1e9,
        "gmacs_speedup": gmacs_speedup,
        "efficiency": speedup / gmacs_speedup,
        "verdict": "faster" if speedup > 1 else "slower",
        "native": best["native"][1],
        "pruned": best["pruned"][1],
        "rounds": len(slow),
        "milliseconds": {" ".join(n): statistics.median(t) * 1e3 for n, t in times.items()},
        "tokens_kept": [{"least": int(k.min()), "median": int(k.median()), "most": int(k.max())} for k in kept],
        "time_shares": time_shares(fast, x),
        "peak_memory_mib_native": peak_memory(variants["native", "fused"], x.device),
        "peak_memory_mib_pruned": peak_memory(variants["pruned", "eager"], x.device),
    }
    if plan.tome:
        other = times[best["tome"]]
        row["tome"] = best["tome"][1]
        row["tome_gmacs_speedup"] = native / tome_at(backbone.model, macs, state.total).macs(state.total)
        row["tome_speedup"] = statistics.median(slow) / statistics.median(other)
        row["speedup_over_tome"] = statistics.median(other) / statistics.median(quick)
        row["speedup_over_tome_fused"] = statistics.median(times["tome", "fused"]) / statistics.median(quick)
    return row


Variants = dict[tuple[str, str], Callable[[], Any]]
"""(whose, how) -> one forward pass"""


def _variants(fast: PrunedViT, x: Tensor, plan: Plan, macs: float, total: int) -> Variants:
    """All that is timed, warmed up; of each side the fastest will count."""
    model = fast.model
    unfused: Any = copy.deepcopy(model)
    for block in unfused.blocks:
        block.attn.fused_attn = False  # two products and a softmax: on some processors faster than the fused kernel
    variants: Variants = {
        ("native", "fused"): partial(model, x),
        ("native", "unfused"): partial(unfused, x),
        ("pruned", "eager"): partial(fast, x),
    }
    tome: ToMe | None = None
    if plan.tome:
        tuned = tome_at(model, macs, total)
        tome = ToMe(model, tuned.merges, padded_attention)
        variants["tome", "fused"] = partial(tome, x)
        variants["tome", "tuned"] = partial(tuned, x)  # on the game's own kernels
    if plan.compiled:
        torch.compiler.reset()
        sides: dict[str, nn.Module] = {"native": model, "pruned": fast} | ({"tome": tome} if tome else {})
        for side, module in sides.items():
            variants[side, "compiled"] = partial(torch.compile(module), x)
    return variants


def _drop_what_cannot_compile(variants: Variants) -> None:
    """Compiling needs a C++ compiler (on CPUs) or Triton; without, the eager models are compared."""
    for name in [name for name in variants if name[1] == "compiled"]:
        try:
            variants[name]()
        except RuntimeError as error:
            warnings.warn(f"{name[0]} model left uncompiled: {first_line(error)}", stacklevel=2)
            del variants[name]


def interleave(variants: Variants, device: torch.device, seconds: float) -> dict[tuple[str, str], list[float]]:
    """Seconds of each call, taken in turn round after round, so that all suffer the same disturbances."""
    times: dict[tuple[str, str], list[float]] = {name: [] for name in variants}
    rounds, stop = -WARM_UP, 0.0
    while rounds < 5 or time.perf_counter() < stop:
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if rounds >= 0:
                times[name].append(time.perf_counter() - start)
        rounds += 1
        stop = time.perf_counter() + seconds if rounds == 0 else stop
    return times


def write_csv(rows: list[dict[str, Any]], folder: str | Path, keep: tuple[float, ...]) -> Path:
    """Write rows of one backbone to a file whose name holds the conditions; lists and dicts in a cell of their own."""
    first = rows[0]
    stages = "-".join(map(str, first["stages"]))
    machine = f"{first['device']}-{first['threads']}threads" if first["device"] == "cpu" else first["device"]
    name = (
        f"bench_{first['backbone']}_{first['transition']}_stages{stages}_keep{'-'.join(map(str, keep))}_{machine}.csv"
    )
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(first), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path
