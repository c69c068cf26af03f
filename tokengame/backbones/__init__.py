"""Which models can run on packed rows: a registry of model families."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models import VisionTransformer as TorchvisionTransformer

from tokengame.backbones.base import Backbone
from tokengame.backbones.hf_vit import HuggingFaceViT
from tokengame.backbones.load import load_model
from tokengame.backbones.of_timm import TIMM
from tokengame.backbones.openclip_vit import OpenCLIPTimm, OpenCLIPViT
from tokengame.backbones.refusals import refusal, unwrapped
from tokengame.backbones.timm_vit import TimmViT
from tokengame.backbones.torchvision_vit import TorchvisionViT
from tokengame.errors import TokenGameError

FAMILIES: tuple[type[Backbone], ...] = (*TIMM, HuggingFaceViT, TorchvisionViT, OpenCLIPViT, OpenCLIPTimm)
"""the supported model families; the first that accepts a model wraps it"""

KINDS = (*(kind for family in TIMM for kind in family.kinds), TorchvisionTransformer)
"""classes whose subclasses may compute something else"""

__all__ = ["FAMILIES", "Backbone", "TimmViT", "load_model", "preprocessing_of", "unfused", "unwrapped", "wrap"]


def wrap(model: Any) -> Backbone:
    """The backbone view of `model`.

    Raises:
        TokenGameError: no family accepts the model, or its family cannot run it exactly.
    """
    for family in FAMILIES:
        if family.accepts(model):
            backbone = family(model)
            assert backbone.watch  # from now on
            return backbone
    raise TokenGameError(refusal(model, _accepted, KINDS))


def _accepted(model: Any) -> bool:
    """Whether `model` is of a family, which may still refuse it."""
    return any(family.accepts(model) for family in FAMILIES)


def preprocessing_of(model: nn.Module) -> dict[str, Any]:
    """How images become the input of `model`: input_size, interpolation, mean, std, crop."""
    return wrap(model).preprocessing()


def unfused(model: nn.Module) -> nn.Module:
    """`model` with attention as two products and a softmax; on some processors faster. Weights are shared."""
    return wrap(model).unfused()
