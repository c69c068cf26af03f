"""What a pruned model takes over from the interface of the model it wraps, and which methods it refuses by name."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, NoReturn

from torch import nn

from tokengame.backbones.calls import Interface
from tokengame.errors import TokenGameError


def native_attribute(model: nn.Module, name: str, interface: Interface) -> Any:
    """What `fast.name` is, where a pruned model has no such attribute of its own.

    Raises:
        AttributeError: the model has none either, or it would not mean the same.
    """
    if name in interface.refused and hasattr(model, name):
        return partial(_refuse, name, interface.refused[name])
    if name in interface.attributes and hasattr(model, name):
        return getattr(model, name)
    there = f"; the model's own is fast.model.{name}" if hasattr(model, name) else ""
    raise AttributeError(f"a pruned model has no attribute {name!r}{there}")


def _refuse(name: str, instead: str, *_: Any, **__: Any) -> NoReturn:
    raise TokenGameError(f"a pruned model has no {name}: {instead}")


def renamed_groups(groups: dict[str, Any], prefix: str) -> dict[str, Any]:
    """timm's `group_matcher` for parameters whose names have a prefix."""

    def renamed(pattern: Any) -> Any:
        if isinstance(pattern, str):
            return f"^{re.escape(prefix)}(?:{pattern.removeprefix('^')})"
        return [(renamed(own), suffix) for own, suffix in pattern]

    return {name: renamed(pattern) for name, pattern in groups.items()}
