"""What a model's output is: logits of classes, or an embedding. The two are compared by different measures."""

from __future__ import annotations

from functools import cache

import torch
from timm.models import get_pretrained_cfg, list_models
from torch import nn

from tokengame.backbones.base import Backbone
from tokengame.config import KeepWhat
from tokengame.errors import TokenGameError


def output_of(backbone: Backbone) -> KeepWhat:
    """ "logits" of at least two classes, or "embedding": pooled features of a model without a classifier, or projected.

    Raises:
        TokenGameError: it has one output.
    """
    if backbone.classes == 1:
        raise TokenGameError(
            "the model has one output, of which every prediction is the same; give one with a classifier of two "
            "classes or more, or one that embeds (num_classes=0)"
        )
    return "logits" if _embeds(backbone) is None else "embedding"


def classes_of(backbone: Backbone) -> int:
    """How many classes the model predicts; 0 where its output is an embedding or one number."""
    return backbone.classes if backbone.classes > 1 and _embeds(backbone) is None else 0


def require_logits(backbone: Backbone) -> None:
    """Raise TokenGameError unless the outputs can be logits, of two classes or more."""
    if backbone.classes < 2:
        raise TokenGameError(
            f"--keep-what logits needs a classifier of two classes or more, and the model has {backbone.classes}; "
            "leave it out, or give a model with a classifier"
        )


def require_classes(backbone: Backbone) -> None:
    """Refuse a model whose outputs are not the logits of at least two classes.

    Raises:
        TokenGameError: it has no classifier, one output, or a projection.
    """
    if output_of(backbone) == "embedding":
        raise TokenGameError(
            f"the model {_embeds(backbone)}, and predicted classes are compared here; give a model with a classifier, "
            "in timm one whose name ends in in1k or the like"
        )


def _embeds(backbone: Backbone) -> str | None:
    """Why the output is an embedding; None where it is logits.

    timm says of CLIP's image towers that the width of their embedding is a number of classes. Such a head is told by
    its bias, which the projection of CLIP does not have (timm fills in zeros), and by its width, if that is one that
    timm's weights of this architecture embed in.
    """
    head = getattr(backbone.model, "head", None)
    if backbone.classes == 0 or isinstance(head, nn.Identity):
        return "has no classifier: its output is an embedding"
    name = (getattr(backbone.model, "pretrained_cfg", None) or {}).get("architecture") or ""
    if isinstance(head, nn.Linear) and _has_no_bias(head) and head.out_features in embedding_widths(name):
        return f"embeds in {head.out_features} dimensions, as {name} does in CLIP"
    return None


def _has_no_bias(head: nn.Linear) -> bool:
    return head.bias is None or not torch.count_nonzero(head.bias.detach())


@cache
def embedding_widths(name: str) -> frozenset[int]:
    """Widths of the embeddings of timm's weights for the architecture `name`, where those are image towers of CLIP."""
    if "clip" not in name and "pe_core" not in name:
        return frozenset()
    configurations = [get_pretrained_cfg(model) for model in list_models(f"{name}.*", pretrained=True)]
    towers = [found for found in configurations if found is not None and "_ft_" not in (found.tag or "")]
    return frozenset(found.num_classes for found in towers)
