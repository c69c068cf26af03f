"""Where the rows of each image lie in a packed tensor, and how to move between packed and padded batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Places(NamedTuple):
    """Where rows come from in the grid of patches, for models whose attention depends on that."""

    position: Tensor
    """[M] place in the grid, row by row; -1 for prefix tokens"""
    grid: tuple[int, int]
    """rows and columns of patches"""
    angles: Tensor | None = None
    """rotary angles of all places of the grid, in the form of the model's family: computed once a call"""


class RaggedLayout:
    """Where each image's rows lie in a packed [M, ...] tensor.

    Args:
        counts: rows of each image, in order.
        device: of the index tensors.
        places: where the rows come from in the grid; None where no attention depends on that.
    """

    def __init__(self, counts: list[int], device: torch.device, places: Places | None = None):
        self.counts, self.device, self.places = counts, device, places
        self.images, self.rows, self.longest = len(counts), sum(counts), max(counts, default=0)
        self._known: dict[str, Tensor] = {}
        self._groups: dict[tuple[int, int, int], Groups] = {}

    def at(self, places: Places | None) -> RaggedLayout:
        """The same layout of rows that come from `places`."""
        layout = copy.copy(self)  # what is known of the layout is shared
        layout.places = places
        return layout

    def prefixes(self, number: int) -> RaggedLayout:
        """Layout of the first `number` rows of each image, prefix tokens, alone."""
        places = self.places
        if places is not None:
            nowhere = torch.full((self.images * number,), -1, dtype=torch.long, device=self.device)
            places = places._replace(position=nowhere)
        return RaggedLayout([number] * self.images, self.device, places)

    def repeated(self, times: int) -> RaggedLayout:
        """Layout of `times` rows for each row."""
        return RaggedLayout([n * times for n in self.counts], self.device)

    @property
    def uniform(self) -> bool:
        """Whether all images have the same count, so that a view is a dense batch."""
        return self.rows == self.images * self.longest

    @property
    def count(self) -> Tensor:
        """[B] rows of each image"""
        return self._once("count", self._count)

    def _count(self) -> Tensor:
        if self.uniform:  # copies nothing from the host, so that it can be captured in a CUDA graph
            return torch.full((self.images,), self.longest, device=self.device)
        return torch.tensor(self.counts, device=self.device)

    @property
    def start(self) -> Tensor:
        """[B] first row of each image"""
        return self._once("start", self._start)

    def _start(self) -> Tensor:
        if self.uniform:
            return torch.arange(self.images, device=self.device) * self.longest
        return torch.tensor(list(accumulate(self.counts, initial=0))[:-1], device=self.device)

    @property
    def cu_seqlens(self) -> Tensor:
        """[B + 1] cumulative row counts, from 0: the first row of each image, and the number of rows"""
        return self._once("cu_seqlens", self._cu_seqlens)

    def _cu_seqlens(self) -> Tensor:
        if self.uniform:
            return torch.arange(self.images + 1, device=self.device) * self.longest
        return torch.tensor(list(accumulate(self.counts, initial=0)), device=self.device)

    @property
    def image(self) -> Tensor:
        """[M] image of each row"""
        return self._once("image", self._image)

    def _image(self) -> Tensor:
        if self.images == 1:
            return torch.zeros(self.rows, dtype=torch.long, device=self.device)
        images = torch.arange(self.images, device=self.device)
        return images.repeat_interleave(self.count, output_size=self.rows)

    @property
    def slot(self) -> Tensor:
        """[M] index of each row in the flattened padded batch [B * longest]"""
        return self._once("slot", self._slot)

    def _slot(self) -> Tensor:
        first = torch.arange(self.images, device=self.device) * self.longest
        return torch.arange(self.rows, device=self.device) + (first - self.start).index_select(0, self.image)

    @property
    def mask(self) -> Tensor:
        """[B, longest] bool, true where a row is"""
        return self._once("mask", lambda: torch.arange(self.longest, device=self.device) < self.count[:, None])

    def first_rows(self, number: int) -> Tensor:
        """[B * number] the first rows of each image"""
        rows = lambda: (self.start[:, None] + torch.arange(number, device=self.device)).flatten()  # noqa: E731
        return self._once(f"first {number}", rows)

    def behind(self, prefix: int) -> Tensor:
        """[M] where the rows lie in a batch that has `prefix` further rows at the start of each image"""
        rows = lambda: torch.arange(self.rows, device=self.device) + prefix * (self.image + 1)  # noqa: E731
        return self._once(f"behind {prefix}", rows)

    def whole_index(self, prefix: int) -> Tensor:
        """[M] index of each row among all rows of its image before any was removed, `prefix` tokens first"""
        places = self.places
        assert places is not None
        own = torch.arange(self.rows, device=self.device) - self.start.index_select(0, self.image)
        return torch.where(places.position < 0, own, prefix + places.position)

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """`functools.cached_property` takes a lock (before Python 3.12), which torch.compile cannot trace."""
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]

    def pad(self, rows: Tensor, value: float = 0.0) -> Tensor:
        """[M, ...] -> [B, longest, ...], filled up with `value`."""
        shape = (self.images, self.longest, *rows.shape[1:])
        if self.uniform:
            return rows.reshape(shape)
        padded = rows.new_full((self.images * self.longest, *rows.shape[1:]), value)
        return padded.index_copy_(0, self.slot, rows).view(shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """[B, longest, ...] -> [M, ...], the inverse of `pad`."""
        flat = padded.flatten(0, 1)
        return flat if self.uniform else flat.index_select(0, self.slot)

    def weight(self, rows: Tensor) -> Tensor:
        """[M] of each of the rows [M, ...] in a mean: 1, and 0 for padding."""
        return torch.ones_like(rows[:, 0])

    def first(self, rows: Tensor) -> Tensor:
        """[M, ...] -> [B, ...], the first row of each image."""
        return self.pad(rows)[:, 0] if self.uniform else rows.index_select(0, self.start)

    def firsts(self, rows: Tensor, number: int) -> Tensor:
        """[M, ...] -> [B, number, ...], the first rows of each image."""
        return rows.index_select(0, self.first_rows(number)).unflatten(0, (self.images, number))

    def per_image(self, flags: Tensor) -> list[int]:
        """How many of `flags` [M] are true in each image; the only synchronisation with the device in a decision."""
        if not self.rows or 0 in self.counts or self.device.type != "cpu":
            return self.pad(flags).sum(1).tolist() if self.rows else list(self.counts)
        starts = list(accumulate(self.counts, initial=0))[:-1]
        return np.add.reduceat(flags.numpy(), starts, dtype=np.int64).tolist()

    def groups(self, size: int, heads: int, multiple: int = 1) -> Groups:
        """Plan for taking `size` images at a time, neighbours in length, each group padded to a `multiple`."""
        key = size, heads, multiple
        if key not in self._groups:
            self._groups[key] = _plan_groups(self, *key)
        return self._groups[key]

    def take(self, images: Tensor) -> tuple[Tensor, RaggedLayout]:
        """Row indices and layout of a batch of some of the images, in any order, any of them several times."""
        layout = RaggedLayout([self.counts[image] for image in images.tolist()], self.device)
        first = self.start.index_select(0, images) - layout.start
        rows = torch.arange(layout.rows, device=self.device) + first.index_select(0, layout.image)
        if self.places is not None:
            layout.places = self.places._replace(position=self.places.position.index_select(0, rows))
        return rows, layout


@dataclass(frozen=True)
class Groups:
    """Images of a layout in groups of similar length, each padded to its longest: S slots of one row in all.

    A padding slot holds the last row of its image. `gather` and `scatter` move the rows of single heads.
    """

    shapes: list[tuple[int, int]]
    """images and length of each group; groups follow one another in the slots"""
    padded: bool
    row: Tensor
    """[S] row of each slot"""
    padding: Tensor
    """[S] bool, true where the slot is padding"""
    gather: Tensor
    """[S * H] for each cell of [images, H, length], group by group: its query in qkv [M * 3 * H]; H further: key"""
    scatter: Tensor
    """[M * H] cell of each row's heads"""


def _plan_groups(layout: RaggedLayout, size: int, heads: int, multiple: int) -> Groups:
    device = layout.device
    order = sorted(range(layout.images), key=layout.counts.__getitem__)
    shapes, padded_to = [], [0] * layout.images
    for first in range(0, layout.images, size):
        group = order[first : first + size]
        longest = -(-layout.counts[group[-1]] // multiple) * multiple
        shapes.append((len(group), longest))
        for member in group:
            padded_to[member] = longest
    image = torch.tensor(order, device=device)
    length = torch.tensor(padded_to, device=device)  # [B]
    slots = sum(padded_to)
    ordered = length[image]
    first_slot = torch.empty_like(length)
    first_slot[image] = ordered.cumsum(0) - ordered
    owner = image.repeat_interleave(ordered, output_size=slots)  # [S]
    place = torch.arange(slots, device=device) - first_slot[owner]
    row = layout.start[owner] + torch.minimum(place, layout.count[owner] - 1)
    # A group's cells run over image, head, place; cell c of an image of length L is head c // L, place c % L.
    cell_owner = image.repeat_interleave(ordered * heads, output_size=slots * heads)
    cell = torch.arange(slots * heads, device=device) - first_slot[cell_owner] * heads
    head = cell // length[cell_owner]
    cell_place = cell - head * length[cell_owner]
    cell_row = layout.start[cell_owner] + torch.minimum(cell_place, layout.count[cell_owner] - 1)
    own = torch.arange(layout.rows, device=device) - layout.start[layout.image]  # [M] place in the image
    every_head = torch.arange(heads, device=device) * length[layout.image, None]
    return Groups(
        shapes=shapes,
        padded=slots > layout.rows,
        row=row,
        padding=place >= layout.count[owner],
        gather=cell_row * (3 * heads) + head,
        scatter=((first_slot[layout.image] * heads + own)[:, None] + every_head).flatten(),
    )
