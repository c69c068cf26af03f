"""How images become the input of a model of timm, in the form that `tokengame.data.transforms.transform_for` reads."""

from __future__ import annotations

import warnings
from typing import Any

import timm
from torch import nn


def timm_preprocessing(model: Any, input_size: tuple[int, int]) -> dict[str, Any]:
    """By the configuration of a timm model, for its `input_size` (height, width; 0: any) and the channels it takes.

    Where one mean is given for all channels it is each channel's; a model of grey images whose configuration is that of
    a model of colours has their average.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = timm.data.resolve_data_config({}, model=model)
    first = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    channels = config["input_size"][0] if first is None else first.in_channels
    config["input_size"] = (channels, *(input_size if any(input_size) else config["input_size"][1:]))
    for key in ("mean", "std"):
        numbers = config[key]
        if channels == 1:
            config[key] = (sum(numbers) / len(numbers),)
        elif len(numbers) == 1:
            config[key] = numbers * channels
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
