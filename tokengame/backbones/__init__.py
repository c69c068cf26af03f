"""Which models can run on packed rows: a registry of model families."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokengame.backbones.base import Backbone
from tokengame.backbones.hf_vit import HuggingFaceViT
from tokengame.backbones.load import load_model
from tokengame.backbones.refusals import refusal, unwrapped
from tokengame.backbones.timm_vit import TimmViT
from tokengame.errors import TokenGameError

FAMILIES: tuple[type[Backbone], ...] = (TimmViT, HuggingFaceViT)
"""the supported model families; the first that accepts a model wraps it"""

__all__ = [
    "FAMILIES", "Backbone", "HuggingFaceViT", "TimmViT", "load_model", "preprocessing_of", "unfused", "unwrapped",
    "wrap",
]  # fmt: skip


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
    raise TokenGameError(refusal(model, _accepted))


def _accepted(model: Any) -> bool:
    """Whether `model` is of a family, which may still refuse it."""
    return any(family.accepts(model) for family in FAMILIES)


def preprocessing_of(model: nn.Module) -> dict[str, Any]:
    """How images become the input of `model`: input_size, interpolation, mean, std, crop."""
    return wrap(model).preprocessing()


def unfused(model: nn.Module) -> nn.Module:
    """`model` with attention as two products and a softmax; on some processors faster. Weights are shared."""
    return wrap(model).unfused()
