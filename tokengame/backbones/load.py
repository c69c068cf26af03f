"""Models by name: any timm model, with timm's weights or a local file, and the embedded one."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import nn

from tokengame.errors import TokenGameError, first_line

EMBEDDED = "fashion"
"""name of the embedded backbone: width 96, 8 blocks, 14 x 14 patches, trained on fashion scenes"""


def load_model(name: str, weights: str | None = None) -> nn.Module:
    """A timm model in evaluation mode.

    Args:
        name: timm's name, or "fashion" for the embedded backbone.
        weights: local checkpoint (.safetensors, .pth); without one timm downloads its own. The classes are the file's.

    Raises:
        TokenGameError: unknown name, weights missing, unreadable, of another architecture, or not finite.
    """
    if name == EMBEDDED:
        with as_file(files("tokengame") / "assets" / "fashion_vit.safetensors") as path:
            return load_model_file(build_embedded(), weights or str(path))
    if not timm.is_model(name.split(".")[0].removeprefix("hf-hub:")) and not name.startswith("hf-hub:"):
        close = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:3]
        raise TokenGameError(f"timm knows no model {name!r}" + (f"; similar: {', '.join(close)}" if close else ""))
    if weights is None:
        try:
            return timm.create_model(name, pretrained=True).eval()
        except Exception as error:
            hint = "pass a local file with --weights"
            raise TokenGameError(f"timm cannot fetch weights for {name} ({first_line(error)}); {hint}") from None
    return load_model_file(untrained(name, **_classes(weights)), weights)


def untrained(name: str, **settings: Any) -> nn.Module:
    """timm's model `name` with random weights."""
    try:
        return timm.create_model(name, **settings).eval()
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise TokenGameError(f"timm knows no model {name!r} ({first_line(error)})") from None


def build_embedded() -> Any:
    """The embedded architecture with random weights: timm's plain ViT, nothing else."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=112, patch_size=8, embed_dim=96, depth=8, num_heads=3, num_classes=10
    )
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 112, 112), "crop_pct": 1.0}
    return model


def _read(weights: str) -> dict[str, torch.Tensor]:
    if not Path(weights).is_file():
        raise TokenGameError(f"no weights file at {weights}")
    try:
        state = load_state_dict(weights, use_ema=False)
    except Exception as error:
        raise TokenGameError(f"weights file {weights} is damaged or of no known format ({first_line(error)})") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise TokenGameError(f"weights file {weights} holds no state dict of tensors")
    return state


def _classes(weights: str) -> dict[str, Any]:
    head = _read(weights).get("head.weight")
    return {} if head is None else {"num_classes": len(head)}


def load_model_file(model: nn.Module, weights: str) -> nn.Module:
    """Load `weights` strictly into `model`."""
    state = {k: v.float() for k, v in _read(weights).items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise TokenGameError(f"{weights} holds another architecture: {first[0]}") from None
    broken = [k for k, v in state.items() if not v.isfinite().all()]
    if broken:
        raise TokenGameError(f"{weights} holds values that are not finite in {broken[0]} ({len(broken)} tensors)")
    return model.eval()
