"""What a stream of images is: it is learned from while it arrives, pass after pass, and has no random access."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from PIL import Image
from torch import Tensor


class Row(Protocol):
    """One image of a stream, not decoded yet."""

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> int | None: ...

    def open(self) -> Image.Image | Tensor: ...


class HeldRows:
    """Rows of a stream that are kept in memory, as they came: a source like any other."""

    def __init__(self, rows: Sequence[Row]):
        self.rows, self.names = rows, [row.name for row in rows]
        labels = [row.label for row in rows if row.label is not None]
        self.labels: list[int] | None = labels if len(labels) == len(rows) else None

    def open(self, index: int) -> Any:
        return self.rows[index].open()


class Stream(ABC):
    """Images that arrive one after the other."""

    names: list[str]
    """of the stream: its images are not known yet"""
    labels: list[int] | None
    """empty: each row brings its own; None where they do not"""
    first: HeldRows
    """the first images, to be checked before anything else"""

    @abstractmethod
    def split(self, holdout: float) -> tuple[Stream, HeldRows]:
        """All but the first images, to learn from, and these, in memory; `holdout` is a share where that is known."""

    @abstractmethod
    def shuffled(self, seed: int, start: int = 0) -> Iterator[Row]:
        """The images, pass after pass without end, from `start` on; what lies before it is read and skipped."""
