"""From what a Python caller brings (see `samples`) to the batches that measuring and setting thresholds read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from tokengame.data.batches import BadImages, Batch, checked, plain_views
from tokengame.data.datasets import STREAM, ImageSource, open_images
from tokengame.data.loader import StreamViews
from tokengame.data.samples import BatchStream, as_batch, given_images
from tokengame.data.stream import Stream
from tokengame.data.transforms import transform_for
from tokengame.ranges import require

BATCH = 32
"""images at a time where the caller brings no batches"""


class Batches(NamedTuple):
    """Batches and how many there are; 0 where that is not known."""

    batches: Iterable[Batch]
    number: int


def opened(images: Any) -> Any:
    """What a caller brings, as a source or a stream; a place is opened (see `open_images`), its images unlabelled.

    Raises:
        TokenGameError: it is none of the forms that are taken, or there is no image in it.
    """
    found = given_images(images)
    return found if hasattr(found, "names") else open_images(str(found))


def batches_of(images: Any, preprocessing: dict[str, Any], workers: int = 0) -> Batches:
    """All that a caller brings, in the caller's order and, of a loader or a stream, in the caller's batches."""
    if isinstance(images, DataLoader):
        return Batches(_arriving(images), _length(images))
    source = opened(images)
    if isinstance(source, BatchStream):
        return Batches(_arriving(source.batches), _length(source.batches))
    require(not isinstance(source, Stream), f"{images} can be learned from, not measured on: leave out {STREAM}")
    return _views(source, preprocessing, None, workers)


def some_of(images: Any, preprocessing: dict[str, Any], most: int, seed: int = 0) -> Batches:
    """At most so many images, drawn by `seed`; of a stream the first ones."""
    source = opened(images)
    if isinstance(source, Stream):
        return Batches(_first(source, transform_for(preprocessing, train=False), most), -(-most // BATCH))
    order = np.random.default_rng(seed).permutation(len(source.names))[:most].tolist()
    return _views(source, preprocessing, order)


def _views(source: ImageSource, preprocessing: dict[str, Any], order: list[int] | None, workers: int = 0) -> Batches:
    views = plain_views(source, preprocessing, order)
    loader = views.loader(BATCH, workers)
    return Batches(checked(loader, BadImages(len(views))), len(loader))


def _arriving(batches: Iterable) -> Iterator[Batch]:
    seen = 0
    for batch in batches:
        images, labels = as_batch(batch)
        yield Batch(images, labels, torch.arange(seen, seen + len(images)))
        seen += len(images)


def _first(stream: Stream, transform: Callable, most: int) -> Iterator[Batch]:
    views, rows = StreamViews(transform, seed=0), enumerate(islice(stream.shuffled(0), most))
    while items := [views[item] for item in islice(rows, BATCH)]:
        yield views.collate(items)


def _length(batches: Any) -> int:
    with suppress(TypeError):  # of a loader whose data set has no length
        return len(batches) if isinstance(batches, Sized) else 0
    return 0
