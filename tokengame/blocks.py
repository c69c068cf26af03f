"""The halves of a timm `Block` on packed rows, run through its own submodules (norm1, attn.qkv, ls1, mlp, ...)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengame import kernels
from tokengame.attention import asked_attention
from tokengame.kernels import takes
from tokengame.ops import Layout, Seen, add_by_pieces


@dataclass(frozen=True)
class Heads:
    """What one block's attention offers to observations and matching."""

    query: Tensor
    """[B, H, D] the class token's query; without a class token the mean query of all rows (or that of their mean)"""
    keys: Tensor
    """[M, H, D]"""
    values: Tensor
    """[M, H, D]"""
    scale: float
    """factor on q.k"""
    seen: Seen | None = None
    """what agents observe, where our own kernels have looked already"""

    def log_attention(self, layout: Layout, bias: Tensor | None = None) -> Tensor:
        """[B, H, longest] log of the attention that `query` pays to each row of its image; -inf to padding."""
        if takes(self.keys):
            own = kernels.class_attention(self.keys, self.query, self.scale, layout, bias)
            return layout.pad(own, float("-inf")).transpose(1, 2)
        query = (self.query * self.scale).index_select(0, layout.image)  # [M, H, D]
        scores = (self.keys * query).sum(2, dtype=torch.float32)
        if bias is not None:
            scores = scores + bias[:, None]
        return layout.pad(scores, float("-inf")).transpose(1, 2).log_softmax(2)


class Ran(NamedTuple):
    """What a run of half-blocks returns."""

    x: Tensor
    """[M, C]"""
    qkv: Tensor | None
    """[M, 3, H, D] queries, keys and values of the last attention among the rows, for `read_heads`; None without one"""
    heads: Heads | None = None
    """of an attention that comes next, where it was wanted"""


def lengthen(x: Tensor, spare: int) -> Tensor:
    """[M, C] -> [M + spare, C], zeros"""
    return F.pad(x, (0, 0, 0, spare)) if spare else x


def feed_forward(block: Any, x: Tensor) -> Tensor:
    """A block's MLP with its residual: x [M, C] -> [M, C]."""
    return add_by_pieces(lambda rows: block.drop_path2(block.ls2(block.mlp(block.norm2(rows)))), x)


def project(attn: Any, rows: Tensor, first: int = 0, last: int = 3) -> Tensor:
    """Queries (0), keys (1) and values (2) from `first` to `last` - 1 of normed rows: [M, C] -> [M, parts, H, D]."""
    parts, norms = last - first, (attn.q_norm, attn.k_norm)[first:last]
    width = attn.num_heads * attn.head_dim
    some = slice(first * width, last * width)
    if parts < 3 and type(attn.qkv) is nn.Linear:
        bias = attn.qkv.bias
        found = F.linear(rows, attn.qkv.weight[some], None if bias is None else bias[some])
    else:
        found = attn.qkv(rows)[:, some]
    heads = found.unflatten(1, (parts, attn.num_heads, attn.head_dim))
    if all(isinstance(norm, nn.Identity) for norm in norms):
        return heads
    normed = [norm(part) for norm, part in zip(norms, heads.unbind(1), strict=False)]
    return torch.stack([*normed, *heads.unbind(1)[len(norms) :]], 1)


def folds(attn: Any) -> bool:
    """Whether a few queries can ask rows themselves in place of their keys and values, see `folded_attention`."""
    return type(attn.qkv) is nn.Linear and isinstance(attn.k_norm, nn.Identity)


def folded_attention(
    attn: Any, query: Tensor, rows: Tensor, asking: Layout, layout: Layout, bias: Tensor | None
) -> Tensor:
    """Attention of few queries [Q, H, D] over rows [M, C] whose keys and values are never computed: [Q, H, D].

    q.(K n + c) = (K^T q).n + q.c, the same for all keys of a softmax up to a constant; and as weights a sum to 1, the
    sum of a (V n + d) is V (sum of a n) + d. So two products of C x C a row become two of C for each query and head.
    """
    _, key, value = attn.qkv.weight.view(3, attn.num_heads, attn.head_dim, -1)  # [H, D, C]
    each = Layout([n * attn.num_heads for n in asking.counts], rows.device)  # every head asks for itself
    heads, rows = torch.einsum("qhd,hdc->qhc", query, key).flatten(0, 1)[:, None], rows[:, None]
    heard = asked_attention(heads, rows, rows, each, layout, bias, attn.scale).view(len(query), attn.num_heads, -1)
    out = torch.einsum("qhc,hdc->qhd", heard, value)
    return out if attn.qkv.bias is None else out + attn.qkv.bias.view(3, *out.shape[1:])[2]


def join(block: Any, x: Tensor, out: Tensor) -> Tensor:
    """Residual of attention: x [M, C] and what the heads found, out [M, H * D] -> [M, C]."""
    attn, out = block.attn, block.attn.norm(out)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(block.norm1(x)).sigmoid()
    return x + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(out))))
