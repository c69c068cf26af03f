"""Queries, keys and values that attention shares with decisions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from tokengame.packed.layout import RaggedLayout

EXTRA_FEATURES = ("attention", "log size", "similarity", "alive", "leader", "dither")
"""names of the observed features that follow the log attention of each head, in order"""


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values of one block's attention, as observations and merging use them."""

    query: Tensor
    """[B, H, D] the class token's query; without a class token the mean query of all rows, or that of their mean"""
    keys: Tensor
    """[M, H, D]"""
    values: Tensor
    """[M, H, D]"""
    scale: float
    """factor on q.k"""

    def take(self, images: Tensor, rows: Tensor) -> Heads:
        """The same for some images [b] and their rows [m]."""
        return replace(
            self,
            query=self.query.index_select(0, images),
            keys=self.keys.index_select(0, rows),
            values=self.values.index_select(0, rows),
        )


class CachedKeysValues(NamedTuple):
    """Keys and values that an attention reads in place of those of its own rows.

    In merge games a pruned token has a key and a value in the block that removes it, but no query.
    """

    keys: Tensor
    """[M, H, D]"""
    values: Tensor
    """[M, H, D]"""
    layout: RaggedLayout
    """of the M rows"""
    bias: Tensor | None
    """[M] added to the attention logits of each key, or None"""


class ObservationRequest(NamedTuple):
    """A request to a backend for what agents observe of an attention; it says where the agents are."""

    position: Tensor
    """[M] position of each row in the grid of patches, -1 for prefix tokens"""
    agents: RaggedLayout
    """of the A agents: the rows of each image without its prefix tokens"""
    dither: Tensor
    """[N] ordered dither of the grid"""
    total: int
    """agents of an image at the start (N)"""
    prefix: int
    """prefix tokens of an image; they come first"""
    features: bool
    """whether features are needed; a policy that reads tokens alone needs none"""
    similarity: bool
    """whether values are compared: for merging, and for the features that say how similar tokens are"""


class Observed(NamedTuple):
    """What A agents observe of an attention."""

    features: Tensor
    """[A, H + 6] log attention of each head, then `EXTRA_FEATURES`"""
    agent: Tensor
    """[A] position in the grid"""
    image: Tensor
    """[A] image of the batch"""
    row: Tensor
    """[A] index among all rows"""
    similarity: Tensor | None = None
    """[B, L, L] cosine of the agents' values, where the backend computes it once for features and merging"""

    def take(self, images: Tensor, agent_rows: Tensor, agents: RaggedLayout, prefix: int) -> Observed:
        """The same for some images [b], whose agents are `agent_rows` [a] of these and are laid out as `agents`."""
        similarity = None if self.similarity is None else self.similarity.index_select(0, images)
        features, agent = self.features.index_select(0, agent_rows), self.agent.index_select(0, agent_rows)
        return Observed(features, agent, agents.image, agents.behind(prefix), similarity)
