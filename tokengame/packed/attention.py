"""Attention inside each image of a packed batch on PyTorch's kernels: several implementations, and how one is chosen.

`bias` is one number per key, added to its logits in every head: log size for merged tokens (ToMe's proportional
attention, Bolya et al. 2023, eq. 1). It stays a key bias, so that fused kernels stay on.

Which implementation is fastest depends on processor, number format, heads and length. `fastest_attention` measures
once in a process and chooses. `deterministic_attention` never measures, so that equal input gives bitwise equal output
on every run: training uses it.
"""

from __future__ import annotations

import inspect
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengame.packed.heads import Heads
from tokengame.packed.layout import RaggedLayout
from tokengame.packed.rows import compiles_per_shape

Kernel = Callable[[Tensor, RaggedLayout, Tensor | None], Tensor]
"""qkv [M, 3, H, D], layout of the M rows, key bias [M] or None -> [M, H * D]"""


class Shape(NamedTuple):
    """What speed depends on beside the lengths."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    head_dim: int
    threads: int

    @staticmethod
    def of(qkv: Tensor) -> Shape:
        return Shape(qkv.device, qkv.dtype, qkv.shape[2], qkv.shape[3], torch.get_num_threads())


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None = None) -> Tensor:
    """Unfused, two matrix products and a softmax: q [b, Q, D], k, v [b, L, D], bias [b, 1, L] -> [b, Q, D]."""
    start, beta = (q.new_zeros(1, 1, 1), 0) if bias is None else (bias, 1)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    scores = torch.baddbmm(start, q, k.transpose(1, 2), beta=beta, alpha=scale)
    return torch.bmm(scores.softmax(2), v)


def padded_attention(qkv: Tensor, layout: RaggedLayout, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """One fused call on the batch padded to its longest image; no padding, no mask where all have the same count.

    A share `dropout` of the attention weights is dropped, in training.
    """
    if bias is None and not layout.uniform:
        bias = qkv.new_zeros(layout.rows)
    query, key, value = layout.pad(qkv).permute(2, 0, 3, 1, 4)  # [B, H, L, D]
    mask = None if bias is None else layout.pad(bias, float("-inf"))[:, None, None].to(qkv.dtype)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return layout.unpad(attended.transpose(1, 2).flatten(2))


def looped_attention(qkv: Tensor, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
    """One fused call per image: no padding, and never a matrix of all pairs."""
    parts = []
    for rows, key_bias in zip(qkv.split(layout.counts), _split(bias, layout, qkv.dtype), strict=True):
        q, k, v = rows.permute(1, 2, 0, 3).unsqueeze(1)  # [1, H, n, D]
        mask = None if key_bias is None else key_bias.view(1, 1, 1, -1)
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1).flatten(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split(bias: Tensor | None, layout: RaggedLayout, dtype: torch.dtype) -> Sequence[Tensor | None]:
    """The bias of each image. Split, not sliced: the gradient of a slice is as long as the whole batch."""
    return [None] * layout.images if bias is None else bias.to(dtype).split(layout.counts)


def unfused_attention(qkv: Tensor, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
    """Two matrix products and a softmax per image: short images fit the cache, where this beats fused kernels."""
    q, k, v = qkv.unbind(1)
    return _one_by_one(q, k, v, layout, layout, bias).flatten(1)


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_layout: RaggedLayout,
    layout: RaggedLayout,
    bias: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    def each(rows: Tensor, of: RaggedLayout) -> Sequence[Tensor]:
        return rows.transpose(0, 1).split(of.counts, 1)  # [H, n, D]

    parts = []
    images = each(q, query_layout), each(k, layout), each(v, layout), _split(bias, layout, q.dtype)
    for query, key, value, own_bias in zip(*images, strict=True):
        if q.dtype != torch.float32:  # products of half precision copy strided operands, and slower than this
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        key_bias = None if own_bias is None else own_bias.expand(q.shape[1], 1, -1)
        parts.append(_softmax_attention(query, key, value, key_bias, scale).transpose(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def grouped_attention(qkv: Tensor, layout: RaggedLayout, bias: Tensor | None = None, *, size: int) -> Tensor:
    """`unfused_attention` for `size` images at a time, neighbours in length, padded to the longest of the group.

    Rows of one head are gathered straight into [images, heads, length, D]; the kernels that follow copy nothing.
    """
    heads, width = qkv.shape[2:]
    groups = layout.groups(size, heads, 8 if compiles_per_shape(qkv) else 1)
    flat = qkv.flatten(0, 2)  # [M * 3 * H, D]; the same index one head group further is k, two further v
    key_bias = None
    if bias is not None or groups.padded:
        rows = qkv.new_zeros(layout.rows) if bias is None else bias.to(qkv.dtype)
        key_bias = rows.index_select(0, groups.row)
        key_bias = key_bias.masked_fill_(groups.padding, float("-inf")) if groups.padded else key_bias
    parts, slot = [], 0
    for images, longest in groups.shapes:
        cells = slice(slot * heads, (slot + images * longest) * heads)
        index = groups.gather[cells]
        q, k, v = (flat[part * heads :].index_select(0, index).view(-1, longest, width) for part in range(3))
        own = None
        if key_bias is not None:
            own = key_bias[slot : slot + images * longest].view(images, 1, 1, longest)
            own = own.expand(-1, heads, -1, -1).flatten(0, 1)
        parts.append(_softmax_attention(q, k, v, own).view(-1, width))
        slot += images * longest
    return torch.cat(parts).index_select(0, groups.scatter).view(layout.rows, heads * width)


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, query_layout: RaggedLayout, layout: RaggedLayout, bias: Tensor | None = None,
    scale: float | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention of fewer queries than keys; bitwise repeatable, nothing is measured.

    Args:
        q: [Q, H, D], rows of `query_layout`.
        k, v: [M, H, D], rows of `layout`.
        query_layout, layout: the same images, in the same order.
        bias: [M] added to the logits of each key, or None.
        scale: factor on q.k; None for 1 / sqrt(D).
        dropout: share of the attention weights that is dropped, in training.

    Returns:
        [Q, H, D]
    """
    half = q.dtype in (torch.float16, torch.bfloat16) and not dropout
    if half and scale is None and not query_layout.uniform and has_varlen(q.device, q.shape[2]):
        return _varlen(q, k, v, query_layout, layout, bias)
    ragged = query_layout.counts and not query_layout.uniform  # a `BucketLayout` has its counts on the device
    if q.device.type == "cpu" and ragged and layout.longest <= LONG and not dropout:
        return _one_by_one(q, k, v, query_layout, layout, bias, scale)
    if bias is None and not layout.uniform:
        bias = q.new_zeros(layout.rows)
    mask = None if bias is None else layout.pad(bias, float("-inf"))[:, None, None].to(q.dtype)
    padded = query_layout.pad(q), layout.pad(k), layout.pad(v)
    query, key, value = (rows.transpose(1, 2) for rows in padded)  # [B, H, L, D]
    attended = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
    return query_layout.unpad(attended.transpose(1, 2))


def gathered_pairs(pairs: Tensor, query_layout: RaggedLayout, layout: RaggedLayout, prefix: int) -> Tensor:
    """Numbers for pairs of rows that are left: pairs [H, R, R] of all R rows of an image -> [B, H, longest, longest].

    Args:
        pairs: by query and key.
        query_layout, layout: of the queries and of the keys, with `places`.
        prefix: rows of an image that are no patches; they come first.
    """
    queries, keys = (rows.pad(rows.whole_index(prefix)) for rows in (query_layout, layout))  # [B, L]
    return pairs[:, queries[:, :, None], keys[:, None]].transpose(0, 1)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, query_layout: RaggedLayout, layout: RaggedLayout, pairs: Tensor,
    bias: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """`cross_attention` with `pairs` [B, H, longest, longest] added to the logits of each query and key."""
    rows = q.new_zeros(layout.rows) if bias is None else bias.to(q.dtype)
    mask = pairs.to(q.dtype) + layout.pad(rows, float("-inf"))[:, None, None]
    query, key, value = (rows.transpose(1, 2) for rows in (query_layout.pad(q), layout.pad(k), layout.pad(v)))
    attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
    return query_layout.unpad(attended.transpose(1, 2))


def query_log_attention(heads: Heads, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
    """[B, H, longest] log of the attention of `heads.query` to each row of its image; -inf to padding."""
    query = (heads.query * heads.scale).index_select(0, layout.image)  # [M, H, D]
    scores = (heads.keys * query).sum(2, dtype=torch.float32)
    if bias is not None:
        scores = scores + bias[:, None]
    return layout.pad(scores, float("-inf")).transpose(1, 2).log_softmax(2)


def bias_column(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A key bias as one more column of q and k, for kernels that take no bias; with zeros the width grows by 8.

    q.k / sqrt(D) + bias = [q, 1].[k, bias * sqrt(D)] / sqrt(D), so the scale of the old width D must be kept.

    Args:
        q: [Q, H, D].
        k, v: [M, H, D].
        bias: [M].

    Returns:
        The three, of width D + 8.
    """
    one = torch.ones_like(q[..., :1])
    column = (bias * math.sqrt(q.shape[2])).to(k.dtype)[:, None, None].expand_as(k[..., :1])
    return F.pad(torch.cat([q, one], 2), (0, 7)), F.pad(torch.cat([k, column], 2), (0, 7)), F.pad(v, (0, 8))


def varlen_attention(qkv: Tensor, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
    """Variable-length FlashAttention: nothing padded, one launch. CUDA in half precision only."""
    q, k, v = qkv.unbind(1)
    return _varlen(q, k, v, layout, layout, bias).flatten(1)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, query_layout: RaggedLayout, layout: RaggedLayout, bias: Tensor | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    width = q.shape[2]
    if bias is not None:
        q, k, v = bias_column(q, k, v, bias)
    of_queries, of_keys = (rows.cu_seqlens.int() for rows in (query_layout, layout))  # [B + 1]
    out: Any = varlen_attn(q, k, v, of_queries, of_keys, query_layout.longest, layout.longest, scale=width**-0.5)
    return out[..., :width]


@cache
def has_varlen(device: torch.device, head_dim: int) -> bool:
    """Whether `varlen_attention` runs here: a CUDA GPU since Ampere, a torch that has it, a head it takes."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    known = "scale" in inspect.signature(varlen_attn).parameters
    return known and head_dim % 8 == 0 and head_dim + 8 <= 256  # `bias_column` adds 8


def deterministic_attention(qkv: Tensor, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
    """An implementation chosen without measuring: bitwise the same on every run."""
    return by_rule(layout, Shape.of(qkv), qkv.requires_grad)(qkv, layout, bias)


def fastest_attention(qkv: Tensor, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
    """The implementation measured to be fastest on batches like this one."""
    return by_cost(layout, Shape.of(qkv))(qkv, layout, bias)


def by_rule(layout: RaggedLayout, shape: Shape, gradients: bool = False) -> Kernel:
    """Choice of `deterministic_attention`; `gradients`: they flow through it."""
    half = shape.dtype in (torch.float16, torch.bfloat16)
    if half and not layout.uniform and has_varlen(shape.device, shape.head_dim):
        return varlen_attention
    if shape.device.type != "cpu":
        return padded_attention
    # Groups are faster for short images; long ones of wide float32 models exceed the cache (docs/LOG.md). The gradient
    # of a group's gathering is as long as the batch.
    short = layout.longest < 160 and layout.images > 1
    return partial(grouped_attention, size=4) if short and not gradients else looped_attention


class Option(NamedTuple):
    """An implementation that `by_cost` can choose, and how many images it pads to a common length."""

    kernel: Kernel
    group: int = 1


KERNELS: dict[str, Option] = {
    "padded": Option(padded_attention),
    "looped": Option(looped_attention),
    "unfused": Option(unfused_attention),
    "grouped by 2": Option(partial(grouped_attention, size=2), 2),
    "grouped by 4": Option(partial(grouped_attention, size=4), 4),
    "grouped by 8": Option(partial(grouped_attention, size=8), 8),
}
"""what `by_cost` chooses from on a CPU; `padded` only where there is nothing to pad"""
LONG = 1024
"""above so many rows of an image only fused kernels are considered: scores of all pairs would fill the memory"""
LENGTHS = [round(16 * 2 ** (step / 2)) for step in range(19)]
"""where costs are measured: 16, 23, 32, ... 8192; linear between"""


def by_cost(layout: RaggedLayout, shape: Shape) -> Kernel:
    """The kernel whose measured cost, summed over the batch, is least. On other devices than CPUs `by_rule`."""
    if shape.device.type != "cpu":
        return by_rule(layout, shape)
    return _cheapest(tuple(sorted(layout.counts)), shape)


@lru_cache(maxsize=256)
def _cheapest(counts: tuple[int, ...], shape: Shape) -> Kernel:
    candidates = [name for name, option in KERNELS.items() if option.group <= len(counts)]
    if counts[-1] > LONG:
        candidates = ["padded", "looped"]
    if counts[0] < counts[-1] or len(counts) == 1:
        candidates.remove("padded")
    return KERNELS[min(candidates, key=lambda name: batch_cost(name, counts, shape))].kernel


def batch_cost(name: str, counts: tuple[int, ...], shape: Shape) -> float:
    """Predicted seconds of one implementation on images of ascending `counts`, padded in its groups."""
    size, total = KERNELS[name].group, 0.0
    for first in range(0, len(counts), size):
        group = counts[first : first + size]
        total += len(group) * image_cost(name, group[-1], shape)
    return total


def image_cost(name: str, length: int, shape: Shape) -> float:
    """Seconds of one image of `length` rows, linear between measured lengths."""
    upper = min(bisect_left(LENGTHS, length), len(LENGTHS) - 1)
    high = LENGTHS[upper]
    if high == length or upper == 0:
        return measured_cost(name, high, shape)
    low = LENGTHS[upper - 1]
    share = (length - low) / (high - low)
    return (1 - share) * measured_cost(name, low, shape) + share * measured_cost(name, high, shape)


@cache
def measured_cost(name: str, length: int, shape: Shape) -> float:
    """Seconds of one image of `length` rows in a batch of eight (fewer where they are long), best of five."""
    images = max(1, min(8, 4096 // length))
    layout = RaggedLayout([length] * images, shape.device)
    qkv = torch.zeros(layout.rows, 3, shape.heads, shape.head_dim, dtype=shape.dtype, device=shape.device)
    kernel, best = KERNELS[name].kernel, math.inf
    with torch.inference_mode():
        for _ in range(6):
            start = time.perf_counter()
            kernel(qkv, layout, None)
            best = min(best, time.perf_counter() - start)
    return best / images
