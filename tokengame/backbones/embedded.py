"""The embedded backbone: a small Vision Transformer that has learned fashion scenes."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

import timm
from torch import nn

from tokengame.backbones.checkpoint import load_into, read_state
from tokengame.backbones.sources import Settings
from tokengame.files import Note
from tokengame.ranges import require


def build_embedded() -> Any:
    """Its architecture with random weights: timm's plain ViT, width 96, 8 blocks, 14 x 14 patches, nothing else."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=112, patch_size=8, embed_dim=96, depth=8, num_heads=3, num_classes=10
    )
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 112, 112), "crop_pct": 1.0}
    return model


def untrained(name: str, settings: Settings) -> nn.Module:
    """The architecture with random weights."""
    require(not settings, f"--model-kwargs is for models of libraries; {name} is as it is")
    return build_embedded().eval()


def pretrained(name: str, settings: Settings, note: Note) -> nn.Module:
    """With its own weights."""
    with as_file(files("tokengame") / "assets" / "fashion_vit.safetensors") as path:
        return from_file(name, str(path), settings, note)


def from_file(name: str, weights: str, settings: Settings, note: Note) -> nn.Module:
    """With other weights of the same architecture."""
    return load_into(untrained(name, settings), read_state(weights, note), weights, note)
