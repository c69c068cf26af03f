"""From a set of images to batches: loading that is repeatable and survives unreadable images.

Unreadable images are skipped, counted and reported; more than 5 % of them is an error.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokengame.data.datasets import ImageSet, ImageSource
from tokengame.data.decode import decoded, viewed
from tokengame.data.stream import Stream
from tokengame.data.transforms import seeded, transform_for
from tokengame.distributed import Processes
from tokengame.errors import TokenGameError

BAD_SHARE = 0.05
"""above this share of unreadable images a set is refused"""


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
    """Those of `total` items that one process takes, its part of every batch, from item `start` on."""

    total: int
    batch_size: int
    start: int = 0
    processes: Processes = field(default_factory=Processes)

    def __len__(self) -> int:
        return (self.total - self.start) // self.processes.size

    def __getitem__(self, item: Any) -> Any:
        if not 0 <= item < len(self):
            raise IndexError(item)
        own = self.processes.local_batch(self.batch_size)
        return self.start + item // own * self.batch_size + self.processes.rank * own + item % own


Item = tuple[int, Tensor | None, list[tuple[str, str]]]
"""index into the source, the image if one could be read, (name, reason) of those that could not"""


class Views(Dataset):
    """Transformed images in a given order; item k is a pure function of (source, order, positions, seed, k).

    Args:
        source: images.
        order: indices into it.
        transform: PIL RGB image -> tensor.
        seed: of random augmentation, for learning: an unreadable image is replaced by the next one of the source, so
            that batches stay whole. None, for measuring, leaves torch's generator alone and the image out.
        positions: which positions of the order to load; all.
    """

    def __init__(
        self,
        source: ImageSource,
        order: Sequence[int],
        transform: Callable,
        seed: int | None = None,
        positions: Sequence[int] | None = None,
    ):
        self.source, self.order, self.transform, self.seed = source, order, transform, seed
        self.positions = range(len(order)) if positions is None else positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int) -> Item:
        position, bad = self.positions[item], []
        index, count = self.order[position], len(self.source.names)
        image = self._view(index, position)
        while isinstance(image, str):
            bad.append((self.source.names[index], image))
            if self.seed is None or len(bad) > BAD_SHARE * count:
                return index, None, bad
            index = (index + 1) % count
            image = self._view(index, position)
        return index, image, bad

    def _view(self, index: int, position: int) -> Tensor | str:
        with seeded(None if self.seed is None else hash((self.seed, position)) & 0x7FFFFFFF):
            return viewed(partial(self.source.open, index), self.transform)

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


def loader_of(views: Dataset, workers: int, collate: Callable[[list], Batch], **batching: Any) -> DataLoader:
    """PyTorch's loader, decoding in `workers` processes."""
    own: dict[str, Any] = {}
    if workers:
        own = {"prefetch_factor": 4, "worker_init_fn": partial(_ignore_signals, _exiting())}
    return DataLoader(views, num_workers=workers, collate_fn=collate, **own, **batching)


@lru_cache(maxsize=1)
def _exiting() -> Any:
    """An event that is set when this process begins to exit, before it ends its workers and joins them."""
    event = multiprocessing.Event()
    atexit.register(event.set)
    return event


def _ignore_signals(exiting: Any, _worker: int) -> None:
    """Ignore signals to stop, which often reach workers too: the main process finishes its update first.

    Only a main process that is exiting may end its workers by a signal; otherwise it would wait for them forever.
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


SAMPLE = 64
"""images that are decoded before anything else, to find out early that many cannot be read"""


def require_readable(images: ImageSet) -> None:
    """Decode a few images: a random but repeatable choice of a set, the first of a stream.

    Raises:
        TokenGameError: so many cannot be read that chance does not explain it in a set with up to 5 % of them.
    """
    streamed = isinstance(images, Stream)
    source = images.first if isinstance(images, Stream) else cast(ImageSource, images)
    count = len(source.names)
    chosen = np.random.default_rng(0).permutation(count)[:SAMPLE].tolist()
    found = [(source.names[i], decoded(partial(source.open, i))) for i in chosen]
    bad = [(name, reason) for name, reason in found if isinstance(reason, str)]
    if bad and _chance(len(bad), len(chosen), 10**6 if streamed else count) < 0.001:
        name, reason = bad[0]
        number = f"{len(bad)} of {len(chosen)} images tried cannot be read (more than 5 %)"
        raise TokenGameError(f"{number}, the first is {name}: {reason}")


def _chance(bad: int, tried: int, total: int) -> float:
    """That `bad` or more of `tried` images cannot be read if 5 % of all `total` cannot: certain where all are tried."""
    from scipy.stats import hypergeom

    return float(hypergeom.sf(bad - 1, total, int(BAD_SHARE * total), tried))


def plain_views(source: ImageSource, preprocessing: dict[str, Any], order: Sequence[int] | None = None) -> Views:
    """The images of `source`, or those of `order`, in evaluation crops."""
    return Views(
        source, range(len(source.names)) if order is None else order, transform_for(preprocessing, train=False)
    )
