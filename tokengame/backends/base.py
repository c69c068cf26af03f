"""What computes: the protocol of a backend, which runs stretches of blocks, attention, decisions and whole games.

A game gets a backend from `backends.choose` at the start of every forward pass and uses no other until its end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor

from tokengame.backbones.base import Backbone
from tokengame.kernels.functions import FusedOutput
from tokengame.kernels.plain import ActorWeights
from tokengame.packed.heads import CachedKeysValues, Heads, ObservationRequest, Observed
from tokengame.packed.layout import RaggedLayout


class Stretch(NamedTuple):
    """Packed rows after a stretch of half-blocks."""

    x: Tensor
    """[M, C]"""
    qkv: Tensor | None
    """[M, 3, H, D] of the last attention among the rows themselves; None without one"""
    heads: Heads | None = None
    """of the attention that comes next, where it was requested"""
    observed: Observed | None = None
    """what agents observe of that attention, where it was requested"""


class Tokens(Protocol):
    """What merging needs to know of a batch that is about to lose tokens (`game.State` has it)."""

    @property
    def x(self) -> Tensor:
        """[M, C]"""

    @property
    def position(self) -> Tensor:
        """[M] position in the grid, -1 for prefix tokens"""

    @property
    def size(self) -> Tensor | None:
        """[M] patches each row stands for, or None where all stand for one"""

    @property
    def layout(self) -> RaggedLayout:
        """of the M rows"""

    @property
    def agents(self) -> RaggedLayout:
        """of the A agents"""

    @property
    def prefix(self) -> int:
        """prefix tokens of an image"""

    @property
    def heads(self) -> Heads | None:
        """whose values are compared"""

    @property
    def observed(self) -> Observed | None:
        """with the similarity of the agents' values, where the backend keeps it"""


class Kept(NamedTuple):
    """The M' rows that go on after a decision."""

    x: Tensor
    """[M', C]"""
    position: Tensor
    """[M']"""
    size: Tensor | None = None
    """[M'] patches each row stands for, in merge games"""
    absorber: Tensor | None = None
    """[A] in merge games, for each agent before the decision the one that stands for it now"""


class FusedRequest(NamedTuple):
    """A whole game under a policy that is linear in observed features, or reads tokens and ids (`runtime.fused`)."""

    stages: tuple[int, ...]
    """blocks that decide; without any, all tokens are kept"""
    merges: bool
    """whether pruned tokens are merged into kept ones"""
    end: int
    """the half-block up to which patches are computed"""
    weights: Tensor | None
    """[T, H + 7] of the observed features at each stage, a bias last; None under another policy"""
    thresholds: Tensor
    """[T, B] a token is kept where its logit exceeds it"""
    shares: Tensor | None
    """[T] logits are taken relative to that of the last token in this share of an image's; None: as they are"""
    dither: Tensor
    """[N]"""
    tokens_before: bool
    """whether tokens before the first decision are wanted"""
    actor: ActorWeights | None = None
    """what reads tokens and ids instead"""


class Backend(Protocol):
    """Computes for one backbone. Shapes: M rows and A agents of B images, H heads of width D, row width C."""

    name: str
    backbone: Backbone
    section: Callable[[str], AbstractContextManager]
    """opened around attention ("attention") and observations ("policy") within other calls; profilers replace it"""

    def embed(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, prefix + N, C], position embedding added."""

    def run(
        self, first: int, last: int, x: Tensor, layout: RaggedLayout, bias: Tensor | None = None,
        cached: CachedKeysValues | None = None, request: ObservationRequest | None = None,
    ) -> Stretch:  # fmt: skip
        """Half-blocks `first` to `last` - 1 on packed rows; 2 i is the attention of block i, 2 i + 1 its MLP.

        Args:
            first, last: half-blocks.
            x: [M, C].
            layout: of the M rows.
            bias: [M] added to the attention logits of each key, or None.
            cached: keys and values that the first half, an attention, reads in place of those of the rows.
            request: for heads and observations of half `last`, an attention that has not run yet.
        """

    def finish(self, half: int, x: Tensor, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
        """The last block from `half` on, for prefix rows only: x [M, C] -> [B * prefix, C].

        Exact where `Backbone.reads_prefix_only`: what the last block makes of patches is not used.
        """

    def head(self, x: Tensor, layout: RaggedLayout, size: Tensor | None = None) -> Tensor:
        """Final norm, pooling and classifier: [M, C] -> [B, classes]; see `Backbone.head`."""

    def attend(self, qkv: Tensor, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
        """Attention inside each image: [M, 3, H, D] -> [M, H * D]."""

    def cross_attend(
        self, q: Tensor, k: Tensor, v: Tensor, query_layout: RaggedLayout, layout: RaggedLayout,
        bias: Tensor | None = None, scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of other rows' queries: q [Q, H, D] to k, v [M, H, D] of the same images -> [Q, H, D]."""

    def log_attention(self, heads: Heads, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
        """[B, H, longest] log of the attention of `heads.query` to each row of its image; -inf to padding."""

    def observe(self, heads: Heads, layout: RaggedLayout, bias: Tensor | None, request: ObservationRequest) -> Observed:
        """What agents observe of an attention."""

    def merge(self, tokens: Tokens, keep: Tensor, kept_layout: RaggedLayout) -> Kept:
        """Merge every pruned token into its most similar kept token.

        The sum of the rows, weighted by size, gets the length of the longest of them (ToFu's MLERP, Kim et al. 2024).

        Args:
            tokens: before the decision.
            keep: [A] bool, at least one of each image.
            kept_layout: of the M' rows that are kept, prefix tokens included.
        """

    def fused(self, images: Tensor, request: FusedRequest) -> FusedOutput | None:
        """A whole game in one call, [B, channels, height, width] to logits; None where it must be played in steps."""


def predict(
    backend: Backend, half: int, x: Tensor, layout: RaggedLayout, bias: Tensor | None = None, size: Tensor | None = None
) -> Tensor:
    """[B, classes] from packed rows [M, C] that have come to half-block `half`.

    Where the prediction depends on prefix tokens alone, the last block computes those alone: what it makes of patches
    is not used, and most of a block is saved.

    Args:
        backend: what computes.
        half: `Backbone.last_half` of the blocks that have run, or the end of the last one.
        x, layout: the rows.
        bias: [M] added to the attention logits of each key, or None.
        size: [M] patches each row stands for, or None where all stand for one.
    """
    if not backend.backbone.reads_prefix_only:
        return backend.head(x, layout, size)
    if half < 2 * backend.backbone.depth:
        x = backend.finish(half, x, layout, bias)
    else:
        x = layout.firsts(x, backend.backbone.prefix).flatten(0, 1)
    return backend.head(x, layout.prefixes(backend.backbone.prefix))
