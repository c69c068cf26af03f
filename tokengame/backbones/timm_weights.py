"""Weights of timm's MLPs and of VisionTransformer's blocks for the compiled kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention, GluMlp, LayerScale, Mlp, SwiGLU
from timm.models.vision_transformer import Block
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from tokengame.backbones.parts import INACTIVE, activation_of, is_plain_norm, joined, norm_weights
from tokengame.kernels.plain import Activation, BlockWeights, LinearWeights, NormWeights

FIRST_LAYERS = {Mlp: ("fc1",), GluMlp: ("fc1",), SwiGLU: ("fc1_g", "fc1_x"), GeGluMlp: ("w0", "w1")}
"""by the exact type of an MLP that the kernels compute: what gives its hidden layer, or gates and values"""


@dataclass(frozen=True)
class MlpWeights:
    """What the kernels need of an MLP, as in `BlockWeights`."""

    fc1: LinearWeights
    fc2: LinearWeights
    fc1_norm: NormWeights | None
    fc2_norm: NormWeights | None
    activation: Activation
    gated: bool


def is_plain_mlp(mlp: Any) -> bool:
    """Whether an MLP is one of timm's that the kernels compute, by exact type."""
    if type(mlp) not in FIRST_LAYERS:
        return False
    return (
        activation_of(mlp.act) is not None
        and is_none_or_plain(mlp.norm)
        and all(type(layer) is nn.Linear for layer in (*_first(mlp), _last(mlp)))
        and all(type(drop) in INACTIVE for drop in (mlp.drop1, mlp.drop2))
    )


def _first(mlp: Any) -> list[Any]:
    """The layers of gates and of values, or the one that gives both."""
    return [getattr(mlp, name) for name in FIRST_LAYERS[type(mlp)]]


def _last(mlp: Any) -> Any:
    return mlp.w2 if type(mlp) is GeGluMlp else mlp.fc2


def mlp_weights(mlp: Any, scale: Tensor | None) -> MlpWeights:
    """Of a plain MLP.

    Args:
        mlp: of `is_plain_mlp`.
        scale: [C] that follows it, or None.
    """
    activation = activation_of(mlp.act)
    assert activation is not None
    fc1 = joined(_first(mlp))
    if type(mlp) is GluMlp and mlp.gate_last:
        fc1 = _gates_first(fc1)
    fc2, norm = LinearWeights(_last(mlp).weight, _last(mlp).bias, scale), none_or_norm(mlp.norm)
    first, last = (norm, None) if type(mlp) is GeGluMlp else (None, norm)  # before which layer it is
    return MlpWeights(fc1, fc2, first, last, activation, type(mlp) is not Mlp)


def _gates_first(layer: LinearWeights) -> LinearWeights:
    half = len(layer.weight) // 2
    bias = None if layer.bias is None else torch.roll(layer.bias.detach(), half, 0)
    return LinearWeights(torch.roll(layer.weight.detach(), half, 0), bias)


def is_none_or_plain(norm: Any) -> bool:
    """Whether a norm is one that the kernels compute, or none at all."""
    return type(norm) is nn.Identity or is_plain_norm(norm)


def none_or_norm(norm: Any) -> NormWeights | None:
    return None if type(norm) is nn.Identity else norm_weights(norm)


# Blocks of VisionTransformer


def is_plain_block(block: Any) -> bool:
    """Whether a block is norm, attention, MLP and layer scale as the kernels compute them, by exact type."""
    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    attn = block.attn
    if not is_plain_mlp(block.mlp) or not all(type(layer) is nn.Linear for layer in (attn.qkv, attn.proj)):
        return False
    if not is_plain_norm(block.norm1) or not is_plain_norm(block.norm2) or not is_none_or_plain(attn.norm):
        return False
    nothing = (attn.q_norm, attn.k_norm)
    drops = (attn.attn_drop, attn.proj_drop, block.drop_path1, block.drop_path2)
    scales = (block.ls1, block.ls2)
    return (
        all(type(part) is nn.Identity for part in nothing)
        and all(type(drop) in INACTIVE for drop in drops)
        and all(type(scale) in (nn.Identity, LayerScale) for scale in scales)
        and getattr(attn, "gate", None) is None
    )


def block_weights(block: Any) -> BlockWeights:
    attn = block.attn
    scales = [None if isinstance(ls, nn.Identity) else ls.gamma for ls in (block.ls1, block.ls2)]
    return BlockWeights(
        norm1=norm_weights(block.norm1),
        qkv=LinearWeights(attn.qkv.weight, attn.qkv.bias),
        proj=LinearWeights(attn.proj.weight, attn.proj.bias, scales[0]),
        norm2=norm_weights(block.norm2),
        **vars(mlp_weights(block.mlp, scales[1])),
        proj_norm=none_or_norm(attn.norm),
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=attn.scale,
    )
