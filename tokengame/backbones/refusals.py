"""Models that no family accepts: what they are, and what to pass instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokengame.errors import warn
from tokengame.modules import hooks_of

LIBRARIES = {
    "open_clip.": "an open_clip model",
    "torchvision.": "a torchvision model",
}
"""other people's models, by the module of their class"""


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


def refusal(model: Any, accepted: Callable[[Any], bool]) -> str:
    """Why no family accepts `model`, and what to pass instead, in one sentence.

    Args:
        model: that no family accepts.
        accepted: whether one accepts a model.
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
        library = part.__module__.partition(".")[0]
        return f"{name} holds a {library} {part.__name__}: prune that and put it back, {put_back}"
    for module, kind in LIBRARIES.items():
        if type(model).__module__.startswith(module):
            return f"{name} is {kind}, which is not supported yet: pass timm's model of the same weights"
    if type(model).__module__.startswith("transformers."):
        return (
            f"{name} is a Hugging Face model of a kind that is not supported; supported are ViT, DeiT, DINOv2, DINOv3, "
            "the image towers of CLIP and SigLIP, ViTMAE, ViTMSN, I-JEPA and AIMv2, also for image classification"
        )
    if isinstance(model, VisionTransformer):
        return _subclass(model)
    return (
        f"{name} is not timm's VisionTransformer, and no other family of models is supported: "
        "`tokengame doctor --backbone NAME` says which of timm's are"
    )


def _outermost(names: list[str]) -> list[str]:
    """Those of some modules, by name, that are not inside another of them."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _subclass(model: Any) -> str:
    kind = type(model)
    if kind.__name__.startswith("FSDP"):
        return f"{kind.__name__} is sharded: prune the model first, then call fully_shard on the pruned model"
    own = sorted(key for key, value in vars(kind).items() if callable(value) and hasattr(VisionTransformer, key))
    reason = f"has its own {', '.join(own)}" if own else "may compute something else"
    return (
        f"{kind.__name__} is a subclass of timm's VisionTransformer that {reason}, which a pruned model would not call"
    )
