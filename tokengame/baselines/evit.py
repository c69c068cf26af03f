"""EViT: the patches that the class token attends to most, the same share in every image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengame.backbones import wrap
from tokengame.backends import Backend
from tokengame.baselines.reducer import KEEP, Baseline, ReducedRows, Reducer, class_attention
from tokengame.config import GameConfig
from tokengame.runtime.method import Method


class EViT(Reducer):
    """EViT (Liang et al., ICLR 2022): of each image the same share of patches, those the class token attends to most.

    After the attention of three blocks (4th, 7th, 10th of 12) ceil(keep * n) patches stay; the others are fused into
    one more, their sum weighted by attention (mean over heads), which then counts as a patch like any other.

    Args:
        model: of a supported family.
        keep: share of the patches that is kept at each of the blocks.
        blocks: where; evenly spread by default.
        fuse: whether the others are fused, or dropped.
    """

    def __init__(self, model: nn.Module, keep: float, blocks: tuple[int, ...] = (), fuse: bool = True):
        super().__init__(model, blocks or GameConfig(stage_count=3).blocks(wrap(model).depth))
        self.keep, self.fuse = keep, fuse

    def reduce(self, rows: ReducedRows, qkv: Tensor, backend: Backend) -> ReducedRows:
        layout, prefix = rows.layout, self.backbone.prefix
        attention = class_attention(backend, qkv, layout).mean(1)[:, prefix:]  # [B, n]
        number = math.ceil(self.keep * attention.shape[1])
        if number == attention.shape[1]:
            return rows
        kept_patches = attention.topk(number, 1, sorted=False).indices
        is_kept = torch.zeros_like(attention, dtype=torch.bool).scatter_(1, kept_patches, True)  # [B, n]
        row = self._rows(F.pad(is_kept, (prefix, 0), value=True))  # [B, kept]
        kept = self._take(rows, row)
        if self.fuse:
            others = self._rows(F.pad(~is_kept, (prefix, 0), value=False))
            weight = attention.masked_select(~is_kept).view(layout.images, 1, -1).to(kept.dtype)
            kept = torch.cat([kept, weight @ self._take(rows, others)], 1)
            foremost = others.gather(1, weight[:, 0].argmax(1, keepdim=True))  # lends the fused patch its place
            row = torch.cat([row, foremost], 1)
        return ReducedRows(kept.flatten(0, 1), rows.layout_of([kept.shape[1]] * len(kept), row.flatten()))

    @staticmethod
    def _take(rows: ReducedRows, row: Tensor) -> Tensor:
        """[B, number, C] the rows `row` [B, number]."""
        return rows.x.index_select(0, row.flatten()).view(*row.shape, -1)

    @staticmethod
    def _rows(flags: Tensor) -> Tensor:
        """[B, number] packed rows where [B, L] flags, the same number of each image, are true."""
        return flags.flatten().nonzero().squeeze(1).view(len(flags), -1)

    def cost(self, rows: Tensor) -> Tensor:
        """The class token's attention once more, and the fusing."""
        patches = rows - self.backbone.prefix
        fused = patches - (self.keep * patches).ceil() if self.fuse else 0
        return (rows + fused) * self.backbone.dim


def settings(model: nn.Module, fuse: bool = True) -> list[tuple[str, Method]]:
    """EViT over its range of keep ratios."""
    return [(f"keep {keep:g}", EViT(model, keep, fuse=fuse)) for keep in KEEP]


BASELINES = (Baseline("EViT", settings), Baseline("EViT, not fusing", lambda model: settings(model, fuse=False)))
