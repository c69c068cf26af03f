"""For tests: a slow, readable game to compare with, and the contract that every token game keeps."""

from __future__ import annotations

from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengame.backbones.base import Backbone
from tokengame.game.env import TokenGame
from tokengame.game.state import Observation
from tokengame.packed.layout import RaggedLayout


class Scripted:
    """A policy that reads its keep logits from a table.

    Args:
        table: [T, B, N], by stage, image and agent id.
    """

    def __init__(self, table: Tensor):
        self.table = table

    def __call__(self, obs: Observation) -> Tensor:
        """[A] keep logits."""
        return self.table[obs.stage[obs.image], obs.image, obs.agent]


def kept_agents(table: Tensor) -> Tensor:
    """[T, B, N] bool, the agents left after each stage under scripted logits: pruning is final, one is always left."""
    alive, history = torch.ones_like(table[0], dtype=torch.bool), []
    for logits in table:
        kept = alive & (logits > 0)
        best = logits.masked_fill(~alive, float("-inf")).argmax(1)
        for image in range(len(kept)):
            if not kept[image].any():
                kept[image, best[image]] = True
        alive = kept
        history.append(alive)
    return torch.stack(history)


@torch.no_grad()
def masked_forward(backbone: Backbone, stages: tuple[int, ...], images: Tensor, table: Tensor) -> Tensor:
    """`drop` by masks: every token is computed, pruned ones are hidden as attention keys. Runs timm's own blocks."""
    model, prefix = backbone.model, backbone.prefix
    x, history = backbone.embed(images), kept_agents(table)
    alive = torch.ones(x.shape[:2], dtype=torch.bool)
    for index, block in enumerate(model.blocks):
        if index in stages:
            alive[:, prefix:] = history[stages.index(index)]
        x = block(x, attn_mask=alive[:, None, None, :].clone())
    x = model.norm(x)
    return torch.cat([model.forward_head(x[b : b + 1, alive[b]]) for b in range(len(x))])


@torch.no_grad()
def masked_features(
    backbone: Backbone, stages: tuple[int, ...], images: Tensor, table: Tensor, calls: int = 1
) -> Tensor:
    """`drop` by masks, for models of any family: the native model computes every token, pruned ones are hidden as keys.

    Args:
        backbone: of a model that calls PyTorch's `scaled_dot_product_attention`.
        stages: blocks before which tokens are pruned.
        images: [B, channels, height, width].
        table: [T, B, N] keep logits.
        calls: attentions of a block.

    Returns:
        [B, prefix + N, C] native features; those of pruned tokens mean nothing.
    """
    native, history, called = F.scaled_dot_product_attention, kept_agents(table), 0

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *more, **named) -> Tensor:
        nonlocal called
        stage, called = sum(called // calls >= block for block in stages) - 1, called + 1
        if stage >= 0 and key.shape[2] == query.shape[2]:
            hidden = F.pad(~history[stage], (backbone.prefix, 0), value=False)[:, None, None]
            start = query.new_zeros(1) if attn_mask is None else attn_mask
            attn_mask = start.masked_fill(hidden, float("-inf"))
        return native(query, key, value, attn_mask, *more, **named)

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with patch.object(F, "scaled_dot_product_attention", attend):
            return backbone.native_features(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@torch.no_grad()
def played_features(game: TokenGame, images: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The features of a scripted game at the tokens that are left, [B, prefix + N, C], and which these are, [B, ...].

    Args:
        game: with `keep_patches`.
        images: [B, channels, height, width].
        table: [T, B, N] keep logits.
    """
    backbone, state = game.backbone, game.play(images, Scripted(table))
    there = F.pad(state.alive, (backbone.prefix, 0), value=True)
    own = torch.arange(state.layout.rows) - state.layout.start[state.layout.image]
    place = torch.where(state.position < 0, own, backbone.prefix + state.position)
    features = state.x.new_zeros(*there.shape, backbone.dim)
    features[state.layout.image, place] = backbone.final_norm(state.x)
    return features, there


@torch.no_grad()
def merged_by_loops(backbone: Backbone, stages: tuple[int, ...], images: Tensor, table: Tensor) -> Tensor:
    """`merge` by loops, for models of any family: one image at a time, one pruned token at a time, no fused attention.

    Returns:
        [B, ...] predictions.
    """
    history, outputs = kept_agents(table), []
    for number, image in enumerate(images):
        tokens, grid = backbone.embed(image[None]), backbone.grid(*image.shape[1:])
        layout = backbone.whole_layout(tokens, grid)
        x, size, agents = tokens[0], torch.ones(tokens.shape[1]), list(range(tokens.shape[1] - backbone.prefix))
        for block in range(backbone.depth):
            _, keys, values = backbone.project(block, backbone.norm_attention(block, x), layout).unbind(1)
            bias, of_keys = size.log(), layout
            if block in stages:
                kept = [a for a in agents if history[stages.index(block), number, a]]
                half = values[..., : (backbone.head_dim + 1) // 2].flatten(1)
                x, size = _merge_one_by_one(x, size, half, agents, kept, backbone.prefix)
                position, agents = torch.tensor([-1] * backbone.prefix + kept), kept
                layout = RaggedLayout([len(x)], x.device, layout.places and layout.places._replace(position=position))
            query = backbone.project(block, backbone.norm_attention(block, x), layout, 0, 1)[:, 0]
            logits = torch.einsum("qhd,khd->hqk", query, keys) * backbone.scale + bias
            pairs = backbone.pair_bias(block, grid)
            if pairs is not None:
                rows, others = layout.whole_index(backbone.prefix), of_keys.whole_index(backbone.prefix)
                logits = logits + pairs[:, rows][:, :, others]
            attended = torch.einsum("hqk,khd->qhd", logits.softmax(2), values).flatten(1)
            x = backbone.feed_forward(block, backbone.add_attention(block, x, attended, layout), layout)
        read = layout.prefixes(backbone.prefix) if backbone.reads_prefix_only else layout
        outputs.append(backbone.head(x[: read.rows], read, size[: read.rows])[0])
    return torch.stack(outputs)


@torch.no_grad()
def merged_forward(backbone: Backbone, stages: tuple[int, ...], images: Tensor, table: Tensor) -> Tensor:
    """`merge` by loops: one image at a time, one pruned token at a time."""
    history = kept_agents(table)
    outputs = []
    for image, tokens in enumerate(backbone.embed(images)):
        x, size = tokens, torch.ones(len(tokens))
        agents = list(range(len(tokens) - backbone.prefix))
        for index, block in enumerate(backbone.blocks):
            before, bias = x, size.log()
            if index in stages:
                kept = [a for a in agents if history[stages.index(index), image, a]]
                x, size = _merge_one_by_one(x, size, _values(block, x), agents, kept, backbone.prefix)
                agents = kept
            x = x + block.ls1(_attend_to(block, x, before, bias))
            x = x + block.ls2(block.mlp(block.norm2(x[None])))[0]
        x = backbone.model.norm(x)
        outputs.append(_weighted_head(backbone, x, size))
    return torch.stack(outputs)


def _attend_to(block, x: Tensor, others: Tensor, bias: Tensor) -> Tensor:
    """[n, C] attention output of rows x [n, C] over rows `others` [m, C]: timm's own attention on both, masked."""
    mask = torch.cat([torch.full((len(x),), float("-inf")), bias]).view(1, 1, 1, -1)
    return block.attn(block.norm1(torch.cat([x, others]))[None], attn_mask=mask)[0, : len(x)]


def _values(block, x: Tensor) -> Tensor:
    """[n, H * D / 2] the first half of the values of each head."""
    attn, half = block.attn, (block.attn.head_dim + 1) // 2
    return attn.qkv(block.norm1(x)).view(len(x), 3, attn.num_heads, attn.head_dim)[:, 2, :, :half].flatten(1)


def _merge_one_by_one(x: Tensor, size: Tensor, values: Tensor, agents: list[int], kept: list[int], prefix: int):
    row = {agent: prefix + place for place, agent in enumerate(agents)}
    total, mass, longest = x * size[:, None], size.clone(), list(x.norm(dim=1))
    for agent in agents:
        if agent in kept:
            continue
        similar = [float(F.cosine_similarity(values[row[agent]], values[row[k]], dim=0).detach()) for k in kept]
        absorber = row[kept[similar.index(max(similar))]]
        total[absorber] += x[row[agent]] * size[row[agent]]
        mass[absorber] += size[row[agent]]
        longest[absorber] = max(longest[absorber], x[row[agent]].norm())
    rows = [*range(prefix), *(row[k] for k in kept)]
    mean = total[rows] / mass[rows, None]
    stretched = mean / mean.norm(dim=1, keepdim=True) * torch.stack([longest[row] for row in rows])[:, None]
    return stretched, mass[rows]


def _weighted_head(backbone: Backbone, x: Tensor, size: Tensor) -> Tensor:
    """timm's head on rows repeated `size` times, so that its mean is the weighted one."""
    patches = x[backbone.prefix :].repeat_interleave(size[backbone.prefix :].round().long(), 0)
    return backbone.model.forward_head(torch.cat([x[: backbone.prefix], patches])[None])[0]


@torch.no_grad()
def check_contract(game: TokenGame, images: Tensor, seed: int = 0) -> None:
    """Play random games and assert what every token game must do.

    Raises:
        AssertionError: a decision was not carried out, pruning was reversed, a prefix token was lost, an image lost all
            agents, rows were not really removed, patches were lost in merging, or keeping everything changed the
            prediction.
    """
    backbone, batch = game.backbone, len(images)
    agents = game.reset(images).total
    table = torch.randn(len(game.stages), batch, agents, generator=torch.Generator().manual_seed(seed)) + 0.5
    expected = kept_agents(table)
    state, decide, before = game.reset(images), Scripted(table), torch.ones(batch, agents, dtype=torch.bool)
    for stage, block in enumerate(game.stages):
        obs = game.observe(state)
        assert state.stage == stage, "one decision a stage"
        assert len(obs.token) == int(before.sum()), "exactly the agents that are left act"
        logits = decide(obs)
        state = game.step(state, logits > 0, logits)
        alive = torch.zeros(batch, agents, dtype=torch.bool)
        alive[state.agents.image, state.position[state.agent_rows]] = True
        assert torch.equal(alive, expected[stage]), "a decision was not carried out: masked, not removed?"
        assert not (alive & ~before).any(), f"pruning at block {block} was reversed"
        assert alive.any(1).all(), "an image lost all of its agents"
        assert len(state.x) == int(alive.sum()) + batch * backbone.prefix, "rows were masked, not removed"
        assert int((state.position < 0).sum()) == batch * backbone.prefix, "a prefix token was pruned"
        if state.size is not None:
            patches = torch.zeros(batch).index_add(0, state.layout.image, state.size)
            assert torch.allclose(patches, torch.full((batch,), float(agents + backbone.prefix))), "patches were lost"
        before = alive
    native, kept = backbone.native(images), game.predict(game.play(images, Scripted(table.abs() + 1)))
    assert torch.allclose(native, kept, atol=1e-5, rtol=1e-4), "keeping everything changed the prediction"
