"""Models that change after our kernels have packed their weights, and models that do what the kernels do not."""


import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import policy_for, tiny_vit
from test_kernels import game_of, half_vit, normal, off, played
from timm.layers import Attention, GELUTanh, Mlp
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tokengame import kernels
from tokengame.backbones import wrap
from tokengame.kernels.weights import packed_weights
from tokengame.runtime import PrunedViT

pytestmark = pytest.mark.skipif(
    not kernels.available(), reason="no kernels of our own: no AVX-512 bfloat16 in the processor, or no compiler"
)


@pytest.fixture
def model():
    return half_vit()


def in_place(model):
    with torch.inference_mode():
        model.blocks[1].mlp.fc1.weight.mul_(3)


def other_data(model):
    for _ in range(3):  # the third may lie where the first did
        model.blocks[1].mlp.fc1.weight.data = model.blocks[1].mlp.fc1.weight.data * 2


CHANGES = {
    "in place": lambda model: model.blocks[1].attn.qkv.weight.mul_(-2),
    "in place, in inference mode": in_place,
    "data in place": lambda model: model.blocks[1].mlp.fc1.weight.data.mul_(3),
    "norm": lambda model: nn.init.constant_(model.blocks[2].norm2.weight, 3),
    "patches": lambda model: model.patch_embed.proj.weight.mul_(-1),
    "head": lambda model: nn.init.constant_(model.head.bias, 1),
    "other data": other_data,
    "other weight": lambda model: setattr(model.blocks[1].mlp.fc1, "weight", nn.Parameter(normal(256, 64))),
    "other MLP": lambda model: setattr(model.blocks[1], "mlp", Mlp(64, 128).bfloat16()),
    "other activation": lambda model: setattr(model.blocks[1].mlp, "act", nn.ReLU()),
    "no layer scale": lambda model: setattr(model.blocks[1], "ls2", nn.Identity()),
    "other patches": lambda model: setattr(model, "patch_embed", half_vit(seed=1).patch_embed),
    "other blocks": lambda model: setattr(model, "blocks", half_vit(seed=1).blocks),
    "other head": lambda model: setattr(model, "head", nn.Linear(64, 5).bfloat16()),
    "state dict": lambda model: model.load_state_dict(half_vit(seed=1, init_values=0.3).state_dict()),
    "float32": lambda model: in_place(model.float()),
    "float32 and back": lambda model: (in_place(model.float()), model.bfloat16()),
}


@pytest.mark.parametrize("key", CHANGES)
@torch.no_grad()
def test_a_model_that_changed_predicts_as_it_is_now(key):
    model, images = half_vit(init_values=0.3), normal(3, 3, 32, 32)
    game = game_of(model)
    before = played(game, images)
    assert game.backbone.tiled(images)
    CHANGES[key](model)
    images = images.to(game.backbone.dtype)
    assert off(before, model(images)) > 0.08, "the test is blind"
    for now in [game_of(model)] + [game] * (key != "other blocks"):
        assert off(played(now, images), model(images)) < 0.03


@torch.inference_mode()
def test_a_model_made_in_inference_mode_may_change_too():
    model, images = half_vit(), normal(3, 3, 32, 32)
    before = played(game_of(model), images)
    in_place(model)
    assert off(before, model(images)) > 0.08, "the test is blind"
    assert off(played(game_of(model), images), model(images)) < 0.03


WATCHERS = {
    "hook": lambda mlp, see: mlp.register_forward_hook(lambda *_: see()),
    "hook before": lambda mlp, see: mlp.fc1.register_forward_pre_hook(lambda *_: see()),
    "hook on all": lambda mlp, see: register_module_forward_hook(lambda part, *_: see() if part is mlp else None),
    "own forward": lambda mlp, see: setattr(mlp, "forward", lambda rows: (see(), type(mlp).forward(mlp, rows))[1]),
}


@pytest.mark.parametrize("key", WATCHERS)
def test_who_watches_a_part_of_the_model_sees_it_at_work(key, model):
    game, images, seen = game_of(model), normal(3, 3, 32, 32), []
    expected, mlp = played(game, images), model.blocks[1].mlp
    handle = WATCHERS[key](mlp, lambda: seen.append(1))
    found = played(game, images)
    handle.remove() if handle else delattr(mlp, "forward")
    assert off(found, expected) < 0.02
    assert torch.equal(played(game, images), expected)
    assert len(seen) == 1


def test_dropout_is_done_by_pytorch():
    """Of a model that trains, or of one layer, which estimates of uncertainty leave on."""
    model, images = half_vit(proj_drop_rate=0.5), normal(3, 3, 32, 32)
    before = played(game_of(model), images)
    for part in (model, model.blocks[1].mlp.drop1):
        part.train()
        assert not torch.equal(played(game_of(model), images), played(game_of(model), images))
        model.eval()
        assert torch.equal(played(game_of(model), images), before)


class Doubling(torch.Tensor):
    """A weight that is not what its memory says, like those of quantised models."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs)
        return 2 * found.as_subclass(torch.Tensor) if func is F.linear else found


def with_part(part, name, value):
    model = half_vit()
    setattr(model.get_submodule(part), name, value)
    return model.eval().bfloat16()


UNSUPPORTED = {
    "qk norm": lambda: half_vit(qk_norm=True),
    "norm of attention": lambda: half_vit(scale_attn_norm=True),
    "norm in the MLP": lambda: half_vit(scale_mlp_norm=True),
    "tanh": lambda: half_vit(act_layer=GELUTanh),
    "ReLU": lambda: half_vit(act_layer=nn.ReLU),
    "heads of 24": lambda: half_vit(embed_dim=96, num_heads=4),
    "hidden 80": lambda: half_vit(mlp_ratio=1.25),
    "SwiGLU": lambda: half_vit(name="vit_giant_patch14_dinov2", mlp_ratio=4),
    "gate": lambda: with_part("blocks.1", "attn", Attention(64, 2, qkv_bias=True, gated=True)),
    "more heads in a block": lambda: with_part("blocks.1", "attn", Attention(64, 4, attn_head_dim=64)),
    "something in place of a dropout": lambda: with_part("blocks.1.mlp", "drop1", nn.Hardtanh()),
    "something in place of a dropped path": lambda: with_part("blocks.1", "drop_path1", nn.Hardtanh()),
    "no plain weight": lambda: with_part("blocks.1.mlp.fc1", "weight", nn.Parameter(Doubling(normal(256, 64)))),
}


@pytest.mark.parametrize("key", UNSUPPORTED)
@torch.no_grad()
def test_models_that_do_something_else_are_run_by_pytorch(key):
    model, images = UNSUPPORTED[key](), normal(3, 3, 32, 32)
    assert packed_weights(model, wrap(model).plain_weights) is None
    assert off(played(game_of(model), images), model(images)) < 0.03


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
@torch.no_grad()
def test_copies_and_pickles_of_a_model_in_use_predict_the_same_and_are_on_their_own(duplicate):
    model = tiny_vit(embed_dim=64)
    fast, images = PrunedViT(model, policy_for(model), 0.5).bfloat16(), normal(4, 3, 32, 32)
    expected = fast(images)
    assert fast.game.backbone.tiled(images)
    twin = duplicate(fast)
    assert torch.equal(twin(images), expected)
    in_place(twin.model)
    assert off(twin(images), expected) > 0.05
    assert torch.equal(fast(images), expected)
