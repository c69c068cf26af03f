"""Which tokens are kept by a rule instead of by learning, in the same game and on the same runtime as a policy."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokengame.backbones import wrap
from tokengame.baselines.reducer import KEEP, Baseline
from tokengame.config import GameConfig
from tokengame.game import Observation
from tokengame.packed.layout import RaggedLayout
from tokengame.runtime import PrunedOutput, PrunedViT, prune_by
from tokengame.runtime.method import Method

Score = Callable[[Observation], Tensor]
"""observation -> [A]; the highest of an image are kept"""


def attention(obs: Observation) -> Tensor:
    """[A] how much the class token attends to each agent."""
    return obs.attention


class Random:
    """Uniform scores: the baseline that every method must beat."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, obs: Observation) -> Tensor:
        """[A] uniform numbers."""
        return torch.rand(len(obs.agent), generator=self.generator).to(obs.agent.device)


def keep_best(score: Tensor, number: Tensor, layout: RaggedLayout) -> Tensor:
    """[A] +1 for the `number` [B] best-scored agents of each image, -1 for the others."""
    ranked = layout.pad(score.float(), float("-inf")).argsort(1, descending=True)
    numbers = torch.arange(layout.longest, device=score.device).expand_as(ranked)
    rank = torch.empty_like(ranked).scatter_(1, ranked, numbers)
    return torch.where(layout.unpad(rank < number[:, None]), 1.0, -1.0)


def keep_all(obs: Observation) -> Tensor:
    """[A] keep logits that prune no token."""
    return torch.ones(len(obs.agent), device=obs.agent.device)


class KeepBest(nn.Module):
    """Keeps a share `shares[t]` of the first tokens at stage t, the same number in every image.

    Args:
        score: which tokens are best.
        shares: of the tokens at the start, one a stage.
    """

    def __init__(self, score: Score, shares: tuple[float, ...]):
        super().__init__()
        self.score, self.shares = score, shares

    def forward(self, obs: Observation) -> Tensor:
        """[A] keep logits."""
        layout, share = obs.layout, self.shares[int(obs.stage[0])]
        assert layout is not None
        number = torch.minimum(torch.full_like(layout.count, math.ceil(share * obs.total)), layout.count)
        return keep_best(self.score(obs), number, layout)


class AtBudgets(nn.Module):
    """Keeps the best by a score, as many in each image and at each stage as another model: *which* without *how many*.

    Args:
        fast: whose numbers are taken, without a cascade; it runs every batch first, so this is for quality, never for
            timing.
        score: which tokens are best.
    """

    def __init__(self, fast: PrunedViT, score: Score):
        super().__init__()
        self.fast, self.score = fast, score
        self.ruled = prune_by(fast.model, fast.game.config, self._decide)
        self.kept: tuple[Tensor, ...] = ()

    def _decide(self, obs: Observation) -> Tensor:
        assert obs.layout is not None
        return keep_best(self.score(obs), self.kept[int(obs.stage[0])], obs.layout)

    def predict(self, images: Tensor) -> PrunedOutput:
        """The rule's prediction for [B, channels, height, width] images, at the other model's numbers."""
        self.kept = self.fast.predict(images).kept
        return self.ruled.predict(images)

    def macs(self, output: PrunedOutput) -> tuple[float, Tensor]:
        """As `PrunedViT.macs`; the rule itself costs nothing."""
        return self.ruled.macs(output)


def _by_score(
    score: Callable[[], Score], transition: str, features: bool = True
) -> Callable[[nn.Module], list[tuple[str, Method]]]:
    """Settings of a rule that keeps fixed shares of the tokens best by `score`, at evenly spaced blocks."""

    def settings(model: nn.Module) -> list[tuple[str, Method]]:
        # by default merge decides a block earlier than drop; here both have drop's blocks, to be comparable
        stages = GameConfig(stage_count=3).blocks(wrap(model).depth)
        game = GameConfig(stages=stages, transition=transition)  # type: ignore[arg-type]
        ways = {keep: KeepBest(score(), (keep, keep**2, keep**3)) for keep in KEEP}
        return [(f"keep {keep:g}", prune_by(model, game, way, features)) for keep, way in ways.items()]

    return settings


def _all_tokens(model: nn.Module) -> list[tuple[str, Method]]:
    return [("", prune_by(model, GameConfig(stage_count=3), keep_all, features=False))]


BASELINES = (
    Baseline("all tokens, exact exit", _all_tokens, published=False),
    Baseline("random, drop", _by_score(Random, "drop", features=False), published=False),
    Baseline("attention, drop", _by_score(lambda: attention, "drop"), published=False),
    Baseline("attention, merge", _by_score(lambda: attention, "merge"), published=False),
)
