"""Decisions on PyTorch's kernels: what agents observe, and which kept token absorbs a pruned one, on padded batches.

The compiled kernels do the same image by image (csrc/decision.cpp).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengame.backends.base import Kept, Tokens
from tokengame.packed.heads import EXTRA_FEATURES, Heads, ObservationRequest, Observed
from tokengame.packed.layout import RaggedLayout


def observe(
    log_attention: Tensor, heads: Heads, layout: RaggedLayout, bias: Tensor | None, request: ObservationRequest
) -> Observed:
    """See `Backend.observe`; log_attention [B, H, longest] of the class token."""
    agents, rows = request.agents, request.agents.behind(request.prefix)
    position = request.position.index_select(0, rows)
    similarity = similarity_of(heads.values, rows, agents) if request.similarity else None
    if request.features:
        features = _features(log_attention, layout, bias, request, similarity, position)
    else:
        features = no_features(agents, heads.keys.shape[1])
    return Observed(features, position, agents.image, rows, similarity)


def no_features(agents: RaggedLayout, heads: int) -> Tensor:
    """[A, H + 6] zeros: what is observed where there was no attention, or where features are not needed."""
    return torch.zeros(agents.rows, heads + len(EXTRA_FEATURES), device=agents.device)


def similarity_of(values: Tensor, rows: Tensor, agents: RaggedLayout) -> Tensor:
    """Cosine of the agents' values: [M, H, D] -> [B, L, L]; -1 on the diagonal, less for padding.

    Half of the numbers of each head, which have no order: as good as all of them (docs/LOG.md), at half the cost.

    Args:
        values: of all rows.
        rows: [A] the agents' rows.
        agents: layout of the A agents.
    """
    half = (values.shape[2] + 1) // 2
    metric = F.normalize(values[..., :half].flatten(1), dim=1)
    metric = agents.pad(metric.index_select(0, rows))  # [B, L, H * D / 2]
    if agents.uniform:
        similarity = metric @ metric.transpose(1, 2)
    else:
        padding = (agents.mask[:, None].to(metric.dtype) - 1).mul_(2)
        similarity = torch.baddbmm(padding, metric, metric.transpose(1, 2))
    if torch.compiler.is_exporting():  # engines have no strides
        own = torch.arange(metric.shape[1], device=metric.device)
        return similarity.masked_fill(own[:, None] == own, -1)
    similarity.flatten(1)[:, :: metric.shape[1] + 1].fill_(-1)  # the diagonal
    return similarity


def _features(
    log_attention: Tensor,
    layout: RaggedLayout,
    bias: Tensor | None,
    request: ObservationRequest,
    similarity: Tensor | None,
    position: Tensor,
) -> Tensor:
    """[A, H + 6], see `Observation.features`."""
    agents, prefix = request.agents, request.prefix
    attention = log_attention[..., prefix:]
    log_size = zero = torch.zeros_like(attention[:, :1])
    if bias is not None:
        log_size = layout.pad(bias)[:, None, prefix:]
    rows: Tensor
    count: Tensor | int
    if layout.uniform:  # numbers instead of small tensors
        rows, count = torch.full((), layout.longest, device=attention.device), agents.longest
    else:
        rows, count = layout.count[:, None, None], agents.count[:, None, None]
    attention = attention + rows.log()  # [B, H, L]
    mean = attention.exp().sum(1, keepdim=True).clamp_(min=1e-30).log_()  # up to a constant
    known = mean if layout.uniform else mean.masked_fill(~agents.mask[:, None], 0.0)
    centred = mean - known.sum(2, keepdim=True) / count
    highest = leader = zero
    if similarity is not None:
        alike = similarity.float()  # [B, L, L]; the maximum of half precision is slow on CPUs
        highest = alike.amax(2)[:, None]
        # 1 where the second gets more attention, otherwise -1; in place, many times faster than a mask
        ahead = (centred - centred.transpose(1, 2)).sub_(1e-30).sign_()
        leader = ahead.clamp_(max=alike).amax(2)[:, None]
    alive = zero + count / request.total
    features = torch.cat([attention, centred, log_size, highest, alive, leader], 1)
    dither = request.dither.index_select(0, position)
    return torch.cat([agents.unpad(features.transpose(1, 2)), dither[:, None]], 1)


def merge(tokens: Tokens, keep: Tensor, kept_layout: RaggedLayout) -> Kept:
    """See `Backend.merge`; computes in float32 at least, since many small rows may be summed."""
    stays = keep_with_prefix(tokens, keep)
    rows = torch.nonzero_static(stays, size=kept_layout.rows).squeeze(1)
    pruned, absorber = _pair(tokens, keep, tokens.layout.rows - len(rows))
    agent_rows = tokens.agents.behind(tokens.prefix)
    pruned_rows, absorber_rows = agent_rows.index_select(0, pruned), agent_rows.index_select(0, absorber)
    target = (stays.cumsum(0) - 1).index_select(0, absorber_rows)  # index among the kept rows
    dtype = torch.promote_types(tokens.x.dtype, torch.float32)
    x, absorbed = (tokens.x.index_select(0, some).to(dtype) for some in (rows, pruned_rows))
    size, absorbed_size = torch.ones_like(x[:, 0]), torch.ones_like(absorbed[:, 0])
    length = torch.linalg.vector_norm(tokens.x, dim=1, dtype=dtype)
    longest, others = length.index_select(0, rows), length.index_select(0, pruned_rows)
    longest = longest.scatter_reduce(0, target, others, "amax")
    if tokens.size is not None:
        size, absorbed_size = tokens.size.index_select(0, rows), tokens.size.index_select(0, pruned_rows)
        x, absorbed = x.mul_(size[:, None]), absorbed.mul_(absorbed_size[:, None])
    x = x.index_add_(0, target, absorbed)
    x = x * (longest / x.norm(dim=1).clamp(min=1e-12))[:, None]
    stands_for = torch.arange(len(keep), device=keep.device).index_copy_(0, pruned, absorber)
    position = tokens.position.index_select(0, rows)
    return Kept(x.to(tokens.x.dtype), position, size.index_add(0, target, absorbed_size), stands_for)


def keep_with_prefix(tokens: Tokens, keep: Tensor) -> Tensor:
    """[A] -> [M] bool: prefix tokens are always kept."""
    if tokens.layout.uniform:
        return F.pad(tokens.agents.pad(keep), (tokens.prefix, 0), value=True).flatten()
    stays = torch.ones(tokens.layout.rows, dtype=torch.bool, device=keep.device)
    return stays.index_copy_(0, tokens.agents.behind(tokens.prefix), keep)


def _pair(tokens: Tokens, keep: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """[number] each: the pruned agents, and for each the most similar kept agent of its image."""
    agents = tokens.agents
    assert tokens.observed is not None
    assert tokens.observed.similarity is not None
    pruned = torch.nonzero_static(~keep, size=number).squeeze(1)
    image = agents.image.index_select(0, pruned)
    slot = agents.slot.index_select(0, pruned)
    similarity = tokens.observed.similarity.flatten(0, 1).index_select(0, slot)  # [number, L]
    kept = agents.pad(keep).index_select(0, image)
    absorber = similarity.masked_fill_(~kept, float("-inf")).max(1).indices  # much faster than argmax
    return pruned, absorber + agents.start.index_select(0, image)
