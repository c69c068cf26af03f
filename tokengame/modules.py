"""Looking at PyTorch modules: what was put on them beside their weights, and whether they have changed since."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules

HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}
RECORDERS = ("transformers.utils.output_capturing",)
"""where hooks come from that record outputs for their library, and only while it calls the model itself"""
SETTINGS = (
    "eps", "approximate", "scale", "num_heads", "p", "drop_prob", "prob", "grad_checkpointing", "global_pool",
    "num_classes", "distilled_training", "rotate_half", "gate_last", "variance_epsilon",
)  # fmt: skip
"""attributes of modules that change what they compute"""


_is_training = itemgetter("training")


class Watch:
    """Notices cheaply that a model has changed: parts, hooks, methods and settings, not the values of weights.

    Args:
        model: as it is now.
    """

    def __init__(self, model: nn.Module):
        _, *self.modules = model.modules()  # without the model itself, so that what is kept of it can outlive it
        self.kinds, owners = [*map(type, self.modules)], [vars(part) for part in (model, *self.modules)]
        self.attributes = owners
        self.part_dicts = [own[kind] for own in owners for kind in ("_modules", "_parameters") if own[kind]]
        self.parts = [*_values(self.part_dicts)]
        self.held = self.part_dicts + owners
        self.sizes = [*map(len, self.held)]
        places = [(own, name) for own in owners for name in SETTINGS if name in own]
        self.owners, self.names = [own for own, _ in places], [name for _, name in places]
        self.settings = [own[name] for own, name in places]
        self.hooks = [own[kind] for own in owners for kind in HOOKS]
        self.hook_ids = self._hook_ids()
        self.hooked = any(hooks_of(part) or "forward" in vars(part) for part in model.modules())
        """whether modules have hooks, or a `forward` of their own"""

    @property
    def unchanged(self) -> bool:
        """Whether no part, class, hook, method or setting was added, replaced or removed since."""
        if not all(map(is_, _values(self.part_dicts), self.parts)):  # no loops in Python: this runs for every batch
            return False
        if [*map(dict.get, self.owners, self.names)] != self.settings:
            return False
        same = [*map(len, self.held)] == self.sizes and [*map(type, self.modules)] == self.kinds
        return same and (self._hook_ids() == self.hook_ids if any(self.hooks) else not self.hook_ids)

    def _hook_ids(self) -> list[int]:
        return [key for hooks in self.hooks for key in hooks]

    @property
    def training(self) -> bool:
        """Whether some module is in training mode."""
        return any(map(_is_training, self.attributes))


def _values(dicts: Iterable[dict]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, dicts))


def hooks_of(module: nn.Module) -> list[str]:
    """The kinds of hooks of a module, in words."""
    return [words for kind, words in HOOKS.items() if any(map(_counts, vars(module)[kind].values()))]


def _counts(hook: Any) -> bool:
    return getattr(hook, "__module__", None) not in RECORDERS


def computes_weights(module: nn.Module) -> bool:
    """Whether all hooks of a module are pre-hooks of torch.nn.utils (weight_norm, spectral_norm, pruning masks)."""
    before = vars(module)["_forward_pre_hooks"].values()
    own = all(type(hook).__module__.startswith("torch.nn.utils") for hook in before)
    return own and len(hooks_of(module)) == bool(before)


def in_int8(model: nn.Module) -> bool:
    """Whether layers are quantised, by torchao or by torch.ao."""
    kinds = [(type(part).__module__, type(getattr(part, "weight", None)).__module__) for part in model.modules()]
    return any(of.startswith("torch.ao.nn.quantized") or weight.startswith("torchao.") for of, weight in kinds)


def global_hooks() -> bool:
    """Whether hooks are registered for all modules."""
    return bool(torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks)


def replaced_methods(module: nn.Module) -> list[str]:
    """Methods that were replaced on this module (`module.forward = ...`), or on its class by other code."""
    own = [name for name, value in vars(module).items() if _replaces(type(module), name, value)]
    return own + [name for name in ("forward", "forward_features", "forward_head") if _patched(type(module), name)]


def _replaces(kind: type, name: str, value: Any) -> bool:
    """Whether an attribute of an instance hides another method of its class."""
    method = inspect.getattr_static(kind, name, None)
    return inspect.isfunction(method) and getattr(value, "__func__", None) is not method


def _patched(kind: type, name: str) -> bool:
    """Whether a method of a class was not defined where the class that has it was."""
    for parent in kind.__mro__:
        if name in vars(parent):
            return getattr(vars(parent)[name], "__module__", parent.__module__) != parent.__module__
    return False
