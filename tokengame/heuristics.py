"""Who stays by a rule instead of by learning, in the same game and on the same runtime as a policy."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokengame.looks import Played
from tokengame.ops import Layout
from tokengame.runtime import PrunedViT, by_rule
from tokengame.state import Observation

Score = Callable[[Observation], Tensor]
"""observation -> [A]; the highest of an image stay"""


def attention(obs: Observation) -> Tensor:
    """[A] how much the class token attends to each agent."""
    return obs.attention


class Random:
    """Scores that nothing is behind: the baseline every method has to beat."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, obs: Observation) -> Tensor:
        """[A] uniform numbers"""
        return torch.rand(len(obs.agent), generator=self.generator).to(obs.agent.device)


def keep_best(score: Tensor, number: Tensor, layout: Layout) -> Tensor:
    """[A] +1 for the `number` [B] best-scored agents of each image, -1 for the others."""
    ranked = layout.pad(score.float(), float("-inf")).argsort(1, descending=True)
    place = torch.empty_like(ranked).scatter_(
        1, ranked, torch.arange(layout.longest, device=score.device).expand_as(ranked)
    )
    return torch.where(layout.unpad(place < number[:, None]), 1.0, -1.0)


class KeepBest(nn.Module):
    """At stage t a share `shares[t]` of the first tokens stays, the same number in every image: an actor by rule.

    Args:
        score: who is best.
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
    """The best by a score, as many in each image and at each stage as another model kept: `which` without `how many`.

    Args:
        fast: whose numbers are taken, of a game without second looks; it plays every batch first, so that this is for
            quality, never for timing.
        score: who is best.
    """

    def __init__(self, fast: PrunedViT, score: Score):
        super().__init__()
        self.fast, self.score = fast, score
        self.ruled = by_rule(fast.model, fast.game.config, self._decide)
        self.kept: tuple[Tensor, ...] = ()

    def _decide(self, obs: Observation) -> Tensor:
        assert obs.layout is not None
        return keep_best(self.score(obs), self.kept[int(obs.stage[0])], obs.layout)

    def play(self, images: Tensor) -> Played:
        """Both games on [B, channels, height, width]; what is played is this one's."""
        self.kept = self.fast.play(images).kept
        return self.ruled.play(images)

    def logits(self, played: Played) -> Tensor:
        """[B, classes]"""
        return self.ruled.logits(played)

    def macs(self, played: Played) -> tuple[float, Tensor]:
        """As `PrunedViT.macs`, the rule being free."""
        return self.ruled.macs(played)
