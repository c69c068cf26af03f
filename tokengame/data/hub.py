"""Hugging Face data sets, on disk or streamed. Needs `datasets`."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from PIL import Image

from tokengame.data.decode import MAX_BYTES, open_image
from tokengame.data.stream import HeldRows, Stream
from tokengame.errors import TokenGameError, first_line

HELD = 1024
"""images held back from a stream"""
BUFFER = 1024
"""images of a stream among which the next one is drawn"""
FIRST = 64
"""images of a stream that are kept to be checked before anything else"""
ANSWER_SECONDS = 10
"""that Hugging Face may take to say whether a data set exists"""


def _load(name: str, split: str, **how: Any) -> Any:
    """The rows of a data set, images not decoded."""
    try:
        import datasets
    except ImportError:
        raise TokenGameError(f"no {missing(name)}; to read it from Hugging Face, pip install datasets") from None
    _require_exists(name)
    try:
        rows = datasets.load_dataset(name, split=split, **how)
    except Exception as error:
        raise TokenGameError(
            f"{name} is no folder or tar, and Hugging Face cannot load it: {first_line(error)}"
        ) from None
    columns = rows.column_names or []
    if "image" not in columns:
        raise TokenGameError(f"{name} has no column 'image' but {', '.join(columns) or 'none'}; rename it")
    try:
        return rows.cast_column("image", datasets.Image(decode=False))
    except Exception as error:
        raise TokenGameError(f"the column 'image' of {name} holds no images: {first_line(error)}") from None


def _require_exists(name: str) -> None:
    """Find out with one request: `datasets` tries for the better part of a minute.

    Raises:
        TokenGameError: there is no such data set, or it is neither within reach nor in the cache.
    """
    from datasets import config
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if os.path.isdir(name):
        return
    if not re.fullmatch(r"(?=.{1,96}$)\w[\w.-]*(/\w[\w.-]*)?", name):
        raise TokenGameError(f"no {missing(name)}, and it cannot be the name of a Hugging Face data set")
    try:
        HfApi().dataset_info(name, timeout=ANSWER_SECONDS)
    except GatedRepoError:
        return  # `datasets` says how to get access
    except RepositoryNotFoundError:
        raise TokenGameError(f"no {missing(name)}, and Hugging Face has no data set of that name") from None
    except Exception as error:
        if not any(Path(config.HF_DATASETS_CACHE).glob(f"{_cached(name)}/*/*/*")):
            reason = f"Hugging Face cannot be reached ({first_line(error)})"
            raise TokenGameError(f"no {missing(name)}, and {reason} to find a data set of that name") from None


def _cached(name: str) -> str:
    """The folder of a data set in the cache of `datasets`."""
    from datasets.naming import camelcase_to_snakecase

    *owner, own = name.split("/")
    return "___".join([*owner, camelcase_to_snakecase(own)])


def missing(location: str) -> str:
    """ "folder or tar file at LOCATION", and what of similar name is there."""
    folder, name = os.path.split(location.rstrip("/"))
    try:
        similar = get_close_matches(name, os.listdir(folder or "."), n=1)
    except OSError:
        similar = []
    hint = f" (did you mean {os.path.join(folder, similar[0])}?)" if similar else ""
    return f"folder or tar file at {location}{hint}"


def _content(image: Any) -> bytes | str | None:
    """The file in an undecoded cell of the column image, or where it lies."""
    if image is None:
        return None
    return image["bytes"] if image["bytes"] is not None else image["path"]


def _opened(content: bytes | str | None) -> Image.Image:
    if content is None:
        raise ValueError("the row holds no image")
    if isinstance(content, bytes):
        return open_image(content)
    import fsspec

    with fsspec.open(content, "rb") as file:
        return open_image(file.read(MAX_BYTES + 1))


def _class_names(rows: Any) -> list[str] | None:
    """Names of the classes that the column label counts, if it says them."""
    feature = (rows.features or {}).get("label")
    return getattr(feature, "names", None)


class HuggingFaceImages:
    """Split `split` of the data set `name`, columns image and (perhaps) label, downloaded once and read from disk."""

    label_origin: str = "their column label"

    def __init__(self, name: str, split: str):
        self.rows = _load(name, split)
        self.names = [f"{name}[{i}]" for i in range(len(self.rows))]
        labelled = "label" in self.rows.column_names
        self.own_labels: Sequence[Any] | None = list(self.rows["label"]) if labelled else None
        self.labels: list[int] | None = None
        self.class_names: Sequence[str] | None = _class_names(self.rows)
        self._images = self.rows.select_columns("image")

    def open(self, index: int) -> Image.Image:
        return _opened(_content(self._images[index]["image"]))


@dataclass(frozen=True)
class Row:
    """One image of a stream, not decoded yet."""

    name: str
    content: bytes | str | None
    """the file, or where it lies; None where the row holds no image"""
    label: int | None

    def open(self) -> Image.Image:
        return _opened(self.content)


class HuggingFaceStream(Stream):
    """A data set that is learned from while it arrives. It never lies on disk and has no random access.

    Every pass is in another order: that of the stream, each image drawn from the next `BUFFER` ones, repeatable with
    the same seed.
    """

    def __init__(self, name: str, split: str):
        self.name, self.rows = name, _load(name, split, streaming=True)
        self.names = [f"{name} ({split})"]
        self.labels: list[int] | None = [] if "label" in self.rows.column_names else None
        self.class_names = _class_names(self.rows)
        self.read_label: Callable[[Any, str], int | None] = lambda label, _name: label
        """from what a row has as its label, and its name, to the model's class index"""
        self.first = HeldRows(list(islice(self._named(self.rows), FIRST)))
        if not self.first.rows:
            raise TokenGameError(f"no image in {name}, split {split}")

    def split(self, _holdout: float = 0.0) -> tuple[HuggingFaceStream, HeldRows]:
        """All but the first `HELD` images, to learn from, and these, in memory.

        Raises:
            TokenGameError: there are not even twice as many.
        """
        first = list(islice(self._named(self.rows), 2 * HELD))
        if len(first) < 2 * HELD:
            raise TokenGameError(
                f"{self.name} has only {len(first)} images, too few to be streamed; give it without stream:"
            )
        rest = copy.copy(self)
        rest.rows = self.rows.skip(HELD)
        return rest, HeldRows(first[:HELD])

    def shuffled(self, seed: int, start: int = 0) -> Iterator[Row]:
        """The images, pass after pass without end, from `start` on; what lies before it is read and skipped."""
        rows = self.rows.shuffle(seed=seed, buffer_size=BUFFER)
        return islice(chain.from_iterable(self._pass(rows, epoch) for epoch in count()), start, None)

    def _pass(self, rows: Any, epoch: int) -> Iterator[Row]:
        rows.set_epoch(epoch)
        return self._named(rows)

    def _named(self, rows: Any) -> Iterator[Row]:
        """Rows with their names, which count from where the stream began.

        Raises:
            TokenGameError: the stream breaks off, or a row's label is no class of the model.
        """
        numbered = enumerate(rows)
        while True:
            try:
                number, row = next(numbered)
            except StopIteration:
                return
            except Exception as error:
                raise TokenGameError(f"{self.name} cannot be streamed any further: {first_line(error)}") from error
            name = f"{self.name}, image {number} as streamed"
            label = None if self.labels is None else self.read_label(row.get("label"), name)
            yield Row(name, _content(row["image"]), label)
