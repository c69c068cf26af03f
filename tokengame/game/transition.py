"""What a decision does to the tokens: pruned ones are removed (drop) or merged into kept ones (merge)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokengame.backends.base import Kept
from tokengame.backends.decisions import keep_with_prefix
from tokengame.game.state import State
from tokengame.packed.heads import CachedKeysValues
from tokengame.packed.layout import RaggedLayout


def remove(state: State, keep: Tensor, logits: Tensor, merge: bool) -> State:
    """The state without the pruned agents; no block has run since.

    Args:
        state: before the decision.
        keep: [A] bool, the agents' actions.
        logits: [A] keep logits; where all agents of an image decide to leave, the one with the highest is kept.
        merge: whether pruned tokens are merged into kept ones.
    """
    counts = state.agents.per_image(keep)
    if 0 in counts:
        keep = keep_at_least_one(keep, logits, state.agents)
        counts = [max(n, 1) for n in counts]
    agents = RaggedLayout(counts, keep.device)
    layout = RaggedLayout([n + state.prefix for n in counts], keep.device)
    kept = state.backend.merge(state, keep, layout) if merge else drop(state, keep, layout)
    cached = None
    if merge and state.heads is not None:
        cached = CachedKeysValues(state.heads.keys, state.heads.values, state.layout, state.bias)
    if state.layout.places is not None:
        layout = layout.at(state.layout.places._replace(position=kept.position))
    return State(
        state.backend, kept.x, kept.position, layout, agents, state.total, state.dither, kept.size, cached=cached,
        absorber=kept.absorber, kept=(*state.kept, agents.count),
    )  # fmt: skip


def drop(state: State, keep: Tensor, layout: RaggedLayout) -> Kept:
    """The kept rows, laid out as `layout`; the others are gone."""
    rows = torch.nonzero_static(keep_with_prefix(state, keep), size=layout.rows).squeeze(1)
    return Kept(state.x.index_select(0, rows), state.position.index_select(0, rows))


def keep_at_least_one(keep: Tensor, logits: Tensor, layout: RaggedLayout) -> Tensor:
    """An image that would lose its last agent keeps the one with the highest keep logit.

    Args:
        keep: [A] bool.
        logits: [A] keep logits.
        layout: of the A agents, every image with at least one.
    """
    best = layout.pad(logits, float("-inf")).argmax(1) + layout.start  # [B]
    empty = ~layout.pad(keep, False).any(1)
    return keep.index_put((best,), keep[best] | empty)
