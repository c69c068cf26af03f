"""Fused forward: a whole game in one call of the compiled kernels (csrc/game.h), from pixels to logits.

It does what `cascade.step_by_step` does, with the same kernels, for a game under a linear policy. A thread plays
a few images to their end while they are in its cache; threads do not wait for each other at decisions, and nothing
returns to Python in between.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokengame.backends import Backend
from tokengame.backends.base import FusedRequest
from tokengame.game import Decide, TokenGame
from tokengame.game.state import ordered_dither
from tokengame.kernels.functions import FusedOutput
from tokengame.packed.heads import EXTRA_FEATURES
from tokengame.policies.networks import linear_decision


def forward(
    game: TokenGame, backend: Backend, images: Tensor, decide: Decide, threshold: float, tokens_before: bool
) -> FusedOutput | None:
    """Play whole games in one call; None where they must be played step by step.

    Args:
        game: what is played.
        backend: that would play it.
        images: [B, channels, height, width].
        decide, threshold: the policy.
        tokens_before: whether tokens before the first decision are wanted.
    """
    linear = linear_decision(decide) if fits(game) else None
    columns = game.backbone.heads + len(EXTRA_FEATURES) + 1
    if linear is None or linear.weights.shape != (len(game.stages), columns):
        return None
    grid = game.backbone.grid(*images.shape[2:])
    request = FusedRequest((), game.merge, game.end, linear.weights, linear.weights, None, ordered_dither(*grid), False)
    if threshold == -math.inf:  # dial 0: nothing is decided
        played = backend.fused(images, request)
        everything = torch.full((len(images),), math.prod(grid))
        return played and played._replace(kept=(everything,) * len(game.stages))
    thresholds = torch.full((len(game.stages), len(images)), threshold, device="cpu", dtype=torch.float32)
    if linear.shift is not None:
        thresholds += linear.shift
    shares = None if linear.shares is None else torch.tensor(linear.shares, device="cpu")
    request = request._replace(stages=game.stages, thresholds=thresholds, shares=shares, tokens_before=tokens_before)
    return backend.fused(images, request)


def fits(game: TokenGame) -> bool:
    """Whether csrc/game.h plays such games: observed features, and an attention before each decision."""
    seen = game.merge or (bool(game.stages) and game.stages[0] > 0)
    return is_usual(game) and seen and game.features and bool(game.stages)


def is_usual(game: TokenGame) -> bool:
    """Whether a game has no methods of its own, of a subclass or on the instance."""
    return type(game) is TokenGame and vars(TokenGame).keys().isdisjoint(vars(game))
