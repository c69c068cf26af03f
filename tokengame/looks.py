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

from tokengame import whole
from tokengame.game import TokenGame
from tokengame.state import Decide
from tokengame.whole import Whole


@dataclass(frozen=True)
class Played:
    """A batch of B images at the end of their games."""

    prediction: Tensor
    """[B, classes]"""
    first: tuple[Tensor, ...]
    """[B] agents alive after each decision of the games"""
    alive: Tensor
    """[B, N] bool: the agents at the end, at the last look"""
    again: Tensor
    """[b] images that were looked at twice"""

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """[B] agents alive after each decision, at the last look; who is looked at twice has them all"""
        return tuple(kept.index_fill(0, self.again, self.total) for kept in self.first)

    @property
    def total(self) -> int:
        """Agents of each image at the start."""
        return self.alive.shape[1]


def play(game: TokenGame, images: Tensor, decide: Decide, threshold: float) -> Played:
    """Whole games on [B, channels, height, width], deterministic; see `TokenGame.play`."""
    margin = margin_at(game, threshold)
    settings = game, images, decide, threshold, margin > 0
    over = whole.play(*settings) or _step_by_step(*settings)
    again = in_doubt(over.prediction, margin) if margin else over.alive.new_zeros(0, dtype=torch.long)
    if not len(again):
        return Played(over.prediction, over.kept, over.alive, again)
    assert over.opening is not None
    native = game.spared(over.opening.index_select(0, again))
    prediction, alive = over.prediction.index_copy(0, again, native), over.alive.index_fill(0, again, True)
    return Played(prediction, over.kept, alive, again)


def _step_by_step(game: TokenGame, images: Tensor, decide: Decide, threshold: float, opening: bool) -> Whole:
    state, logits = game.turn(game.begin(images), decide)
    tokens = state.x.unflatten(0, (len(images), -1)) if opening else None
    state = game.play_on(state, logits, decide, threshold)
    return Whole(game.logits(state), state.kept, state.alive, tokens)


def margin_at(game: TokenGame, threshold: float) -> float:
    """How close a call must be to be looked at again: 2 (1 - dial) times what is configured, so that the dial's hard
    end, where most calls would be close, is not all second looks. Nobody without anything pruned, or a classifier."""
    doubts = math.isfinite(threshold) and game.backbone.model.num_classes > 1
    return 2 * game.config.second_look / (1 + math.exp(threshold)) if doubts else 0.0


def in_doubt(prediction: Tensor, margin: float) -> Tensor:
    """[b] indices of the images whose two likeliest classes are less than `margin` apart in probability."""
    likeliest = prediction.detach().float().softmax(1).topk(2, 1).values
    return (likeliest[:, 0] - likeliest[:, 1] < margin).nonzero().squeeze(1)
