"""Multiply-accumulates, counted analytically: one multiply-accumulate is one (DeiT-S has 4.6 G).

Counted as the field and `torch.utils.flop_counter` do: convolutions, linear layers and the two products of attention;
normalisation and activations are left out. The policy and the matching of merge games are included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokengame.backbones.base import Backbone
from tokengame.game import TokenGame


def native_macs(backbone: Backbone, agents: int) -> float:
    """MACs of one image with `agents` patch tokens through the untouched model."""
    return float(_model_macs(backbone, (), False, 2 * backbone.depth, torch.zeros(0, 1), agents))


def pruned_macs(game: TokenGame, actor: Any, kept: Tensor, agents: int) -> Tensor:
    """[B] MACs of each image through the game, policy and matching included.

    Args:
        game: stages and transition.
        actor: anything with `macs_per_agent`; without it decisions cost nothing.
        kept: [T, B] agents left after each stage.
        agents: at the start.
    """
    kept = kept.double()
    macs = _model_macs(game.backbone, game.stages, game.merge, game.end, kept, agents)
    deciding = torch.cat([torch.full_like(kept[:1], agents), kept[:-1]])  # [T, B]
    return macs + decision_macs(game, actor, deciding).sum(0)


def decision_macs(game: TokenGame, actor: Any, deciding: Tensor) -> Tensor:
    """MACs of decisions of `deciding` [...] agents each, their observation and matching included."""
    backbone = game.backbone
    macs = deciding * (actor.macs_per_agent() if hasattr(actor, "macs_per_agent") else 0)
    if game.merge:  # a query of the class token's own, and matching
        macs = macs + backbone.costs(0).query + deciding**2 * backbone.heads * ((backbone.head_dim + 1) // 2)
    return macs + deciding * backbone.dim if game.features else macs


def fallback_macs(game: TokenGame, agents: int) -> float:
    """MACs of an image of `agents` patch tokens from its first decision on with all tokens (`predict_unpruned`)."""
    backbone, rows = game.backbone, torch.tensor(float(agents + game.backbone.prefix))
    macs = backbone.head_macs(rows)
    for block in range(game.stages[0], backbone.depth):
        macs = macs + block_macs(backbone, block, game.end, rows, rows, rows)
    return float(macs)


def _model_macs(
    backbone: Backbone, stages: tuple[int, ...], merge: bool, end: int, kept: Tensor, agents: int
) -> Tensor:
    """[B] MACs of the network; from half-block `end` on prefix tokens alone are computed."""
    first = kept[0] if len(kept) else torch.zeros(1, dtype=torch.double)
    rows = torch.full_like(first, agents + backbone.prefix).double()
    macs = torch.full_like(rows, float(agents * backbone.embed_macs()))
    for block in range(backbone.depth):
        after = kept[stages.index(block)] + backbone.prefix if block in stages else rows
        macs = macs + block_macs(backbone, block, end, rows if merge else after, after, after)
        rows = after
    return macs + backbone.head_macs(rows)


def block_macs(backbone: Backbone, block: int, end: int, keys: Tensor, queries: Tensor, after: Tensor) -> Tensor:
    """MACs of a block: an attention of `queries` rows to `keys` rows, then an MLP of `after` rows.

    From half-block `end` on prefix rows alone are computed.
    """
    prefix = torch.full_like(keys, backbone.prefix)
    if 2 * block < end:
        macs = attention_macs(backbone, block, keys, queries)
    elif backbone.key_value_weights(block) is None:
        macs = attention_macs(backbone, block, keys, prefix)
    else:
        macs = folded_macs(backbone, block, keys, prefix)
    return macs + (after if 2 * block + 1 < end else prefix) * backbone.costs(block).mlp


def attention_macs(backbone: Backbone, block: int, keys: Tensor, queries: Tensor) -> Tensor:
    """MACs of an attention with `keys` rows of keys and values, of which `queries` rows have a query and an output."""
    costs = backbone.costs(block)
    products = 2 * keys * queries * backbone.heads * backbone.head_dim
    return keys * costs.keys_values + queries * (costs.query + costs.output) + products


def folded_macs(backbone: Backbone, block: int, rows: Tensor, queries: Tensor) -> Tensor:
    """The same where queries attend to the rows themselves (see `TorchBackend._attend_rows`)."""
    costs = backbone.costs(block)
    linear = costs.query + costs.keys_values + costs.output
    return queries * (linear + 2 * rows * backbone.heads * backbone.dim)
