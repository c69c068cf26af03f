"""What a token game is made of: the state of a batch of images, and what its agents observe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tokengame.backends import Backend
from tokengame.packed.heads import EXTRA_FEATURES, CachedKeysValues, Heads, Observed
from tokengame.packed.layout import RaggedLayout


@dataclass(frozen=True)
class Observation:
    """What A agents observe; those of one image at one stage lie together. S counts such images."""

    x: Tensor
    """[A, C] the agents' own rows; or [M, C] rows, of which `row` selects those of the agents"""
    class_tokens: Tensor | Callable[[], Tensor]
    """`cls`, or a function that computes it"""
    features: Tensor
    """[A, H + 6] per head: log attention from the class token times the number of rows; then the mean over heads,
    centred in the image; log size; highest similarity of values to another agent; share of agents alive; highest
    similarity to an agent that gets more attention; and `State.dither`, by which similar tokens differ"""
    image: Tensor
    """[A] index into S"""
    agent: Tensor
    """[A] agent id: position in the grid, row by row"""
    stage: Tensor
    """[S] stage index"""
    layout: RaggedLayout | None = None
    """of the A agents over S; None for an arbitrary selection of agents"""
    total: int = 0
    """agents of an image at the start"""
    row: Tensor | None = None
    """[A] index into x, where not all rows are agents'"""
    at_stage: int | None = None
    """the stage, where all images are at the same one"""

    @property
    def cls(self) -> Tensor:
        """[S, C] class token of each image; without a class token the mean of its rows."""
        return self.class_tokens if isinstance(self.class_tokens, Tensor) else self.class_tokens()

    @property
    def token(self) -> Tensor:
        """[A, C] the agent's own row; gathered only when a policy reads it."""
        return self.x if self.row is None else self.x.index_select(0, self.row)

    @property
    def attention(self) -> Tensor:
        """[A] log attention from the class token, mean over heads, centred in the image."""
        return self.features[:, EXTRA_FEATURES.index("attention") - len(EXTRA_FEATURES)]

    def take(self, rows: Tensor) -> Observation:
        """The same for some of the agents."""
        return replace(
            self,
            x=self.token[rows],
            row=None,
            features=self.features[rows],
            image=self.image[rows],
            agent=self.agent[rows],
            layout=None,
        )

    @staticmethod
    def concat(parts: list[Observation]) -> Observation:
        """All agents of several stages in one."""
        offsets = [0]
        for part in parts[:-1]:
            offsets.append(offsets[-1] + len(part.cls))
        return Observation(
            x=torch.cat([p.token for p in parts]),
            class_tokens=torch.cat([p.cls for p in parts]),
            features=torch.cat([p.features for p in parts]),
            image=torch.cat([p.image + offset for p, offset in zip(parts, offsets, strict=True)]),
            agent=torch.cat([p.agent for p in parts]),
            stage=torch.cat([p.stage for p in parts]),
        )


Decide = Callable[[Observation], Tensor]
"""A policy: observation -> [A] keep logits."""


@dataclass(frozen=True)
class State:
    """A batch of images somewhere in the network: before a decision, or at the end."""

    backend: Backend
    """computes until the end of this game"""
    x: Tensor
    """[M, C] packed rows, prefix tokens first in each image"""
    position: Tensor
    """[M] agent id of each row, -1 for prefix tokens"""
    layout: RaggedLayout
    """of the M rows"""
    agents: RaggedLayout
    """of the A agents that are left"""
    total: int
    """agents of each image at the start (N)"""
    dither: Tensor
    """[N] a number for each position of the grid, the same in all images (see `ordered_dither`)"""
    size: Tensor | None = None
    """[M] patches each row stands for, once tokens were merged"""
    heads: Heads | None = None
    """of the attention before (drop) or at (merge) the decision; None where there was none"""
    observed: Observed | None = None
    """what agents observe of it"""
    cached: CachedKeysValues | None = None
    """in merge games after a decision: keys and values that the attention of its block reads"""
    absorber: Tensor | None = None
    """[A] in merge games, for each agent before the latest decision the one that stands for it now"""
    kept: tuple[Tensor, ...] = ()
    """[B] agents left after each decision so far"""

    @property
    def stage(self) -> int:
        """Decisions taken so far."""
        return len(self.kept)

    @property
    def bias(self) -> Tensor | None:
        """[M] added to the attention logits of each key: log size, or None."""
        return None if self.size is None else self.size.log()

    @property
    def prefix(self) -> int:
        """Prefix tokens of an image."""
        return self.layout.longest - self.agents.longest

    @property
    def agent_rows(self) -> Tensor:
        """[A] the agents' rows among all rows."""
        return self.agents.behind(self.prefix)

    @property
    def alive(self) -> Tensor:
        """[B, N] bool: which agents are left."""
        places = self.agents.image * self.total + self.of_agents(self.position)
        flat = torch.zeros(self.layout.images * self.total, dtype=torch.bool, device=places.device)
        return flat.index_fill_(0, places, True).view(-1, self.total)

    def of_agents(self, rows: Tensor) -> Tensor:
        """[M, ...] -> [A, ...], without the prefix tokens."""
        if self.layout.uniform:
            return self.layout.pad(rows)[:, self.prefix :].flatten(0, 1)
        return rows.index_select(0, self.agent_rows)

    def take(self, images: Tensor) -> State:
        """The same for some images [b], in any order and any of them several times, to be played differently."""
        rows, layout = self.layout.take(images)
        agent_rows, agents = self.agents.take(images)
        return replace(
            self,
            x=self.x.index_select(0, rows),
            position=self.position.index_select(0, rows),
            layout=layout,
            agents=agents,
            size=None if self.size is None else self.size.index_select(0, rows),
            heads=self.heads and self.heads.take(images, rows),
            observed=self.observed and self.observed.take(images, agent_rows, agents, self.prefix),
            absorber=None,
            kept=tuple(number.index_select(0, images) for number in self.kept),
        )

    def repeat(self, times: int) -> State:
        """The same with every image `times` times in a row."""
        images = torch.arange(self.layout.images, device=self.x.device)
        return self.take(images.repeat_interleave(times))


@lru_cache(maxsize=64)
def _dither_matrix(rows: int, columns: int) -> np.ndarray:
    matrix = np.zeros((1, 1))
    while len(matrix) < 8:
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    tiled = np.tile((matrix + 0.5) / 64, (-(-rows // 8), -(-columns // 8)))[:rows, :columns]
    return np.log(tiled / (1 - tiled)).astype(np.float32).ravel()


def ordered_dither(rows: int, columns: int) -> Tensor:
    """[rows * columns] logits of the thresholds of ordered dithering (Bayer 1973), an 8 x 8 matrix repeated.

    The tokens of an even background are alike, so without it all of them would be kept or none. Added to their logits
    it thins them evenly at any resolution: whatever share is kept, is spread over the grid.
    """
    return torch.from_numpy(_dither_matrix(rows, columns).copy())
