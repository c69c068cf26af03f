"""What users put on a model beside its weights: which of it a pruned model honours, and which it refuses by name.

A pruned model calls most parts of a model on packed rows [rows, C] of several images, and goes past a few (a block, its
attention), whose work it does itself. Hooks and methods of those would silently not run, so they are refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from tokengame.errors import TokenGameError, warn
from tokengame.modules import computes_weights, global_hooks, hooks_of, replaced_methods

TOKENWISE = (
    "torch.nn.modules", "torch.nn.utils", "torch.ao", "torchao.", "timm.layers", "timm.models.vitamin", "torchvision.",
    "open_clip.", "transformers.", "peft.", "bitsandbytes",
)  # fmt: skip
"""where modules come from that are known to treat every token alone, or are refused by type"""


def check_changes(model: nn.Module, bypassed: Iterable[str], rowwise: Iterable[str]) -> None:
    """Refuse what would be skipped, and say what sees other shapes than natively.

    Args:
        model: the native one.
        bypassed: names of its parts that are never called; "" is the model itself.
        rowwise: names of its parts that are called on packed rows, with all that is in them.

    Raises:
        TokenGameError: a hook or replaced method of a part that is never called.
    """
    for name in bypassed:
        _check_bypassed(f"the model's {name}" if name else "the model", name, model.get_submodule(name))
    known = {id(model.get_submodule(name)) for name in bypassed}
    called = {name: part for name, part in model.named_modules() if _within(name, rowwise) and id(part) not in known}
    called = {name: part for name, part in called.items() if ".parametrizations" not in name}  # they see weights
    seen = [name for name, part in called.items() if _sees_rows(part)]
    if seen or global_hooks():
        what = f"hooks and methods put on {_some(seen)}" if seen else "hooks on all modules"
        warn(f"{what} see packed rows [rows, C] of the tokens that are left, not [images, tokens, C]; blocks and their "
             "attention are not called, so counters that work by hooks count too little")  # fmt: skip
    if any(type(part).__module__.startswith("torch.ao.nn.quantized.dynamic") for part in called.values()):
        warn("dynamically quantised layers take the range of all rows of a call, which are fewer in a pruned model: at "
             "dial 0 it is near the native one, not equal")  # fmt: skip
    strange = [name for name, part in called.items() if not type(part).__module__.startswith(TOKENWISE)]
    if strange:
        kind = type(called[strange[0]]).__name__
        warn(f"{_some(strange)} ({kind}) runs on packed rows [rows, C] of several images: a pruned model is exact only "
             "if it treats every token alone")  # fmt: skip


def _within(name: str, parts: Iterable[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _check_bypassed(where: str, name: str, part: nn.Module) -> None:
    if "_hf_hook" in vars(part) or "_original_forward" in vars(part):
        raise TokenGameError(
            f"{where} was wrapped by Accelerate, whose work a pruned model would skip: prune the model as it was "
            "before (accelerator.unwrap_model(model, keep_fp32_wrapper=False), or remove_hook_from_module of "
            "accelerate.hooks), then prepare the pruned one"
        )
    for hook in hooks_of(part):
        instead = "on the pruned model" if not name else "on a part that it calls (norm1, attn.proj, mlp)"
        raise TokenGameError(f"{where} has {hook}, which a pruned model would not call: remove it, or put it {instead}")
    for method in replaced_methods(part):
        raise TokenGameError(
            f"{where} has another {method} than its class {type(part).__name__} was written with, and a pruned model "
            "would not call it: restore the method"
        )
    if part._compiled_call_impl is not None:
        warn(f"{where} was compiled, which a pruned model does not use: compile the pruned one, torch.compile(fast)")


def check_memory(model: nn.Module) -> None:
    """Refuse a model whose weights have no values, or lie in several places.

    Raises:
        TokenGameError: names the first such parameter, or the devices.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise TokenGameError(f"{name} lies on the meta device, without values: load the weights before pruning")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise TokenGameError(f"the model lies on several devices ({names}): move it to one before pruning")


def _sees_rows(part: nn.Module) -> bool:
    return (bool(hooks_of(part)) and not computes_weights(part)) or "forward" in vars(part)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
