"""Heads and MLPs filled up with zeros, to multiples of `TILE`, which the kernels take: blocks compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengame.kernels.library import TILE
from tokengame.kernels.plain import BlockWeights, LinearWeights, ModelWeights, NormWeights

WIDEST = 1.5
"""times as wide as the model's heads may be, filled up with zeros, on which attention computes for nothing"""


def fits(model: ModelWeights) -> bool:
    """Whether the kernels take its widths once blocks are widened, and layers take what those before them give."""
    width, dims = model.blocks[0].head_dim, [len(block.norm1.weight) for block in model.blocks]
    if model.patches is not None:
        dims.append(model.patches.weight.shape[0])
    if model.head is not None:
        dims.append(model.head[1].weight.shape[1])
    same = len({(block.heads, block.head_dim) for block in model.blocks}) == 1
    even = width % 2 == 0 and _up(width) <= WIDEST * width
    return same and even and all(dim % TILE == 0 for dim in dims) and all(map(_is_whole, model.blocks))


def widened(block: BlockWeights) -> BlockWeights:
    """The block with all widths multiples of `TILE`; of gates and values in `fc1`, `TILE` of each come in turn then."""
    return _wide_heads(_wide_mlp(block))


def slots_of(head_dim: int) -> Tensor | None:
    """[D] where the numbers of a head are in the wider one; None where it is not wider.

    Each half is at the beginning of a half of the wider one. So halves still turn with each other, and the same values
    are compared (see `decisions.similarity_of`).
    """
    if head_dim % TILE == 0:
        return None
    half = torch.arange(head_dim // 2)
    return torch.cat([half, half + _up(head_dim) // 2])


def _up(width: int) -> int:
    return width + -width % TILE


def _is_whole(block: BlockWeights) -> bool:
    """Whether layers and norms take what those before them give."""
    dim, inner, hidden = len(block.norm1.weight), block.heads * block.head_dim, block.fc2.weight.shape[1]
    layers = (block.qkv, block.proj, block.fc1, block.fc2)
    shapes = (3 * inner, dim), (dim, inner), (hidden * (2 if block.gated else 1), dim), (dim, hidden)
    norms = (block.norm2, dim), (block.proj_norm, inner), (block.fc1_norm, dim), (block.fc2_norm, hidden)
    return all(tuple(layer.weight.shape) == shape for layer, shape in zip(layers, shapes, strict=True)) and all(
        norm is None or len(norm.weight) == width for norm, width in norms
    )


def _wide_mlp(block: BlockWeights) -> BlockWeights:
    hidden = block.fc2.weight.shape[1]
    spare, parts = -hidden % TILE, 2 if block.gated else 1
    if not spare and not block.gated:
        return block

    def filled(numbers: Tensor) -> Tensor:  # [hidden, ..], or [2 * hidden, ..] of gates and values
        rows = F.pad(numbers.view(parts, hidden, -1), (0, 0, 0, spare))
        return rows.unflatten(1, (-1, TILE)).transpose(0, 1).reshape(-1, *numbers.shape[1:])

    return replace(
        block,
        fc1=replace(block.fc1, **_both(block.fc1, filled)),
        fc2=replace(block.fc2, weight=F.pad(block.fc2.weight.detach(), (0, spare))),
        fc2_norm=_wide_norm(block.fc2_norm, lambda numbers: F.pad(numbers, (0, spare))),
    )


def _wide_heads(block: BlockWeights) -> BlockWeights:
    width, slots = block.head_dim, slots_of(block.head_dim)
    if slots is None:
        return block

    def spread(numbers: Tensor) -> Tensor:  # [heads * D, ..] of one or more parts
        rows = numbers.unflatten(0, (-1, width))
        wide = rows.new_zeros(len(rows), _up(width), *rows.shape[2:])
        return wide.index_copy_(1, slots, rows).flatten(0, 1)

    return replace(
        block,
        head_dim=_up(width),
        qkv=replace(block.qkv, **_both(block.qkv, spread)),
        proj=replace(block.proj, weight=spread(block.proj.weight.detach().T).T),
        proj_norm=_wide_norm(block.proj_norm, spread),
    )


def _both(layer: LinearWeights | NormWeights, wider: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Weight and bias by `wider`."""
    return {
        "weight": wider(layer.weight.detach()),
        "bias": None if layer.bias is None else wider(layer.bias.detach()),
    }


def _wide_norm(norm: NormWeights | None, wider: Callable[[Tensor], Tensor]) -> NormWeights | None:
    return None if norm is None else replace(norm, **_both(norm, wider), counted=wider(torch.ones_like(norm.weight)))
