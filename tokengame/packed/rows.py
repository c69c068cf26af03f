"""Helpers for packed rows [M, C]: means per image, row-wise functions in pieces, padding for shape-specific kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengame.packed.layout import RaggedLayout

PIECE = 2**19
"""numbers in a piece of `add_in_pieces`; the last piece has up to twice as many"""


def segment_mean(values: Tensor, layout: RaggedLayout, weight: Tensor | None = None) -> Tensor:
    """Weighted mean of the rows of each image: [M, C] -> [B, C]; zeros for an image without rows."""
    dtype, values = values.dtype, values.float()  # bfloat16 cannot count beyond 256
    weight = (layout.weight(values) if weight is None else weight).float()
    total = values.new_zeros(layout.images, values.shape[1]).index_add_(0, layout.image, values * weight[:, None])
    mass = values.new_zeros(layout.images).index_add_(0, layout.image, weight)
    return (total / mass.clamp(min=1e-30)[:, None]).to(dtype)


def add_in_pieces(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """rows + function(rows) for a row-wise function of [M, C], on a CPU in pieces where M is large.

    Intermediate results of a piece fit memory that the allocator already holds; fresh pages for the wide hidden layer
    of an MLP cost time. Small pieces cost more, because matrix products are efficient for many rows (docs/LOG.md).
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or rows.device.type != "cpu":
        return rows + function(rows)
    piece = max(PIECE // rows.shape[1], 1)
    pieces = max(len(rows) // piece, 1)
    sizes = [piece] * (pieces - 1) + [len(rows) - piece * (pieces - 1)]  # few distinct sizes: see `padding_rows`
    out = torch.empty_like(rows)
    for part, own in zip(rows.split(sizes), out.split(sizes), strict=True):
        torch.add(part, function(part), out=own)
    return out


def compiles_per_shape(rows: Tensor) -> bool:
    """Whether the first matrix product of every new shape costs half a millisecond more than the second.

    oneDNN compiles a kernel for each shape in half precision on CPUs. Packed batches have new shapes every time, so
    rounding sizes up to a few values pays.
    """
    half = rows.dtype in (torch.bfloat16, torch.float16)
    return half and rows.device.type == "cpu" and not torch.is_grad_enabled()


def padding_rows(rows: Tensor) -> int:
    """How many rows to append to [M, C] so that M is a multiple of 32, where `compiles_per_shape`; otherwise 0."""
    return -len(rows) % 32 if compiles_per_shape(rows) else 0


def without_padding(x: Tensor, number: int) -> Tensor:
    """[M + padding, ...] -> [M, ...], the first `number` rows."""
    return x if x.shape[0] == number else x[:number]


def append_rows(x: Tensor, number: int) -> Tensor:
    """[M, C] -> [M + number, C], zeros at the end."""
    return F.pad(x, (0, 0, 0, number)) if number else x
