"""Features on the full grid against a slow reference that goes token by token."""

import pytest
import torch
from conftest import tiny_vit

from tokengame.backbones import wrap
from tokengame.config import GameConfig
from tokengame.errors import TokenGameError
from tokengame.game import TokenGame
from tokengame.game.testing import Scripted, _attend_to, _merge_one_by_one, _values, kept_agents
from tokengame.measure.synthetic import synthetic_model
from tokengame.runtime.features import grid_features

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TABLE = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2))
STAGES, EVERY = (1, 3), [0, 1, 2, 3]


def cosine(values, one, other):
    return float(torch.cosine_similarity(values[one], values[other], dim=0))


def slowly(model, transition, fill):
    """[block][B, R, C]: one image, one block, one token at a time."""
    backbone, history = wrap(model), kept_agents(TABLE)
    result = [torch.zeros(3, 16 + backbone.prefix, backbone.dim) for _ in EVERY]
    for image, tokens in enumerate(backbone.embed(IMAGES)):
        prefix, alive, owner = backbone.prefix, list(range(16)), list(range(16))
        x, size, full = tokens, torch.ones(len(tokens)), tokens.clone()
        for index, block in enumerate(backbone.blocks):
            kept = [a for a in alive if index not in STAGES or history[STAGES.index(index), image, a]]
            rows = [*range(prefix), *(prefix + alive.index(a) for a in kept)]
            if transition == "drop" and len(kept) < len(alive):
                x, size, alive = x[rows], size[rows], kept
            values, before, bias = _values(block, x), x, size.log()
            if transition == "merge" and len(kept) < len(alive):
                for pruned in set(alive) - set(kept):
                    full[prefix + pruned] = x[prefix + alive.index(pruned)]
                    similar = [cosine(values, prefix + alive.index(pruned), prefix + alive.index(k)) for k in kept]
                    owner = [kept[similar.index(max(similar))] if o == pruned else o for o in owner]
                x, size = _merge_one_by_one(x, size, values, alive, kept, prefix)
                alive = kept
            x = x + block.ls1(_attend_to(block, x, before, bias))
            x = x + block.ls2(block.mlp(block.norm2(x[None])))[0]
            full[[*range(prefix), *(prefix + a for a in alive)]] = x
            filled = full.clone()
            for agent in range(16):
                if agent not in alive and fill == "zero":
                    filled[prefix + agent] = 0
                if agent not in alive and fill == "absorber":
                    filled[prefix + agent] = full[prefix + owner[agent]]
            result[index][image] = filled
    return result


@pytest.mark.parametrize(("transition", "fill"), [("drop", "exit"), ("drop", "zero"), ("merge", "exit"),
                                                  ("merge", "zero"), ("merge", "absorber")])  # fmt: skip
@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 2}, {"global_pool": "avg", "class_token": False}])
@torch.no_grad()
def test_fills_equal_the_slow_reference(changes, transition, fill):
    model = tiny_vit(**changes)
    game = TokenGame(wrap(model), GameConfig(stages=STAGES, transition=transition))
    found, _ = grid_features(game, Scripted(TABLE), 0.0, IMAGES, EVERY, fill, norm=False)
    for block, expected in zip(found, slowly(model, transition, fill), strict=True):
        torch.testing.assert_close(block, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"reg_tokens": 2}, {"img_size": (24, 48)}, {"name": "deit_tiny_distilled_patch16_224"}]
)
@torch.no_grad()
def test_keeping_everything_gives_timms_features(changes):
    model = tiny_vit(**changes)
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    fast = synthetic_model(model, GameConfig(stages=(1, 2)), (1.0, 1.0))
    fast.actor.fit(fast, images)
    torch.testing.assert_close(fast.forward_features(images), model.forward_features(images), atol=1e-5, rtol=1e-4)
    for indices in (None, 2, [0, 3], [-1]):
        expected = model.forward_intermediates(images, indices, intermediates_only=True, norm=True)
        found = fast.forward_intermediates(images, indices, intermediates_only=True, norm=True)
        assert [f.shape for f in found] == [e.shape for e in expected]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_unknown_or_impossible_fills_are_refused(model):
    fast = synthetic_model(model, GameConfig(stages=(1, 2)), (0.5, 0.5))
    fast.actor.fit(fast, IMAGES)
    with pytest.raises(TokenGameError, match="policy that merges"):
        fast.forward_features(IMAGES, fill="absorber")
    with pytest.raises(TokenGameError, match="must be one of exit, absorber, zero"):
        fast.forward_features(IMAGES, fill="mean")
