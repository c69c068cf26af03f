"""Models by name, whatever library they are of, with the library's weights or a file: a registry of sources."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from torch import nn

import tokengame.backbones.embedded as embedded
import tokengame.backbones.from_hugging_face as from_hugging_face
import tokengame.backbones.from_open_clip as from_open_clip
import tokengame.backbones.from_timm as from_timm
import tokengame.backbones.from_torchvision as from_torchvision
from tokengame.backbones.hub import offline_at_once, reason
from tokengame.backbones.sources import Settings, Source
from tokengame.errors import TokenGameError
from tokengame.files import Note, require_file, unsaid
from tokengame.ranges import require

EMBEDDED = "fashion"
"""name of the embedded backbone"""
SOURCES: dict[str, Source] = {"open_clip": from_open_clip, "torchvision": from_torchvision}
"""by the part of a name before a colon; all other names are timm's, or those of folders and of models on the hub"""


def load_model(name: str, weights: str | None = None, settings: Settings | None = None, note: Note = unsaid) -> Any:
    """A model in evaluation mode.

    Args:
        name: as timm takes it (also "hf-hub:timm/...", "local-dir:FOLDER"); "open_clip:NAME" or "open_clip:NAME/TAG";
            "torchvision:NAME"; a folder of Hugging Face transformers or of timm, with its config.json; the name of a
            model on the Hugging Face hub, "ORG/NAME"; or "fashion" for the embedded backbone.
        weights: local checkpoint (.safetensors, .pth, .ckpt, an index of shards, a folder of Accelerate, ...); without
            one the library downloads its own. The classes are the file's.
        settings: those of `timm.create_model` (img_size, num_classes, in_chans, ...) and of preprocessing (mean, std,
            ...), or of the model's configuration in transformers.
        note: is told what was found in the file and what was made of it.

    Raises:
        TokenGameError: unknown name, no network, weights missing, unreadable, of another kind or architecture, or not
            finite.
    """
    source, name = source_of(name)
    if weights is None:
        return source.pretrained(name, settings or {}, note)
    return source.from_file(name, weights, settings or {}, note)


def untrained(name: str, settings: Settings | None = None) -> nn.Module:
    """The model `name` with random weights; arguments as in `load_model`."""
    source, name = source_of(name)
    return source.untrained(name, settings or {})


def blank(name: str, settings: Settings | None = None) -> nn.Module:
    """The model `name` to look at, not to run: of timm without the time and memory that weights take."""
    source, name = source_of(name)
    return from_timm.blank(name, settings or {}) if source is from_timm else source.untrained(name, settings or {})


def source_of(name: str) -> tuple[Source, str]:
    """Where a name leads, and what the model is called there."""
    prefix, _, rest = name.partition(":")
    if name == EMBEDDED:
        return embedded, name
    if prefix in SOURCES:
        return SOURCES[prefix], rest
    if os.path.isdir(name):
        return _source_in(name, _configuration(Path(name) / "config.json"))
    weights = f"{name} is a file: --backbone names the model that it has weights of, and --weights the file"
    require(not os.path.isfile(name), weights)
    if name.startswith(("/", "./", "../", "~")) or (":" not in name and name.count("/") > 1):
        raise TokenGameError(f"no folder at {name}, which --backbone names")
    if "/" in name and ":" not in name:
        return _source_in(name, {"architecture": ""} if name.startswith("timm/") else _on_hub(name))
    return from_timm, name


def _source_in(name: str, config: dict[str, Any]) -> tuple[Source, str]:
    """By the configuration in a folder or on the hub: timm's names an architecture, transformers' a type of model."""
    if "architecture" in config:
        return from_timm, f"local-dir:{name}" if os.path.isdir(name) else f"hf-hub:{name}"
    known = isinstance(config.get("model_type"), str)
    require(
        known, f"config.json of {name} names neither a model_type, as transformers', nor an architecture, as timm's"
    )
    return from_hugging_face, name


def _on_hub(name: str) -> dict[str, Any]:
    """The configuration of a model on the Hugging Face hub."""
    with offline_at_once():
        try:
            return _configuration(Path(hf_hub_download(name, "config.json")))
        except TokenGameError:
            raise
        except Exception as error:  # of whatever fetches
            hint = "a model of timm has no / in its name"
            raise TokenGameError(f"no model {name!r} on the Hugging Face hub ({reason(error)}); {hint}") from None


def _configuration(path: Path) -> dict[str, Any]:
    require_file(path, "config.json, which a folder of transformers or timm has,")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError):
        config = None
    require(isinstance(config, dict), f"{path} is damaged: it is no JSON object")
    return config
