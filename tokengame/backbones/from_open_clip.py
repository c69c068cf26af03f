"""Image towers of open_clip by name, "ViT-B-32" or with the tag of its weights "ViT-B-32/laion2b_s34b_b79k".

open_clip is optional (`pip install tokengame[open_clip]`) and imported where it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tokengame.backbones.checkpoint import load_into, read_state
from tokengame.backbones.hub import offline_at_once, reason
from tokengame.backbones.sources import Settings
from tokengame.errors import TokenGameError
from tokengame.files import Note
from tokengame.ranges import require

PLACES = ("hf-hub:", "local-dir:")
"""what names of models on the hub and in folders begin with, as in open_clip"""
TOWER = "visual."
"""prefix of the image tower's weights in those of the whole model"""


def untrained(name: str, settings: Settings) -> nn.Module:
    """The image tower with random weights."""
    return _tower(*_parts(name), settings, weights=False)


def pretrained(name: str, settings: Settings, _note: Note) -> nn.Module:
    """The image tower with the weights of the tag, which open_clip downloads; of a folder or the hub with its own."""
    named, tag = _parts(name)
    tags = [] if named.startswith(PLACES) else _library(name).list_pretrained_tags_by_model(named)
    which = f"name them, open_clip:{named}/TAG, where TAG is one of {', '.join(tags[:6])}, or pass --weights"
    found = f"no weights {tag!r}" if tag else "several weights"
    require(tag in tags or not tags, f"open_clip has {found} of {named}; {which}")
    return _tower(named, tag, settings, weights=True)


def from_file(name: str, weights: str, settings: Settings, note: Note) -> nn.Module:
    """The image tower with the weights in a file, of the tower alone or of the whole model."""
    state = read_state(weights, note)
    if any(key.startswith(TOWER) for key in state):  # those of the text tower beside them may have the same names
        state = {key.removeprefix(TOWER): value for key, value in state.items() if key.startswith(TOWER)}
    return load_into(untrained(name, settings), state, weights, note)


def _parts(name: str) -> tuple[str, str | None]:
    """The model, and the tag of its weights where one is named."""
    model, _, tag = (name, "", "") if name.startswith(PLACES) else name.partition("/")
    return model, tag or None


def _tower(name: str, tag: str | None, settings: Settings, weights: bool) -> Any:
    library = _library(name)
    others = "--model-kwargs is for models of timm, torchvision and transformers"
    require(not settings, f"{others}, not for open_clip:{name}")
    known = library.list_models()
    close = ", ".join([model for model in known if model.startswith(name.split("-")[0])][:3])
    similar = f"; similar: {close}" if close else ""
    require(name.startswith(PLACES) or name in known, f"open_clip knows no model {name!r}{similar}")
    with _quiet(), offline_at_once():
        try:
            model = library.create_model(name, pretrained=tag, load_weights=weights, require_pretrained=weights)
        except Exception as error:  # of whatever builds, fetches and reads
            hint = "pass a local file with --weights"
            raise TokenGameError(f"open_clip cannot load {name} ({reason(error)}); {hint}") from None
    return model.visual.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs that weights are random, which is wanted, and errors, which are raised."""
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


def _library(name: str) -> Any:
    try:
        import open_clip
    except ImportError:
        raise TokenGameError(f"open_clip:{name} is a model of open_clip: pip install 'tokengame[open_clip]'") from None
    return open_clip
