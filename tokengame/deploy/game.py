"""The game on dense batches, as one graph: what is exported plays it.

Tokens are really removed: after a decision an image has as many rows as the image of the batch that keeps most, and the
rest is masked. With one image nothing is padding. Sizes may be symbols, and nothing is branched on but sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokengame.backbones.base import Backbone
from tokengame.backends import Backend
from tokengame.config import GameConfig
from tokengame.deploy.backend import PaddedBackend, by_image
from tokengame.game.env import TokenGame
from tokengame.game.state import Decide, State, ordered_dither
from tokengame.packed.heads import CachedKeysValues
from tokengame.packed.padded import PaddedLayout

GONE = 8.0
"""taken from the similarity to pruned rows: below that to any row that is left"""


@dataclass(frozen=True)
class PaddedState(State):
    """A state of dense batches; `position` [M] is of float32 and -1 for padding too, `dither` [M] is of rows."""

    marks: Tensor | None = None
    """[B, L, 3] size, position + 1 and dither of each row; 0 for padding"""


class PaddedGame(TokenGame):
    """The same game with `PaddedLayout`s, for images of one size.

    Args:
        backbone, config, features: as in `TokenGame`.
        grid: rows and columns of patches of the images.
    """

    def __init__(self, backbone: Backbone, config: GameConfig, features: bool, grid: tuple[int, int]):
        super().__init__(backbone, config, features)
        agents, prefix = grid[0] * grid[1], backbone.prefix
        self.grid, self.most = grid, prefix + agents
        self.numbers = torch.arange(float(self.most), device=backbone.device)
        marks = torch.zeros(self.most, 3, device=backbone.device)
        marks[:, 0], marks[prefix:, 1] = 1, torch.arange(1, agents + 1)
        marks[prefix:, 2] = ordered_dither(*grid).to(marks)
        self.marks, self.of_all = marks, torch.tensor([1.0, 0.0, 0.0], device=backbone.device)
        self.of_kept = 1 - self.of_all

    def backend_for(self, _images: Tensor) -> Backend:
        """PyTorch's, whose operations can be exported."""
        return PaddedBackend(self.backbone, self.attention, self.most)

    def _embedded(self, images: Tensor, backend: Backend) -> State:
        tokens, prefix = backend.embed(images), self.backbone.prefix
        batch, rows = tokens.shape[:2]
        marks = self.marks.expand(batch, -1, -1)
        position = marks[:, :, 1].flatten() - 1
        places = self.backbone.whole_layout(tokens[:1], self.grid).places
        places = places and places._replace(position=position.long())
        return PaddedState(
            backend=backend,
            x=tokens.flatten(0, 1),
            position=position,
            layout=PaddedLayout(batch, rows, tokens.device, places=places),
            agents=PaddedLayout(batch, rows - prefix, tokens.device),
            total=rows - prefix,
            dither=marks[:, :, 2].flatten(),
            marks=marks,
        )

    @torch.no_grad()
    def decisions(self, state: State, decide: Decide, threshold: Any) -> tuple[Tensor, Tensor]:
        """[A] keep logits, and whether each exceeds the threshold of its image [B]; padding never does."""
        logits, agents = decide(self.observe(state)), state.agents
        assert isinstance(agents, PaddedLayout)
        kept = (by_image(logits, agents) > threshold[:, None]).flatten()
        return logits, kept if agents.uniform else kept & agents.filled

    def step(self, state: State, keep: Tensor, logits: Tensor) -> State:
        return self._advance(self.removed(state, keep, logits), self._decides_before(state.stage))

    def alive(self, state: State) -> Tensor:
        """[B, N] bool: which agents are left."""
        position = by_image(state.position, state.layout)
        return (position[:, :, None] == self.numbers[: state.total]).any(1)

    def removed(self, state: State, keep: Tensor, logits: Tensor) -> State:
        """As `game.transition.remove`: kept rows first in each image, then padding.

        Rows move by products with matrices of ones and zeros, which engines do faster than sorting and gathering.
        """
        assert isinstance(state, PaddedState)
        assert state.marks is not None
        stays = self._stays(state, keep, logits)  # [B, L]
        images, device, prefix = state.layout.images, keep.device, state.prefix
        (count, longest, padded), slot = self._left(state, stays), stays.cumsum(1) - 1
        target = self._target(state, stays, slot)
        moves = (target[:, None] == self.numbers[:longest, None]).float()  # [B, longest, L]
        marks = moves @ (state.marks * (stays[:, :, None] * self.of_kept + self.of_all))
        position, cached = marks[:, :, 1].flatten() - 1, None
        places = state.layout.places and state.layout.places._replace(position=position.long())
        if self.merge:
            assert state.heads is not None
            x = merged(state, moves)
            cached = CachedKeysValues(state.heads.keys, state.heads.values, state.layout, state.bias)
        else:
            x = moves @ by_image(state.x, state.layout)
        return replace(
            state, x=x.reshape(-1, x.shape[2]), position=position, dither=marks[:, :, 2].flatten(), marks=marks,
            size=marks[:, :, 0].flatten() if self.merge or padded else None, heads=None, observed=None, cached=cached,
            layout=PaddedLayout(images, longest, device, count, padded, places),
            agents=PaddedLayout(images, longest - prefix, device, count - prefix, padded),
            kept=(*state.kept, count - prefix),
        )  # fmt: skip

    def _target(self, state: State, stays: Tensor, slot: Tensor) -> Tensor:
        """[B, L] the slot to which each row moves; -1: nowhere."""
        if not self.merge:
            return torch.where(stays > 0, slot, -1.0)
        assert state.observed is not None
        assert state.observed.similarity is not None
        return absorbers(state.observed.similarity, stays, slot)

    def _stays(self, state: State, keep: Tensor, logits: Tensor) -> Tensor:
        """[B, L] 1 for prefix tokens and kept agents, of each image at least the agent with the highest logit."""
        best = state.agents.pad(logits, float("-inf")).argmax(1, keepdim=True)
        own = torch.arange(state.agents.longest, device=keep.device)
        stays = (by_image(keep, state.agents) | (own == best)).float()
        return torch.cat([stays.new_ones(state.layout.images, state.prefix), stays], 1)

    def _left(self, state: State, stays: Tensor) -> tuple[Tensor, Any, bool]:
        """Rows [B] left of each image, those of the image with most, and whether images may differ in them."""
        count, images = stays.sum(1).long(), state.layout.images
        longest = count.max().item()
        torch._check(longest > self.backbone.prefix)
        torch._check(longest <= self.most)
        return count, longest, not isinstance(images, int) or images > 1


def absorbers(similarity: Tensor, stays: Tensor, slot: Tensor) -> Tensor:
    """[B, L] for each row the slot of the row that stands for it: its own, or that of the most similar kept agent.

    Args:
        similarity: [B, L, L], see `PaddedBackend`.
        stays: [B, L] 1 or 0.
        slot: [B, L] where kept rows go.
    """
    similarity = similarity + (stays * GONE - GONE)[:, None]
    best = similarity.amax(2, keepdim=True)
    nearest = torch.where(similarity == best, slot[:, None], float("inf")).amin(2)  # of equals the first
    return torch.where(stays > 0, slot, nearest)


def merged(state: State, moves: Tensor) -> Tensor:
    """[B, longest, C] rows as in `backends.decisions.merge`; zeros for padding.

    Args:
        state: before the decision.
        moves: [B, longest, L] 1 where a row is merged into that one, or 0.
    """
    x = by_image(state.x, state.layout)
    lengths, weighted = torch.linalg.vector_norm(x, dim=2), x
    if state.size is not None:
        size = by_image(state.size, state.layout)
        lengths, weighted = lengths * size.clamp(max=1), x * size[:, :, None]
    total = moves @ weighted
    length = (moves * lengths[:, None]).amax(2) / torch.linalg.vector_norm(total, dim=2).clamp(min=1e-12)
    return total * length[:, :, None]
