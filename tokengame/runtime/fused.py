"""Fused forward: a whole game in one call of the compiled kernels (csrc/game.h), from pixels to logits.

It does what `cascade.step_by_step` does, with the same kernels, under a policy that is linear in what it observes, or
under RL4EViT's actor. A thread plays a few images to their end while they are in its cache; threads do not wait for
each other at decisions, and nothing returns to Python in between.
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
from tokengame.policies.networks import Decision, decision_of


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
    grid = game.backbone.grid(*images.shape[2:])
    decision = decision_of(decide) if is_usual(game) and game.stages else None
    if decision is None or not fits(decision, game, math.prod(grid)):
        return None
    request = FusedRequest((), game.merge, game.end, None, torch.zeros(0), None, ordered_dither(*grid), False)
    if threshold == -math.inf:  # dial 0: nothing is decided
        played = backend.fused(images, request)
        everything = torch.full((len(images),), math.prod(grid))
        return played and played._replace(kept=(everything,) * len(game.stages))
    thresholds = torch.full((len(game.stages), len(images)), threshold, device="cpu", dtype=torch.float32)
    if decision.shift is not None:
        thresholds += decision.shift
    shares = None if decision.shares is None else torch.tensor(decision.shares, device="cpu")
    return backend.fused(
        images,
        request._replace(
            stages=game.stages, weights=decision.weights, actor=decision.actor, thresholds=thresholds, shares=shares,
            tokens_before=tokens_before,
        ),
    )  # fmt: skip


def fits(decision: Decision, game: TokenGame, agents: int) -> bool:
    """Whether a policy is of a game's shape, with an id for each agent; step by step says what is wrong otherwise."""
    if decision.actor is not None:
        first = decision.actor.layers[0].weight
        return first.shape[1] == game.backbone.dim and len(decision.actor.identity) >= agents
    assert decision.weights is not None
    columns = game.backbone.heads + len(EXTRA_FEATURES) + 1
    return game.features and decision.weights.shape == (len(game.stages), columns)


def is_usual(game: TokenGame) -> bool:
    """Whether a game has no methods of its own, of a subclass or on the instance."""
    return type(game) is TokenGame and vars(TokenGame).keys().isdisjoint(vars(game))
