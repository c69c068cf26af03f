"""What a decision needs of the tokens: what they observe, who goes on, and who absorbs whoever leaves.

In bfloat16 on CPUs that compute in it our own kernels do this image by image (csrc/decision.cpp); what stands here is
the same on padded batches, for everybody else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengame import kernels
from tokengame.blocks import Heads
from tokengame.kernels import takes
from tokengame.ops import Layout
from tokengame.state import State


def similarity_of(state: State, heads: Heads) -> Tensor | None:
    """Cosine of values [B, L, L]; -1 to oneself, less to padding, who cannot absorb anybody.

    Half of the numbers of each head, which have no order: as good as all of them (docs/LOG.md), at half the cost. None
    where our own kernels will compare what they need.
    """
    if takes(heads.values) and state.x.shape[1] % kernels.SIDE == 0:
        return None
    agents, half = state.agents, (heads.values.shape[2] + 1) // 2
    metric = F.normalize(heads.values[..., :half].flatten(1), dim=1)
    metric = agents.pad(state.of_agents(metric))  # [B, L, H * D / 2]
    if agents.uniform:
        similarity = metric @ metric.transpose(1, 2)
    else:
        padding = (agents.mask[:, None].to(metric.dtype) - 1).mul_(2)
        similarity = torch.baddbmm(padding, metric, metric.transpose(1, 2))
    similarity.flatten(1)[:, :: metric.shape[1] + 1].fill_(-1)  # the diagonal
    return similarity


def features_of(state: State, heads: Heads, compare: bool) -> Tensor:
    """[A, heads + 6], see `Observation.features`; without `compare` nobody's likeness to others is looked at."""
    if state.similarity is None if compare else takes(heads.values):
        return kernels.observe(
            heads.keys, heads.values, heads.query, heads.scale, state.layout, state.prefix, state.bias, state.position,
            state.dither, state.total, compare,
        )  # fmt: skip
    layout, agents, prefix = state.layout, state.agents, state.prefix
    attention = heads.log_attention(layout, state.bias)[..., prefix:]
    log_size = zero = torch.zeros_like(attention[:, :1])
    if state.bias is not None:
        log_size = layout.pad(state.bias)[:, None, prefix:]
    rows: Tensor
    count: Tensor | int
    if layout.uniform:  # numbers instead of small tensors
        rows, count = torch.full((), layout.longest, device=attention.device), agents.longest
    else:
        rows, count = layout.count[:, None, None], agents.count[:, None, None]
    attention = attention + rows.log()  # [B, H, L]
    mean = attention.exp().sum(1, keepdim=True).clamp_(min=1e-30).log_()  # but for a constant
    known = mean if layout.uniform else mean.masked_fill(~agents.mask[:, None], 0.0)
    centred = mean - known.sum(2, keepdim=True) / count
    similarity = leader = zero
    if state.similarity is not None:
        alike = state.similarity.float()  # [B, L, L]; the maximum of half precision is slow on CPUs
        similarity = alike.amax(2)[:, None]
        # 1 where the second is paid more attention, otherwise -1; in place, many times faster than a mask
        ahead = (centred - centred.transpose(1, 2)).sub_(1e-30).sign_()
        leader = ahead.clamp_(max=alike).amax(2)[:, None]
    alive = zero + count / state.total
    features = torch.cat([attention, centred, log_size, similarity, alive, leader], 1)
    dither = state.dither.index_select(0, state.of_agents(state.position))
    return torch.cat([agents.unpad(features.transpose(1, 2)), dither[:, None]], 1)


class Remaining(NamedTuple):
    """What goes on after a decision."""

    x: Tensor
    """[M', C]"""
    position: Tensor
    """[M']"""
    size: Tensor | None = None
    """[M'] patches each row stands for, in merge games"""
    absorber: Tensor | None = None
    """[A] in merge games, which of the agents before the decision now stands for each of them"""


def drop(state: State, keep: Tensor, layout: Layout) -> Remaining:
    """Those who stay, laid out as `layout`; the others are gone."""
    rows = torch.nonzero_static(_with_prefix(state, keep), size=layout.rows).squeeze(1)
    return Remaining(state.x.index_select(0, rows), state.position.index_select(0, rows))


def absorb(state: State, keep: Tensor, layout: Layout) -> Remaining:
    """Those who stay, every leaving agent's row added to its most similar survivor's, and their sizes.

    A sum is then given the length of the longest row in it. In at least float32 whatever the network computes in:
    many small rows may meet in one.

    Args:
        state: before the decision.
        keep: [A] bool, at least one of each image.
        layout: of the M' rows that stay.
    """
    assert state.heads is not None
    if state.similarity is None:
        x, size, position, absorber = kernels.absorb(
            state.heads.values, state.x, state.size, state.position, keep, state.layout, layout, state.prefix
        )
        return Remaining(x, position, size, absorber)
    stays = _with_prefix(state, keep)
    rows = torch.nonzero_static(stays, size=layout.rows).squeeze(1)
    leaving, target = _pair(state, keep, state.layout.rows - len(rows))
    leaving_rows, target_rows = state.agent_rows.index_select(0, leaving), state.agent_rows.index_select(0, target)
    survivor = (stays.cumsum(0) - 1).index_select(0, target_rows)  # index among the survivors
    dtype = torch.promote_types(state.x.dtype, torch.float32)
    x, absorbed = (state.x.index_select(0, some).to(dtype) for some in (rows, leaving_rows))
    size, gone = torch.ones_like(x[:, 0]), torch.ones_like(absorbed[:, 0])
    length = torch.linalg.vector_norm(state.x, dim=1, dtype=dtype)
    longest, others = length.index_select(0, rows), length.index_select(0, leaving_rows)
    longest = longest.scatter_reduce(0, survivor, others, "amax")
    if state.size is not None:
        size, gone = state.size.index_select(0, rows), state.size.index_select(0, leaving_rows)
        x, absorbed = x.mul_(size[:, None]), absorbed.mul_(gone[:, None])
    x = x.index_add_(0, survivor, absorbed)
    x = x * (longest / x.norm(dim=1).clamp(min=1e-12))[:, None]
    absorber = torch.arange(len(keep), device=keep.device).index_copy_(0, leaving, target)
    return Remaining(
        x.to(state.x.dtype), state.position.index_select(0, rows), size.index_add(0, survivor, gone), absorber
    )


def _with_prefix(state: State, keep: Tensor) -> Tensor:
    """[A] -> [M] bool: prefix tokens always stay."""
    if state.layout.uniform:
        return F.pad(state.agents.pad(keep), (state.prefix, 0), value=True).flatten()
    stays = torch.ones(state.layout.rows, dtype=torch.bool, device=keep.device)
    return stays.index_copy_(0, state.agent_rows, keep)


def _pair(state: State, keep: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """[number] each: the agents who leave, and for each the most similar one of its image who stays."""
    agents = state.agents
    assert state.similarity is not None
    leaving = torch.nonzero_static(~keep, size=number).squeeze(1)
    image = agents.image.index_select(0, leaving)
    slot = agents.slot.index_select(0, leaving)
    similarity = state.similarity.flatten(0, 1).index_select(0, slot)  # [number, L]
    keepers = agents.pad(keep).index_select(0, image)
    target = similarity.masked_fill_(~keepers, float("-inf")).max(1).indices  # much faster than argmax
    return leaving, target + agents.start.index_select(0, image)
