"""Peers under the same runtime, each written from its paper."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengame.attention import Kernel, fastest_attention
from tokengame.backbone import Backbone, feed_forward, join, project
from tokengame.macs import head_macs, linear_macs
from tokengame.ops import Layout


class ToMe(nn.Module):
    """Token Merging (Bolya et al., ICLR 2023): every block merges its r most similar pairs, between attention and MLP.

    Tokens are split alternately into sets A and B; each of A is tied to its most similar one of B (cosine of keys,
    averaged over heads), and the r strongest ties are merged: size-weighted mean, log size on the attention logits
    (proportional attention). Prefix tokens never merge. Every image keeps the same number of tokens. It runs on the
    same attention kernels as the game, so that a difference in time is not one in kernels.

    Args:
        model: supported timm model.
        merges: r for each block.
        attend: attention within images.
    """

    def __init__(self, model: nn.Module, merges: tuple[int, ...], attend: Kernel = fastest_attention):
        super().__init__()
        self.backbone, self.merges = Backbone(model, attend), merges

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, classes]."""
        x, size = self.merged(images)
        layout = Layout([x.shape[1]] * len(x), x.device)
        return self.backbone.head(x.flatten(0, 1), layout, None if size is None else size.flatten())

    def merged(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows [B, n, C] after the last block, and how many patches each stands for, [B, n] (None: one each)."""
        backbone = self.backbone
        x, size = backbone.embed(images), None
        for block, r in zip(backbone.blocks, self.merges, strict=True):
            batch, rows, width = x.shape
            layout, flat = Layout([rows] * batch, x.device), x.flatten(0, 1)
            qkv = project(block, flat)
            bias = None if size is None else size.log().flatten()
            flat = join(block, flat, backbone.attend(qkv, layout, bias))
            x = flat.view(batch, rows, width)
            r = min(r, (rows - backbone.prefix) // 2)
            if r > 0:
                size = x.new_ones(batch, rows, dtype=torch.float32) if size is None else size
                x, size = merge_pairs(x, size, qkv[:, 1].mean(1).view(batch, rows, -1), r, backbone.prefix)
            x = feed_forward(block, x.flatten(0, 1)).view(len(x), -1, width)
        return x, size

    def macs(self, agents: int) -> float:
        """Multiply-accumulates of one image with `agents` patches, matching included."""
        backbone, rows = self.backbone, agents + self.backbone.prefix
        total = float(agents * backbone.model.patch_embed.proj.weight.numel())
        for block, r in zip(backbone.blocks, self.merges, strict=True):
            head_dim = block.attn.head_dim
            total += rows * linear_macs(block.attn) + 2 * rows**2 * block.attn.num_heads * head_dim
            patches = rows - backbone.prefix
            r = min(r, patches // 2)
            total += ((patches + 1) // 2) * (patches // 2) * head_dim if r > 0 else 0
            rows -= max(r, 0)
            total += rows * linear_macs(block.mlp)
        pooled = rows - (0 if backbone.model.pool_include_prefix else backbone.prefix)
        return total + float(head_macs(backbone.model, torch.tensor(float(pooled))))


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
    return min((ToMe(model, merges) for merges in schedules), key=lambda tome: abs(tome.macs(agents) - macs))
