"""From a source to batches: conversion, timm's transforms, loading that is repeatable and survives bad images.

Unreadable images are skipped, counted and reported; more than 5 % of them is an error.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokengame.errors import TokenGameError
from tokengame.images import ImageSource

BAD_SHARE = 0.05


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to 8-bit RGB: 16-bit and float scaled, transparency put on white, grey and CMYK converted."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float32)
        top = (
            65535.0
            if image.mode.startswith("I") and values.max() > 255
            else max(float(values.max()), 1.0)
            if image.mode == "F"
            else 255.0
        )
        image = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass
class Batch:
    """What a loader yields."""

    images: Tensor
    """[B, channels, height, width]"""
    labels: Tensor | None
    """[B] class indices"""
    index: Tensor
    """[B] into the source"""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of images that could not be read"""


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run with both generators that transforms draw from set to `seed`, and put them back; None leaves them alone."""
    if seed is None:
        yield
        return
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        yield
    random.setstate(state)


class Views(Dataset):
    """Transformed images in a given order; item k is a pure function of (source, order, seed, k).

    Args:
        source: images.
        order: indices into it, one per item.
        transform: PIL RGB image -> tensor.
        seed: of random augmentation; None leaves torch's generator alone.
        start: first item to give, where an interrupted pass goes on.
    """

    def __init__(
        self, source: ImageSource, order: Sequence[int], transform: Callable, seed: int | None = None, start: int = 0
    ):
        self.source, self.order, self.transform, self.seed, self.start = source, order, transform, seed, start

    def __len__(self) -> int:
        return len(self.order) - self.start

    def __getitem__(self, item: int) -> tuple[int, Tensor | str]:
        item += self.start
        index = self.order[item]
        try:
            with self.source.open(index) as image:
                image = to_rgb(image)
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return index, str(error) or type(error).__name__
        with seeded(None if self.seed is None else hash((self.seed, item)) & 0x7FFFFFFF):
            return index, self.transform(image)

    def collate(self, items: list[tuple[int, Tensor | str]]) -> Batch:
        """Batch of the readable items; the others are named in `bad`."""
        good = [(i, image) for i, image in items if isinstance(image, Tensor)]
        bad = [(self.source.names[i], image) for i, image in items if isinstance(image, str)]
        index = torch.tensor([i for i, _ in good], dtype=torch.long)
        labels = None if self.source.labels is None else torch.tensor([self.source.labels[i] for i, _ in good])
        images = torch.stack([image for _, image in good]) if good else torch.empty(0)
        return Batch(images, labels, index, bad)

    def loader(self, batch_size: int, workers: int) -> DataLoader:
        """In order; decoding in `workers` processes."""
        return DataLoader(
            self,
            batch_size,
            num_workers=workers,
            collate_fn=self.collate,
            persistent_workers=False,
            prefetch_factor=4 if workers else None,
        )


class BadImages:
    """Counts distinct unreadable images among `total`.

    Raises (from `add`):
        TokenGameError: they are more than 5 % of the set.
    """

    def __init__(self, total: int):
        self.total = total
        self.reasons: dict[str, str] = {}

    def add(self, bad: list[tuple[str, str]]) -> None:
        self.reasons |= dict(bad)
        if len(self.reasons) > BAD_SHARE * self.total:
            name, reason = next(iter(self.reasons.items()))
            count = f"{len(self.reasons)} of {self.total} images cannot be read (more than 5 %)"
            raise TokenGameError(f"{count}, the first is {name}: {reason}")


def checked(loader: DataLoader, tally: BadImages) -> Iterator[Batch]:
    """Batches with at least one readable image; the unreadable ones are counted in `tally`."""
    for batch in loader:
        tally.add(batch.bad)
        if len(batch.index):
            yield batch


def transform_for(preprocessing: dict[str, Any], train: bool) -> Callable:
    """timm's own transform: evaluation, or mild random crops and flips for training a policy."""
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in preprocessing.items()}
    if not train:
        return create_transform(**config)
    config.pop("crop_mode", None)
    config.pop("crop_pct", None)
    return create_transform(
        **config,
        is_training=True,
        scale=(0.6, 1.0),
        ratio=(0.9, 1.1),
        color_jitter=None,
        auto_augment=None,
        re_prob=0.0,
    )


def plain_views(source: ImageSource, preprocessing: dict[str, Any], order: Sequence[int] | None = None) -> Views:
    """The images of `source`, or those of `order`, in evaluation crops."""
    return Views(
        source, range(len(source.names)) if order is None else order, transform_for(preprocessing, train=False)
    )
