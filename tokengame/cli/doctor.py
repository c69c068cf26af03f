"""`doctor`: what this machine and this installation can do."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ClassVar

from rich.markup import escape

import tokengame
from tokengame.cli.common import Common
from tokengame.errors import TokenGameError
from tokengame.report.console import show_table

if TYPE_CHECKING:
    from torch import nn

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "safetensors", "numpy", "pillow", "tyro")
EXTRAS = {"hub": "datasets"}
"""optional parts, `pip install tokengame[NAME]`, and the package that each brings"""


@dataclass(kw_only=True)
class Doctor(Common):
    """Say what this machine can do, what is installed, and whether a backbone is supported."""

    name: ClassVar[str] = "doctor"
    examples: ClassVar[str] = "tokengame doctor\ntokengame doctor --backbone vit_small_patch16_224 --json"
    first: ClassVar[tuple[str, ...]] = ("backbone", "json")

    backbone: str | None = None
    """timm model name, or "fashion": is it supported, what is its shape, which shipped policies fit; no weights are
    downloaded"""

    def run(self) -> dict[str, Any]:
        """Look at the machine, the versions and the backbone."""
        found = {"machine": machine(), "number_formats": number_formats(self.torch_device), "versions": versions()}
        found["extras"] = {extra: _version(package) for extra, package in EXTRAS.items()}
        if self.backbone is not None:
            found["backbone"] = supported(self.backbone)
        for title, facts in found.items():
            show_table(
                title.replace("_", " "), [(name.replace("_", " "), _text(value)) for name, value in facts.items()]
            )
        return found


def machine() -> dict[str, Any]:
    """Processor, cores, threads that PyTorch uses, memory in GiB, kernels and GPUs."""
    import torch

    from tokengame import kernels
    from tokengame.measure.conditions import processor

    pages = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    memory = hasattr(os, "sysconf") and os.sysconf(pages[0]) * os.sysconf(pages[1]) / 2**30
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory, 1) if memory else None,
        "kernels": str(kernels.status()).removeprefix("kernels: "),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


def number_formats(device: str) -> dict[str, str]:
    """Of each number format "fast", or that it is slow and why."""
    import torch

    from tokengame.kernels import why_slow

    kind = torch.device(device).type
    reasons = {name: why_slow(getattr(torch, name), kind) for name in ("float32", "bfloat16", "float16")}
    return {name: f"slow: {reason}" if reason else "fast" for name, reason in reasons.items()}


def versions() -> dict[str, str | None]:
    """Of tokengame, Python and the packages that matter most."""
    own = {"tokengame": tokengame.__version__, "python": platform.python_version()}
    return own | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    """None where the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def supported(name: str) -> dict[str, Any]:
    """Whether tokengame can run timm's model `name`, and why not; its shape, and the shipped policies that fit it.

    Raises:
        TokenGameError: timm knows no such model.
    """
    from tokengame.backbones import wrap
    from tokengame.backbones.classes import output_of
    from tokengame.policies.policy import SHIPPED, Policy

    model = blank(name)
    try:
        backbone = wrap(model)
        output = output_of(backbone)
    except TokenGameError as error:
        return {"name": name, "supported": False, "reason": str(error)}
    shape, policies = backbone.shape(), []
    for path in sorted(SHIPPED.glob("*.safetensors")):
        wanted = Policy.load(path).card["backbone"]["shape"]
        if all(wanted[key] == value for key, value in shape.items() if key != "input_size"):  # they take any size
            policies.append(path.stem)
    return {"name": name, "supported": True, "reason": None, "output": output, **shape, "shipped_policies": policies}


def blank(name: str) -> nn.Module:
    """timm's model `name` without weights, and without the time and memory that random ones take, where timm can."""
    import torch

    from tokengame.backbones.load import EMBEDDED, build_embedded, untrained

    if name == EMBEDDED:
        return build_embedded()
    try:
        with torch.device("meta"):
            model = untrained(name).to_empty(device="cpu")
        bias = getattr(getattr(model, "head", None), "bias", None)
        if bias is not None:
            torch.nn.init.zeros_(bias)  # by it `output_of` tells an embedding
        return model
    except Exception:  # not every model can be built without numbers
        return untrained(name)


def _text(value: Any) -> str:
    """As a table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    return escape(text) or "none"
