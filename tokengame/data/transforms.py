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
from torchvision.transforms import CenterCrop, Compose, Grayscale
from torchvision.transforms.functional import crop

from tokengame.errors import TokenGameError
from tokengame.ranges import require

BAND = 512
"""rows that are converted at a time, as a large image and a copy or two of it are much memory"""


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to 8-bit RGB: 16-bit and float scaled, transparency put on white, grey and CMYK converted.

    Raises:
        ValueError: a pixel is no finite number.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    highest = _highest(image) if image.mode.startswith(("I", "F")) else None
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, BAND):
        band = image.crop((0, top, image.width, min(top + BAND, image.height)))
        whole.paste(_opaque(band if highest is None else _eight_bits(band, highest)), (0, top))
    return whole


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _highest(image: Image.Image) -> float:
    """The value that becomes white."""
    highest = float(np.array(image.getextrema(), float)[1])
    return max(highest, 1.0) if image.mode == "F" else 65535.0 if highest > 255 else 255.0


def _eight_bits(image: Image.Image, highest: float) -> Image.Image:
    """Grey of 16 or 32 bits, or float, as grey of 8."""
    values = np.asarray(image, np.float32)
    if not np.isfinite(values).all():
        raise ValueError("a pixel is no finite number")
    return Image.fromarray((values / highest * 255).clip(0, 255).astype(np.uint8))


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run with the generators that transforms draw from set to `seed`, and put them back; None leaves them alone."""
    if seed is None:
        yield
        return
    state, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond to look for other devices
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)


def transform_for(preprocessing: dict[str, Any], train: bool, augment: dict[str, Any] | None = None) -> Callable:
    """timm's own transform: evaluation, or for training. Models of one channel get grey images.

    Args:
        preprocessing: of the model.
        train: random crops and flips, mild unless `augment` says otherwise.
        augment: settings of `timm.data.create_transform` (scale, auto_augment, re_prob, ...).

    Raises:
        TokenGameError: timm does not know such an augmentation; the model takes neither grey nor RGB images.
    """
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in preprocessing.items()}
    channels, down = config["input_size"][0], config.pop("crop_rounding", None) == "down"
    given = "images are loaded as grey (1) or RGB (3): call the pruned model with your own tensors"
    require(channels in (1, 3), f"the model takes {channels} channels, and {given}")
    steps = (_training(config, augment or {}) if train else create_transform(**config)).transforms
    steps = [CropDown(step.size) if down and type(step) is CenterCrop else step for step in steps]
    return Compose([Grayscale(), *steps] if channels == 1 else steps)


class CropDown(CenterCrop):
    """The middle of an image, its corner rounded down as Hugging Face's processors do; torchvision rounds to even."""

    def forward(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        return crop(image, (image.height - height) // 2, (image.width - width) // 2, height, width)


def _training(config: dict[str, Any], augment: dict[str, Any]) -> Compose:
    config.pop("crop_mode", None)
    config.pop("crop_pct", None)
    mild = {"scale": (0.6, 1.0), "ratio": (0.9, 1.1), "color_jitter": None, "auto_augment": None, "re_prob": 0.0}
    try:
        return create_transform(**config, is_training=True, **(mild | augment))
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise TokenGameError(f"timm makes no augmentation of {augment} ({error or type(error).__name__})") from None
