"""Batches to learn from: sets shuffled as a whole, streams in the order in which they arrive; both repeatable.

The image at position k of a run depends on the images and the seed alone, so a run can resume where it stopped, and
several processes load together what one would load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokengame.data.batches import Batch, Epochs, Share, Views, loader_of
from tokengame.data.datasets import ImageSet, ImageSource
from tokengame.data.decode import viewed
from tokengame.data.stream import Row, Stream
from tokengame.data.transforms import seeded
from tokengame.distributed import Processes


@dataclass(frozen=True)
class TrainingLoader:
    """Loads the batches that a run learns from.

    Args:
        images: a source or a stream.
        transform: random, from a PIL image to a tensor.
        seed: of order and augmentation.
        batch_size: images of an update, over all processes.
        updates: of the whole run.
        processes: those that learn together; each decodes its part of every batch.
    """

    images: ImageSet
    transform: Callable[[Image.Image], Tensor]
    seed: int
    batch_size: int
    updates: int
    processes: Processes = field(default_factory=Processes)

    @property
    def total(self) -> int:
        """The number of images, of which at most 5 % may be unreadable."""
        return self.batch_size * self.updates if isinstance(self.images, Stream) else len(self.images.names)

    def loader(self, start: int = 0, workers: int = 0) -> DataLoader:
        """This process's part of the batches from update `start` on; decoding in `workers` processes."""
        own = self.processes.local_batch(self.batch_size)
        if isinstance(self.images, Stream):
            views = StreamViews(self.transform, self.seed)
            return loader_of(views, workers, views.collate, batch_sampler=self._streamed(self.images, start))
        source = cast(ImageSource, self.images)  # all but streams open any image
        order = Epochs(len(source.names), self.updates * self.batch_size, self.seed)
        positions = Share(len(order), self.batch_size, start * self.batch_size, self.processes)
        return Views(source, order, self.transform, self.seed, positions).loader(own, workers)

    def _streamed(self, stream: Stream, start: int) -> Iterator[list[tuple[int, Row]]]:
        """Undecoded batches. The main process reads them once and passes the bytes to workers."""
        own = self.processes.local_batch(self.batch_size)
        rows = stream.shuffled(self.seed, start * self.batch_size)
        for update in range(start, self.updates):
            whole = list(enumerate(islice(rows, self.batch_size), update * self.batch_size))
            yield whole[self.processes.rank * own :][:own]


class StreamViews(Dataset):
    """Transformed images of (position, row); unreadable ones are replaced by others of the batch, so it stays whole.

    Args:
        transform: PIL RGB image -> tensor.
        seed: seeds the random augmentation, together with the position of the image in the run.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor], seed: int):
        self.transform, self.seed = transform, seed

    def __getitem__(self, item: tuple[int, Row]) -> tuple[int, Row, Tensor | str]:
        position, row = item
        with seeded(hash((self.seed, position)) & 0x7FFFFFFF):
            return position, row, viewed(row.open, self.transform)

    @staticmethod
    def collate(items: list[tuple[int, Row, Tensor | str]]) -> Batch:
        """Batch as long as `items`, empty where none can be read."""
        bad = [(row.name, image) for _, row, image in items if isinstance(image, str)]
        good = [(position, row, image) for position, row, image in items if isinstance(image, Tensor)]
        if not good:
            return Batch(torch.empty(0), None, torch.empty(0, dtype=torch.long), bad)
        whole = [good[number % len(good)] for number in range(len(items))]
        labels = [row.label for _, row, _ in whole if row.label is not None]
        return Batch(
            torch.stack([image for _, _, image in whole]),
            torch.tensor(labels) if len(labels) == len(whole) else None,
            torch.tensor([position for position, _, _ in whole]),
            bad,
        )
