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


def looped_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """One call per image: no padding and no mask, best on a CPU."""
    counts = layout.counts
    queries, keys, values = (rows.transpose(0, 1).unsqueeze(0).split(counts, 2) for rows in (q, k, v))  # [1, H, n, D]
    masks = [None] * len(counts) if bias is None else [m.view(1, 1, 1, -1) for m in bias.to(q.dtype).split(counts)]
    parts = [
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        for query, key, value, mask in zip(queries, keys, values, masks, strict=True)
    ]
    return torch.cat([part.squeeze(0).transpose(0, 1).flatten(1) for part in parts])
