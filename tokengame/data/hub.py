"""Hugging Face data sets, on disk or streamed. Needs `datasets`."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

from PIL import Image

from tokengame.errors import TokenGameError, first_line

HELD = 1024
"""images held back from a stream"""
BUFFER = 1024
"""images of a stream among which the next one is drawn"""


def _load(name: str, split: str, **how: Any) -> Any:
    try:
        import datasets
    except ImportError:
        raise TokenGameError(
            f"{name} is no folder or tar; to read it from Hugging Face, pip install datasets"
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split, **how)
    except Exception as error:
        reason = first_line(error)
        raise TokenGameError(f"{name} is no folder or tar, and Hugging Face cannot load it: {reason}") from None
    columns = rows.column_names or []
    if "image" not in columns:
        raise TokenGameError(f"{name} has no column 'image' but {', '.join(columns) or 'none'}; rename it")
    return rows


class HuggingFaceImages:
    """Split `split` of the data set `name`, columns image and (perhaps) label, downloaded once and read from disk."""

    def __init__(self, name: str, split: str):
        self.rows = _load(name, split)
        self.names = [f"{name}[{i}]" for i in range(len(self.rows))]
        self.labels = list(self.rows["label"]) if "label" in self.rows.column_names else None

    def open(self, index: int) -> Image.Image:
        return self.rows[index]["image"]


@dataclass(frozen=True)
class Row:
    """One image of a stream, not decoded yet."""

    name: str
    content: bytes | str
    """the file, or where it lies"""
    label: int | None

    def open(self) -> Image.Image:
        if isinstance(self.content, bytes):
            return Image.open(io.BytesIO(self.content))
        import fsspec

        with fsspec.open(self.content, "rb") as file:
            return Image.open(io.BytesIO(file.read()))


class HeldRows:
    """Rows of a stream that are kept in memory, encoded as they came: a source like any other."""

    def __init__(self, rows: list[Row]):
        self.rows, self.names = rows, [row.name for row in rows]
        labels = [row.label for row in rows if row.label is not None]
        self.labels: list[int] | None = labels if len(labels) == len(rows) else None

    def open(self, index: int) -> Image.Image:
        return self.rows[index].open()


class HuggingFaceStream:
    """A data set that is learned from while it arrives. It never lies on disk and has no random access.

    Every pass is in another order: that of the stream, each image drawn from the next `BUFFER` ones, repeatable with
    the same seed.
    """

    def __init__(self, name: str, split: str):
        rows = _load(name, split, streaming=True)
        from datasets import Image as Encoded

        self.name, self.rows = name, rows.cast_column("image", Encoded(decode=False))
        if next(iter(self.rows), None) is None:
            raise TokenGameError(f"no image in {name}, split {split}")
        self.names = [f"{name} ({split})"]
        """of the stream: its images are not known yet"""
        self.labels: list[int] | None = [] if "label" in self.rows.column_names else None
        """empty: each row brings its own; None where they do not"""

    @property
    def classes(self) -> int | None:
        """How many classes the data set says it has."""
        return getattr(self.rows.features["label"], "num_classes", None) if self.labels is not None else None

    def split(self) -> tuple[HuggingFaceStream, HeldRows]:
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
        for number, row in enumerate(rows):
            image = row["image"]
            content = image["bytes"] if image["bytes"] is not None else image["path"]
            yield Row(f"{self.name}, image {number} as streamed", content, row.get("label"))
