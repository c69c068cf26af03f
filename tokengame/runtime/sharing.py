"""A second set of modules on the same weights, for a pruned model in another mode than the native one."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from tokengame.modules import Watch


def sharing_copy(model: nn.Module, known: dict[str, nn.Parameter] | None = None) -> nn.Module:
    """A copy of `model` whose parameters and buffers are its own but share memory with the model's.

    Args:
        model: to copy.
        known: parameters of an earlier copy, used again where they share memory: optimisers hold them.
    """
    memo: dict[int, Any] = {id(buffer): buffer.detach() for buffer in model.buffers()}
    for name, parameter in model.named_parameters():
        earlier = (known or {}).get(name)
        if earlier is not None and _same_memory(earlier, parameter):
            memo[id(parameter)] = earlier
        elif type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
        else:
            memo[id(parameter)] = parameter
    return copy.deepcopy(model, memo)


def _same_memory(one: nn.Parameter, other: nn.Parameter) -> bool:
    return one.data_ptr() == other.data_ptr() and one.dtype == other.dtype and one.shape == other.shape


class Sharing:
    """A copy that follows its original as long as only the original changes.

    Args:
        original: stays as it is.
    """

    def __init__(self, original: nn.Module):
        self.original, self.copy = original, sharing_copy(original)
        self._remember()

    def _remember(self) -> None:
        self.watches = Watch(self.original), Watch(self.copy)
        self.parameters = dict(self.original.named_parameters())

    @property
    def outdated(self) -> bool:
        """Whether parts, hooks or settings of the original have changed since it was copied."""
        return not self.watches[0].unchanged

    def follow(self) -> nn.Module | None:
        """A copy of the original as it is now, in the modes of the earlier one; None where that one has changed too.

        It has changed where it was converted or got other parts: those would be lost.
        """
        own = dict(self.copy.named_parameters())
        shared = all(name in own and _same_memory(own[name], p) for name, p in self.parameters.items())
        changed, modes = not self.watches[1].unchanged, {name: m.training for name, m in self.copy.named_modules()}
        if changed or not shared:
            self._remember()
            return None
        self.copy = sharing_copy(self.original, own)
        for name, module in self.copy.named_modules():
            module.training = modes.get(name, modes[""])
        self._remember()
        return self.copy
