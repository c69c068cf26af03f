"""Features on the full grid against games played token by token."""

import pytest
import torch
from conftest import tiny_vit

from tokengame.attention import looped_attention
from tokengame.backbone import Backbone
from tokengame.config import GameConfig
from tokengame.errors import TokenGameError
from tokengame.forced import forced_model
from tokengame.grid import grid_features
from tokengame.testing import Scripted, _look_back, _merge_one_by_one, _values, survivors

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TABLE = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2))
STAGES, EVERY = (1, 3), [0, 1, 2, 3]


def cosine(keys, one, other):
    return float(torch.cosine_similarity(keys[one], keys[other], dim=0))


def slowly(model, transition, fill):
    """[block][B, R, C]: one image, one block, one token at a time."""
    backbone, history = Backbone(model, looped_attention), survivors(TABLE)
    result = [torch.zeros(3, 16 + backbone.prefix, backbone.dim) for _ in EVERY]
    for image, tokens in enumerate(backbone.embed(IMAGES)):
        prefix, living, owner = backbone.prefix, list(range(16)), list(range(16))
        x, size, full = tokens, torch.ones(len(tokens)), tokens.clone()
        for index, block in enumerate(backbone.blocks):
            kept = [a for a in living if index not in STAGES or history[STAGES.index(index), image, a]]
            rows = [*range(prefix), *(prefix + living.index(a) for a in kept)]
            if transition == "drop" and len(kept) < len(living):
                x, size, living = x[rows], size[rows], kept
            keys, seen, bias = _values(block, x), x, size.log()
            if transition == "merge" and len(kept) < len(living):
                for gone in set(living) - set(kept):
                    full[prefix + gone] = x[prefix + living.index(gone)]
                    similar = [cosine(keys, prefix + living.index(gone), prefix + living.index(k)) for k in kept]
                    owner = [kept[similar.index(max(similar))] if o == gone else o for o in owner]
                x, size = _merge_one_by_one(x, size, keys, living, kept, prefix)
                living = kept
            x = x + block.ls1(_look_back(block, x, seen, bias))
            x = x + block.ls2(block.mlp(block.norm2(x[None])))[0]
            full[[*range(prefix), *(prefix + a for a in living)]] = x
            shown = full.clone()
            for agent in range(16):
                if agent not in living and fill == "zero":
                    shown[prefix + agent] = 0
                if agent not in living and fill == "absorber":
                    shown[prefix + agent] = full[prefix + owner[agent]]
            result[index][image] = shown
    return result


@pytest.mark.parametrize(("transition", "fill"), [("drop", "exit"), ("drop", "zero"), ("merge", "exit"),
                                                  ("merge", "zero"), ("merge", "absorber")])  # fmt: skip
@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 2}, {"global_pool": "avg", "class_token": False}])
@torch.no_grad()
def test_every_fill_is_what_it_says(changes, transition, fill):
    model = tiny_vit(**changes)
    config = GameConfig(stages=STAGES, transition=transition)
    found = grid_features(model, config, Scripted(TABLE), 0.0, IMAGES, EVERY, fill, norm=False)
    for block, expected in zip(found, slowly(model, transition, fill), strict=True):
        torch.testing.assert_close(block, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"reg_tokens": 2}, {"img_size": (24, 48)}, {"name": "deit_tiny_distilled_patch16_224"}]
)
@torch.no_grad()
def test_keeping_everything_gives_timms_features(changes):
    model = tiny_vit(**changes)
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    fast = forced_model(model, GameConfig(stages=(1, 2)), (1.0, 1.0))
    fast.actor.force(fast, images)
    torch.testing.assert_close(fast.forward_features(images), model.forward_features(images), atol=1e-5, rtol=1e-4)
    for indices in (None, 2, [0, 3], [-1]):
        expected = model.forward_intermediates(images, indices, intermediates_only=True, norm=True)
        found = fast.forward_intermediates(images, indices, norm=True)
        assert [f.shape for f in found] == [e.shape for e in expected]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_unknown_or_impossible_fills_are_refused(model):
    fast = forced_model(model, GameConfig(stages=(1, 2)), (0.5, 0.5))
    fast.actor.force(fast, IMAGES)
    with pytest.raises(TokenGameError, match="merge game"):
        fast.forward_features(IMAGES, fill="absorber")
    with pytest.raises(TokenGameError, match="must be one of exit, absorber, zero"):
        fast.forward_features(IMAGES, fill="mean")
