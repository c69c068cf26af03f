"""Image towers of open_clip by name, "ViT-B-32" or with the tag of its weights "ViT-B-32/laion2b_s34b_b79k".

open_clip is optional (`pip install tokengame[open_clip]`) and imported where it is used.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tokengame.backbones.checkpoint import load_into, read_state
from tokengame.backbones.hub import offline_at_once, reason
from tokengame.backbones.sources import Settings
from tokengame.errors import TokenGameError, first_line
from tokengame.files import Note
from tokengame.ranges import require

TOWER = "visual."
"""prefix of the image tower's weights in those of the whole model"""


def untrained(name: str, settings: Settings) -> nn.Module:
    """The image tower with random weights."""
    return _tower(name.partition("/")[0] if ":" not in name else name, None, settings)


def pretrained(name: str, settings: Settings, _note: Note) -> nn.Module:
    """The image tower with the weights of the tag, which open_clip downloads; of a folder or the hub with its own."""
    named, _, tag = (name, "", "") if ":" in name else name.partition("/")
    tags = _library(name).list_pretrained_tags_by_model(named)
    which = f"name its weights, open_clip:{named}/TAG, where TAG is one of {', '.join(tags[:6])}"
    require(":" in name or tag in tags or not tags, f"open_clip has no weights {tag!r} of {named}; {which}")
    return _tower(named, tag or None, settings, weights=True)


def from_file(name: str, weights: str, settings: Settings, note: Note) -> nn.Module:
    """The image tower with the weights in a file, of the tower alone or of the whole model."""
    state = read_state(weights, note)
    if any(
        key.startswith(TOWER) for key in state
    ):  # beside them those of the text tower, which may have the same names
        state = {key.removeprefix(TOWER): value for key, value in state.items() if key.startswith(TOWER)}
    return load_into(untrained(name, settings), state, weights, note)


def _tower(name: str, tag: str | None, settings: Settings, weights: bool = False) -> Any:
    library = _library(name)
    require(not settings, f"--model-kwargs is for models of timm and transformers, not for open_clip:{name}")
    known = library.list_models()
    close = [model for model in known if model.startswith(name.split("-")[0])][:3]
    require(
        ":" in name or name in known,
        f"open_clip knows no model {name!r}" + (f"; similar: {', '.join(close)}" if close else ""),
    )
    with offline_at_once():
        try:
            model = library.create_model(name, pretrained=tag, load_weights=weights, require_pretrained=weights)
        except Exception as error:  # of whatever builds, fetches and reads
            hint = "pass a local file with --weights"
            raise TokenGameError(f"open_clip cannot load {name} ({reason(error)}); {hint}") from None
    return model.visual.eval()


def _library(name: str) -> Any:
    try:
        import open_clip
    except ImportError as error:
        hint = "pip install 'tokengame[open_clip]'"
        raise TokenGameError(f"open_clip:{name} is a model of open_clip ({first_line(error)}): {hint}") from None
    return open_clip
