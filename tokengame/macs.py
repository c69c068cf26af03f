"""Multiply-accumulates, counted analytically: one multiply-accumulate is one (DeiT-S is 4.6 G).

Counted as the field and `torch.utils.flop_counter` do: convolutions, linear layers and the two products of attention;
normalisation and activations are left out. The policy and the matching of `merge` are included.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from tokengame.backbone import Backbone
from tokengame.blocks import folds
from tokengame.game import TokenGame


def linear_macs(module: nn.Module | None) -> int:
    """MACs of one row through every linear layer of `module`."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear)) if module is not None else 0


def native_macs(backbone: Backbone, agents: int) -> float:
    """MACs of one image with `agents` patch tokens through the untouched model."""
    return float(_model_macs(backbone, [], False, 2 * backbone.depth, torch.zeros(0, 1), agents))


def pruned_macs(game: TokenGame, actor: Any, kept: Tensor, agents: int) -> Tensor:
    """[B] MACs of each image through the game, policy and matching included.

    Args:
        game: stages and transition.
        actor: anything with `macs_per_agent`; whoever has none decides for free.
        kept: [T, B] agents alive after each stage.
        agents: at the start.
    """
    kept = kept.double()
    macs = _model_macs(game.backbone, list(game.stages), game.merge, game.end, kept, agents)
    deciding = torch.cat([torch.full_like(kept[:1], agents), kept[:-1]])  # [T, B]
    return macs + decision_macs(game, actor, deciding).sum(0)


def decision_macs(game: TokenGame, actor: Any, deciding: Tensor) -> Tensor:
    """MACs of decisions of `deciding` [...] agents each, their observation and matching included."""
    attn = game.backbone.blocks[0].attn
    macs = deciding * (actor.macs_per_agent() if hasattr(actor, "macs_per_agent") else 0)
    if game.merge:  # a query of the class token's own, and matching
        macs = macs + linear_macs(attn.qkv) // 3 + deciding**2 * attn.num_heads * ((attn.head_dim + 1) // 2)
    return macs + deciding * game.backbone.dim if game.features else macs


def second_look_macs(game: TokenGame, agents: int) -> float:
    """MACs of an image of `agents` patch tokens from its first decision on, all of which stay (`TokenGame.spared`)."""
    backbone, first = game.backbone, game.stages[0]
    rows = torch.tensor(float(agents + backbone.prefix))
    macs = head_macs(backbone.model, rows - (0 if backbone.model.pool_include_prefix else backbone.prefix))
    for index in range(first, backbone.depth):
        macs = macs + block_macs(backbone.blocks[index], index, game.end, backbone.prefix, rows, rows, rows)
    return float(macs)


def _model_macs(backbone: Backbone, stages: list[int], merge: bool, end: int, kept: Tensor, agents: int) -> Tensor:
    """[B] MACs of the network; from half-block `end` on prefix tokens alone are computed."""
    prefix, model = backbone.prefix, backbone.model
    rows = torch.full_like(kept[0] if len(kept) else torch.zeros(1, dtype=torch.double), agents + prefix).double()
    macs = torch.full_like(rows, float(agents * model.patch_embed.proj.weight.numel()))
    for index, block in enumerate(backbone.blocks):
        decides = index in stages
        after = kept[stages.index(index)] + prefix if decides else rows
        macs = macs + block_macs(block, index, end, prefix, rows if merge else after, after, after)
        rows = after
    return macs + head_macs(model, rows - (0 if model.pool_include_prefix else prefix))


def block_macs(block: Any, index: int, end: int, prefix: int, rows: Tensor, asking: Tensor, after: Tensor) -> Tensor:
    """MACs of block `index`: `rows` are looked at by `asking` ones, `after` go through its MLP.

    From half-block `end` on `prefix` rows alone are computed.
    """
    few = torch.full_like(rows, prefix)
    if 2 * index < end:
        macs = attention_macs(block.attn, rows, asking)
    else:
        macs = (folded_macs if folds(block.attn) else attention_macs)(block.attn, rows, few)
    return macs + (after if 2 * index + 1 < end else few) * linear_macs(block.mlp)


def attention_macs(attn: Any, rows: Tensor, asking: Tensor) -> Tensor:
    """MACs of an attention over the keys and values of `rows` rows, of which only `asking` ask and go on."""
    looked_at = linear_macs(attn.qkv) // 3 * 2
    products = 2 * rows * asking * attn.num_heads * attn.head_dim
    return rows * looked_at + asking * (linear_macs(attn) - looked_at) + products


def folded_macs(attn: Any, rows: Tensor, asking: Tensor) -> Tensor:
    """The same where `asking` rows, times heads, ask the rows themselves (see `blocks.folds`)."""
    return asking * (linear_macs(attn) + 2 * rows * attn.num_heads * attn.qkv.in_features)


def head_macs(model: Any, rows: Tensor) -> Tensor:
    """MACs of pooling `rows` [...] rows and of the classifier."""
    heads = linear_macs(model.head) + linear_macs(getattr(model, "head_dist", None))
    pool = model.attn_pool
    if not isinstance(pool, AttentionPoolLatent):
        return rows * 0 + heads
    latent = pool.latent_len
    fixed = latent * (linear_macs(pool.q) + linear_macs(pool.proj) + linear_macs(pool.mlp))
    return rows * (linear_macs(pool.kv) + 2 * latent * pool.num_heads * pool.head_dim) + fixed + heads
