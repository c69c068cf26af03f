"""Parts that families share: costs of layers, pooling and stochastic depth on packed rows, what kernels can read."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm
from torch import Tensor, nn

from tokengame.kernels.weights import NormWeights
from tokengame.modules import hooks_of
from tokengame.packed.layout import RaggedLayout
from tokengame.packed.rows import append_rows

INACTIVE = (nn.Identity, nn.Dropout, DropPath)
"""modules that do nothing in evaluation mode"""


def linear_macs(module: nn.Module | None) -> int:
    """Multiply-accumulates of one row through every linear layer of `module`, quantised ones too."""
    layers: list[Any] = [] if module is None else [m for m in module.modules() if _is_linear(m)]
    return sum(m.in_features * m.out_features for m in layers if not any(map(_is_linear, m.children())))


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "in_features")


def drop_paths(drop: nn.Module, update: Tensor, layout: RaggedLayout) -> Tensor:
    """Stochastic depth of packed rows: an image's whole update [its rows, C] is dropped, or none of it."""
    if not drop.training or isinstance(drop, nn.Identity):
        return drop(update)
    factor = drop(update.new_ones(layout.images, 1))
    return update * append_rows(factor.index_select(0, layout.image), len(update) - layout.rows)


def masked_pool(kind: str, rows: Tensor, mask: Tensor, size: Tensor | None) -> Tensor:
    """Pooling [B, L, C] -> [B, C] over the rows that `mask` [B, L] marks, as timm's `global_pool` of that name."""
    weight = mask.to(rows.dtype) if size is None else (size * mask).to(rows.dtype)
    mean = torch.einsum("blc,bl->bc", rows, weight) / weight.sum(1, keepdim=True)
    if kind == "avg":
        return mean
    top = rows.masked_fill(~mask[..., None], float("-inf")).amax(1)
    return top if kind == "max" else 0.5 * (top + mean)


def is_plain_linear(layer: Any) -> bool:
    """Whether a layer is its weight and bias and nothing else, so that they can be used without calling it."""
    plain = type(layer) is nn.Linear and type(layer.weight) in (nn.Parameter, Tensor)
    return plain and not hooks_of(layer) and "forward" not in vars(layer)


def is_plain_norm(norm: Any) -> bool:
    return type(norm) in (nn.LayerNorm, LayerNorm) and norm.bias is not None and len(norm.normalized_shape) == 1


def norm_weights(norm: Any) -> NormWeights:
    return NormWeights(norm.weight, norm.bias, norm.eps)
