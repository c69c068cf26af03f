"""Pure tensor helpers for packed batches: rows of all images one after another, a different count for every image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Layout:
    """Where each image's rows lie in a packed [M, ...] tensor.

    Args:
        counts: rows of each image, in order.
        device: of the index tensors.
    """

    def __init__(self, counts: list[int], device: torch.device):
        self.counts, self.device = counts, device
        self.images, self.rows, self.longest = len(counts), sum(counts), max(counts, default=0)
        self._known: dict[str, Tensor] = {}
        self._groups: dict[tuple[int, int, int], Groups] = {}

    @property
    def uniform(self) -> bool:
        """Whether all images have the same count, so that a view is a dense batch."""
        return self.rows == self.images * self.longest

    @property
    def count(self) -> Tensor:
        """[B] rows of each image"""
        return self._once("count", lambda: torch.tensor(self.counts, device=self.device))

    @property
    def start(self) -> Tensor:
        """[B] first row of each image"""
        starts = lambda: list(accumulate(self.counts, initial=0))[:-1]  # noqa: E731
        return self._once("start", lambda: torch.tensor(starts(), device=self.device))

    @property
    def bounds(self) -> Tensor:
        """[B + 1] first row of each image, and the number of rows"""
        return self._once("bounds", lambda: torch.tensor(list(accumulate(self.counts, initial=0)), device=self.device))

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

    def first(self, rows: Tensor) -> Tensor:
        """[M, ...] -> [B, ...], the first row of each image."""
        return self.pad(rows)[:, 0] if self.uniform else rows.index_select(0, self.start)

    def per_image(self, flags: Tensor) -> list[int]:
        """How many of `flags` [M] are true in each image. The one synchronisation with the device of a decision."""
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

    def take(self, images: Tensor) -> tuple[Tensor, Layout]:
        """Row indices and layout of a batch of some of the images, in any order, any of them several times."""
        layout = Layout([self.counts[image] for image in images.tolist()], self.device)
        first = self.start.index_select(0, images) - layout.start
        return torch.arange(layout.rows, device=self.device) + first.index_select(0, layout.image), layout


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


def _plan_groups(layout: Layout, size: int, heads: int, multiple: int) -> Groups:
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


class Memory(NamedTuple):
    """Rows that an attention is about to look at, some of which are gone and can be heard only this once."""

    keys: Tensor
    """[M, H, D]"""
    values: Tensor
    """[M, H, D]"""
    layout: Layout
    """of the M rows"""
    bias: Tensor | None
    """[M] added to the attention logits of each key, or None"""


class Look(NamedTuple):
    """What is wanted of an attention that comes next: keys and values, and what agents observe of them."""

    position: Tensor
    """[M] place of each row in the grid, -1 for the `prefix` rows of an image that are no agents"""
    dither: Tensor
    """[N]"""
    total: int
    """agents of an image at the start"""
    prefix: int
    observe: bool
    """whether anybody looks at what agents observe"""


class Seen(NamedTuple):
    """What A agents observe of an attention, and who they are."""

    features: Tensor
    """[A, heads + 6]"""
    agent: Tensor
    """[A] place in the grid"""
    scene: Tensor
    """[A] image"""
    row: Tensor
    """[A] among all rows"""


@lru_cache(maxsize=64)
def _dither_matrix(rows: int, columns: int) -> np.ndarray:
    matrix = np.zeros((1, 1))
    while len(matrix) < 8:
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    tiled = np.tile((matrix + 0.5) / 64, (-(-rows // 8), -(-columns // 8)))[:rows, :columns]
    return np.log(tiled / (1 - tiled)).astype(np.float32).ravel()


def ordered_dither(rows: int, columns: int) -> Tensor:
    """[rows * columns] logits of the thresholds of ordered dithering (Bayer 1973), an 8 x 8 matrix repeated.

    Tokens of an even background are alike and would all stay or all leave. Whoever adds this to its logits thins them
    evenly instead, whatever the resolution: any share that stays is spread over the grid.
    """
    return torch.from_numpy(_dither_matrix(rows, columns).copy())


PIECE = 2**19
"""numbers in a piece of `add_by_pieces`; the last has up to twice as many"""


def add_by_pieces(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """rows + function(rows) for a row-wise function of [M, C], on a CPU piece by piece where that is large.

    What it needs in between then stays in memory that the allocator already holds: fresh pages for the wide hidden
    layer of an MLP cost time. Small pieces cost more, products like many rows (docs/LOG.md).
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or rows.device.type != "cpu":
        return rows + function(rows)
    piece = max(PIECE // rows.shape[1], 1)
    pieces = max(len(rows) // piece, 1)
    sizes = [piece] * (pieces - 1) + [len(rows) - piece * (pieces - 1)]  # always the same: see `spare_rows`
    out = torch.empty_like(rows)
    for some, own in zip(rows.split(sizes), out.split(sizes), strict=True):
        torch.add(some, function(some), out=own)
    return out


def makes_kernels(rows: Tensor) -> bool:
    """Whether the first product of a shape costs half a millisecond more than the second.

    In half precision on CPUs oneDNN makes a kernel for it, and packed batches have other shapes every time: few sizes,
    rounded up, pay.
    """
    half = rows.dtype in (torch.bfloat16, torch.float16)
    return half and rows.device.type == "cpu" and not torch.is_grad_enabled()


def spare_rows(rows: Tensor) -> int:
    """How many rows to add to [M, C] so that M is a multiple of 32, where that pays."""
    return -len(rows) % 32 if makes_kernels(rows) else 0


def segment_mean(values: Tensor, layout: Layout, weight: Tensor | None = None) -> Tensor:
    """Weighted mean of the rows of each image: [M, C] -> [B, C]; zeros for an image without rows."""
    dtype, values = values.dtype, values.float()  # bfloat16 cannot count beyond 256
    weight = torch.ones_like(values[:, 0]) if weight is None else weight.float()
    total = values.new_zeros(layout.images, values.shape[1]).index_add_(0, layout.image, values * weight[:, None])
    mass = values.new_zeros(layout.images).index_add_(0, layout.image, weight)
    return (total / mass.clamp(min=1e-30)[:, None]).to(dtype)


def keep_at_least_one(keep: Tensor, logits: Tensor, layout: Layout) -> Tensor:
    """The game's floor: an image about to lose its last agent keeps the one with the highest keep logit.

    Args:
        keep: [A] bool.
        logits: [A] keep logits.
        layout: of the A agents, every image with at least one.
    """
    best = layout.pad(logits, float("-inf")).argmax(1) + layout.start  # [B]
    starved = ~layout.pad(keep, False).any(1)
    return keep.index_put((best,), keep[best] | starved)
