"""Vision Transformers of Hugging Face transformers as a table: how each names its parts, and how it predicts.

The library repeats its block for each architecture, and they differ in names alone: norm, attention with a linear layer
each for queries, keys and values, norm, MLP; some scale or drop what a half-block adds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor

from tokengame.backbones.parts import linear_macs, masked_pool
from tokengame.packed.layout import RaggedLayout


class Parts(NamedTuple):
    """Where a tower has its blocks and its norm, and what the parts of a block are called."""

    blocks: str = "layers"
    norm: str = "layernorm"
    """after the last block"""
    norm1: str = "layernorm_before"
    attention: str = "attention"
    output: str = "o_proj"
    """linear layer after the heads of an attention"""
    norm2: str = "layernorm_after"
    mlp: str = "mlp"
    scales: tuple[str, str] | None = None
    """of what attention and MLP add"""
    drop: str | None = None
    """dropout or stochastic depth of what attention and MLP add"""
    start: str | None = None
    """norm after the embedding"""
    gives_normed: bool = True
    """whether `last_hidden_state` is behind the norm"""


VIT = Parts(drop="dropout")
DINO = Parts(
    "encoder.layer", "layernorm", "norm1", "attention", "o_proj", "norm2", "mlp",
    scales=("layer_scale1", "layer_scale2"), drop="drop_path",
)  # fmt: skip
DINO_V3 = DINO._replace(blocks="model.layer", norm="norm")
SIGLIP = Parts("encoder.layers", "post_layernorm", "layer_norm1", "self_attn", "out_proj", "layer_norm2", "mlp")
CLIP = SIGLIP._replace(start="pre_layrnorm", gives_normed=False)
AIM = Parts("encoder.layers", "rms_norm", "rms_norm1", "attention", "out_proj", "rms_norm2", "ffn")


def _no_macs(_backbone: Any, rows: Tensor) -> Tensor:
    return rows * 0


class Pool(NamedTuple):
    """What is read from the rows after the last block, which are not normed yet."""

    read: Callable[[Any, Tensor, RaggedLayout, Tensor | None], Tensor]
    """backbone, rows [M, C], layout, size [M] -> [B, C']"""
    macs: Callable[[Any, Tensor], Tensor] = _no_macs
    """backbone, rows [...] of an image -> multiply-accumulates [...], linear layers on what was pooled left out"""
    prefix_only: bool = False
    """whether rows of patches are not read"""


def _class_token(backbone: Any, x: Tensor, layout: RaggedLayout, _size: Tensor | None) -> Tensor:
    return backbone.final_norm(layout.first(x))


def _pooler(backbone: Any, x: Tensor, layout: RaggedLayout, size: Tensor | None) -> Tensor:
    token, pooler = _class_token(backbone, x, layout, size), backbone.tower.pooler
    return token if pooler is None else pooler(token[:, None])  # it reads the first row


def _both_heads(backbone: Any, x: Tensor, layout: RaggedLayout, _size: Tensor | None) -> Tensor:
    one, other = both_logits(backbone, backbone.final_norm(layout.firsts(x, backbone.prefix)))
    return (one + other) / 2


def both_logits(backbone: Any, normed: Tensor) -> list[Tensor]:
    """[B, classes] logits of class token and distillation token; normed [B, at least 2, C]."""
    return [backbone.model.cls_classifier(normed[:, 0]), backbone.model.distillation_classifier(normed[:, 1])]


def _mean(backbone: Any, x: Tensor, layout: RaggedLayout, size: Tensor | None) -> Tensor:
    return _mean_of_patches(backbone, backbone.final_norm(x), layout, size)


def _mean_of_patches(backbone: Any, x: Tensor, layout: RaggedLayout, size: Tensor | None) -> Tensor:
    mask = layout.mask.clone()
    mask[:, : backbone.prefix] = False
    return masked_pool("avg", layout.pad(x), mask, None if size is None else layout.pad(size))


def _class_and_mean(backbone: Any, x: Tensor, layout: RaggedLayout, size: Tensor | None) -> Tensor:
    normed = backbone.final_norm(x)
    return torch.cat([layout.first(normed), _mean_of_patches(backbone, normed, layout, size)], 1)


def _key_bias(x: Tensor, layout: RaggedLayout, size: Tensor | None) -> Tensor:
    """[B, longest] for the keys of a pooling attention: log size, and -inf where there is no row."""
    rows = x.new_zeros(layout.rows) if size is None else size.log().to(x.dtype)
    return layout.pad(rows, float("-inf"))


def _siglip_head(backbone: Any, x: Tensor, layout: RaggedLayout, size: Tensor | None) -> Tensor:
    head, rows = backbone.tower.head, layout.pad(backbone.final_norm(x))
    probe, bias = head.probe.expand(layout.images, -1, -1), _key_bias(x, layout, size)
    attended = head.attention(probe, rows, rows, key_padding_mask=bias, need_weights=False)[0]
    return (attended + head.mlp(head.layernorm(attended)))[:, 0]


def _siglip_macs(backbone: Any, rows: Tensor) -> Tensor:
    return rows * (2 * backbone.dim**2 + 2 * backbone.dim) + 2 * backbone.dim**2 + linear_macs(backbone.tower.head.mlp)


def _aim_head(backbone: Any, x: Tensor, layout: RaggedLayout, size: Tensor | None) -> Tensor:
    head, rows = backbone.tower.head, layout.pad(backbone.final_norm(x))
    query = head.cls_token.expand(layout.images, -1, -1)
    q, k, v = (part.unflatten(2, (head.num_heads, -1)).transpose(1, 2) for part in
               (query, head.k_proj(rows), head.v_proj(rows)))  # fmt: skip
    attended = F.scaled_dot_product_attention(q, k, v, _key_bias(x, layout, size)[:, None, None])
    return head.output_proj(attended.transpose(1, 2).flatten(2))[:, 0]


def _aim_macs(backbone: Any, rows: Tensor) -> Tensor:
    return rows * (2 * backbone.dim**2 + 2 * backbone.dim) + backbone.dim**2


CLASS_TOKEN = Pool(_class_token, prefix_only=True)
POOLER = Pool(_pooler, prefix_only=True)
BOTH_HEADS = Pool(_both_heads, prefix_only=True)
MEAN = Pool(_mean)
RAW_MEAN = Pool(_mean_of_patches)
CLASS_AND_MEAN = Pool(_class_and_mean)
SIGLIP_HEAD = Pool(_siglip_head, _siglip_macs)
AIM_HEAD = Pool(_aim_head, _aim_macs)


class Normalisation(NamedTuple):
    """Mean and standard deviation of the channels of images for which a kind of model is usually trained."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalisation(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
HALF = Normalisation(IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
OF_CLIP = Normalisation(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


class Kind(NamedTuple):
    """What a class of models is made of, and how it predicts."""

    parts: Parts
    pool: Pool
    finish: str | None = None
    """layer of the model on what was pooled"""
    tower: str | None = None
    """attribute of the model that holds embedding and blocks; None: it holds them itself"""
    field: str | None = "logits"
    """name of the prediction in the output; None where the output has none"""
    images: Normalisation = IMAGENET


def _classifier(parts: Parts, pool: Pool, tower: str, images: Normalisation = IMAGENET) -> Kind:
    return Kind(parts, pool, "classifier", tower, images=images)


def _of_clip(name: str) -> dict[str, Kind]:
    return {
        f"{name}VisionModel": Kind(CLIP, CLASS_TOKEN, field="pooler_output", images=OF_CLIP),
        f"{name}VisionModelWithProjection": Kind(
            CLIP, CLASS_TOKEN, "visual_projection", "vision_model", "image_embeds", OF_CLIP
        ),
        f"{name}ForImageClassification": _classifier(CLIP, RAW_MEAN, "vision_model", OF_CLIP),
    }


KINDS = {
    "ViTModel": Kind(VIT, POOLER, field="pooler_output", images=HALF),
    "ViTForImageClassification": _classifier(VIT, CLASS_TOKEN, "vit", HALF),
    "DeiTModel": Kind(VIT, POOLER, field="pooler_output"),
    "DeiTForImageClassification": _classifier(VIT, CLASS_TOKEN, "deit"),
    "DeiTForImageClassificationWithTeacher": Kind(VIT, BOTH_HEADS, tower="deit"),
    "ViTMSNModel": Kind(VIT, CLASS_TOKEN, field=None),
    "ViTMSNForImageClassification": _classifier(VIT, CLASS_TOKEN, "vit"),
    "ViTMAEModel": Kind(VIT, CLASS_TOKEN, field=None),
    "IJepaModel": Kind(VIT, MEAN, field=None),
    "IJepaForImageClassification": _classifier(VIT, MEAN, "ijepa"),
    "Dinov2Model": Kind(DINO, CLASS_TOKEN, field="pooler_output"),
    "Dinov2ForImageClassification": _classifier(DINO, CLASS_AND_MEAN, "dinov2"),
    "Dinov2WithRegistersModel": Kind(DINO, CLASS_TOKEN, field="pooler_output"),
    "Dinov2WithRegistersForImageClassification": _classifier(DINO, CLASS_AND_MEAN, "dinov2_with_registers"),
    "DINOv3ViTModel": Kind(DINO_V3, CLASS_TOKEN, field="pooler_output"),
    **_of_clip("CLIP"),
    **_of_clip("MetaClip2"),
    "SiglipVisionModel": Kind(SIGLIP, SIGLIP_HEAD, field="pooler_output", images=HALF),
    "SiglipForImageClassification": _classifier(SIGLIP, MEAN, "vision_model", HALF),
    "Aimv2VisionModel": Kind(AIM, AIM_HEAD, field="pooler_output", images=OF_CLIP),
}
"""by name of class"""

_NAFLEX = (
    "reads patches of images of any shape with a mask, not images: fixed-size SigLIP 2 models are "
    "SiglipVisionModel or SiglipForImageClassification"
)
IMPOSSIBLE = {
    "ViTMAEForPreTraining": (
        "masks patches at random and draws them again: pass its encoder, model.vit, with model.config.mask_ratio = 0.0"
    ),
    "Siglip2VisionModel": _NAFLEX,
    "Siglip2ForImageClassification": _NAFLEX,
}
"""classes that cannot be run exactly, and why"""
