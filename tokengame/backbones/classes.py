"""Which models predict classes. All figures compare predicted classes, so that of an embedding they would be wrong."""

from __future__ import annotations

from functools import cache

import torch
from timm.models import get_pretrained_cfg, list_models
from torch import nn

from tokengame.backbones.base import Backbone
from tokengame.errors import TokenGameError


def require_classes(backbone: Backbone) -> None:
    """Refuse a model whose outputs are not the logits of at least two classes.

    timm says of CLIP's image towers that the width of their embedding is a number of classes. Such a head is told by
    its bias, which the projection of CLIP does not have (timm fills in zeros), and by its width, if that is one that
    timm's weights of this architecture embed in.

    Raises:
        TokenGameError: it has no classifier, one output, or a projection.
    """
    head = getattr(backbone.model, "head", None)
    if backbone.classes == 0 or isinstance(head, nn.Identity):
        raise TokenGameError(_sentence("has no classifier: its output is an embedding"))
    if backbone.classes == 1:
        raise TokenGameError(_sentence("has one output, of which every prediction is the same"))
    name = (getattr(backbone.model, "pretrained_cfg", None) or {}).get("architecture") or ""
    if isinstance(head, nn.Linear) and _has_no_bias(head) and head.out_features in embedding_widths(name):
        raise TokenGameError(_sentence(f"embeds in {head.out_features} dimensions, as {name} does in CLIP"))


def _sentence(what: str) -> str:
    return (
        f"the model {what}, and only predicted classes can be compared yet; give a model with a classifier, in timm "
        "one whose name ends in in1k or the like"
    )


def _has_no_bias(head: nn.Linear) -> bool:
    return head.bias is None or not torch.count_nonzero(head.bias.detach())


@cache
def embedding_widths(name: str) -> frozenset[int]:
    """Widths of the embeddings of timm's weights for the architecture `name`, where those are image towers of CLIP."""
    if "clip" not in name:
        return frozenset()
    configurations = [get_pretrained_cfg(model) for model in list_models(f"{name}.*", pretrained=True)]
    towers = [found for found in configurations if found is not None and "_ft_" not in (found.tag or "")]
    return frozenset(found.num_classes for found in towers)
