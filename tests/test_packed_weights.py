"""Models that change after their weights were packed, and models that do what the compiled kernels do not."""

import copy
import pickle
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from conftest import half_vit, needs_kernels, normal, off, policy_for, tiny_vit
from test_kernels import game_of, is_compiled, predicted
from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tokengame.backbones import wrap
from tokengame.backends import CompiledBlocks
from tokengame.kernels.weights import HASHED_PARTS, packed_weights
from tokengame.modules import Watch
from tokengame.runtime import PrunedViT

pytestmark = [needs_kernels, pytest.mark.filterwarnings("ignore:.*see packed rows")]


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
    before = predicted(game, images)
    assert is_compiled(game, images)
    CHANGES[key](model)
    images = images.to(game.backbone.dtype)
    assert off(before, model(images)) > 0.07, "the change changes the prediction"
    for now in (game_of(model), game):
        assert off(predicted(now, images), model(images)) < 0.03


@torch.no_grad()
def test_which_half_of_a_layer_gives_the_gates_may_change():
    model, images = half_vit(mlp_layer=GluMlp, mlp_ratio=3), normal(3, 3, 32, 32)
    game = game_of(model)
    before = predicted(game, images)
    assert is_compiled(game, images)
    for block in model.blocks:
        block.mlp.gate_last = False
    assert off(before, model(images)) > 0.07
    assert off(predicted(game, images), model(images)) < 0.03


@torch.inference_mode()
def test_a_model_made_in_inference_mode_predicts_as_it_is_now():
    model, images = half_vit(), normal(3, 3, 32, 32)
    before = predicted(game_of(model), images)
    in_place(model)
    assert off(before, model(images)) > 0.07, "the change changes the prediction"
    assert off(predicted(game_of(model), images), model(images)) < 0.03


def rows(weight, start, stop):
    weight.data[start:stop] = 4


PARTIAL = {
    "a row": lambda weight: rows(weight, 5, 6),
    "the last row": lambda weight: rows(weight, -1, None),
    "a column": lambda weight: weight.data.T[7].fill_(4),
    "a half": lambda weight: rows(weight, 0, len(weight) // 2),
    "a block": lambda weight: weight.data[16:32, 16:32].mul_(-9),
    "every other": lambda weight: weight.data.flatten()[1::2].zero_(),
    "nothing left": lambda weight: weight.data.zero_(),
}


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("key", PARTIAL)
@torch.no_grad()
def test_a_part_of_a_weight_written_through_its_data_takes_effect(key, part, model):
    """Such writes count no version; a row or column of a weight is seen within some calls, a few numbers may not be."""
    game, images = game_of(model), normal(3, 3, 32, 32)
    before = predicted(game, images)
    assert is_compiled(game, images)
    PARTIAL[key](model.blocks[1].get_submodule(part).weight)
    assert any(not torch.equal(predicted(game, images), before) for _ in range(HASHED_PARTS))
    assert torch.equal(predicted(game, images), predicted(game_of(copy.deepcopy(model)), images))


@pytest.mark.parametrize("key", ["norm1.weight", "norm2.bias", "attn.qkv.bias", "mlp.fc2.bias"])
@torch.no_grad()
def test_one_number_of_a_norm_or_bias_written_through_its_data_takes_effect(key, model):
    game, images = game_of(model), normal(3, 3, 32, 32)
    before = predicted(game, images)
    model.blocks[1].get_parameter(key).data[11] = 4
    assert not torch.equal(predicted(game, images), before)


def test_a_model_without_settings_is_watched_too():
    plain = nn.Sequential(nn.Linear(2, 2))
    watch = Watch(plain)
    assert watch.unchanged
    plain[0].bias = None
    assert not watch.unchanged


def test_threads_share_packed_weights_while_one_records_gradients(model):
    """Weights are packed once, and what a thread computes does not depend on the others."""
    fast, images = PrunedViT(model, policy_for(tiny_vit(embed_dim=64)), 0.5), normal(4, 3, 32, 32)
    expected = fast(images)
    gradient = fast.predict(images, gradients=True).logits
    model.blocks[1].mlp.fc1.weight.data.mul_(1)  # the same numbers, another version
    wrong: list[str] = []

    def work(records):
        for _ in range(20):
            found = fast.predict(images, gradients=records).logits
            if records:
                found.sum().backward()
            if not torch.equal(found, gradient if records else expected):
                wrong.append(f"gradients {records}")

    threads = [Thread(target=work, args=(number == 0,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


HOOKS = {
    "hook": lambda mlp, call: mlp.register_forward_hook(lambda *_: call()),
    "hook before": lambda mlp, call: mlp.fc1.register_forward_pre_hook(lambda *_: call()),
    "hook on all": lambda mlp, call: register_module_forward_hook(lambda part, *_: call() if part is mlp else None),
    "own forward": lambda mlp, call: setattr(mlp, "forward", lambda rows: (call(), type(mlp).forward(mlp, rows))[1]),
}


@pytest.mark.parametrize("key", HOOKS)
def test_hooks_of_a_part_of_the_model_are_called(key, model):
    game, images, calls = game_of(model), normal(3, 3, 32, 32), []
    expected, mlp = predicted(game, images), model.blocks[1].mlp
    handle = HOOKS[key](mlp, lambda: calls.append(1))
    found = predicted(game, images)
    handle.remove() if handle else delattr(mlp, "forward")
    assert off(found, expected) < 0.02
    assert torch.equal(predicted(game, images), expected)
    assert len(calls) == 1


def test_dropout_is_done_by_pytorch():
    """In a model in training mode, or in one layer, as for estimates of uncertainty."""
    model, images = half_vit(proj_drop_rate=0.5), normal(3, 3, 32, 32)
    before = predicted(game_of(model), images)
    for part in (model, model.blocks[1].mlp.drop1):
        part.train()
        assert not torch.equal(predicted(game_of(model), images), predicted(game_of(model), images))
        model.eval()
        assert torch.equal(predicted(game_of(model), images), before)


class Doubling(torch.Tensor):
    """A weight that is more than the numbers in its memory, like those of quantised models."""

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
    "ReLU": lambda: half_vit(act_layer=nn.ReLU),
    "heads of 16": lambda: half_vit(num_heads=4),
    "rows of 80": lambda: half_vit(embed_dim=80),
    "something in place of a norm": lambda: with_part("blocks.1.mlp", "norm", nn.Hardtanh()),
    "another norm": lambda: with_part("blocks.1", "norm1", nn.LayerNorm(64, bias=False)),
    "SwiGLU of ReLU": lambda: with_part("blocks.1", "mlp", SwiGLU(64, 256, act_layer=nn.ReLU)),
    "gate": lambda: with_part("blocks.1", "attn", Attention(64, 2, qkv_bias=True, gated=True)),
    "more heads in a block": lambda: with_part("blocks.1", "attn", Attention(64, 4, attn_head_dim=64)),
    "something in place of a dropout": lambda: with_part("blocks.1.mlp", "drop1", nn.Hardtanh()),
    "something in place of a dropped path": lambda: with_part("blocks.1", "drop_path1", nn.Hardtanh()),
    "no plain weight": lambda: with_part("blocks.1.mlp.fc1", "weight", nn.Parameter(Doubling(normal(256, 64)))),
}


@pytest.mark.parametrize("key", UNSUPPORTED)
@torch.no_grad()
def test_models_that_do_something_else_run_on_pytorch(key):
    model, images = UNSUPPORTED[key](), normal(3, 3, 32, 32)
    backbone = wrap(model)
    assert packed_weights(model, backbone.watch, backbone.plain_weights) is None
    assert not is_compiled(game_of(model), images)
    assert off(predicted(game_of(model), images), model(images)) < 0.03


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
@torch.no_grad()
def test_copies_and_pickles_of_a_model_in_use_predict_the_same_and_are_independent(duplicate):
    model = tiny_vit(embed_dim=64)
    fast, images = PrunedViT(model, policy_for(model), 0.5).bfloat16(), normal(4, 3, 32, 32)
    expected = fast(images)
    assert isinstance(fast.game.backend_for(images), CompiledBlocks)
    other = duplicate(fast)
    assert torch.equal(other(images), expected)
    in_place(other.model)
    assert off(other(images), expected) > 0.05
    assert torch.equal(fast(images), expected)
