"""Models that no family accepts: what they are, and what to pass instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tokengame.errors import warn
from tokengame.modules import hooks_of

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


def refusal(model: Any, accepted: Callable[[Any], bool], kinds: tuple[type[nn.Module], ...]) -> str:
    """Why no family accepts `model`, and what to pass instead, in one sentence.

    Args:
        model: that no family accepts.
        accepted: whether one accepts a model.
        kinds: classes that are supported, whose subclasses may compute something else.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        return f"a {name} is no model: pass a torch module, e.g. timm.create_model('vit_small_patch16_224')"
    if isinstance(model, torch.jit.ScriptModule):
        return f"{name} is a TorchScript program: pass the timm model that it was made from"
    if _wrapper(model) is not None:
        return f"{name} wraps a model: pass model.{_wrapper(model)}, and wrap the pruned model instead"
    if hasattr(model, "restore") and hasattr(model, "dial"):
        return "the model is pruned already: set its dial, or pass fast.restore()"
    inside = _outermost([where for where, part in model.named_modules() if where and accepted(part)])
    if len(inside) == 1:
        put_back = f"model.{inside[0]} = tokengame.prune(model.{inside[0]}, ...)"
        part = type(model.get_submodule(inside[0]))
        return f"{name} holds a {_library(part)} {part.__name__}: prune that and put it back, {put_back}"
    if type(model).__module__.startswith("transformers."):
        return (
            f"{name} is a Hugging Face model of a kind that is not supported; supported are ViT, DeiT, DINOv2, DINOv3, "
            "the image towers of CLIP and SigLIP, ViTMAE, ViTMSN, I-JEPA and AIMv2, also for image classification"
        )
    if type(model).__module__.startswith("open_clip."):
        return _of_open_clip(model, accepted, kinds)
    parent = next((kind for kind in kinds if isinstance(model, kind)), None)
    if parent is not None:
        return _subclass(type(model), parent)
    if type(model).__module__.startswith("torchvision."):
        return f"{name} has no tokens to prune: of torchvision's models VisionTransformer has (vit_b_16, ...)"
    library, _, module = type(model).__module__.rpartition(".")
    why = f": {TIMM[module]}" if library == "timm.models" and module in TIMM else ""
    return f"{name} is of no supported family{why}; `tokengame doctor --backbone NAME` says which of timm's models are"


def _library(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _of_open_clip(model: Any, accepted: Callable[[Any], bool], kinds: tuple[type[nn.Module], ...]) -> str:
    name = type(model).__name__
    for part in ("visual", "trunk"):
        if isinstance(getattr(model, part, None), nn.Module):
            return f"{name}.{part} cannot be pruned: {refusal(getattr(model, part), accepted, kinds)}"
    return f"{name} has no tokens to prune: of open_clip's image towers VisionTransformer has, and TimmModel with a ViT"


def _outermost(names: list[str]) -> list[str]:
    """Those of some modules, by name, that are not inside another of them."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _subclass(kind: type[nn.Module], parent: type[nn.Module]) -> str:
    if kind.__name__.startswith("FSDP"):
        return f"{kind.__name__} is sharded: prune the model first, then call fully_shard on the pruned model"
    own = sorted(key for key, value in vars(kind).items() if callable(value) and hasattr(parent, key))
    reason = f"has its own {', '.join(own)}" if own else "may compute something else"
    return (
        f"{kind.__name__} is a subclass of {_library(parent)}'s {parent.__name__} that {reason}, which a pruned model "
        "would not call"
    )
