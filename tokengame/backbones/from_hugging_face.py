"""Models of Hugging Face transformers, from a folder or the hub: a classifier where there is one, else the image part.

transformers is optional (`pip install tokengame[hf]`) and imported where it is used. Code of a model's folder is never
run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tokengame.backbones.checkpoint import State, read_state, require_finite
from tokengame.backbones.hub import offline_at_once, reason
from tokengame.backbones.sources import Settings
from tokengame.errors import TokenGameError, first_line
from tokengame.files import Note
from tokengame.ranges import require

TOWERS = {
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
}
"""the image part of models of images and text, by type of model"""
CLASSIFIER = "ForImageClassification"
"""end of the names of classes that predict classes"""


def untrained(name: str, settings: Settings) -> nn.Module:
    """The model of a folder's configuration with random weights."""
    config = _config(name, settings)
    kind = _class_of(config)
    try:
        with _quiet():
            return kind._from_config(_part(config, kind)).eval()
    except Exception as error:  # of whatever builds
        raise TokenGameError(
            f"transformers makes no model of the configuration of {name} ({first_line(error)})"
        ) from None


def pretrained(name: str, settings: Settings, _note: Note) -> nn.Module:
    """The model with the weights of its folder."""
    return _loaded(name, settings, name, None)


def from_file(name: str, weights: str, settings: Settings, note: Note) -> nn.Module:
    """The model of a folder's configuration with other weights."""
    return _loaded(name, settings, weights, read_state(weights, note))


def _loaded(name: str, settings: Settings, weights: str, state: State | None) -> nn.Module:
    """The model with every weight from `state`, or where that is None from its own folder."""
    config = _config(name, settings)
    kind = _class_of(config)
    model, missing, differ = _fetched(kind, name, config, state)
    if missing and all(part.startswith("pooler.") for part in missing):  # a layer that is not in every checkpoint
        model, missing, differ = _fetched(kind, name, config, state, add_pooling_layer=False)
    strange = f"{weights} holds no whole {kind.__name__}: {len(missing)} of its weights are missing"
    require(not missing, f"{strange} (the first is {min(missing, default='')})")
    sizes = f"{len(differ)} weights are of another size"
    require(
        not differ,
        f"{weights} does not fit the configuration of {name}: {sizes} (the first is {min(differ, default='')})",
    )
    require_finite(model.state_dict(), weights)
    model.name_or_path = model.config._name_or_path = name  # where its image processor is
    return model.eval()


def _fetched(kind: Any, name: str, config: Any, state: State | None, **more: Any) -> tuple[Any, list[str], list[str]]:
    """What transformers loads, and the names of weights that are missing, and of another size."""
    given = {"config": _part(config, kind), "dtype": torch.float32, "ignore_mismatched_sizes": True}
    with _quiet(), offline_at_once():
        try:
            model, found = kind.from_pretrained(
                None if state is not None else name, state_dict=state, output_loading_info=True, **given, **more
            )
        except Exception as error:  # of whatever fetches and reads
            raise TokenGameError(f"transformers cannot load {name} ({reason(error)})") from None
    return model, sorted(found["missing_keys"]), sorted(str(differ[0]) for differ in found["mismatched_keys"])


def _config(name: str, settings: Settings) -> Any:
    """The configuration in a folder or on the hub, with `settings` in place of its own."""
    transformers = require_transformers(name)
    with _quiet(), offline_at_once():
        try:
            config, unused = transformers.AutoConfig.from_pretrained(
                name, return_unused_kwargs=True, trust_remote_code=False, **settings
            )
        except Exception as error:  # of whatever fetches and reads
            raise TokenGameError(f"transformers knows no model {name!r} ({reason(error)})") from None
    strange = ", ".join(key for key in unused if key in settings)
    require(not strange, f"the configuration of {name} has no {strange}, which --model-kwargs sets")
    quantised = getattr(config, "quantization_config", None)
    require(quantised is None, f"{name} is quantised: give the model that it was made of, in floating point")
    return config


def _class_of(config: Any) -> Any:
    """The class of transformers that a model of images is to be: what its `architectures` say, else by its type."""
    import transformers

    named = getattr(config, "architectures", None) or []
    if any(name.endswith(CLASSIFIER) for name in named) and config.model_type not in TOWERS:
        mapping, kind = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, type(config)
    elif config.model_type in TOWERS:
        return getattr(transformers, TOWERS[config.model_type])
    else:
        mapping, kind = transformers.MODEL_MAPPING, type(config)
    require(kind in mapping, f"transformers has no model of images of type {config.model_type!r}")
    found = mapping[kind]
    return found[0] if isinstance(found, tuple | list) else found


def _part(config: Any, kind: Any) -> Any:
    """The part of a configuration of images and text that `kind` is made of."""
    part = getattr(config, "vision_config", None)
    if part is None or not isinstance(part, kind.config_class):
        return config
    projection = getattr(config, "projection_dim", None)
    if projection is not None and hasattr(part, "projection_dim"):
        part.projection_dim = projection
    return part


def require_transformers(name: str) -> Any:
    """The library, or TokenGameError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise TokenGameError(f"{name} is a model of transformers: pip install 'tokengame[hf]'") from None
    return transformers


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports on stderr what is missing, which is refused here; downloads still show their progress."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
