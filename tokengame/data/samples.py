"""Images that a Python caller brings: tensors, lists, PyTorch's data sets and loaders, and names of folders.

Tensors are taken as they are, normalised by the caller; PIL images and files get the transform of the model. A loader
over a data set is learned from through its data set, in an order of our own that can be resumed and divided; anything
else that gives batches is a stream, read again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tokengame.data.stream import HeldRows, Stream
from tokengame.errors import TokenGameError
from tokengame.ranges import require

HELD = 256
"""images held back from a stream of tensors, at most"""
IMAGE_KEYS, LABEL_KEYS = ("image", "pixel_values"), ("label", "labels")
"""of items and batches that are dictionaries"""
FORMS = "a tensor [images, channels, height, width], a data set or loader of PyTorch, a list of PIL images, or a folder"


class Samples:
    """A data set, a tensor or a list of images as a source.

    Args:
        items: by index; each a PIL image, a float tensor [channels, height, width], (image, label, ...) or a
            dictionary with "image" or "pixel_values" and perhaps "label".
        chosen: the indices that count; all.
        collate: of the loader that the items come from.

    Raises:
        TokenGameError: there is none, or the first one is no image.
    """

    def __init__(self, items: Any, chosen: Sequence[int] | None = None, collate: Callable | None = None):
        self.items, self.collate = items, collate
        self.chosen = range(len(items)) if chosen is None else chosen
        require(len(self.chosen) > 0, "images= is empty; give at least one image")
        self.names = [f"image {index}" for index in self.chosen]
        self._known: dict[int, int] = {}
        try:
            label = self._sample(0)[1]
        except (ValueError, KeyError) as error:
            raise TokenGameError(f"the first of images= is no image ({error}); give {FORMS}") from None
        self.labels: Sequence[int] | None = None if label is None else _Labels(self)

    def open(self, index: int) -> Image.Image | Tensor:
        """The image; its label is kept, so that the item is made once."""
        image, label = self._sample(index)
        if label is not None:
            self._known[index] = label
        return image.copy() if isinstance(image, Image.Image) else image

    def label(self, index: int) -> int:
        """Class index of an image."""
        if index not in self._known:
            self.open(index)
        return self._known[index]

    def part(self, chosen: Sequence[int]) -> Samples:
        """Some of the images."""
        return Samples(self.items, [self.chosen[index] for index in chosen], self.collate)

    def _sample(self, index: int) -> tuple[Image.Image | Tensor, int | None]:
        item = self.items[self.chosen[index]]
        if self.collate is None:
            return image_and_label(item)
        images, labels = images_and_labels(self.collate([item]))
        return images[0], None if labels is None else int(labels[0])


class _Labels(Sequence[int]):
    """Labels of samples, each found when it is needed: a data set may have to open an image for it."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples.names)

    def __getitem__(self, index: Any) -> Any:
        return self.samples.label(index)

    def __repr__(self) -> str:
        return f"labels of {type(self.samples.items).__name__}"


@dataclass(frozen=True)
class TensorRow:
    """One image of a batch."""

    name: str
    image: Tensor
    label: int | None

    def open(self) -> Tensor:
        return self.image


class BatchStream(Stream):
    """Whatever gives batches again and again: a loader of an iterable data set, or a list of batches.

    A resumed run goes on where it stopped only if every pass gives the same batches.

    Args:
        batches: each a float tensor [B, channels, height, width], (tensor, labels, ...) or a dictionary.
        skip: images at the beginning of each pass that are left out.

    Raises:
        TokenGameError: they can be read only once, there is none, or the first one holds no images.
    """

    def __init__(self, batches: Iterable, skip: int = 0):
        require(iter(batches) is not batches, f"images= is an iterator, which can be read once; give {FORMS}")
        self.batches, self.skip, self.names = batches, skip, [f"images of a {type(batches).__name__}"]
        self.first = HeldRows(list(islice(self._rows(), 1)))
        require(bool(self.first.rows), "images= gives no batch; give at least one image")
        self.labels: list[int] | None = None if self.first.labels is None else []

    def split(self, holdout: float) -> tuple[BatchStream, HeldRows]:
        first = list(islice(self._rows(), int(HELD / holdout) + 1))
        held = min(HELD, max(1, round(holdout * len(first))))
        require(held < len(first), "one image cannot be both trained on and held back; give more images")
        return BatchStream(self.batches, held), HeldRows(first[:held])

    def shuffled(self, seed: int, start: int = 0) -> Iterator[TensorRow]:
        """In the order of the batches; the seed changes nothing."""
        del seed
        return islice(chain.from_iterable(self._rows() for _ in repeat(None)), start, None)

    def _rows(self) -> Iterator[TensorRow]:
        """One pass, image by image."""
        return islice(chain.from_iterable(map(_rows_of, self.batches)), self.skip, None)


def _rows_of(batch: Any) -> Iterator[TensorRow]:
    images, labels = as_batch(batch)
    for number, image in enumerate(images):
        yield TensorRow("an image of the stream", image, None if labels is None else int(labels[number]))


def given_images(images: Any) -> Any:
    """What a caller brings, as a source or a stream to learn from; names of places are left to `open_images`.

    Raises:
        TokenGameError: it is none of the forms that are taken.
    """
    if isinstance(images, (str, Path, Stream)) or (hasattr(images, "names") and hasattr(images, "open")):
        return images
    if isinstance(images, Image.Image):
        return Samples([images])
    if isinstance(images, Tensor):
        return Samples(_batch_tensor(images))
    if isinstance(images, DataLoader):
        return _of_loader(images)
    if isinstance(images, IterableDataset):
        return BatchStream(DataLoader(images, batch_size=32))
    if isinstance(images, (list, tuple)) and images and _is_batch(images[0]):
        return BatchStream(images)
    other = isinstance(images, (Mapping, bytes)) or _is_array(images)  # has a length, and no images by index
    if not other and hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        return Samples(images)
    require(not isinstance(images, Dataset), f"images= is {_described(images)} without a length; define __len__")
    require(not other and isinstance(images, Iterable), f"images= must be {FORMS}, not {_described(images)}")
    return BatchStream(images)


def _of_loader(loader: DataLoader) -> Samples | BatchStream:
    """A loader through its data set where that has indices, with the images that one pass of its sampler chooses."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return BatchStream(loader)
    with torch.random.fork_rng(devices=[]):
        chosen = sorted({index for batch in loader.batch_sampler for index in batch})
    return Samples(loader.dataset, chosen, loader.collate_fn)


def as_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images [B, channels, height, width] and labels [B] of a loader's batch.

    Raises:
        TokenGameError: there are no such images in it.
    """
    try:
        return images_and_labels(batch)
    except (ValueError, KeyError) as error:
        raise TokenGameError(f"a batch of images= holds no images ({error}); give {FORMS}") from None


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor | None]:
    """As `as_batch`; raises ValueError."""
    images, labels = _parts(batch)
    if not isinstance(images, Tensor):
        raise ValueError(f"a tensor is wanted, not {_described(images)}")
    if isinstance(labels, (list, tuple)) and all(isinstance(label, int) for label in labels):
        labels = torch.tensor(labels)
    usable = isinstance(labels, Tensor) and labels.shape == images.shape[:1] and not labels.is_floating_point()
    return _batch_tensor(images), labels if usable else None


def image_and_label(item: Any) -> tuple[Image.Image | Tensor, int | None]:
    """An item of a data set as an image and its class index; raises ValueError where there is no image."""
    image, label = _parts(item)
    if isinstance(image, Tensor):
        if image.ndim != 3 or not image.is_floating_point():
            raise ValueError(f"a float tensor [channels, height, width] is wanted, not {_described(image)}")
    elif not isinstance(image, Image.Image):
        raise ValueError(f"a PIL image or a float tensor is wanted, not {_described(image)}")
    if isinstance(label, Tensor) and label.ndim == 0 and not label.is_floating_point():
        label = int(label)
    return image, label if isinstance(label, int) and not isinstance(label, bool) else None


def _parts(item: Any) -> tuple[Any, Any]:
    """Image and label, or images and labels, of a tuple, a dictionary or alone."""
    if isinstance(item, Mapping):
        image = next((item[key] for key in IMAGE_KEYS if key in item), None)
        if image is None:
            raise ValueError(f"a dictionary needs {' or '.join(IMAGE_KEYS)}, and has {', '.join(map(str, item))}")
        return image, next((item[key] for key in LABEL_KEYS if key in item), None)
    if isinstance(item, (list, tuple)):
        if not item:
            raise ValueError("it is empty")
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _is_batch(item: Any) -> bool:
    """Whether an entry of a list is a batch of images rather than one."""
    try:
        images = _parts(item)[0]
    except ValueError:
        return False
    return isinstance(images, Tensor) and images.ndim == 4


def _batch_tensor(images: Tensor) -> Tensor:
    if images.ndim != 4 or not images.is_floating_point():
        raise TokenGameError(
            f"images must be a float tensor [images, channels, height, width], normalised for the model, not "
            f"{_described(images)}"
        )
    return images


def _is_array(value: Any) -> bool:
    """Whether it is an array of another library, whose numbers may be of any kind."""
    return hasattr(value, "__array__") or hasattr(value, "__array_interface__")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)}"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
