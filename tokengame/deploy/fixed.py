"""The game with the same number of tokens in every image, so that all sizes of a graph are known before it runs."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokengame.backends import Backend
from tokengame.config import ActorConfig, with_overrides
from tokengame.deploy.backend import PaddedBackend, attention, by_image
from tokengame.deploy.game import PaddedGame
from tokengame.errors import TokenGameError
from tokengame.files import Progress, silent
from tokengame.game.state import Decide, State
from tokengame.packed.heads import CachedKeysValues
from tokengame.packed.layout import RaggedLayout
from tokengame.policies import Policy
from tokengame.policies.networks import BudgetActor, ContextActor, build_actor
from tokengame.policies.policy import card_shape
from tokengame.runtime import PrunedViT

OWN_CHOICE = 0.5
"""the dial at which budgets are kept"""
BATCH = 32
"""images that are counted at once"""


class FixedBackend(PaddedBackend):
    """One product for queries, keys and values, which engines fuse with attention where all sizes are known."""

    def _attention(
        self, block: int, normed: Tensor, layout: RaggedLayout, bias: Tensor | None, cached: CachedKeysValues | None
    ) -> tuple[Tensor, Tensor | None]:
        if cached is not None:
            return super()._attention(block, normed, layout, bias, cached)
        qkv = self.backbone.project(block, normed, layout, 0, 3)  # [M, 3, H, D]
        query, key, value = by_image(qkv, layout).permute(2, 0, 3, 1, 4).unbind(0)
        keys = None if bias is None else by_image(bias, layout)
        return attention(query, key.transpose(2, 3), value, keys, None).flatten(2).flatten(0, 1), qkv


class FixedGame(PaddedGame):
    """A game whose images keep as many tokens after each decision as the policy's budgets say; nothing is padding.

    Args:
        backbone, config, grid: as in `PaddedGame`.
        shares: of an image's tokens that stay at each stage, of those before it.
    """

    def __init__(self, backbone: Any, config: Any, grid: tuple[int, int], shares: tuple[float, ...]):
        super().__init__(backbone, config, True, grid)
        self.numbers_kept, number = [], grid[0] * grid[1]
        for share in shares:
            number = max(1, round(number * share))
            self.numbers_kept.append(number)

    def backend_for(self, _images: Tensor) -> Backend:
        return FixedBackend(self.backbone, self.attention, self.most)

    @torch.no_grad()
    def decisions(self, state: State, decide: Decide, threshold: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """[A] keep logits, and whether each is among the best of its image; of equals the first stay."""
        logits = decide(self.observe(state))
        return logits, best(by_image(logits, state.agents), self.numbers_kept[state.stage]).flatten()

    def _stays(self, state: State, keep: Tensor, logits: Tensor) -> Tensor:  # noqa: ARG002
        stays = by_image(keep, state.agents).float()
        return torch.cat([stays.new_ones(state.layout.images, state.prefix), stays], 1)

    def _left(self, state: State, stays: Tensor) -> tuple[Tensor, Any, bool]:
        longest = state.prefix + self.numbers_kept[state.stage]
        return torch.full((state.layout.images,), longest, device=stays.device), longest, False


def best(logits: Tensor, number: int) -> Tensor:
    """[B, N] bool: which logits are among the greatest `number` of their image; of equals the first are."""
    here, other = logits[:, :, None], logits[:, None]
    first = torch.ones(logits.shape[1], logits.shape[1], device=logits.device).tril(-1)  # 1 where j comes before i
    ahead = (other > here).float() + (other == here).float() * first
    return ahead.sum(2) < number


def with_fixed_counts(fast: PrunedViT, images: Tensor, progress: Progress = silent) -> PrunedViT:
    """A pruned model each of whose images keeps as many tokens as the mean of some images does at its dial.

    Args:
        fast: whose policy decides which tokens these are.
        images: [B, channels, height, width].
        progress: shows the batches.

    Raises:
        TokenGameError: the policy is not linear in what it observes.
    """
    if not isinstance(fast.actor, ContextActor):
        raise TokenGameError(
            f"{type(fast.actor).__name__} has no fixed counts: take a policy that was trained with --actor.observation "
            "context, or leave out the fixed counts"
        )
    batches = images.split(BATCH)
    with torch.no_grad():
        outputs = [fast.predict(batch) for batch in progress(batches, "counting tokens", len(batches))]
    kept = torch.cat([torch.stack(output.kept, 1) for output in outputs]).double().mean(0)  # [T]
    counts = [outputs[0].total, *(max(1, round(float(count))) for count in kept)]
    shares = [after / before for before, after in pairwise(counts)]
    card = copy.deepcopy(fast.card) | {"calibration": [], "dial": OWN_CHOICE}
    card["actor"] = card["actor"] | {"shares": shares, "keep": None}
    actor = build_actor(with_overrides(ActorConfig(), card["actor"]), card_shape(card))
    assert isinstance(actor, BudgetActor)
    actor.load_state_dict(fast.actor.state_dict())
    return PrunedViT(fast.model, Policy(actor.eval(), card), OWN_CHOICE)
