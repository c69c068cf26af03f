"""How images become the input of a model of timm, in the form that `tokengame.data.transforms.transform_for` reads."""

from __future__ import annotations

import warnings
from typing import Any

import timm


def timm_preprocessing(model: Any) -> dict[str, Any]:
    """By the configuration of a timm model, for the size and the channels that its patch embedding takes.

    Where one mean is given for all channels it is each channel's; a model of grey images whose configuration is that of
    a model of colours has their average.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = timm.data.resolve_data_config({}, model=model)
    embed = getattr(model, "patch_embed", None)
    channels = getattr(getattr(embed, "proj", None), "in_channels", config["input_size"][0])
    config["input_size"] = (channels, *(getattr(embed, "img_size", None) or config["input_size"][1:]))
    for key in ("mean", "std"):
        numbers = config[key]
        if channels == 1:
            config[key] = (sum(numbers) / len(numbers),)
        elif len(numbers) == 1:
            config[key] = numbers * channels
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
