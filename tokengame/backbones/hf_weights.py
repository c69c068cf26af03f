"""Weights of Hugging Face's Vision Transformers for the compiled kernels; queries, keys and values become one layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tokengame.backbones.hf_kinds import CLASS_TOKEN, Parts
from tokengame.backbones.parts import INACTIVE, activation_of, is_plain_norm, joined, norm_weights
from tokengame.kernels.plain import BlockWeights, LinearWeights, NormWeights

MLPS = (
    ("fc1", "activation_fn", "fc2"),
    ("up_proj", "act_fn", "down_proj"),
    ("gate_proj", "act_fn", "down_proj", "up_proj"),
)
"""names of the parts of MLPs that the kernels run, in the order of use; where there are gates, the values last"""
RMS_NORMS = ("Aimv2RMSNorm",)


def block_weights(backbone: Any, block: Any) -> BlockWeights | None:
    """Of a block of a `HuggingFaceViT`; None where it computes what the kernels do not."""
    parts = backbone.parts
    attn, mlp = getattr(block, parts.attention), _mlp(getattr(block, parts.mlp))
    norm1, norm2 = (_norm(getattr(block, name)) for name in (parts.norm1, parts.norm2))
    scales = _scales(block, parts)
    if mlp is None or norm1 is None or norm2 is None or scales is None or not _drops_nothing(block, parts):
        return None
    first, act, fc2, *values = mlp
    projections, proj = [attn.q_proj, attn.k_proj, attn.v_proj], getattr(attn, parts.output)
    activation = activation_of(act)
    if activation is None or not all(type(layer) is nn.Linear for layer in (*projections, proj, first, fc2, *values)):
        return None
    return BlockWeights(
        norm1=norm1,
        qkv=joined(projections),
        proj=LinearWeights(proj.weight, proj.bias, scales[0]),
        norm2=norm2,
        fc1=joined([first, *values]),
        gated=bool(values),
        fc2=LinearWeights(fc2.weight, fc2.bias, scales[1]),
        heads=backbone.heads,
        head_dim=backbone.head_dim,
        scale=backbone.scale,
        activation=activation,
    )


def _scales(block: Any, parts: Parts) -> list[Tensor | None] | None:
    """Of what attention and MLP add; None where something else than the library's own scales it."""
    if parts.scales is None:
        return [None, None]
    modules = [getattr(block, name) for name in parts.scales]
    return [module.lambda1 for module in modules] if all(map(_is_own, modules)) else None


def _drops_nothing(block: Any, parts: Parts) -> bool:
    """Whether what stands for dropout does nothing in evaluation mode."""
    drop = nn.Identity() if parts.drop is None else getattr(block, parts.drop)
    return type(drop) in INACTIVE or _is_own(drop)


def _is_own(module: Any) -> bool:
    """Whether a module is one of the library's own."""
    return type(module).__module__.startswith("transformers.models.")


def _norm(module: Any) -> NormWeights | None:
    """None where it is no norm that the kernels compute."""
    if is_plain_norm(module):
        return norm_weights(module)
    if _is_own(module) and type(module).__name__ in RMS_NORMS:
        return NormWeights(module.weight, None, module.variance_epsilon, rms=True)
    return None


def _mlp(module: Any) -> list[Any] | None:
    """First layer, activation and last layer, of gated ones also that of the values; None where it has others."""
    if not _is_own(module):
        return None
    found = {name for name, _ in module.named_children()}
    return next(([getattr(module, name) for name in names] for names in MLPS if found == set(names)), None)


def head_weights(pool: Any, norm: Any, layer: Any) -> tuple[NormWeights, LinearWeights] | None:
    """Of the final norm and a linear layer on the class token; None where the head is more or less than that."""
    if pool != CLASS_TOKEN or not is_plain_norm(norm) or type(layer) is not nn.Linear:
        return None
    return norm_weights(norm), LinearWeights(layer.weight, layer.bias)


EMBEDDING = (nn.Conv2d, nn.Embedding, nn.Dropout, nn.Identity)
"""modules of an embedding beside the library's own"""


def is_plain_embedding(embedding: nn.Module) -> bool:
    """Whether an embedding is a convolution, positions that are added and tokens that are put before; by exact type."""
    modules = list(embedding.modules())
    known = all(type(part) in EMBEDDING or (_is_own(part) and any(part.children())) for part in modules)
    return known and sum(type(part) is nn.Conv2d for part in modules) == 1


def without_bias(embedding: nn.Module, images: Tensor, options: dict[str, Any]) -> Tensor:
    """What a plain embedding gives for black images, if its convolution had no bias: [B, prefix + N, C]."""
    twin = copy.deepcopy(embedding)  # other threads may be calling the embedding itself
    for layer in twin.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            layer.bias.data.zero_()
    found: Tensor = twin(torch.zeros_like(images), **options)
    return found
