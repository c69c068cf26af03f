"""Parts that families share: costs of layers, pooling and stochastic depth on packed rows, what kernels can read."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, RmsNorm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tokengame.backbones.base import KeyValueWeights
from tokengame.errors import TokenGameError
from tokengame.kernels.plain import Activation, LinearWeights, NormWeights
from tokengame.modules import hooks_of
from tokengame.packed.layout import RaggedLayout
from tokengame.packed.rows import append_rows

INACTIVE = (nn.Identity, nn.Dropout, DropPath)
"""modules that do nothing in evaluation mode"""
MIXING = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.conv._ConvNd, nn.MultiheadAttention)
"""modules that let one token see others"""


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


DROPS = ("drop_path", "drop_path1", "drop_path2")
"""names of stochastic depth in blocks"""


def set_drop_path(model: nn.Module, rate: float) -> list[nn.Module]:
    """Give every block of `model` stochastic depth, at a rate that rises from 0 at the first to `rate` at the last.

    Returns:
        the modules that drop, in evaluation mode; empty where the model has no place for any.
    """
    blocks = [module for module in model.modules() if any(map(module._modules.__contains__, DROPS))]
    found: list[nn.Module] = []
    for number, block in enumerate(blocks):
        for name in DROPS:
            if isinstance(getattr(block, name, None), (nn.Identity, DropPath)):
                drop = DropPath(rate * number / max(len(blocks) - 1, 1)).eval()
                setattr(block, name, drop)
                found.append(drop)
    return found


def dropped_patches(drop: nn.Module, x: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """What the patch dropout `drop` leaves of embedded tokens [B, prefix + N, C], and the place of each [B, rows].

    Places are -1 for prefix tokens, else the position in the grid. They go through `drop` beside the tokens.
    """
    place = torch.arange(-prefix, x.shape[1] - prefix, device=x.device).clamp(min=-1) + 1
    digits = torch.stack([place // 128, place % 128], 1).to(x.dtype)  # whole numbers below 256 are exact
    left = drop(torch.cat([x, digits.expand(len(x), -1, -1)], 2))
    high, low = left[..., -2:].long().unbind(2)
    return left[..., :-2], high * 128 + low - 1


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
    kinds = nn.Parameter, Tensor, FakeTensor  # fake while it is exported
    plain = type(layer) is nn.Linear and type(layer.weight) in kinds
    return plain and not hooks_of(layer) and "forward" not in vars(layer)


def is_int8_linear(layer: Any) -> bool:
    """Whether a layer is in int8 by torchao, a scale for each output: some outputs can be computed alone.

    Not where a program is traced: a part of such weights cannot be exported.
    """
    if torch.compiler.is_compiling():
        return False
    kind = type(getattr(layer, "weight", None))
    plain = type(layer) is nn.Linear and kind.__module__.startswith("torchao.") and kind.__name__ == "Int8Tensor"
    by_output = plain and tuple(layer.weight.block_size) == (1, layer.weight.shape[1])
    return by_output and not hooks_of(layer) and "forward" not in vars(layer)


def patch_weights(proj: nn.Module) -> LinearWeights | None:
    """The weights of a patch embedding, where it is a convolution with patches that the kernels know."""
    if type(proj) is not nn.Conv2d or proj.kernel_size not in ((8, 8), (16, 16), (32, 32)):
        return None
    beside = proj.padding not in ((0, 0), "valid") or proj.dilation != (1, 1) or proj.groups != 1
    if beside or proj.stride != proj.kernel_size:
        return None
    return LinearWeights(proj.weight.flatten(1), proj.bias)


RMS_NORMS = (nn.RMSNorm, RmsNorm)


def is_plain_norm(norm: Any) -> bool:
    """Whether a norm is a LayerNorm with weight and bias or an RMSNorm with weight, over the last dimension."""
    if type(norm) in RMS_NORMS:
        return norm.weight is not None and norm.eps is not None and len(norm.normalized_shape) == 1
    return type(norm) in (nn.LayerNorm, LayerNorm) and norm.bias is not None and len(norm.normalized_shape) == 1


def norm_weights(norm: Any) -> NormWeights:
    if type(norm) in RMS_NORMS:
        return NormWeights(norm.weight, None, norm.eps, rms=True)
    return NormWeights(norm.weight, norm.bias, norm.eps)


def joined(layers: list[Any]) -> LinearWeights:
    """One layer with the outputs of all; those without a bias have zeros."""
    weights = [layer.weight.detach() for layer in layers]
    if all(layer.bias is None for layer in layers):
        return LinearWeights(torch.cat(weights), None)
    biases = [weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
              for layer, weight in zip(layers, weights, strict=True)]  # fmt: skip
    return LinearWeights(torch.cat(weights), torch.cat(biases))


ACTIVATIONS: dict[str, Activation] = {
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "tanh_gelu",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "tanh_gelu",
    "transformers.activations.NewGELUActivation": "tanh_gelu",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.SiLUActivation": "silu",
    "open_clip.transformer.QuickGELU": "quick_gelu",
}
"""of the libraries whose models are supported, by module and name of their class"""


def activation_of(module: Any) -> Activation | None:
    """Which activation of the kernels a module computes; None where it is none of them."""
    kind = type(module)
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "tanh_gelu"
    if kind is nn.SiLU:
        return "silu"
    return ACTIVATIONS.get(f"{kind.__module__}.{kind.__qualname__}")


# Attention with the three input projections in one parameter, as in nn.MultiheadAttention and open_clip's Attention


def packed_projection(attn: Any, normed: Tensor, first: int, last: int) -> Tensor:
    """Queries (0), keys (1) and values (2) from `first` to `last` - 1: [M, C] -> [M, last - first, H, D]."""
    width, bias = attn.in_proj_weight.shape[0] // 3, attn.in_proj_bias
    some = slice(first * width, last * width)
    found = F.linear(normed, attn.in_proj_weight[some], None if bias is None else bias[some])
    return found.unflatten(1, (last - first, attn.num_heads, -1))


def packed_key_values(attn: Any) -> KeyValueWeights:
    """Key and value maps of such an attention."""
    heads, bias = attn.num_heads, attn.in_proj_bias
    _, key, value = attn.in_proj_weight.unflatten(0, (3, heads, -1))
    return KeyValueWeights(key, value, None if bias is None else bias.unflatten(0, (3, heads, -1))[2])


def check_packed_attention(where: str, attn: Any) -> None:
    """Refuse a MultiheadAttention that is more than one input projection, attention inside each image, and an output.

    Raises:
        TokenGameError: names it by `where`.
    """
    if type(attn) is not nn.MultiheadAttention:
        raise TokenGameError(f"{where} attends with {type(attn).__name__}; only plain MultiheadAttention is exact")
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn or not attn.batch_first:
        raise TokenGameError(
            f"{where} has a MultiheadAttention with settings of its own (kdim, vdim, add_bias_kv, add_zero_attn or "
            "batch_first=False), which packed rows do not have"
        )


def check_rowwise(where: str, block: nn.Module, attn: nn.Module | None = None) -> None:
    """Refuse a block in which a token sees others outside its attention.

    Raises:
        TokenGameError: names the module.
    """
    mixing = [module for module in block.modules() if isinstance(module, MIXING) and module is not attn]
    if mixing:
        raise TokenGameError(f"{where} holds a {type(mixing[0]).__name__}, whose result depends on other tokens")
