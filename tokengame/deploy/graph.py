"""A pruned model as one module of tensors, dial included: what is exported."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tokengame.backbones import wrap
from tokengame.backbones.base import Backbone
from tokengame.deploy.fixed import FixedGame
from tokengame.deploy.game import PaddedGame
from tokengame.errors import TokenGameError
from tokengame.game.state import Observation
from tokengame.policies.networks import BudgetActor
from tokengame.runtime import PrunedViT

MOST_IMAGES = 4096
"""of a batch, where its size is an input"""


class GraphOutput(NamedTuple):
    """What a graph returns of B images."""

    output: Tensor
    """[B, ...] logits, or the embedding of a model without classes"""
    tokens_kept: Tensor
    """[B, T] patch tokens left after each decision"""
    alive: Tensor
    """[B, N] bool: the patch tokens that the prediction was made with at the end"""


class PrunedGraph(nn.Module):
    """(images [B, channels, height, width], dial [B]) -> `GraphOutput`, for images of one size.

    Args:
        fast: the pruned model, of which a copy in float32 on the CPU is taken.
        size: height and width of the images.

    Raises:
        TokenGameError: what the model or policy does cannot be put into one graph; the sentence says why.
    """

    def __init__(self, fast: PrunedViT, size: tuple[int, int]):
        super().__init__()
        check_exportable(fast)
        parts = (copy.deepcopy(part).float().cpu().eval() for part in (fast.model, fast.actor))
        self.model, self.actor = (part.requires_grad_(False) for part in parts)
        self.game = self._game_of(wrap(self.model), fast, size)

    def _game_of(self, backbone: Backbone, fast: PrunedViT, size: tuple[int, int]) -> PaddedGame:
        return PaddedGame(backbone, fast.game.config, fast.game.features, backbone.grid(*size))

    def forward(self, images: Tensor, dial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Play the game, and return the fields of `GraphOutput`; dial 0 keeps every token, 1 prunes most."""
        return self._play(images, torch.log(dial) - torch.log1p(-dial))

    def _play(self, images: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        state = self.game.reset(images)
        while state.stage < len(self.game.stages):
            logits, keep = self.game.decisions(state, self._decide, threshold)
            state = self.game.step(state, keep, logits)
        return self.game.predict(state), torch.stack(state.kept, 1), self.game.alive(state)

    def _decide(self, obs: Observation) -> Tensor:
        return self.actor(obs)

    def _inputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Of a batch, in the order of `forward`."""
        return images, torch.full((len(images),), 0.5)

    def program(self, images: Tensor, batch_size: int | None) -> ExportedProgram:
        """The graph by `torch.export`.

        Args:
            images: [B, channels, height, width] of the size that it is for.
            batch_size: images of a batch; with 1 nothing is masked. None: the size is an input.

        Raises:
            TokenGameError: a part of the model cannot be exported.
        """
        number = batch_size or 3  # sizes 0 and 1 would be taken for constants
        rows = images[:1].float().cpu().expand(number, -1, -1, -1).contiguous()
        inputs, batch = self._inputs(rows), {0: Dim("batch", min=1, max=MOST_IMAGES)}
        shapes = None if batch_size else tuple(batch for _ in inputs)
        try:
            with torch.no_grad():  # where it is on, regions without it become graphs of their own
                return torch.export.export(self, inputs, dynamic_shapes=shapes)
        except Exception as error:
            name, line = type(self.model).__name__, str(error).strip().partition("\n")[0]
            raise TokenGameError(f"torch.export cannot follow {name} ({line}): export another model") from error


class FixedGraph(PrunedGraph):
    """images [B, channels, height, width] -> `GraphOutput`, the same number of tokens in every image; no dial.

    Args:
        fast: from `with_fixed_counts`.
        size: height and width of the images.
    """

    def _game_of(self, backbone: Backbone, fast: PrunedViT, size: tuple[int, int]) -> PaddedGame:
        assert isinstance(self.actor, BudgetActor)
        return FixedGame(backbone, fast.game.config, backbone.grid(*size), self.actor.shares)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Play the game, and return the fields of `GraphOutput`."""
        return self._play(images, 0.0)

    def _decide(self, obs: Observation) -> Tensor:
        assert isinstance(self.actor, BudgetActor)
        return self.actor.scores(obs)

    def _inputs(self, images: Tensor) -> tuple[Tensor, ...]:
        return (images,)


def check_exportable(fast: PrunedViT) -> None:
    """Refuse what cannot be put into one graph.

    Raises:
        TokenGameError: says what it is.
    """
    name, backbone = type(fast.model).__name__, fast.game.backbone
    if fast.game.config.cascade_margin:
        raise TokenGameError(
            "images that fall back to all tokens cannot be put into one graph: prune with cascade_margin 0, then export"
        )
    if not isinstance(fast.actor, nn.Module):
        raise TokenGameError(
            f"the policy of this pruned {name} is a function: only policies of the library are exported"
        )
    if any(backbone.pair_bias(block, (1, 1)) is not None for block in range(backbone.depth)):
        raise TokenGameError(
            f"{name} has relative positions, whose lookup is not exported: use absolute or rotary ones"
        )
