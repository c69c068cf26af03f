"""timm's models by name, with timm's weights or one's own, at any size and with any settings of `timm.create_model`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import timm
import torch
from timm.models import parse_model_name
from torch import nn

from tokengame.backbones.checkpoint import State, load_into, read_state, renamed
from tokengame.backbones.hub import offline_at_once, reason
from tokengame.backbones.sources import Settings
from tokengame.errors import TokenGameError, first_line
from tokengame.files import Note
from tokengame.ranges import require

PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
"""settings of how images become the input; all others are those of `timm.create_model`"""
NOT_SETTINGS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable")
"""parameters of `timm.create_model` that say where weights come from"""


def untrained(name: str, settings: Settings) -> nn.Module:
    """timm's model `name` with random weights."""
    require_known(name)
    return _created(name, settings)


def pretrained(name: str, settings: Settings, _note: Note) -> nn.Module:
    """The model with the weights that timm downloads, or has downloaded before."""
    require_known(name)
    classes = settings.get("num_classes") or None
    model = _created(name, settings, pretrained=True)
    own = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    random = f"timm's weights for {name} have {own} classes, and a classifier of {classes} would be random"
    require(classes in (None, own), f"{random}; pass your own with --weights")
    return model


def from_file(name: str, weights: str, settings: Settings, note: Note) -> nn.Module:
    """The model with the weights in a file; it has the classifier that the file has, or none."""
    require_known(name)
    state = read_state(weights, note)
    wanted = blank(name, settings).state_dict()
    state = renamed(state, wanted, weights, note)
    settings, state = _with_head_of(state, wanted, settings, weights, note)
    return load_into(_created(name, settings), state, weights, note)


def blank(name: str, settings: Settings) -> nn.Module:
    """timm's model `name` without the time and memory that weights take, where timm can: its numbers are anything."""
    require_known(name)
    try:
        with torch.device("meta"):
            model = _created(name, settings).to_empty(device="cpu")
    except Exception:  # not every model can be built without numbers
        return _created(name, settings)
    bias = getattr(getattr(model, "head", None), "bias", None)
    if bias is not None:
        torch.nn.init.zeros_(bias)  # by it `output_of` tells an embedding
    return model


def require_known(name: str) -> None:
    """Raise TokenGameError unless timm has a model of this name, or may find it where the name says."""
    try:
        source, model = parse_model_name(name)
    except (ValueError, AssertionError) as error:
        raise TokenGameError(f"timm knows no model {name!r}: {first_line(error)}") from None
    if source in (None, "timm") and not timm.is_model(model.split(".")[0]):
        close = timm.list_models(f"*{model.split('.')[0].split('_')[0]}*")[:3]
        raise TokenGameError(f"timm knows no model {name!r}" + (f"; similar: {', '.join(close)}" if close else ""))


def _created(name: str, settings: Settings, pretrained: bool = False) -> nn.Module:
    """What `timm.create_model` makes of a name and settings."""
    strange = [key for key in settings if key in NOT_SETTINGS]
    require(not strange, f"--model-kwargs has no {', '.join(strange)}: weights are given by --weights")
    given = {key: value for key, value in settings.items() if key not in PREPROCESSING}
    with offline_at_once() if pretrained or ":" in name else nullcontext():  # the architecture of others is known here
        try:
            model = timm.create_model(name, pretrained=pretrained, **given).eval()
        except Exception as error:  # of whatever builds, fetches and reads
            raise TokenGameError(_sentence(name, given, pretrained, error)) from None
    return _described(model, settings)


def _sentence(name: str, given: Settings, pretrained: bool, error: Exception) -> str:
    """Why a model could not be made."""
    said = " ".join(f"{key}={value}" for key, value in given.items())
    if isinstance(error, TypeError) and said:
        return f"timm's {name} takes no --model-kwargs {said} ({first_line(error)})"
    if pretrained:
        return f"timm cannot fetch weights for {name} ({reason(error)}); pass a local file with --weights"
    if said:
        return f"timm makes no {name} with --model-kwargs {said} ({first_line(error)})"
    return f"timm knows no model {name!r} ({reason(error)})"


def _described(model: Any, settings: Settings) -> nn.Module:
    """`model`, whose configuration names the preprocessing that was set."""
    own = {key: settings[key] for key in PREPROCESSING if key in settings}
    for key in ("mean", "std"):
        if key in own:
            numbers = own[key] if isinstance(own[key], tuple | list) else (own[key],)
            good = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers) and numbers
            require(bool(good), f"--model-kwargs {key} is a number for each channel, e.g. {key}=0.5,0.5,0.5")
            own[key] = tuple(float(number) for number in numbers)
    if own:
        model.pretrained_cfg = {**model.pretrained_cfg, **own}
    return model


def _with_head_of(state: State, wanted: State, settings: Settings, weights: str, note: Note) -> tuple[Settings, State]:
    """Settings and weights with the classifier that the file has: of any size, or none."""
    inside, head = [name for name in state if name.startswith("head")], state.get("head.weight")
    if settings.get("num_classes") == 0 and inside and not any(name.startswith("head") for name in wanted):
        note(f"{weights}: its classifier is left out, as num_classes=0 says")
        return settings, {name: tensor for name, tensor in state.items() if name not in inside}
    if "num_classes" in settings:
        return settings, state
    if head is not None and head.ndim == 2:
        return {**settings, "num_classes": len(head)}, state
    if not inside and any(name.startswith("head") for name in wanted):
        note(f"{weights} has no classifier: the model embeds")
        return {**settings, "num_classes": 0}, state
    return settings, state
