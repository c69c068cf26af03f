"""torchvision's models by name, "vit_b_16" or with the name of its weights "vit_b_16/IMAGENET1K_SWAG_E2E_V1"."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from torch.hub import get_dir
from torchvision import models

from tokengame.backbones.checkpoint import load_into, read_state, renamed
from tokengame.backbones.hub import reachable
from tokengame.backbones.sources import Settings
from tokengame.errors import TokenGameError, first_line
from tokengame.files import Note
from tokengame.ranges import require

HEAD = "heads.head.weight"
"""of the classifier"""


def untrained(name: str, settings: Settings) -> nn.Module:
    """The model with random weights."""
    return _created(name.partition("/")[0], None, settings)


def pretrained(name: str, settings: Settings, _note: Note) -> nn.Module:
    """The model with torchvision's weights, the default ones unless the name says which."""
    model, _, tag = name.partition("/")
    _require_known(model)
    known = models.get_model_weights(model)
    names = [weights.name for weights in known]
    require(tag in ("", *names), f"torchvision has no weights {tag!r} of {model}; there are {', '.join(names)}")
    return _created(model, known[tag] if tag else known.DEFAULT, settings)


def from_file(name: str, weights: str, settings: Settings, note: Note) -> nn.Module:
    """The model with the weights in a file, and the classes of the file."""
    state = read_state(weights, note)
    wanted = untrained(name, settings).state_dict()
    head = renamed(state, wanted, weights).get(HEAD)
    if head is not None and head.ndim == 2 and "num_classes" not in settings:
        settings = {**settings, "num_classes": len(head)}
    return load_into(untrained(name, settings), state, weights, note)


def _require_known(name: str) -> None:
    known = models.list_models(module=models)
    close = [model for model in known if model.startswith(name.split("_")[0])][:3]
    require(name in known, f"torchvision knows no model {name!r}" + (f"; similar: {', '.join(close)}" if close else ""))


def _require_within_reach(name: str, address: str) -> None:
    """Raise TokenGameError at once where weights are neither here nor to be had, as torch would wait for long."""
    host, file = address.split("/")[2], address.rpartition("/")[2]
    here = os.path.isfile(os.path.join(get_dir(), "checkpoints", file))
    offline = f"no connection to {host}, and no {file} on this machine"
    fetched = f"torchvision cannot fetch weights for {name} ({offline}); pass a local file with --weights"
    require(here or reachable(address), fetched)


def _created(name: str, weights: Any, settings: Settings) -> nn.Module:
    _require_known(name)
    if weights is not None:
        _require_within_reach(name, weights.url)
    try:
        return models.get_model(name, weights=weights, **settings).eval()
    except Exception as error:  # of whatever builds, fetches and reads
        said = " ".join(f"{key}={value}" for key, value in settings.items())
        made = f"with --model-kwargs {said} " if said else ""
        raise TokenGameError(f"torchvision makes no {name} {made}({first_line(error)})") from None
