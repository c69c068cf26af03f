"""Adaptive Token Sampling (ATS): patches sampled by significance, a different number in every image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengame.backbones import wrap
from tokengame.backends import Backend
from tokengame.baselines.reducer import Baseline, ReducedRows, Reducer, class_attention
from tokengame.runtime.method import Method

SHARES = (2.0, 1.3, 0.9, 0.7, 0.55, 0.45, 0.35)
"""points at which the distribution is inverted, relative to the number of tokens"""


class ATS(Reducer):
    """Adaptive Token Sampling (Fayyaz et al., ECCV 2022): patches are sampled by significance, few where few matter.

    Significance is the class token's attention times the norm of the value, summed over heads (eq. 3). Its cumulative
    distribution is inverted at `samples` evenly spaced points (section 3.2); a patch hit several times is kept once, so
    that images with a few significant patches keep fewer. All rows of the attention are computed and projected before
    some are removed, where the paper skips those: a twelfth of a block's work on them.

    Args:
        model: of a supported family.
        samples: points at which the distribution is inverted: the most patches an image can keep.
        blocks: where; from a quarter of the depth to the last but one, as in the paper's multi-stage models.
    """

    def __init__(self, model: nn.Module, samples: int, blocks: tuple[int, ...] = ()):
        depth = wrap(model).depth
        super().__init__(model, blocks or tuple(range(depth // 4, max(depth - 1, depth // 4 + 1))))
        self.samples = samples

    def reduce(self, rows: ReducedRows, qkv: Tensor, backend: Backend) -> ReducedRows:
        layout, prefix = rows.layout, self.backbone.prefix
        attention = class_attention(backend, qkv, layout)  # [B, H, L]
        norms = layout.pad(qkv[:, 2].float().norm(dim=2)).transpose(1, 2)
        chosen = sample_by_significance((attention * norms).sum(1)[:, prefix:], self.samples)
        is_kept = F.pad(chosen, (prefix, 0), value=True)
        counts = is_kept.sum(1).tolist()
        row = torch.nonzero(layout.unpad(is_kept)).squeeze(1)
        return ReducedRows(rows.x.index_select(0, row), rows.layout_of(counts, row))

    def cost(self, rows: Tensor) -> Tensor:
        """The class token's attention once more."""
        return rows * self.backbone.dim


def sample_by_significance(significance: Tensor, samples: int) -> Tensor:
    """Invert the cumulative distribution of [B, n] non-negative numbers at (2 k - 1) / (2 samples), k = 1..samples.

    Returns:
        [B, n] bool, which were hit: at least one of each row.
    """
    cumulative = significance.double().cumsum(1)
    points = (torch.arange(samples, device=significance.device).double() * 2 + 1) / (2 * samples)
    hit = torch.searchsorted(cumulative, points * cumulative[:, -1:])
    return torch.zeros_like(significance, dtype=torch.bool).scatter(1, hit, True)


def settings(model: nn.Module) -> list[tuple[str, Method]]:
    """ATS over its range of samples."""
    samples = [max(1, round(share * wrap(model).patches)) for share in SHARES]
    return [(f"{number} samples", ATS(model, number)) for number in samples]


BASELINES = (Baseline("ATS", settings),)
