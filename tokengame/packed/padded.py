"""Layouts of dense batches whose sizes may be symbols of a graph that is exported.

Every image has as many rows as the longest one, and those past its own count are padding, in place. Nothing is computed
from counts on the host, so `torch.export` can follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokengame.packed.layout import Places, RaggedLayout


class PaddedLayout(RaggedLayout):
    """A layout of B * longest rows, image by image; padding holds any finite numbers.

    Args:
        images: B, a number or a symbol.
        longest: rows of an image, a number or a symbol.
        device: of the index tensors.
        count: [B] rows of each image that are no padding; None: all.
        padded: whether there may be padding.
        places: see `RaggedLayout`.
    """

    def __init__(
        self, images: Any, longest: Any, device: torch.device, count: Tensor | None = None, padded: bool = False,
        places: Places | None = None,
    ):  # fmt: skip
        super().__init__([], device, places)
        self.images, self.longest, self.rows, self._padded = images, longest, images * longest, padded
        if count is not None:
            self._known["count"] = count

    @property
    def uniform(self) -> bool:
        return not self._padded

    @property
    def filled(self) -> Tensor:
        """[M] bool, false for padding"""
        return self.mask.flatten()

    def prefixes(self, number: int) -> RaggedLayout:
        places = self.places
        if places is not None:
            nowhere = torch.full((self.images * number,), -1, dtype=torch.long, device=self.device)
            places = places._replace(position=nowhere)
        return PaddedLayout(self.images, number, self.device, places=places)

    def repeated(self, times: int) -> RaggedLayout:
        return PaddedLayout(self.images, self.longest * times, self.device, self.count * times, self._padded)

    def _count(self) -> Tensor:
        return torch.full((self.images,), self.longest, device=self.device)

    def _start(self) -> Tensor:
        return torch.arange(self.images, device=self.device) * self.longest

    def _image(self) -> Tensor:
        return torch.arange(self.images, device=self.device)[:, None].expand(-1, self.longest).flatten()

    def _slot(self) -> Tensor:
        return torch.arange(self.rows, device=self.device)

    def pad(self, rows: Tensor, value: float = 0.0) -> Tensor:
        padded = rows.reshape(self.images, -1, *rows.shape[1:])  # one unknown size: engines need not compute it
        if self.uniform:
            return padded
        mask = self.mask[(...,) + (None,) * (rows.ndim - 1)]
        if rows.dtype == torch.bool:  # engines do not choose between truth values
            return padded | ~mask if value else padded & mask
        return padded.masked_fill(~mask, value)

    def unpad(self, padded: Tensor) -> Tensor:
        return padded.reshape(-1, *padded.shape[2:])

    def weight(self, rows: Tensor) -> Tensor:
        return super().weight(rows) if self.uniform else self.filled

    def first(self, rows: Tensor) -> Tensor:
        return self.firsts(rows, 1)[:, 0]

    def firsts(self, rows: Tensor, number: int) -> Tensor:
        return rows.reshape(self.images, -1, *rows.shape[1:])[:, :number]
