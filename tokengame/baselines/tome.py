"""Token Merging (ToMe): every block merges its most similar pairs of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengame.backbones import wrap
from tokengame.backends import Backend
from tokengame.baselines.reducer import Baseline, ReducedRows, Reducer
from tokengame.packed.attention import Kernel, fastest_attention
from tokengame.runtime.method import Method

MERGES = (2, 4, 6, 8, 10, 13, 16)
"""r for 196 tokens and 12 blocks; scaled to others"""


class ToMe(Reducer):
    """Token Merging (Bolya et al., ICLR 2023): every block merges its r most similar pairs.

    Tokens are split alternately into sets A and B; each of A is tied to its most similar one of B (cosine of keys,
    averaged over heads), and the r strongest ties are merged: size-weighted mean, log size on the attention logits
    (proportional attention). Prefix tokens never merge. Every image keeps the same number of tokens.

    Args:
        model: of a supported family.
        merges: r for each block.
        attend: attention within images.
    """

    def __init__(self, model: nn.Module, merges: tuple[int, ...], attend: Kernel = fastest_attention):
        super().__init__(model, tuple(block for block, r in enumerate(merges) if r > 0), attend)
        self.merges = merges

    def _pairs(self, stage: int, rows: int) -> int:
        return min(self.merges[self.blocks[stage]], (rows - self.backbone.prefix) // 2)

    def reduce(self, rows: ReducedRows, qkv: Tensor, _backend: Backend) -> ReducedRows:
        layout, width = rows.layout, rows.x.shape[1]
        x = rows.x.view(layout.images, layout.longest, width)
        size = x.new_ones(x.shape[:2], dtype=torch.float32) if rows.size is None else rows.size.view(x.shape[:2])
        metric, r = qkv[:, 1].mean(1).view(*x.shape[:2], -1), self._pairs(rows.stage, layout.longest)
        if r < 1:
            return rows
        x, size, kept, place = merge_pairs(x, size, metric, r, self.backbone.prefix)
        row, owner = (
            (kept + layout.start[:, None]).flatten(),
            place if rows.owner is None else place.gather(1, rows.owner),
        )
        return ReducedRows(x.flatten(0, 1), rows.layout_of([x.shape[1]] * len(x), row), size.flatten(), owner=owner)

    def on_grid(self) -> ToMe:
        """The same that gives features [B, prefix + N, C], normed: a token has those of the row it was merged into."""
        return ToMeFeatures(self.backbone.model, self.merges, self.attend)

    def cost(self, rows: Tensor) -> Tensor:
        patches = rows - self.backbone.prefix
        return ((patches + 1) // 2) * (patches // 2) * self.backbone.head_dim

    def macs_at(self, agents: int) -> float:
        """Multiply-accumulates of one image with `agents` patches."""
        counts = [agents + self.backbone.prefix]
        for stage in range(len(self.blocks)):
            counts.append(counts[-1] - self._pairs(stage, counts[-1]))
        return float(self.macs_of([torch.tensor([count]) for count in counts]))


class ToMeFeatures(ToMe):
    """ToMe, unmerged again at the end."""

    def __init__(self, model: nn.Module, merges: tuple[int, ...], attend: Kernel = fastest_attention):
        super().__init__(model, merges, attend)
        self.end = 2 * self.backbone.depth

    def finish(self, _backend: Backend, x: Tensor, rows: ReducedRows) -> Tensor:
        x = self.backbone.final_norm(x).unflatten(0, (rows.layout.images, -1))
        return x if rows.owner is None else x.gather(1, rows.owner[..., None].expand(-1, -1, x.shape[2]))


def merge_pairs(x: Tensor, size: Tensor, metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bipartite soft matching (ToMe, section 3): merge the `r` most similar pairs of each image.

    Args:
        x: [B, n, C].
        size: [B, n] patches each row stands for.
        metric: [B, n, D] whose cosine says how similar rows are.
        r: pairs to merge.
        prefix: rows at the start that stay as they are.

    Returns:
        [B, n - r, C], their sizes [B, n - r] and the rows that they were [B, n - r]; prefix tokens first and in order;
        and [B, n] the row that each token is in now.
    """
    metric = F.normalize(metric, dim=2)
    patches = metric[:, prefix:]
    scores = patches[:, ::2] @ patches[:, 1::2].transpose(1, 2)  # [B, |A|, |B|]
    strength, partner = scores.max(2)
    order = strength.argsort(1, descending=True)
    source, rest = order[:, :r], order[:, r:]
    target = partner.gather(1, source)  # [B, r]
    weighted = x[:, prefix:] * size[:, prefix:, None].to(x.dtype)
    first, second = weighted[:, ::2], weighted[:, 1::2]
    width = x.shape[2]
    gone = first.gather(1, source[..., None].expand(-1, -1, width))
    second = second.scatter_add(1, target[..., None].expand(-1, -1, width), gone)
    stay = first.gather(1, rest[..., None].expand(-1, -1, width))
    first_size, second_size = size[:, prefix::2], size[:, prefix + 1 :: 2]
    second_size = second_size.scatter_add(1, target, first_size.gather(1, source))
    merged_size = torch.cat([first_size.gather(1, rest), second_size], 1)
    merged = torch.cat([stay, second], 1) / merged_size[..., None].to(x.dtype)
    kept, place = _moves(source, rest, target, x.shape[1], prefix)
    return torch.cat([x[:, :prefix], merged], 1), torch.cat([size[:, :prefix], merged_size], 1), kept, place


def _moves(source: Tensor, rest: Tensor, target: Tensor, rows: int, prefix: int) -> tuple[Tensor, Tensor]:
    """[B, n - r] the row that each row was, and [B, n] the row that each of `rows` is in now.

    Args:
        source, rest: [B, r] and [B, |A| - r] of set A, those that are merged and those that stay.
        target: [B, r] of set B, what each of `source` is merged into.
        rows: before (n).
        prefix: rows at the start that stay as they are.
    """
    own = torch.arange(rows, device=rest.device).repeat(len(rest), 1)
    first, second = own[:, prefix::2], own[:, prefix + 1 :: 2]
    kept = torch.cat([own[:, :prefix], first.gather(1, rest), second], 1)
    place = torch.zeros_like(own).scatter_(1, kept, own[:, : kept.shape[1]])
    into = place[:, prefix + 1 :: 2].gather(1, target)
    return kept, place.scatter(1, first.gather(1, source), into)


def tome_at(model: nn.Module, macs: float, agents: int) -> ToMe:
    """The ToMe whose multiply-accumulates are nearest to `macs` for images of `agents` patches.

    As in the paper every block merges r, but for the first few, which merge one more where that comes nearer.
    """
    depth = wrap(model).depth
    most = max(1, agents // depth)
    schedules = [tuple(r + (block < extra) for block in range(depth)) for r in range(most) for extra in range(depth)]
    return min((ToMe(model, merges) for merges in schedules), key=lambda tome: abs(tome.macs_at(agents) - macs))


def settings(model: nn.Module) -> list[tuple[str, Method]]:
    """ToMe over its range of r."""
    backbone = wrap(model)
    scaled = sorted({max(1, round(r * backbone.patches / 196 * 12 / backbone.depth)) for r in MERGES})
    return [(f"r {r}", ToMe(model, (r,) * backbone.depth)) for r in scaled]


BASELINES = (Baseline("ToMe", settings),)
