"""Synthetic decisions that keep given shares of tokens, so that speed can be measured on random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengame.config import ActorConfig, GameConfig
from tokengame.errors import TokenGameError
from tokengame.game import Observation
from tokengame.policies.networks import Actor, Decision, actor_shape, build_actor, decision_of
from tokengame.ranges import require
from tokengame.runtime import PrunedViT, prune_by

SPREAD = 0.15
"""standard deviation of an image's share kept, relative to the mean: what learned policies show on ImageNet"""


class SyntheticDecisions(nn.Module):
    """An actor at its full cost whose decisions keep given shares of tokens, different ones in every image.

    `fit` plays a batch and finds for each image and stage the logit at which tokens must be pruned. From then on the
    actor's logits are shifted by it, so that what is timed is what a learned policy does. It does so for several draws
    of counts, as one batch follows another; `draw` selects one.

    Args:
        actor: whose logits rank the tokens.
        keep: share of the first tokens left after each stage, on average over images.
        seed: of the images' deviations from that average.
    """

    def __init__(self, actor: Actor, keep: tuple[float, ...], seed: int = 0):
        super().__init__()
        require_shares(keep, len(keep))
        self.actor, self.keep, self.seed, self.total = actor, keep, seed, 0
        self.found: list[Tensor] = []
        self.rows, self.table = torch.empty(0), torch.empty(0)
        self.tables: list[Tensor] = []
        self.deviation = torch.empty(0)
        """[B] standard normal: how much more than others an image keeps"""

    def forward(self, obs: Observation) -> Tensor:
        """[A] logits; above 0 for kept tokens."""
        logits = self.actor(obs)
        if len(self.table):
            return self._shifted(obs, logits, self.rows)
        shift = self._shift(obs, logits)
        self.found.append(shift)
        return logits - shift[obs.image]

    def _shifted(self, obs: Observation, logits: Tensor, rows: Tensor) -> Tensor:
        return logits - self.table[obs.stage, rows].index_select(0, obs.image)

    def of_images(self, first: int, last: int) -> Callable[[Observation], Tensor] | None:
        """The decisions on images first .. last - 1 of the batch; None while `fit` runs."""
        if not len(self.table):
            return None
        return lambda obs: self._shifted(obs, self.actor(obs), self.rows[first:last])

    @property
    def decision(self) -> Decision | None:
        """The actor's decision with the shifts of each image that `fit` found; None while it runs."""
        decision = decision_of(self.actor)
        return decision._replace(shift=self.table) if decision is not None and len(self.table) else None

    def fit(self, fast: PrunedViT, images: Tensor, draws: int = 1) -> Tensor:
        """Find the shifts for a batch [B, channels, height, width].

        Returns:
            [T, draws * B] agents left after each stage.
        """
        tables, kept = [], []
        for deviation in self._draws(draws, len(images)):
            self.found, self.table, self.deviation = [], torch.empty(0), deviation
            kept.append(torch.stack(fast.predict(images).kept).cpu())
            tables.append(torch.stack(self.found))
        self.tables, self.rows = tables, torch.arange(len(images), device=images.device)
        self.draw(0)
        return torch.cat(kept, 1)

    def draw(self, number: int) -> None:
        """Play draw `number`, over and over from the first."""
        self.table = self.tables[number % len(self.tables)]

    def _draws(self, draws: int, batch: int) -> list[Tensor]:
        """Deviations [B], evenly spread within a draw; draws differ in order and, as random batches do, in mean."""
        generator = torch.Generator().manual_seed(self.seed)
        within, between = (torch.special.ndtri((torch.arange(n) + 0.5).double() / n) for n in (batch, draws))
        return [within[torch.randperm(batch, generator=generator)] + mean / batch**0.5 for mean in between]

    def _shift(self, obs: Observation, logits: Tensor) -> Tensor:
        """[B] half-way between the lowest logit kept and the highest one pruned."""
        layout, stage = obs.layout, len(self.found)
        assert layout is not None
        self.total = layout.longest if stage == 0 else self.total
        share = self.keep[stage]
        spread = min(SPREAD, (1 / share - 1) / 2)  # an image cannot keep more than all
        wanted = (share * self.total * (1 + spread * self.deviation.clamp(-2, 2))).round().long().clamp(min=1)
        wanted = torch.minimum(wanted.to(logits.device), layout.count)[:, None]
        ranked = layout.pad(logits.float(), float("-inf")).sort(1, descending=True).values
        ranked = F.pad(ranked, (0, 1), value=float("-inf"))
        last, first = ranked.gather(1, wanted - 1).squeeze(1), ranked.gather(1, wanted).squeeze(1)
        return torch.where(first.isfinite(), (last + first) / 2, last - 1)

    def macs_per_agent(self) -> int:
        """Those of the actor."""
        return self.actor.macs_per_agent()


def require_shares(keep: Sequence[float], stages: int) -> None:
    """Raise TokenGameError unless there is a share to keep for each stage, and none is greater than those before it."""
    if len(keep) != stages:
        raise TokenGameError(f"{len(keep)} shares to keep for {stages} stages: give one for each")
    if any(not 0 < k <= 1 for k in keep) or list(keep) != sorted(keep, reverse=True):
        raise TokenGameError(f"--keep wants shares between 0 and 1 that do not grow, not {list(keep)}")


def synthetic_model(model: nn.Module, game: GameConfig, keep: tuple[float, ...], seed: int = 0) -> PrunedViT:
    """`model` under an untrained policy whose decisions keep the shares `keep`; speed does not depend on weights.

    Raises:
        TokenGameError: not one share for each stage; or tokens are dropped before any attention ranks them.
    """
    fast = prune_by(model, game, nn.Identity())
    blind = not fast.game.merge and fast.game.stages[0] == 0
    require(not blind, "tokens cannot be ranked before the first block: give --stages from 1 on, or --transition merge")
    backbone, stages = fast.game.backbone, len(fast.game.stages)
    require_shares(keep, stages)
    actor = build_actor(ActorConfig("context", (32,)), actor_shape(backbone, game)).eval().to(backbone.device)
    fast.actor = SyntheticDecisions(actor, keep, seed)  # type: ignore[assignment]
    return fast
