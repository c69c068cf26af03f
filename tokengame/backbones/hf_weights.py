"""Weights of Hugging Face's Vision Transformers for the compiled kernels; queries, keys and values become one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokengame.backbones.base import Backbone
from tokengame.backbones.hf_kinds import CLASS_TOKEN, Parts
from tokengame.backbones.parts import activation_of, is_plain_norm, joined, norm_weights
from tokengame.kernels.weights import BlockWeights, LinearWeights, NormWeights

MLPS = (("fc1", "activation_fn", "fc2"), ("up_proj", "act_fn", "down_proj"))
"""names of the parts of MLPs that the kernels run"""


def block_weights(backbone: Backbone, block: Any, parts: Parts) -> BlockWeights | None:
    """Of a block; None where it computes what the kernels do not."""
    attn, mlp = getattr(block, parts.attention), _mlp(getattr(block, parts.mlp))
    norms = [getattr(block, name) for name in (parts.norm1, parts.norm2)]
    if mlp is None or not all(map(is_plain_norm, norms)):
        return None
    layers = [attn.q_proj, attn.k_proj, attn.v_proj, getattr(attn, parts.output), mlp[0], mlp[2]]
    activation = activation_of(mlp[1])
    if activation is None or not all(type(layer) is nn.Linear for layer in layers):
        return None
    scales = [None, None] if parts.scales is None else [getattr(block, name).lambda1 for name in parts.scales]
    proj, fc1, fc2 = layers[3:]
    return BlockWeights(
        norm1=norm_weights(norms[0]),
        qkv=joined(layers[:3]),
        proj=LinearWeights(proj.weight, proj.bias, scales[0]),
        norm2=norm_weights(norms[1]),
        fc1=LinearWeights(fc1.weight, fc1.bias),
        fc2=LinearWeights(fc2.weight, fc2.bias, scales[1]),
        heads=backbone.heads,
        head_dim=backbone.head_dim,
        scale=backbone.scale,
        activation=activation,
    )


def _mlp(module: Any) -> list[Any] | None:
    """First layer, activation and second layer; None where it has others beside them."""
    found = {name for name, _ in module.named_children()}
    return next(([getattr(module, name) for name in names] for names in MLPS if found == set(names)), None)


def head_weights(pool: Any, norm: Any, layer: Any) -> tuple[NormWeights, LinearWeights] | None:
    """Of the final norm and a linear layer on the class token; None where the head is more or less than that."""
    if pool != CLASS_TOKEN or not is_plain_norm(norm) or type(layer) is not nn.Linear:
        return None
    return norm_weights(norm), LinearWeights(layer.weight, layer.bias)


def without_bias(embedding: nn.Module, images: Tensor, options: dict[str, Any]) -> Tensor:
    """What `embedding` gives for black images, if its convolution had no bias: [B, prefix + N, C]."""
    name, layer = next((name, part) for name, part in embedding.named_modules() if isinstance(part, nn.Conv2d))
    changed = {} if layer.bias is None else {f"{name}.bias": torch.zeros_like(layer.bias)}
    found: Tensor = torch.func.functional_call(embedding, changed, torch.zeros_like(images), options)
    return found
