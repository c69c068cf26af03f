"""The game on rows filled up to buckets: nothing from one decision to the next is read by the host.

So a stretch, decision included, can be captured in a CUDA graph and repeated with other counts (`runtime.cuda_graphs`).
In merge games a stretch ends behind the attention whose keys are those of all tokens. Then the shapes of the next one
depend on one bucket instead of two, for queries of one attention that are computed for as many rows as before.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokengame.backends.decisions import keep_with_prefix
from tokengame.game.env import TokenGame
from tokengame.game.state import Decide, State
from tokengame.game.transition import keep_at_least_one
from tokengame.packed.buckets import BucketLayout
from tokengame.packed.heads import CachedKeysValues


class BucketGame(TokenGame):
    """The same game in stretches of fixed shapes.

    States before the first decision have a `RaggedLayout` of whole images, later ones `BucketLayout`s.
    """

    def decide(self, state: State, decide: Decide, threshold: float) -> State:
        """Run to the next decision and carry it out, in merge games up to the attention of its block."""
        state = self._advance(state, self._begins_at(state.stage))
        logits, keep = self.decisions(state, decide, threshold)
        state = removed(state, keep, logits, self.merge)
        if not self.merge:
            return state
        half = 2 * self.stages[state.stage - 1]
        ran = state.backend.run(half, half + 1, state.x, state.layout, state.bias, state.cached)
        return replace(state, x=ran.x, cached=None)

    def finish(self, state: State) -> tuple[Tensor, Tensor]:
        """[B, classes] the prediction, and [B, N] bool, which agents are left."""
        state = self._advance(state, self._begins_at(state.stage))
        agents, images, total = state.agents, state.layout.images, state.total
        assert isinstance(agents, BucketLayout)
        place = agents.image * total + state.of_agents(state.position)
        place = torch.where(agents.filled, place, images * total)
        alive = torch.zeros(images * total + 1, dtype=torch.bool, device=place.device).index_fill_(0, place, True)
        return self.predict(state), alive[:-1].view(images, total)

    def _begins_at(self, stage: int) -> int:
        """The half-block at which a stretch begins, `stage` decisions after the first."""
        return 2 * self.stages[stage - 1] + self.merge if stage else 0


def removed(state: State, keep: Tensor, logits: Tensor, merge: bool) -> State:
    """As `game.transition.remove`, in as many rows as before: those that are left come first, padding follows."""
    agents, layout, prefix = state.agents, state.layout, state.prefix
    keep = keep_at_least_one(keep, logits, agents)
    stays, count = keep_with_prefix(state, keep), agents.pad(keep, False).sum(1)
    # Padding holds an agent's row, whose position is one of the grid.
    rows = torch.nonzero_static(stays, size=layout.rows, fill_value=prefix).squeeze(1)
    x, size, cached = state.x.index_select(0, rows), None, None
    if merge:
        assert state.heads is not None
        x, size = merged(state, keep, stays)
        cached = CachedKeysValues(state.heads.keys, state.heads.values, layout, state.bias)
    return replace(
        state, x=x, position=state.position.index_select(0, rows), size=size, heads=None, observed=None, cached=cached,
        layout=BucketLayout(count + prefix, layout.rows, layout.longest),
        agents=BucketLayout(count, agents.rows, agents.longest), kept=(*state.kept, count),
    )  # fmt: skip


def merged(state: State, keep: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """As `backends.decisions.merge`, in as many rows as before: [M, C] rows and [M] sizes."""
    agents, own = state.agents, torch.arange(len(stays), device=stays.device)
    assert state.observed is not None
    assert state.observed.similarity is not None
    similarity = state.observed.similarity.masked_fill(~agents.pad(keep, False)[:, None], float("-inf"))
    nearest = agents.unpad(similarity.max(2).indices + agents.start[:, None])  # [A]
    absorber = own.index_copy(0, state.agent_rows, state.agent_rows.index_select(0, nearest))
    target = (stays.cumsum(0) - 1).index_select(0, torch.where(stays, own, absorber))
    if isinstance(state.layout, BucketLayout):
        target = torch.where(state.layout.filled, target, own)  # padding stays where it is, behind all rows
    dtype = torch.promote_types(state.x.dtype, torch.float32)
    size = torch.ones_like(own, dtype=torch.float32) if state.size is None else state.size
    length = torch.linalg.vector_norm(state.x, dim=1, dtype=dtype)
    longest = torch.zeros_like(length).scatter_reduce_(0, target, length, "amax")
    x = torch.zeros_like(state.x, dtype=dtype).index_add_(0, target, state.x.to(dtype) * size[:, None])
    x = x * (longest / x.norm(dim=1).clamp(min=1e-12))[:, None]
    return x.to(state.x.dtype), torch.zeros_like(size).index_add_(0, target, size).clamp_(min=1)
