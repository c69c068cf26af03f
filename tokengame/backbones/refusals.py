"""Models that no family accepts: what they are, and what to pass instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tokengame.errors import warn
from tokengame.modules import hooks_of

LIBRARIES = {
    "transformers.": "a Hugging Face model",
    "open_clip.": "an open_clip model",
    "torchvision.": "a torchvision model",
}
"""other people's models, by the module of their class"""
WINDOWS = "it attends inside windows of the grid, whose tokens must all be there"
TIMM = {
    "cait": "its heads exchange their attention weights",
    "convit": "part of its attention weights are positions alone",
    "gemma4_vit": "it pools neighbouring patches of the grid",
    "hiera": WINDOWS,
    "maxxvit": WINDOWS,
    "qwen3_vit": "it merges neighbouring patches of the grid",
    "swin_transformer": WINDOWS,
    "swin_transformer_v2": WINDOWS,
    "swin_transformer_v2_cr": WINDOWS,
    "vision_transformer_sam": WINDOWS,
    "xcit": "it attends between channels, over all tokens",
}
"""why models of timm are not supported, by the module of their class"""


def unwrapped(model: Any) -> Any:
    """The model inside `torch.compile`, DataParallel or DistributedDataParallel, which compute what it computes.

    Warns that the wrapper is left out.
    """
    inner = model
    while (name := _wrapper(inner)) is not None and not hooks_of(inner):
        inner = getattr(inner, name)
    if inner is not model:
        kind = "torch.compile" if hasattr(model, "_orig_mod") else type(model).__name__
        warn(f"the model inside {kind} is pruned without it: wrap the pruned model instead, {kind}(fast)")
    return inner


def _wrapper(model: Any) -> str | None:
    """The attribute under which a wrapper holds a model."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    return "_orig_mod" if isinstance(getattr(model, "_orig_mod", None), nn.Module) else None


def refusal(model: Any, kinds: tuple[type[nn.Module], ...]) -> str:
    """Why no family accepts `model`, and what to pass instead, in one sentence; `kinds` are timm's that some accept."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        return f"a {name} is no model: pass a torch module, e.g. timm.create_model('vit_small_patch16_224')"
    if isinstance(model, torch.jit.ScriptModule):
        return f"{name} is a TorchScript program: pass the timm model that it was made from"
    if _wrapper(model) is not None:
        return f"{name} wraps a model: pass model.{_wrapper(model)}, and wrap the pruned model instead"
    if hasattr(model, "restore") and hasattr(model, "dial"):
        return "the model is pruned already: set its dial, or pass fast.restore()"
    inside = [(f"model.{where}", part) for where, part in model.named_modules() if where and isinstance(part, kinds)]
    if len(inside) == 1:
        (where, part), *_ = inside
        put_back = f"{where} = tokengame.prune({where}, ...)"
        return f"{name} holds a timm {type(part).__name__}: prune that and put it back, {put_back}"
    for module, kind in LIBRARIES.items():
        if type(model).__module__.startswith(module):
            return f"{name} is {kind}, which is not supported yet: pass timm's model of the same weights"
    parent = next((kind for kind in kinds if isinstance(model, kind)), None)
    if parent is not None:
        return _subclass(type(model), parent)
    library, _, module = type(model).__module__.rpartition(".")
    why = f": {TIMM[module]}" if library == "timm.models" and module in TIMM else ""
    return f"{name} is of no supported family{why}; `tokengame doctor --backbone NAME` says which of timm's models are"


def _subclass(kind: type[nn.Module], parent: type[nn.Module]) -> str:
    if kind.__name__.startswith("FSDP"):
        return f"{kind.__name__} is sharded: prune the model first, then call fully_shard on the pruned model"
    own = sorted(key for key, value in vars(kind).items() if callable(value) and hasattr(parent, key))
    reason = f"has its own {', '.join(own)}" if own else "may compute something else"
    return (
        f"{kind.__name__} is a subclass of timm's {parent.__name__} that {reason}, which a pruned model would not call"
    )
