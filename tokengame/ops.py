"""Pure tensor helpers for packed batches: rows of all images one after another, a different count for every image."""

from __future__ import annotations

from functools import cached_property

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

    @property
    def uniform(self) -> bool:
        """Whether all images have the same count, so that a view is a dense batch."""
        return self.rows == self.images * self.longest

    @cached_property
    def count(self) -> Tensor:
        """[B] rows of each image"""
        return torch.tensor(self.counts, device=self.device)

    @cached_property
    def start(self) -> Tensor:
        """[B] first row of each image"""
        return self.count.cumsum(0) - self.count

    @cached_property
    def image(self) -> Tensor:
        """[M] image of each row"""
        images = torch.arange(self.images, device=self.device)
        return images.repeat_interleave(self.count, output_size=self.rows)

    @cached_property
    def slot(self) -> Tensor:
        """[M] index of each row in the flattened padded batch [B * longest]"""
        return torch.arange(self.rows, device=self.device) + (
            torch.arange(self.images, device=self.device) * self.longest - self.start
        ).repeat_interleave(self.count, output_size=self.rows)

    @cached_property
    def mask(self) -> Tensor:
        """[B, longest] bool, true where a row is"""
        return torch.arange(self.longest, device=self.device) < self.count[:, None]

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

    def select(self, keep: Tensor) -> tuple[Tensor, Layout]:
        """Indices of the rows where `keep` [M] is true, and their layout. One synchronisation with the device."""
        per_image = self.pad(keep).sum(1) if self.rows else self.count
        counts = per_image.tolist()
        rows = torch.nonzero_static(keep, size=sum(counts)).squeeze(1)
        return rows, Layout(counts, self.device)

    def repeat(self, times: int) -> tuple[Tensor, Layout]:
        """Row indices and layout of the batch in which every image stands `times` times in a row."""
        counts = [n for n in self.counts for _ in range(times)]
        layout = Layout(counts, self.device)
        first = self.start.repeat_interleave(times)
        rows = torch.arange(layout.rows, device=self.device) + (first - layout.start)[layout.image]
        return rows, layout


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
