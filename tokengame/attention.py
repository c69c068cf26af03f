"""Self-attention inside each image of a packed batch, by two kernels with one meaning.

`bias` is one number per key, added to its logits in every head: log size for merged tokens (ToMe's proportional
attention, Bolya et al. 2023, eq. 1). It stays a key bias, so fused attention stays on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengame.ops import Layout

Kernel = Callable[[Tensor, Tensor, Tensor, Layout, Tensor | None], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """Attention of every row to the rows of its own image, by the kernel that suits the batch.

    Args:
        q, k, v: [M, H, D].
        layout: of the M rows.
        bias: [M] added to the logits of each key, or None.

    Returns:
        [M, H * D]
    """
    return choose_kernel(layout)(q, k, v, layout, bias)


def choose_kernel(layout: Layout) -> Kernel:
    """A dense batch needs no packing; on a GPU one padded launch beats many; on a CPU a call per image wins."""
    if layout.uniform or layout.device.type != "cpu":
        return padded_attention
    return looped_attention


def padded_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """One call on the batch padded to its longest image; without padding or mask where all have the same count."""
    query, key, value = (layout.pad(rows).transpose(1, 2) for rows in (q, k, v))  # [B, H, L, D]
    mask = None
    if bias is not None or not layout.uniform:
        rows = q.new_zeros(layout.rows) if bias is None else bias.to(q.dtype)
        mask = layout.pad(rows, float("-inf"))[:, None, None]  # [B, 1, 1, L]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return layout.unpad(out.transpose(1, 2)).flatten(1)


WIDE = 192
"""PyTorch's CPU kernel takes at least this many queries in blocks of 64, fewer in blocks of 32, which are slower"""


def looped_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """One call per image: no padding and no mask, best on a CPU.

    Images slightly below `WIDE` borrow the rows behind them as further queries, and their results are thrown away.
    """
    q, k, v = (rows.transpose(0, 1).unsqueeze(0) for rows in (q, k, v))  # [1, H, M, D]
    bias = None if bias is None else bias.to(q.dtype).view(1, 1, 1, -1)
    parts, start = [], 0
    for count in layout.counts:
        own, end = slice(start, start + count), start + count
        if 0.87 * WIDE < count < WIDE and start + WIDE <= layout.rows:
            end = start + WIDE
        mask = None if bias is None else bias[..., own]
        out = F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, own], v[:, :, own], attn_mask=mask)
        parts.append(out[0, :, :count].transpose(0, 1).flatten(1))
        start += count
    return torch.cat(parts)
