"""Peers that let rows go between a block's attention and its MLP, each written from its paper, on our kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengame.attention import Kernel, fastest_attention
from tokengame.backbone import Backbone
from tokengame.config import GameConfig
from tokengame.macs import block_macs, head_macs, native_macs
from tokengame.ops import Layout


@dataclass(frozen=True)
class Rows:
    """A batch somewhere in a `Reducer`."""

    x: Tensor
    """[M, C] packed, prefix tokens first in each image"""
    layout: Layout
    size: Tensor | None = None
    """[M] patches each row stands for, in methods that weigh them"""
    stage: int = 0
    """reductions before this one"""


@dataclass(frozen=True)
class Reduced:
    """A batch at the end of the network."""

    rows: Rows
    counts: tuple[Tensor, ...]
    """[B] rows of each image at the start and after each reduction, prefix tokens included"""
    prefix: int

    @property
    def total(self) -> int:
        """Patches of an image at the start."""
        return int(self.counts[0][0]) - self.prefix

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """[B] patch tokens after each reduction"""
        return tuple(count - self.prefix for count in self.counts[1:])


class Reducer(nn.Module):
    """A frozen network that lets rows go after the attention of some blocks and before their MLP.

    It runs on the game's kernels and lets patches leave in the last attention where the class token alone is read,
    as the game does, so that a difference is in the method.

    Args:
        model: supported timm model.
        blocks: where rows go, ascending.
        attend: attention within images.
    """

    def __init__(self, model: nn.Module, blocks: tuple[int, ...], attend: Kernel = fastest_attention):
        super().__init__()
        self.backbone, self.blocks = Backbone(model, attend), blocks
        self.end = self.backbone.end(2 * blocks[-1] + 1 if blocks else 0)

    def reduce(self, rows: Rows, qkv: Tensor) -> Rows:
        """What goes on; qkv [M, 3, H, D] are of the block's attention."""
        raise NotImplementedError

    def cost(self, rows: Tensor) -> Tensor:
        """MACs of reducing `rows` [B] rows."""
        raise NotImplementedError

    def play(self, images: Tensor) -> Reduced:
        """Run [B, channels, height, width] images through all blocks."""
        backbone = self.backbone
        tokens = backbone.embed(images)
        rows = Rows(tokens.flatten(0, 1), Layout([tokens.shape[1]] * len(tokens), tokens.device))
        half, counts = 0, [rows.layout.count]
        for stage, block in enumerate(self.blocks):
            x, qkv, _ = backbone.run(half, 2 * block + 1, rows.x, rows.layout, _bias(rows))
            assert qkv is not None
            rows, half = self.reduce(Rows(x, rows.layout, rows.size, stage), qkv), 2 * block + 1
            counts.append(rows.layout.count)
        x = backbone.run(half, self.end, rows.x, rows.layout, _bias(rows)).x
        return Reduced(Rows(x, rows.layout, rows.size), tuple(counts), backbone.prefix)

    def logits(self, end: Reduced) -> Tensor:
        """[B, classes]"""
        return self.backbone.predict(self.end, end.rows.x, end.rows.layout, end.rows.size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, classes]."""
        return self.logits(self.play(images))

    def macs(self, end: Reduced) -> tuple[float, Tensor]:
        """Multiply-accumulates of an image natively, and of each image [B] as it was run."""
        return native_macs(self.backbone, end.total), self.macs_of([count.cpu() for count in end.counts])

    def macs_of(self, counts: list[Tensor]) -> Tensor:
        """[B] multiply-accumulates of images with `counts` [B] rows at the start and after each reduction."""
        backbone, rows = self.backbone, counts[0].double()
        model, prefix, stage = backbone.model, backbone.prefix, 0
        total = (rows - prefix) * model.patch_embed.proj.weight.numel()
        for index, block in enumerate(backbone.blocks):
            after = rows
            if index in self.blocks:
                total, stage = total + self.cost(rows), stage + 1
                after = counts[stage].double()
            total, rows = total + block_macs(block, index, self.end, prefix, rows, rows, after), after
        return total + head_macs(model, rows - (0 if model.pool_include_prefix else prefix))


def _bias(rows: Rows) -> Tensor | None:
    return None if rows.size is None else rows.size.log()


class ToMe(Reducer):
    """Token Merging (Bolya et al., ICLR 2023): every block merges its r most similar pairs.

    Tokens are split alternately into sets A and B; each of A is tied to its most similar one of B (cosine of keys,
    averaged over heads), and the r strongest ties are merged: size-weighted mean, log size on the attention logits
    (proportional attention). Prefix tokens never merge. Every image keeps the same number of tokens.

    Args:
        model: supported timm model.
        merges: r for each block.
        attend: attention within images.
    """

    def __init__(self, model: nn.Module, merges: tuple[int, ...], attend: Kernel = fastest_attention):
        super().__init__(model, tuple(block for block, r in enumerate(merges) if r > 0), attend)
        self.merges = merges

    def _pairs(self, stage: int, rows: int) -> int:
        return min(self.merges[self.blocks[stage]], (rows - self.backbone.prefix) // 2)

    def reduce(self, rows: Rows, qkv: Tensor) -> Rows:
        layout, width = rows.layout, rows.x.shape[1]
        x = rows.x.view(layout.images, layout.longest, width)
        size = x.new_ones(x.shape[:2], dtype=torch.float32) if rows.size is None else rows.size.view(x.shape[:2])
        metric, r = qkv[:, 1].mean(1).view(*x.shape[:2], -1), self._pairs(rows.stage, layout.longest)
        if r < 1:
            return rows
        x, size = merge_pairs(x, size, metric, r, self.backbone.prefix)
        return Rows(x.flatten(0, 1), Layout([x.shape[1]] * len(x), x.device), size.flatten())

    def cost(self, rows: Tensor) -> Tensor:
        patches = rows - self.backbone.prefix
        return ((patches + 1) // 2) * (patches // 2) * self.backbone.blocks[0].attn.head_dim

    def macs_at(self, agents: int) -> float:
        """Multiply-accumulates of one image with `agents` patches."""
        counts = [agents + self.backbone.prefix]
        for stage in range(len(self.blocks)):
            counts.append(counts[-1] - self._pairs(stage, counts[-1]))
        return float(self.macs_of([torch.tensor([count]) for count in counts]))


def merge_pairs(x: Tensor, size: Tensor, metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching (ToMe, section 3): merge the `r` most similar pairs of each image.

    Args:
        x: [B, n, C].
        size: [B, n] patches each row stands for.
        metric: [B, n, D] whose cosine says how similar rows are.
        r: pairs to merge.
        prefix: rows at the start that stay as they are.

    Returns:
        [B, n - r, C] and [B, n - r]; prefix tokens first and in order.
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
    return torch.cat([x[:, :prefix], merged], 1), torch.cat([size[:, :prefix], merged_size], 1)


def tome_at(model: nn.Module, macs: float, agents: int) -> ToMe:
    """The ToMe whose multiply-accumulates are nearest to `macs` for images of `agents` patches.

    As in the paper every block merges r, but for the first few, which merge one more where that comes nearer.
    """
    depth = Backbone(model).depth
    most = max(1, agents // depth)
    schedules = [tuple(r + (block < extra) for block in range(depth)) for r in range(most) for extra in range(depth)]
    return min((ToMe(model, merges) for merges in schedules), key=lambda tome: abs(tome.macs_at(agents) - macs))


class EViT(Reducer):
    """EViT (Liang et al., ICLR 2022): of each image the same share of patches, those the class token attends to most.

    After the attention of three blocks (4th, 7th, 10th of 12) ceil(keep * n) patches stay; the others are fused into
    one more, their sum weighted by attention (mean over heads), which then counts as a patch like any other.

    Args:
        model: supported timm model.
        keep: share of the patches that stays at each of the blocks.
        blocks: where; evenly spread by default.
        fuse: whether the others are fused, or gone.
    """

    def __init__(self, model: nn.Module, keep: float, blocks: tuple[int, ...] = (), fuse: bool = True):
        super().__init__(model, blocks or GameConfig(stage_count=3).blocks(Backbone(model).depth))
        self.keep, self.fuse = keep, fuse

    def reduce(self, rows: Rows, qkv: Tensor) -> Rows:
        layout, prefix = rows.layout, self.backbone.prefix
        attention = self.backbone.read_heads(qkv, layout).log_attention(layout).exp().mean(1)[:, prefix:]  # [B, n]
        number = math.ceil(self.keep * attention.shape[1])
        if number == attention.shape[1]:
            return rows
        stay = attention.topk(number, 1, sorted=False).indices
        stays = torch.zeros_like(attention, dtype=torch.bool).scatter_(1, stay, True)  # [B, n]
        kept = self._rows(rows, F.pad(stays, (prefix, 0), value=True))
        if self.fuse:
            weight = attention.masked_select(~stays).view(layout.images, 1, -1).to(kept.dtype)
            gone = self._rows(rows, F.pad(~stays, (prefix, 0), value=False))
            kept = torch.cat([kept, weight @ gone], 1)
        return Rows(kept.flatten(0, 1), Layout([kept.shape[1]] * len(kept), kept.device))

    @staticmethod
    def _rows(rows: Rows, flags: Tensor) -> Tensor:
        """[B, number, C] of the rows where [B, L] flags, the same number of each image, are true."""
        return rows.x.index_select(0, flags.flatten().nonzero().squeeze(1)).view(len(flags), -1, rows.x.shape[1])

    def cost(self, rows: Tensor) -> Tensor:
        """The class token's attention once more, and the fusing."""
        patches = rows - self.backbone.prefix
        fused = patches - (self.keep * patches).ceil() if self.fuse else 0
        return (rows + fused) * self.backbone.dim


class ATS(Reducer):
    """Adaptive Token Sampling (Fayyaz et al., ECCV 2022): patches are sampled by significance, few where few matter.

    Significance is the class token's attention times the norm of the value, summed over heads (eq. 3). Its cumulative
    distribution is inverted at `samples` evenly spaced points (section 3.2); a patch hit several times stays once, so
    that images with a few significant patches keep fewer. All rows of the attention are computed and projected before
    they go, where the paper skips those that go: a twelfth of a block's work on them.

    Args:
        model: supported timm model.
        samples: points at which the distribution is inverted: the most patches an image can keep.
        blocks: where; from a quarter of the depth to the last but one, as in the paper's multi-stage models.
    """

    def __init__(self, model: nn.Module, samples: int, blocks: tuple[int, ...] = ()):
        depth = Backbone(model).depth
        super().__init__(model, blocks or tuple(range(depth // 4, max(depth - 1, depth // 4 + 1))))
        self.samples = samples

    def reduce(self, rows: Rows, qkv: Tensor) -> Rows:
        layout, prefix = rows.layout, self.backbone.prefix
        attention = self.backbone.read_heads(qkv, layout).log_attention(layout).exp()  # [B, H, L]
        norms = layout.pad(qkv[:, 2].float().norm(dim=2)).transpose(1, 2)
        chosen = sample_by_significance((attention * norms).sum(1)[:, prefix:], self.samples)
        stays = F.pad(chosen, (prefix, 0), value=True)
        counts = stays.sum(1).tolist()
        row = torch.nonzero(layout.unpad(stays)).squeeze(1)
        return Rows(rows.x.index_select(0, row), Layout(counts, row.device))

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
