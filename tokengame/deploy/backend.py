"""What a padded batch computes, in operations that inference engines fuse, with few copies.

Rows of padding hold any finite numbers. A bias of -inf keeps them out of attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokengame.backbones.base import Backbone
from tokengame.backends import TorchBackend
from tokengame.backends.base import Stretch
from tokengame.backends.decisions import no_features
from tokengame.packed.attention import Kernel
from tokengame.packed.heads import CachedKeysValues, Heads, ObservationRequest, Observed
from tokengame.packed.layout import RaggedLayout

APART = 4.0
"""taken from the similarity to what absorbs nothing: below every cosine"""


class PaddedBackend(TorchBackend):
    """Runs a backbone on `PaddedLayout`s.

    Args:
        backbone, attention: as in `TorchBackend`.
        most: rows of an image.
    """

    name = "padded"

    def __init__(self, backbone: Backbone, attention: Kernel, most: int):
        super().__init__(backbone, attention)
        self.diagonal = -APART * torch.eye(most, device=backbone.device)

    def run(
        self, first: int, last: int, x: Tensor, layout: RaggedLayout, bias: Tensor | None = None,
        cached: CachedKeysValues | None = None, request: ObservationRequest | None = None,
    ) -> Stretch:  # fmt: skip
        ran = super().run(first, last, x, layout, bias, cached)
        if request is None:
            return ran
        heads = self._next_heads(last // 2, ran.x, layout)
        return ran._replace(heads=heads, observed=self.observe(heads, layout, bias, request))

    def _next_heads(self, block: int, x: Tensor, layout: RaggedLayout) -> Heads:
        """As `Backbone.next_heads`, from rows that are normalised once."""
        backbone = self.backbone
        normed = backbone.norm_attention(block, x)
        keys, values = (self._part(block, normed, layout, part) for part in (1, 2))
        if backbone.has_class_token:
            query = self._part(block, layout.first(normed), layout.prefixes(1), 0)
        elif backbone.positional:
            query = layout.pad(self._part(block, normed, layout, 0)).sum(1) / layout.count[:, None, None]
        else:
            query = self._part(block, layout.pad(normed).sum(1) / layout.count[:, None], layout.prefixes(1), 0)
        return Heads(query, keys, values, backbone.scale)

    def _attention(
        self, block: int, normed: Tensor, layout: RaggedLayout, bias: Tensor | None, cached: CachedKeysValues | None
    ) -> tuple[Tensor, Tensor | None]:
        """By a product each for queries, keys and values: engines copy less than where they split one."""
        query = self._part(block, normed, layout, 0)
        if cached is not None:
            of = cached.keys, cached.values, layout, cached.layout, cached.bias
            return self.cross_attend(query, *of).flatten(1), None
        key, value = (self._part(block, normed, layout, part) for part in (1, 2))
        attended = self.cross_attend(query, key, value, layout, layout, bias).flatten(1)
        return attended, torch.stack([query, key, value], 1)

    def _part(self, block: int, normed: Tensor, layout: RaggedLayout, part: int) -> Tensor:
        """[M, H, D] queries (0), keys (1) or values (2)."""
        found = self.backbone.project(block, normed, layout, part, part + 1)
        return found.reshape(-1, *found.shape[2:])  # engines copy what they select

    def cross_attend(
        self, q: Tensor, k: Tensor, v: Tensor, query_layout: RaggedLayout, layout: RaggedLayout,
        bias: Tensor | None = None, scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        query, key, value = by_image(q, query_layout), by_image(k, layout), by_image(v, layout)
        keys = None if bias is None else by_image(bias, layout)
        attended = attention(query.transpose(1, 2), key.permute(0, 2, 3, 1), value.transpose(1, 2), keys, scale)
        return query_layout.unpad(attended)

    def log_attention(self, heads: Heads, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
        """[B, H, L] as one product: the query of each head is filled up with zeros to all heads."""
        own = torch.eye(heads.query.shape[1], device=heads.query.device)[:, :, None] * heads.scale
        query = (heads.query[:, :, None] * own).flatten(2)  # [B, H, H * D]
        scores = query @ by_image(heads.keys, layout).flatten(2).transpose(1, 2)
        return (scores if bias is None else scores + by_image(bias, layout)[:, None]).log_softmax(2)

    def observe(self, heads: Heads, layout: RaggedLayout, bias: Tensor | None, request: ObservationRequest) -> Observed:
        """As `decisions.observe`; the similarity is of all rows [B, L, L]. Here `request.dither` is of rows [M]."""
        agents, prefix, position = request.agents, request.prefix, by_image(request.position, layout)
        present = (position + 1).clamp(max=1)  # [B, L] 0 for prefix tokens and padding
        similarity = self._similarity(heads.values, layout, present) if request.similarity else None
        features = no_features(agents, heads.keys.shape[1])
        if request.features:
            columns = self._features(heads, layout, bias, request, similarity, present)  # [B, F, L]
            features = columns.transpose(1, 2)[:, prefix:].reshape(-1, columns.shape[1])
        agent = position[:, prefix:].reshape(-1).clamp(min=0).long()
        return Observed(features, agent, agents.image, agents.behind(prefix), similarity)

    def _similarity(self, values: Tensor, layout: RaggedLayout, present: Tensor) -> Tensor:
        """[B, L, L] cosine of values, as `decisions.similarity_of`; less than -1 where a column is no other agent."""
        metric = by_image(values[..., : (values.shape[2] + 1) // 2], layout).flatten(2)
        metric = metric / torch.linalg.vector_norm(metric, dim=2, keepdim=True).clamp(min=1e-12)
        own = self.diagonal[: metric.shape[1], : metric.shape[1]]
        return metric @ metric.transpose(1, 2) + (own + (present * APART - APART)[:, None])

    def _features(
        self, heads: Heads, layout: RaggedLayout, bias: Tensor | None, request: ObservationRequest,
        similarity: Tensor | None, present: Tensor,
    ) -> Tensor:  # fmt: skip
        """[B, H + 6, L], see `Observation.features`."""
        count = request.agents.count[:, None, None]
        attention = self.log_attention(heads, layout, bias) + layout.count.float().log()[:, None, None]
        mean = attention.exp().sum(1, keepdim=True).clamp(min=1e-30).log()
        present = present[:, None]
        centred = mean - (mean * present).sum(2, keepdim=True) / count
        log_size = present * 0 if bias is None else by_image(bias, layout)[:, None].clamp(min=0)
        highest = leader = present * 0
        if similarity is not None:
            highest = similarity.amax(2).clamp(min=-1)[:, None]
            ahead = ((centred - centred.transpose(1, 2)) * 1e30 - 1).clamp(
                -1, 1
            )  # [B, L, L] 1 where j gets more than i
            leader = torch.minimum(ahead, similarity).amax(2).clamp(min=-1)[:, None]
        alive, dither = present * (count / request.total), by_image(request.dither, layout)[:, None]
        return torch.cat([attention, centred, log_size, highest, alive, leader, dither], 1)


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """[B, Q, H, D] from queries [B, H, Q, D], keys [B, H, D, L], values [B, H, L, D] and a bias [B, L] of keys."""
    scores = (query * (query.shape[3] ** -0.5 if scale is None else scale)) @ key
    if bias is not None:
        scores = scores + bias[:, None, None]
    return (scores.softmax(3) @ value).transpose(1, 2)


def by_image(rows: Tensor, layout: Any) -> Tensor:
    """[M, ...] -> [B, L, ...], whatever padding holds."""
    return rows.reshape(layout.images, -1, *rows.shape[1:])  # one unknown size: engines need not compute it
