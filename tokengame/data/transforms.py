"""From PIL images to tensors: conversion to RGB, timm's transforms, repeatable random augmentation."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

from tokengame.errors import TokenGameError


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to 8-bit RGB: 16-bit and float scaled, transparency put on white, grey and CMYK converted."""
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or float, as grey of 8; in place, as images are large.

    Raises:
        ValueError: a pixel is no finite number.
    """
    values = np.array(image, np.float32)
    highest = float(values.max())
    if not np.isfinite([highest, values.min()]).all():
        raise ValueError("a pixel is no finite number")
    top = max(highest, 1.0) if image.mode == "F" else 65535.0 if highest > 255 else 255.0
    values /= top
    values *= 255
    return Image.fromarray(np.clip(values, 0, 255, out=values).astype(np.uint8))


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run with the generators that transforms draw from set to `seed`, and put them back; None leaves them alone."""
    if seed is None:
        yield
        return
    state, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)


def transform_for(preprocessing: dict[str, Any], train: bool, augment: dict[str, Any] | None = None) -> Callable:
    """timm's own transform: evaluation, or for training.

    Args:
        preprocessing: of the model.
        train: random crops and flips, mild unless `augment` says otherwise.
        augment: settings of `timm.data.create_transform` (scale, auto_augment, re_prob, ...).

    Raises:
        TokenGameError: timm does not know such an augmentation.
    """
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in preprocessing.items()}
    if not train:
        return create_transform(**config)
    config.pop("crop_mode", None)
    config.pop("crop_pct", None)
    mild = {"scale": (0.6, 1.0), "ratio": (0.9, 1.1), "color_jitter": None, "auto_augment": None, "re_prob": 0.0}
    try:
        return create_transform(**config, is_training=True, **(mild | (augment or {})))
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise TokenGameError(f"timm makes no augmentation of {augment} ({error or type(error).__name__})") from None
