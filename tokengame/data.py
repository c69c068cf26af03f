"""From a source to batches: conversion, timm's transforms, loading that is repeatable and survives bad images.

Unreadable images are skipped, counted and reported; more than 5 % of them is an error.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokengame.errors import TokenGameError
from tokengame.images import ImageSource
from tokengame.ranks import Ranks

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


@dataclass(frozen=True)
class Epochs(Sequence):
    """The image of each of `total` items of a run: seeded permutations of `images` images, one after the other."""

    images: int
    total: int
    seed: int

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, item: Any) -> Any:
        return int(_permutation(self.images, self.seed, item // self.images)[item % self.images])


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


@dataclass(frozen=True)
class Share(Sequence):
    """Those of `total` items that one process is given, its part of every batch, from item `start` on."""

    total: int
    batch_size: int
    start: int = 0
    ranks: Ranks = field(default_factory=Ranks)

    def __len__(self) -> int:
        return (self.total - self.start) // self.ranks.size

    def __getitem__(self, item: Any) -> Any:
        if not 0 <= item < len(self):
            raise IndexError(item)
        own = self.ranks.part_of(self.batch_size)
        return self.start + item // own * self.batch_size + self.ranks.rank * own + item % own


Item = tuple[int, Tensor | None, list[tuple[str, str]]]
"""index into the source, the image if one could be read, (name, reason) of those that could not"""


class Views(Dataset):
    """Transformed images in a given order; item k is a pure function of (source, order, places, seed, k).

    Args:
        source: images.
        order: indices into it.
        transform: PIL RGB image -> tensor.
        seed: of random augmentation, for learning: the next image of the source stands in for one that cannot be read,
            so that batches stay whole. None, for measuring, leaves torch's generator alone and the image out.
        places: which places of the order to give; all.
    """

    def __init__(
        self,
        source: ImageSource,
        order: Sequence[int],
        transform: Callable,
        seed: int | None = None,
        places: Sequence[int] | None = None,
    ):
        self.source, self.order, self.transform, self.seed = source, order, transform, seed
        self.places = range(len(order)) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, item: int) -> Item:
        place, bad = self.places[item], []
        index, count = self.order[place], len(self.source.names)
        image = decoded(partial(self.source.open, index))
        while isinstance(image, str):
            bad.append((self.source.names[index], image))
            if self.seed is None or len(bad) > BAD_SHARE * count:
                return index, None, bad
            index = (index + 1) % count
            image = decoded(partial(self.source.open, index))
        with seeded(None if self.seed is None else hash((self.seed, place)) & 0x7FFFFFFF):
            return index, self.transform(image), bad

    def collate(self, items: list[Item]) -> Batch:
        """Batch of the readable items; the others are named in `bad`."""
        good = [(i, image) for i, image, _ in items if image is not None]
        bad = [reason for _, _, reasons in items for reason in reasons]
        index = torch.tensor([i for i, _ in good], dtype=torch.long)
        labels = None if self.source.labels is None else torch.tensor([self.source.labels[i] for i, _ in good])
        images = torch.stack([image for _, image in good]) if good else torch.empty(0)
        return Batch(images, labels, index, bad)

    def loader(self, batch_size: int, workers: int) -> DataLoader:
        """In order; decoding in `workers` processes."""
        return loader_of(self, workers, self.collate, batch_size=batch_size)


def decoded(open_image: Callable[[], Image.Image]) -> Image.Image | str:
    """The image in RGB, or why it cannot be read."""
    try:
        with open_image() as image:
            return to_rgb(image)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error) or type(error).__name__


def loader_of(views: Dataset, workers: int, collate: Callable[[list], Batch], **batching: Any) -> DataLoader:
    """PyTorch's loader, decoding in `workers` processes."""
    own: dict[str, Any] = {}
    if workers:
        own = {"prefetch_factor": 4, "worker_init_fn": partial(_leave_signals, _exiting())}
    return DataLoader(views, num_workers=workers, collate_fn=collate, **own, **batching)


@lru_cache(maxsize=1)
def _exiting() -> Any:
    """An event that is set when this process begins to exit, before it ends its workers and waits for them."""
    event = multiprocessing.Event()
    atexit.register(event.set)
    return event


def _leave_signals(exiting: Any, _worker: int) -> None:
    """Signals to stop often reach workers too and must not end them: the main process finishes its update first.

    Only the one with which an exiting main process ends its workers does; it would wait for them forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if exiting.is_set() else None)


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


def plain_views(source: ImageSource, preprocessing: dict[str, Any], order: Sequence[int] | None = None) -> Views:
    """The images of `source`, or those of `order`, in evaluation crops."""
    return Views(
        source, range(len(source.names)) if order is None else order, transform_for(preprocessing, train=False)
    )
