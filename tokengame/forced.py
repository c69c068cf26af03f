"""Decisions forced to wished shares of tokens, so that speed can be measured on random weights of any model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengame.config import ActorConfig, GameConfig
from tokengame.errors import TokenGameError
from tokengame.networks import Actor, Lines, build_actor
from tokengame.runtime import PrunedViT, by_rule
from tokengame.state import Observation
from tokengame.whole import lines_of

SPREAD = 0.15
"""standard deviation of an image's share kept, relative to the mean: what learned policies show on ImageNet"""


class ForcedKeep(nn.Module):
    """An actor at its full cost whose decisions come out as wished: different shares of tokens for every image.

    `force` plays a batch and finds for each image and stage the logit below which tokens must leave; from then on the
    actor's logits are shifted by it, so that what is timed is what a learned policy does. It does so for several draws
    of counts, as one batch follows another; `draw` says which one is played.

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
        self.tables: list[Tensor] = []
        self.places = torch.empty(0)
        """[B] standard normal: how much more than others an image keeps"""

    def forward(self, obs: Observation) -> Tensor:
        """[A] logits; above 0 for those who stay."""
        logits = self.actor(obs)
        if len(self.table):
            return logits - self.table[obs.stage, self.rows].index_select(0, obs.scene)
        cut = self._cut(obs, logits)
        self.cuts.append(cut)
        return logits - cut[obs.scene]

    @property
    def lines(self) -> Lines | None:
        """Those of the actor, shifted; None while the shifts are being found."""
        ours = lines_of(self.actor)
        return Lines(ours.weights, self.table) if ours is not None and len(self.table) else None

    def force(self, fast: PrunedViT, images: Tensor, draws: int = 1) -> Tensor:
        """Find the shifts for a batch [B, channels, height, width].

        Returns:
            [T, draws * B] agents alive after each stage.
        """
        tables, kept = [], []
        for places in self._draws(draws, len(images)):
            self.cuts, self.table, self.places = [], torch.empty(0), places
            kept.append(torch.stack(fast.play(images).kept).cpu())
            tables.append(torch.stack(self.cuts))
        self.tables, self.rows = tables, torch.arange(len(images), device=images.device)
        self.draw(0)
        return torch.cat(kept, 1)

    def draw(self, number: int) -> None:
        """Play draw `number`, over and over from the first."""
        self.table = self.tables[number % len(self.tables)]

    def _draws(self, draws: int, batch: int) -> list[Tensor]:
        """Places [B] evenly spread within a draw; draws differ in who has which and, as random batches do, in mean."""
        generator = torch.Generator().manual_seed(self.seed)
        within, between = (torch.special.ndtri((torch.arange(n) + 0.5).double() / n) for n in (batch, draws))
        return [within[torch.randperm(batch, generator=generator)] + mean / batch**0.5 for mean in between]

    def _cut(self, obs: Observation, logits: Tensor) -> Tensor:
        """[B] half-way between the last to stay and the first to go."""
        layout, stage = obs.layout, len(self.cuts)
        assert layout is not None
        self.total = layout.longest if stage == 0 else self.total
        share = self.keep[stage]
        spread = min(SPREAD, (1 / share - 1) / 2)  # nobody can keep more than all
        wanted = (share * self.total * (1 + spread * self.places.clamp(-2, 2))).round().long().clamp(min=1)
        wanted = torch.minimum(wanted.to(logits.device), layout.count)[:, None]
        ranked = layout.pad(logits.float(), float("-inf")).sort(1, descending=True).values
        ranked = F.pad(ranked, (0, 1), value=float("-inf"))
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
    fast = by_rule(model, game, nn.Identity())
    backbone, stages = fast.game.backbone, len(fast.game.stages)
    if stages != len(keep):
        raise TokenGameError(f"{len(keep)} shares to keep for {stages} stages: give one for each")
    shape: dict[str, Any] = {"dim": backbone.dim, "heads": backbone.heads, "agents": backbone.patches, "stages": stages}
    shape["transition"] = game.transition
    actor = build_actor(ActorConfig("context", (32,)), shape).eval().to(backbone.device)
    fast.actor = ForcedKeep(actor, keep, seed)  # type: ignore[assignment]
    return fast
