"""Batches to learn from: random access shuffled as a whole, streams in the order they arrive; both repeatable.

What lies at place k of a run depends on the images and the seed alone, so a run is gone on with where it stopped, and
several processes see together what one sees.
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

from tokengame.data import Batch, Epochs, Share, Views, decoded, loader_of, seeded
from tokengame.hub import HuggingFaceStream, Row
from tokengame.images import ImageSet, ImageSource
from tokengame.ranks import Ranks


@dataclass(frozen=True)
class Feed:
    """What a run learns from.

    Args:
        images: a source or a stream.
        transform: random, from a PIL image to a tensor.
        seed: of order and augmentation.
        batch_size: images of an update, over all processes.
        updates: of the whole run.
        ranks: the processes that learn together; each decodes its part of every batch.
    """

    images: ImageSet
    transform: Callable[[Image.Image], Tensor]
    seed: int
    batch_size: int
    updates: int
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def total(self) -> int:
        """Images that more than 5 % of must not be unreadable."""
        return self.batch_size * self.updates if isinstance(self.images, HuggingFaceStream) else len(self.images.names)

    def loader(self, start: int = 0, workers: int = 0) -> DataLoader:
        """This process's part of the batches from update `start` on; decoding in `workers` processes."""
        own = self.ranks.part_of(self.batch_size)
        if isinstance(self.images, HuggingFaceStream):
            views = StreamViews(self.transform, self.seed)
            return loader_of(views, workers, views.collate, batch_sampler=self._streamed(self.images, start))
        source = cast(ImageSource, self.images)  # all but streams open any image
        order = Epochs(len(source.names), self.updates * self.batch_size, self.seed)
        places = Share(len(order), self.batch_size, start * self.batch_size, self.ranks)
        return Views(source, order, self.transform, self.seed, places).loader(own, workers)

    def _streamed(self, stream: HuggingFaceStream, start: int) -> Iterator[list[tuple[int, Row]]]:
        """Undecoded batches. The main process reads them, once; workers are handed the bytes."""
        own = self.ranks.part_of(self.batch_size)
        rows = stream.shuffled(self.seed, start * self.batch_size)
        for update in range(start, self.updates):
            whole = list(enumerate(islice(rows, self.batch_size), update * self.batch_size))
            yield whole[self.ranks.rank * own :][:own]


class StreamViews(Dataset):
    """Transformed images of (place, row); unreadable ones are replaced by others of the batch, so that it stays whole.

    Args:
        transform: PIL RGB image -> tensor.
        seed: of random augmentation, with the place.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor], seed: int):
        self.transform, self.seed = transform, seed

    def __getitem__(self, item: tuple[int, Row]) -> tuple[int, Row, Tensor | str]:
        place, row = item
        image = decoded(row.open)
        if isinstance(image, str):
            return place, row, image
        with seeded(hash((self.seed, place)) & 0x7FFFFFFF):
            return place, row, self.transform(image)

    @staticmethod
    def collate(items: list[tuple[int, Row, Tensor | str]]) -> Batch:
        """Batch as long as `items`, empty where none can be read."""
        bad = [(row.name, image) for _, row, image in items if isinstance(image, str)]
        good = [(place, row, image) for place, row, image in items if isinstance(image, Tensor)]
        if not good:
            return Batch(torch.empty(0), None, torch.empty(0, dtype=torch.long), bad)
        whole = [good[number % len(good)] for number in range(len(items))]
        labels = [row.label for _, row, _ in whole if row.label is not None]
        return Batch(
            torch.stack([image for _, _, image in whole]),
            torch.tensor(labels) if len(labels) == len(whole) else None,
            torch.tensor([place for place, _, _ in whole]),
            bad,
        )
