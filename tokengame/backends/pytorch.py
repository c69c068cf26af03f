"""The backend that runs everywhere: any number format, CPU or GPU, with gradients, on PyTorch's kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tokengame.backends.decisions as decisions
from tokengame.backbones.base import Backbone
from tokengame.backends.base import FusedRequest, Kept, Stretch, Tokens
from tokengame.kernels.functions import FusedOutput
from tokengame.packed.attention import (
    Kernel,
    cross_attention,
    gathered_pairs,
    masked_attention,
    padded_attention,
    query_log_attention,
)
from tokengame.packed.heads import CachedKeysValues, Heads, ObservationRequest, Observed
from tokengame.packed.layout import RaggedLayout
from tokengame.packed.rows import append_rows, compiles_per_shape, padding_rows, without_padding


class TorchBackend:
    """Runs a backbone's half-blocks one after the other; see `Backend`.

    Args:
        backbone: what is run.
        attention: inside each image; `deterministic_attention` repeats bitwise, `fastest_attention` measures first.
    """

    name = "PyTorch"
    section: Callable[[str], AbstractContextManager] = staticmethod(lambda _part: nullcontext())

    def __init__(self, backbone: Backbone, attention: Kernel):
        self.backbone, self.attention = backbone, attention

    @classmethod
    def ready(cls, backbone: Backbone, _images: Tensor, attention: Kernel) -> TorchBackend | None:
        return cls(backbone, attention)

    def embed(self, images: Tensor) -> Tensor:
        return self.backbone.embed(images)

    def run(
        self, first: int, last: int, x: Tensor, layout: RaggedLayout, bias: Tensor | None = None,
        cached: CachedKeysValues | None = None, request: ObservationRequest | None = None,
    ) -> Stretch:  # fmt: skip
        backbone, rows, qkv = self.backbone, x.shape[0], None
        spare = padding_rows(x) if compiles_per_shape(x) and layout.images > 1 else 0
        x = append_rows(x, spare)
        while first < last:
            end = min(first + 2 - first % 2, last)  # of this block
            x, found = self._checkpointed(self._halves, first, end, x, layout, bias, cached)
            first, cached, qkv = end, None, qkv if found is None else found
        if request is None:
            return Stretch(without_padding(x, rows), qkv)
        keys_values = backbone.project(last // 2, backbone.norm_attention(last // 2, x), layout, 1, 3)
        x = without_padding(x, rows)
        heads = backbone.next_heads(last // 2, x, layout, without_padding(keys_values, rows))
        with self.section("policy"), torch.no_grad():  # decisions have no gradient
            observed = self.observe(heads, layout, bias, request)
        return Stretch(x, qkv, heads, observed)

    def _checkpointed(self, call: Callable, *arguments: Any) -> Any:
        """The result of `call`, computed again for the gradient where the model checkpoints."""
        if self.backbone.checkpoints and torch.is_grad_enabled():
            return checkpoint(call, *arguments, use_reentrant=False)
        return call(*arguments)

    def _halves(
        self, first: int, last: int, x: Tensor, layout: RaggedLayout, bias: Tensor | None,
        cached: CachedKeysValues | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Half-blocks of one block on rows x [M, C] and padding: the rows, and qkv [M, 3, H, D] of its attention."""
        backbone, block, qkv = self.backbone, first // 2, None
        if first % 2 == 0:
            attended, qkv = self._attention(block, backbone.norm_attention(block, x), layout, bias, cached)
            x = backbone.add_attention(block, x, append_rows(attended, x.shape[0] - layout.rows), layout)
        return (x if last % 2 else backbone.feed_forward(block, x, layout)), qkv

    def _attention(
        self, block: int, normed: Tensor, layout: RaggedLayout, bias: Tensor | None, cached: CachedKeysValues | None
    ) -> tuple[Tensor, Tensor | None]:
        """[M, H * D] attention of normed rows, and qkv [M, 3, H, D] where it is among themselves."""
        backbone, dropout = self.backbone, self.backbone.attention_dropout(block)
        if cached is not None:
            query = without_padding(backbone.project(block, normed, layout, 0, 1), layout.rows)[:, 0]
            of = cached.keys, cached.values, layout, cached.layout, cached.bias
            with self.section("attention"):
                return self._cross_attend(block, query, *of).flatten(1), None
        qkv = without_padding(backbone.project(block, normed, layout), layout.rows)
        with self.section("attention"):
            pairs = self._pair_bias(block, layout)
            if pairs is not None:
                q, k, v = qkv.unbind(1)
                return self._masked_attend(pairs, q, k, v, layout, layout, bias, dropout).flatten(1), qkv
            return padded_attention(qkv, layout, bias, dropout) if dropout else self.attend(qkv, layout, bias), qkv

    def _pair_bias(self, block: int, layout: RaggedLayout) -> Tensor | None:
        return None if layout.places is None else self.backbone.pair_bias(block, layout.places.grid)

    def finish(self, half: int, x: Tensor, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
        return self._checkpointed(self._finish, half, x, layout, bias)

    def _finish(self, half: int, x: Tensor, layout: RaggedLayout, bias: Tensor | None) -> Tensor:
        backbone, block = self.backbone, self.backbone.depth - 1
        number, prefix_layout = backbone.prefix, layout.prefixes(backbone.prefix)
        prefix = layout.firsts(x, number).flatten(0, 1)
        if half % 2 == 0:
            normed = backbone.norm_attention(block, x)
            own = layout.firsts(normed, number).flatten(0, 1)
            query = backbone.project(block, own, prefix_layout, 0, 1)[:, 0]
            with self.section("attention"):
                attended = self._attend_rows(block, query, normed, prefix_layout, layout, bias)
            prefix = backbone.add_attention(block, prefix, attended.flatten(1), prefix_layout)
        return backbone.feed_forward(block, prefix, prefix_layout)

    def _attend_rows(
        self, block: int, query: Tensor, normed: Tensor, query_layout: RaggedLayout, layout: RaggedLayout,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attention of few queries [Q, H, D] to normed rows [M, C] -> [Q, H, D]."""
        folded = self.backbone.key_value_weights(block)
        if folded is None:
            keys_values = self.backbone.project(block, normed, layout, 1, 3)
            keys, values = without_padding(keys_values, layout.rows).unbind(1)
            return self._cross_attend(block, query, keys, values, query_layout, layout, bias)
        # q.(K n + c) = (K^T q).n + q.c, the same for all keys of a softmax up to a constant; and as weights a sum to 1,
        # the sum of a (V n + d) is V (sum of a n) + d. Two products of C x C for every row become two of C for each
        # query and head.
        by_head = query_layout.repeated(query.shape[1])
        rows = normed[:, None]  # one head of width C
        queries = torch.einsum("qhd,hdc->qhc", query, folded.key).flatten(0, 1)[:, None]
        attended = self.cross_attend(queries, rows, rows, by_head, layout, bias, self.backbone.scale)
        out = torch.einsum("qhc,hdc->qhd", attended.view(*query.shape[:2], -1), folded.value)
        return out if folded.value_bias is None else out + folded.value_bias

    def head(self, x: Tensor, layout: RaggedLayout, size: Tensor | None = None) -> Tensor:
        return self.backbone.head(x, layout, size)

    def attend(self, qkv: Tensor, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
        return self.attention(qkv, layout, bias)

    def cross_attend(
        self, q: Tensor, k: Tensor, v: Tensor, query_layout: RaggedLayout, layout: RaggedLayout,
        bias: Tensor | None = None, scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        return cross_attention(q, k, v, query_layout, layout, bias, scale)

    def _cross_attend(
        self, block: int, q: Tensor, k: Tensor, v: Tensor, query_layout: RaggedLayout, layout: RaggedLayout,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """`cross_attend` with what is special to `block`: relative positions, and dropout of weights in training."""
        pairs, dropout = self._pair_bias(block, layout), self.backbone.attention_dropout(block)
        if pairs is not None:
            return self._masked_attend(pairs, q, k, v, query_layout, layout, bias, dropout)
        attend = partial(cross_attention, dropout=dropout) if dropout else self.cross_attend
        return attend(q, k, v, query_layout, layout, bias)

    def _masked_attend(
        self, pairs: Tensor, q: Tensor, k: Tensor, v: Tensor, query_layout: RaggedLayout, layout: RaggedLayout,
        bias: Tensor | None, dropout: float,
    ) -> Tensor:  # fmt: skip
        """`cross_attend` with a number for each pair of places, [H, prefix + N, prefix + N], added to the logits."""
        added = gathered_pairs(pairs, query_layout, layout, self.backbone.prefix)
        return masked_attention(q, k, v, query_layout, layout, added, bias, dropout)

    def log_attention(self, heads: Heads, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
        return query_log_attention(heads, layout, bias)

    def observe(self, heads: Heads, layout: RaggedLayout, bias: Tensor | None, request: ObservationRequest) -> Observed:
        attention = self.log_attention(heads, layout, bias) if request.features else heads.query
        return decisions.observe(attention, heads, layout, bias, request)

    def merge(self, tokens: Tokens, keep: Tensor, kept_layout: RaggedLayout) -> Kept:
        return decisions.merge(tokens, keep, kept_layout)

    def fused(self, _images: Tensor, _request: FusedRequest) -> FusedOutput | None:
        return None
