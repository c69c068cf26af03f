"""Ragged layouts whose shapes repeat: counts stay on the device, and rows are filled up to a bucket.

A CUDA graph repeats launches of fixed shapes without the host, and a decision changes every count. So a bucket bounds
the rows of a batch and those of an image, and only the bounds are known to the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengame.packed.layout import RaggedLayout


def bucket(number: int, step: int, most: int) -> int:
    """The least multiple of `step` that is at least `number`, or `most` where that is less."""
    return min(-(-number // step) * step, most)


class BucketLayout(RaggedLayout):
    """A ragged layout of M rows of which the last are padding: those past the rows of the last image.

    Padding is left out of padded batches and of variable-length attention, which writes nothing there: what is computed
    of it may be any number. In `image` it counts as the last image's, so sums over the rows of an image must leave it
    out (see `filled`).

    Args:
        count: [B] rows of each image, on the device.
        rows: M, at least their sum.
        longest: at least the greatest count.
    """

    uniform = False

    def __init__(self, count: Tensor, rows: int, longest: int):
        super().__init__([], count.device)
        self.images, self.rows, self.longest = len(count), rows, longest
        self._known["count"] = count

    def _start(self) -> Tensor:
        return self.count.cumsum(0) - self.count

    def _cu_seqlens(self) -> Tensor:
        return F.pad(self.count.cumsum(0, dtype=torch.int32), (1, 0))

    @property
    def filled(self) -> Tensor:
        """[M] bool, false for padding"""
        return self._once("filled", lambda: torch.arange(self.rows, device=self.device) < self.count.sum())

    def _image(self) -> Tensor:
        rows, ends = torch.arange(self.rows, device=self.device), self.count.cumsum(0)
        return torch.searchsorted(ends, rows, right=True).clamp_(max=self.images - 1)

    def _slot(self) -> Tensor:
        return torch.where(self.filled, super()._slot(), self.images * self.longest)  # past the padded batch

    def pad(self, rows: Tensor, value: float = 0.0) -> Tensor:
        """[M, ...] -> [B, longest, ...], filled up with `value`."""
        slots = self.images * self.longest
        padded = rows.new_full((slots + 1, *rows.shape[1:]), value)
        return padded.index_copy_(0, self.slot, rows)[:slots].view(self.images, self.longest, *rows.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """[B, longest, ...] -> [M, ...], the inverse of `pad`; padding gets the last slot."""
        return padded.flatten(0, 1).index_select(0, self.slot.clamp(max=self.images * self.longest - 1))
