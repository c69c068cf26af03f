"""A second look: an image whose prediction is in doubt is run on from its first decision with all of its tokens.

Where pruning changes a prediction, the pruned prediction was mostly a close call, and that can be seen in it. Nothing
that is known before the last blocks tells so much, and a second game that prunes gently is no match for all tokens
(docs/LOG.md). What comes before the first decision is not repeated. A cascade within one network, as Wang et al. 2021
(Dynamic Transformer) have it of several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokengame.game import TokenGame
from tokengame.state import Decide, State


@dataclass(frozen=True)
class Played:
    """A batch of B images at the end of their games."""

    once: State
    """of each image at the end of its game"""
    prediction: Tensor
    """[B, classes]"""
    again: Tensor
    """[b] images that were looked at twice"""
    whole: State | None = None
    """of those, with all agents"""

    @property
    def state(self) -> State:
        """Of each image at the end; who was looked at twice has all agents."""
        return self.once if self.whole is None else self.once.replaced(self.again, self.whole)

    @property
    def first(self) -> tuple[Tensor, ...]:
        """[B] agents alive after each decision of the games"""
        return self.once.kept

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """[B] agents alive after each decision, at the last look"""
        if self.whole is None:
            return self.once.kept
        both = zip(self.once.kept, self.whole.kept, strict=True)
        return tuple(first.index_copy(0, self.again, last) for first, last in both)

    @property
    def total(self) -> int:
        """Agents of each image at the start."""
        return self.once.total


def play(game: TokenGame, images: Tensor, decide: Decide, threshold: float) -> Played:
    """Whole games on [B, channels, height, width], deterministic; see `TokenGame.play`."""
    margin = margin_at(game, threshold)
    if not margin:  # and nothing of the beginning needs to be remembered
        state = game.play(images, decide, threshold)
        nobody = torch.zeros(0, dtype=torch.long, device=state.x.device)
        return Played(state, game.logits(state), nobody)
    opening, logits = game.turn(game.begin(images), decide)
    state = game.play_on(opening, logits, decide, threshold)
    prediction = game.logits(state)
    again = in_doubt(prediction, margin)
    if not len(again):
        return Played(state, prediction, again)
    whole = game.spare(opening, again)
    native = game.backbone.predict(game.end, whole.x, whole.layout, whole.size)
    return Played(state, prediction.index_copy(0, again, native), again, whole)


def margin_at(game: TokenGame, threshold: float) -> float:
    """How close a call must be to be looked at again: 2 (1 - dial) times what is configured, so that the dial's hard
    end, where most calls would be close, is not all second looks. Nobody without anything pruned, or a classifier."""
    doubts = math.isfinite(threshold) and game.backbone.model.num_classes > 1
    return 2 * game.config.second_look / (1 + math.exp(threshold)) if doubts else 0.0


def in_doubt(prediction: Tensor, margin: float) -> Tensor:
    """[b] indices of the images whose two likeliest classes are less than `margin` apart in probability."""
    likeliest = prediction.detach().float().softmax(1).topk(2, 1).values
    return (likeliest[:, 0] - likeliest[:, 1] < margin).nonzero().squeeze(1)
