"""`doctor`: what this machine and this installation can do."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ClassVar

from rich.markup import escape

import tokengame
from tokengame.cli.common import WithModel
from tokengame.errors import TokenGameError
from tokengame.report.console import show_table

if TYPE_CHECKING:
    from tokengame.backbones.sources import Settings

PACKAGES = ("torch", "torchvision", "timm", "huggingface_hub", "safetensors", "numpy", "pillow", "tyro")
EXTRAS = {
    "train": "accelerate",
    "hub": "datasets",
    "hf": "transformers",
    "open_clip": "open_clip_torch",
    "engines": "onnxruntime",
    "demo": "gradio",
    "serve": "fastapi",
}
"""optional parts, `pip install tokengame[NAME]`, and the package that each brings"""


@dataclass(kw_only=True)
class Doctor(WithModel):
    """Say what this machine can do, what is installed, and whether a backbone is supported."""

    name: ClassVar[str] = "doctor"
    examples: ClassVar[str] = (
        "tokengame doctor\ntokengame doctor --backbone vit_small_patch16_224 --json\n"
        "tokengame doctor --backbone vit_small_patch14_dinov2 --model-kwargs img_size=224 num_classes=10"
    )
    first: ClassVar[tuple[str, ...]] = ("backbone", "model_kwargs", "json")

    backbone: str | None = None
    """a model's name or folder, as for train: is it supported, what is its shape, which shipped policies fit; no
    weights are downloaded"""

    def run(self) -> dict[str, Any]:
        """Look at the machine, the versions and the backbone."""
        found = {"machine": machine(), "number_formats": number_formats(self.torch_device), "versions": versions()}
        found["extras"] = {extra: _version(package) for extra, package in EXTRAS.items()}
        if self.backbone is not None:
            found["backbone"] = supported(self.backbone, self.settings)
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


def supported(name: str, settings: Settings) -> dict[str, Any]:
    """Whether tokengame can run the model `name`, and why not; its shape, and the shipped policies that fit it.

    Raises:
        TokenGameError: no library knows such a model or setting.
    """
    from tokengame.backbones import wrap
    from tokengame.backbones.classes import output_of
    from tokengame.backbones.load import blank
    from tokengame.policies.policy import SHIPPED, Policy

    model = blank(name, settings)
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


def _text(value: Any) -> str:
    """As a table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    return escape(text) or "none"
