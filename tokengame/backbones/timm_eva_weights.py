"""Weights of timm's Eva models for the compiled kernels: DINOv3, ViTs with rotary positions, Perception Encoder."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention, EvaBlock
from torch import Tensor, nn

from tokengame.backbones.parts import INACTIVE, is_plain_norm, joined, norm_weights
from tokengame.backbones.timm_weights import is_none_or_plain, is_plain_mlp, mlp_weights, none_or_norm
from tokengame.kernels.plain import BlockWeights, LinearWeights

ATTENTIONS = (EvaAttention, AttentionRope)


def is_plain_block(block: Any) -> bool:
    """Whether a block is norm, attention, MLP and layer scale as the kernels compute them, by exact type."""
    if type(block) is not EvaBlock or type(block.attn) not in ATTENTIONS:
        return False
    attn = block.attn
    drops = (attn.attn_drop, attn.proj_drop, block.drop_path1, block.drop_path2)
    return (
        is_plain_mlp(block.mlp)
        and is_plain_norm(block.norm1)
        and is_plain_norm(block.norm2)
        and is_none_or_plain(attn.norm)
        and all(type(layer) is nn.Linear for layer in (*_projections(attn), attn.proj))
        and all(type(part) is nn.Identity for part in (attn.q_norm, attn.k_norm))
        and all(type(drop) in INACTIVE for drop in drops)
        and getattr(attn, "gate", None) is None
    )


def _projections(attn: Any) -> list[Any]:
    """The layers that give queries, keys and values: one, or three."""
    return [attn.q_proj, attn.k_proj, attn.v_proj] if attn.qkv is None else [attn.qkv]


def block_weights(block: Any, order: Tensor | None) -> BlockWeights:
    """Of a plain block.

    Args:
        block: of `is_plain_block`.
        order: [D] of the numbers of a head of queries and keys; None: as they are.
    """
    attn = block.attn
    return BlockWeights(
        norm1=norm_weights(block.norm1),
        qkv=_ordered(_qkv(attn), order, attn),
        proj=LinearWeights(attn.proj.weight, attn.proj.bias, block.gamma_1),
        norm2=norm_weights(block.norm2),
        **vars(mlp_weights(block.mlp, block.gamma_2)),
        proj_norm=none_or_norm(attn.norm),
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=attn.head_dim**-0.5,
    )


def _qkv(attn: Any) -> LinearWeights:
    found = joined(_projections(attn))
    if getattr(attn, "q_bias", None) is None:
        return found
    return LinearWeights(found.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]).detach())


def _ordered(layer: LinearWeights, order: Tensor | None, attn: Any) -> LinearWeights:
    """`layer` with the numbers of each head of queries and keys in another order; products of both are the same."""
    if order is None:
        return layer
    shape = (3, attn.num_heads, attn.head_dim)
    index = torch.arange(len(layer.weight)).view(shape)
    index[:2] = index[:2][..., order]
    index = index.flatten()
    return LinearWeights(layer.weight.detach()[index], None if layer.bias is None else layer.bias[index])
