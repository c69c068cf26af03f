"""A cascade within one network: an image whose pruned prediction is uncertain falls back to all of its tokens.

Where pruning changes a prediction, the two likeliest classes were mostly close, and that can be seen in the pruned
prediction. Nothing known before the last blocks says as much, and a second, gentler game is worse than all tokens
(docs/LOG.md). Blocks before the first decision are not repeated. Wang et al. 2021 (Dynamic Transformer) have such a
cascade of several networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import tokengame.runtime.fused as fused
import tokengame.runtime.groups as groups
from tokengame.backends import Backend
from tokengame.game import Decide, TokenGame
from tokengame.kernels.functions import FusedOutput


@dataclass(frozen=True)
class PrunedOutput:
    """The prediction for B images, and which of their tokens were kept."""

    logits: Tensor
    """[B, classes]; in distilled training a pair of them, as the model's"""
    decided: tuple[Tensor, ...]
    """[B] tokens left after each decision of the game, before any fallback"""
    alive: Tensor
    """[B, N] bool: the tokens that the prediction was made with at the end"""
    fallback: Tensor
    """[b] indices of the images that fell back to all tokens"""

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """[B] tokens left after each decision; images that fell back have all of them"""
        return tuple(kept.index_fill(0, self.fallback, self.total) for kept in self.decided)

    @property
    def total(self) -> int:
        """Patch tokens of each image at the start."""
        return self.alive.shape[1]


def predict(
    game: TokenGame, images: Tensor, decide: Decide, threshold: float, backend: Backend | None = None
) -> PrunedOutput:
    """Play whole deterministic games and let uncertain images fall back.

    Args:
        game: with the cascade's margin in its config.
        images: [B, channels, height, width].
        decide, threshold: the policy; see `TokenGame.play`.
        backend: what computes; by default the best one for these images.
    """
    if not len(images):
        return _of_no_image(game, images)
    backend = backend or game.backend_for(images)
    margin = margin_at(game, threshold)
    played = fused.forward(game, backend, images, decide, threshold, margin > 0) or groups.play(
        game, lambda some, policy: step_by_step(game, backend, some, policy, threshold, margin > 0), images, decide
    )
    uncertain = uncertain_images(played.logits, margin) if margin else played.alive.new_zeros(0, dtype=torch.long)
    if not len(uncertain):
        return PrunedOutput(played.logits, played.kept, played.alive, uncertain)
    assert played.tokens_before is not None
    grid = game.backbone.grid(*images.shape[2:])
    native = game.predict_unpruned(played.tokens_before.index_select(0, uncertain), grid, backend)
    logits = tree_map(lambda pruned, whole: pruned.index_copy(0, uncertain, whole), played.logits, native)
    return PrunedOutput(logits, played.kept, played.alive.index_fill(0, uncertain, True), uncertain)


def _of_no_image(game: TokenGame, images: Tensor) -> PrunedOutput:
    """The prediction for an empty batch [0, channels, height, width]: the model's own."""
    total = math.prod(game.backbone.grid(*images.shape[2:]))
    alive = torch.zeros(0, total, dtype=torch.bool, device=images.device)
    nothing = torch.zeros(0, dtype=torch.long, device=images.device)
    return PrunedOutput(game.backbone.native(images), (nothing,) * len(game.stages), alive, nothing)


def step_by_step(
    game: TokenGame, backend: Backend, images: Tensor, decide: Decide, threshold: float, tokens_before: bool
) -> FusedOutput:
    """What `fused.forward` returns, one step of the game after the other: any game, policy and backend."""
    state = game.reset(images, backend)
    tokens = state.x.unflatten(0, (len(images), -1)) if tokens_before else None
    state = game.play_on(state, decide, threshold)
    return FusedOutput(game.predict(state), state.kept, state.alive, tokens)


def margin_at(game: TokenGame, threshold: float) -> float:
    """The difference in probability below which an image falls back: 2 (1 - dial) times what is configured.

    It shrinks towards the hard end of the dial, where most images would fall back otherwise. 0 where nothing is pruned
    or the model has no classes.
    """
    applies = math.isfinite(threshold) and game.backbone.classes > 1
    return 2 * game.config.cascade_margin / (1 + math.exp(threshold)) if applies else 0.0


def uncertain_images(logits: Tensor | tuple[Tensor, ...], margin: float) -> Tensor:
    """[b] indices of the images whose two likeliest classes are less than `margin` apart in probability."""
    whole = torch.stack(logits).mean(0) if isinstance(logits, tuple) else logits
    likeliest = whole.detach().float().softmax(1).topk(2, 1).values
    return (likeliest[:, 0] - likeliest[:, 1] < margin).nonzero().squeeze(1)
