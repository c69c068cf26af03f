"""Honest timing: native and pruned in one process, interleaved, medians; policy and packing included."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from tokengame.backbone import Backbone
from tokengame.config import ActorConfig, GameConfig
from tokengame.errors import TokenGameError
from tokengame.game import Decide, Observation, TokenGame
from tokengame.macs import native_macs, pruned_macs
from tokengame.networks import build_actor

SPREAD = 0.15
"""standard deviation of an image's share kept, relative to the mean: what learned policies show on ImageNet"""


class ForcedKeep:
    """Runs an actor at its full cost, then keeps forced shares of the tokens, different for every image.

    Args:
        actor: whose logits rank the tokens.
        keep: share of the first tokens alive after each stage, on average over images.
        seed: of the spread over images.
    """

    def __init__(self, actor: Decide, keep: tuple[float, ...], seed: int = 0):
        if any(not 0 < k <= 1 for k in keep) or list(keep) != sorted(keep, reverse=True):
            raise TokenGameError(f"--keep wants shares between 0 and 1 that do not grow, not {list(keep)}")
        self.actor, self.keep, self.seed, self.total = actor, keep, seed, 0

    def __call__(self, obs: Observation) -> Tensor:
        """Logits of the actor, shifted in each image so that exactly the forced number exceeds 0."""
        assert obs.layout is not None
        logits, stage = self.actor(obs), int(obs.stage[0])
        self.total = obs.layout.longest if stage == 0 else self.total
        generator = torch.Generator().manual_seed(self.seed)
        factor = 1 + SPREAD * torch.randn(obs.layout.images, generator=generator).clamp(-2, 2).to(logits.device)
        wanted = (self.keep[stage] * factor * self.total).round().long().clamp(min=1)
        wanted = torch.minimum(wanted, obs.layout.count)
        ranked = obs.layout.pad(logits, float("-inf")).sort(1, descending=True).values
        last_kept = ranked.gather(1, wanted[:, None] - 1).squeeze(1)
        return logits - last_kept[obs.scene] + 1e-6


def bench(
    model: nn.Module,
    name: str,
    *,
    game: GameConfig | None = None,
    keep: tuple[float, ...] = (0.7, 0.49, 0.34),
    batch_sizes: tuple[int, ...] = (1, 8, 32),
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    seconds: float = 10.0,
    seed: int = 0,
    report: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
    """Time native against pruned for each dtype and batch size; rows with the JSON keys of `bench`.

    Args:
        model: supported timm model; speed does not depend on its weights.
        game: stages and transition; `keep` has one share for each stage.
        keep: forced shares of tokens, see `ForcedKeep`.
        seconds: for each row, shared by both models.
        report: called when a row is finished.
    """
    rows = []
    for dtype in dtypes:
        backbone = Backbone(copy.deepcopy(model).to(dtype))
        config = game or GameConfig(stage_count=len(keep))
        played = TokenGame(backbone, config)
        if len(played.stages) != len(keep):
            raise TokenGameError(f"{len(keep)} shares to keep for {len(played.stages)} stages: give one for each")
        shape = {"dim": backbone.dim, "heads": backbone.heads, "agents": backbone.patches, "stages": len(played.stages)}
        actor = build_actor(ActorConfig("context", (32,)), shape).eval().to(backbone.device)
        decide = ForcedKeep(actor, keep, seed)
        size = backbone.model.patch_embed.img_size
        for batch_size in batch_sizes:
            x = torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(seed))
            row = _row(played, decide, x.to(backbone.device, dtype), seconds)
            rows.append(
                {"backbone": name, "dtype": str(dtype).removeprefix("torch."), "transition": config.transition, **row}
            )
            report()
    return rows


@torch.inference_mode()
def _row(game: TokenGame, decide: ForcedKeep, x: Tensor, seconds: float) -> dict[str, Any]:
    native: Callable[[], Any] = lambda: game.backbone.model(x)  # noqa: E731
    pruned: Callable[[], Any] = lambda: game.logits(game.play(x, decide))  # noqa: E731
    state = game.play(x, decide)
    kept = torch.stack(state.kept).cpu()
    macs = pruned_macs(game, decide.actor, kept, state.total)
    times: tuple[list[float], list[float]] = ([], [])
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[0]) < 7:
        for call, measured in zip((native, pruned), times, strict=True):
            start = time.perf_counter()
            call()
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
            measured.append(time.perf_counter() - start)
    slow, fast = (median(t[2:]) for t in times)
    gmacs_speedup = native_macs(game.backbone, state.total) / float(macs.mean())
    low, _, high = quantiles([a / b for a, b in zip(times[0][2:], times[1][2:], strict=True)], n=4)
    return {
        "batch_size": len(x),
        "keep": [round(float(k.float().mean()) / state.total, 4) for k in kept],
        "images_per_second_native": len(x) / slow,
        "images_per_second_pruned": len(x) / fast,
        "speedup": slow / fast,
        "speedup_quartiles": [low, high],
        "gmacs_speedup": gmacs_speedup,
        "efficiency": slow / fast / gmacs_speedup,
        "verdict": "faster" if slow > fast else "slower",
    }
