"""What a pruned model takes over from the interface of the model it wraps, and which methods it refuses by name."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, NoReturn

from torch import nn

from tokengame.errors import TokenGameError

ATTRIBUTES = frozenset({
    "pretrained_cfg", "default_cfg", "num_features", "head_hidden_size", "embed_dim", "num_classes", "global_pool",
    "num_prefix_tokens", "num_reg_tokens", "has_class_token", "feature_info", "dynamic_img_size", "patch_embed",
    "get_classifier", "forward_head", "pool",
})  # fmt: skip
"""read from the wrapped model"""
CHANGES = frozenset({"reset_classifier", "set_grad_checkpointing", "set_distilled_training"})
"""methods that change a model: called on modules of the pruned model's own"""
REFUSED = {
    "set_input_size": "set the input size of the model, then prune it",
    "prune_intermediate_layers": "remove layers of the model, then prune it",
    "load_pretrained": "load weights into the model, then prune it",
    "init_weights": "initialise the model, then prune it",
}


def native_attribute(model: nn.Module, name: str) -> Any:
    """What `fast.name` is, where a pruned model has no such attribute of its own.

    Raises:
        AttributeError: the model has none either, or it would not mean the same.
    """
    if name in REFUSED and hasattr(model, name):
        return partial(_refuse, name)
    if name in ATTRIBUTES and hasattr(model, name):
        return getattr(model, name)
    there = f"; the model's own is fast.model.{name}" if hasattr(model, name) else ""
    raise AttributeError(f"a pruned model has no attribute {name!r}{there}")


def _refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    raise TokenGameError(f"a pruned model has no {name}: {REFUSED[name]}")


def renamed_groups(groups: dict[str, Any], prefix: str) -> dict[str, Any]:
    """timm's `group_matcher` for parameters whose names have a prefix."""

    def renamed(pattern: Any) -> Any:
        if isinstance(pattern, str):
            return f"^{re.escape(prefix)}(?:{pattern.removeprefix('^')})"
        return [(renamed(own), suffix) for own, suffix in pattern]

    return {name: renamed(pattern) for name, pattern in groups.items()}
