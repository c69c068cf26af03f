"""torchvision's Vision Transformers: exact, with its own preprocessing; timm's weights in them predict the same."""

import copy

import pytest
import timm
import torch
from conftest import REAL, layout_of, needs_kernels, off, randomise, tiny_vit
from converted import to_torchvision
from exact import check_all_tokens, check_bfloat16, check_gradients, check_macs, check_random_decisions, distance
from torch import nn
from torchvision import models
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

import tokengame
from tokengame import TokenGameError, kernels
from tokengame.backbones import preprocessing_of, wrap
from tokengame.backends import CompiledBlocks, TorchBackend
from tokengame.baselines.heuristics import KeepBest, attention, keep_all
from tokengame.config import GameConfig
from tokengame.data.transforms import transform_for
from tokengame.game import TokenGame
from tokengame.game.testing import Scripted
from tokengame.runtime import prune_by
from tokengame.runtime.macs import native_macs

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
STEM = [ConvStemConfig(8, 3, 2), ConvStemConfig(12, 3, 2), ConvStemConfig(16, 3, 2)]


def tiny(heads=None, **changes):
    """4 x 4 patches, four layers, random weights."""
    torch.manual_seed(0)
    settings = {"image_size": 32, "patch_size": 8, "num_layers": 4, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48}
    model = VisionTransformer(**(settings | {"num_classes": 5} | changes))
    if heads is not None:
        model.heads = heads
    randomise(model, std=0.15)
    return model.eval()


VARIANTS = {
    "plain": {},
    "representation": {"representation_size": 24},
    "convolutional stem": {"conv_stem_configs": STEM},
    "four heads of 8": {"num_heads": 4},
    "dropout": {"dropout": 0.3, "attention_dropout": 0.3},
    "another epsilon": {"norm_layer": nn.LayerNorm},
    "no head": {"heads": nn.Identity()},
    "another head": {"heads": nn.Sequential(nn.ReLU(), nn.Linear(32, 3))},
}


@pytest.mark.parametrize("key", VARIANTS)
def test_exact(key):
    model = tiny(**VARIANTS[key])
    check_all_tokens(model, IMAGES)
    check_random_decisions(model, IMAGES)
    check_bfloat16(model, IMAGES)
    if key != "dropout":
        check_gradients(model, IMAGES)


@pytest.mark.parametrize("name", ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"])
def test_every_model_of_torchvision_is_supported(name):
    with torch.device("meta"):
        model = models.get_model(name)
    backbone = wrap(model)
    assert (backbone.depth, backbone.dim) == (len(model.encoder.layers), model.hidden_dim)
    found = native_macs(backbone, backbone.patches) / 1e9
    weights = [entry.value.meta for entry in models.get_model_weights(name)]
    published = [meta["_ops"] for meta in weights if meta["min_size"] == (224, 224)]
    assert found == pytest.approx(published[0], rel=1e-4)


def test_classes_are_those_of_the_head_there_is_now():
    assert wrap(tiny()).classes == 5
    assert wrap(tiny(representation_size=24)).classes == 5
    assert wrap(tiny(heads=nn.Linear(32, 3))).classes == 3
    assert wrap(tiny(heads=nn.Identity())).classes == 0
    assert wrap(tiny(heads=nn.Sequential())).classes == 0
    model = tiny()
    model.heads.head = nn.Identity()
    assert wrap(model).classes == 0


@pytest.mark.parametrize("key", ["plain", "representation", "convolutional stem"])
@torch.inference_mode()
def test_macs_equal_the_flop_counter(key):
    check_macs(tiny(**VARIANTS[key]), IMAGES[:1])


def test_dropout_of_training_is_the_models():
    """Outputs of many draws have the native mean and spread."""
    model = tiny(dropout=0.2, attention_dropout=0.2).train()
    fast, image = prune_by(model, GameConfig(stages=(1, 2)), keep_all).train(), IMAGES[:1].repeat(2000, 1, 1, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        native, found = model(image), fast(image)
    spread = native.std(0)
    assert ((found.mean(0) - native.mean(0)).abs() < 0.15 * spread).all()
    torch.testing.assert_close(found.std(0), spread, rtol=0.1, atol=0)
    assert not torch.allclose(native.mean(0), model.eval()(image)[0], atol=1e-3)


def test_copies_conversions_and_restore():
    model = tiny()
    fast = prune_by(model, GameConfig(stages=(1, 2)), KeepBest(attention, (0.5, 0.25)))
    found = fast(IMAGES)
    torch.testing.assert_close(copy.deepcopy(fast)(IMAGES), found)
    torch.testing.assert_close(copy.deepcopy(fast).double()(IMAGES.double()).float(), found, atol=1e-4, rtol=1e-4)
    assert fast.restore() is model
    assert (fast.image_size, fast.seq_length) == (32, 17)
    assert fast.no_weight_decay() == set()


def test_images_of_another_size_are_refused_as_natively():
    fast = prune_by(tiny(), GameConfig(stages=(1, 2)), keep_all)
    with pytest.raises(AssertionError, match="Wrong image height! Expected 32 but got 48!"):
        fast(torch.randn(1, 3, 48, 48))


BASE, HUGE = models.ViT_B_16_Weights, models.ViT_H_14_Weights


@pytest.mark.parametrize(
    "weights", [BASE.IMAGENET1K_V1, BASE.IMAGENET1K_SWAG_E2E_V1, HUGE.IMAGENET1K_SWAG_E2E_V1], ids=str
)
def test_preprocessing_is_that_of_torchvisions_weights(weights):
    theirs, size = weights.transforms(), weights.meta["min_size"][0]
    with torch.device("meta"):
        model = models.vit_b_32(image_size=size // 32 * 32) if size % 14 else models.vit_h_14(image_size=size)
    ours = preprocessing_of(model)
    assert ours["input_size"] == [3, *theirs.crop_size * 2]
    assert (ours["mean"], ours["std"], ours["interpolation"]) == (theirs.mean, theirs.std, theirs.interpolation.value)
    assert round(size / ours["crop_pct"]) == theirs.resize_size[0]
    assert transform_for(ours, train=False) is not None


# Refusals and changes


class Half(VisionTransformer):
    def forward(self, x):
        return 0.5 * super().forward(x)


def with_part(where, part):
    model = tiny()
    parent, _, name = where.rpartition(".")
    setattr(model.get_submodule(parent), name, part)
    return model


LAYER = "encoder.layers.encoder_layer_1"
REFUSED = {
    "subclass of torchvision's VisionTransformer that has its own forward": lambda: Half(32, 8, 1, 2, 32, 48),
    "layer 1 has a Identity; only torchvision's own EncoderBlock": lambda: with_part(LAYER, nn.Identity()),
    "layer 1 has a Linear; only torchvision's own": lambda: with_part(f"{LAYER}.mlp", nn.Linear(32, 32)),
    "layer 1 attends with Identity": lambda: with_part(f"{LAYER}.self_attention", nn.Identity()),
    "layer 1 has a MultiheadAttention with settings of its own": lambda: with_part(
        f"{LAYER}.self_attention", nn.MultiheadAttention(32, 2, add_bias_kv=True, batch_first=True)
    ),
    "layer 1 holds a BatchNorm1d": lambda: with_part(f"{LAYER}.ln_2", nn.BatchNorm1d(32)),
    "has no layers": lambda: tiny(num_layers=0),
    "ResNet has no tokens to prune: of torchvision's models": models.resnet18,
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_exact_is_refused_with_the_reason(said):
    with pytest.raises(TokenGameError, match=said):
        wrap(REFUSED[said]())


@pytest.mark.parametrize("part", ["", "encoder", "encoder.layers", LAYER, f"{LAYER}.self_attention"])
def test_hooks_that_would_be_skipped_are_refused(part):
    model = tiny()
    model.get_submodule(part).register_forward_hook(lambda *_: None)
    with pytest.raises(TokenGameError, match=f"the model{chr(39) + 's ' + part if part else ''} has a forward hook"):
        wrap(model)


@pytest.mark.parametrize("part", ["conv_proj", "heads", "encoder.dropout"])
@torch.no_grad()
def test_hooks_outside_the_layers_act_as_natively(part):
    model = tiny()
    plain = model(IMAGES)
    model.get_submodule(part).register_forward_hook(lambda _part, _inputs, output: 0.5 * output)
    found = prune_by(model, GameConfig(stages=(1, 2)), keep_all)(IMAGES)
    torch.testing.assert_close(found, model(IMAGES), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-3)


# Weights of timm


@torch.no_grad()
def test_weights_of_timm_give_the_same_packed_rows():
    timms = tiny_vit()
    model = tiny(mlp_dim=128)
    model.load_state_dict(to_torchvision(timms.state_dict()))
    for kind in ("drop", "merge"):
        config = GameConfig(stages=(1, 2), transition=kind)
        one, other = (prune_by(m, config, KeepBest(attention, (0.5, 0.25)))(IMAGES) for m in (timms, model))
        assert distance(other, one) < 1e-5
    assert wrap(model).shape() == wrap(timms).shape()


@pytest.mark.skipif(not REAL.is_dir(), reason="no real weights; point TOKENGAME_REAL_DATA at them")
@torch.no_grad()
def test_real_weights_and_the_shipped_policy(recwarn):
    """torchvision's model with ViT-Ti's weights gives timm's predictions, native and pruned, and fits its policy."""
    timms = timm.create_model(
        "vit_tiny_patch16_224", checkpoint_path=str(REAL / "vit_tiny_patch16_224.safetensors")
    ).eval()
    model = VisionTransformer(224, 16, 12, 3, 192, 768).eval()
    model.load_state_dict(to_torchvision(timms.state_dict()))
    images = torch.rand(8, 3, 224, 224, generator=torch.Generator().manual_seed(3)) * 2 - 1
    torch.testing.assert_close(model(images), timms(images), atol=1e-4, rtol=1e-4)
    one, other = (tokengame.prune(m, "vit_tiny_patch16_224").predict(images) for m in (timms, model))
    assert torch.equal(one.alive, other.alive)
    assert not one.alive.all()
    torch.testing.assert_close(other.logits, one.logits, atol=1e-4, rtol=1e-4)
    assert not recwarn.list, "the policy knows these weights"


# Compiled kernels


@needs_kernels
@pytest.mark.parametrize(
    "changes",
    [{}, {"heads": nn.Identity()}, {"representation_size": 32}, {"image_size": 56, "patch_size": 14}],
    ids=str,
)
@torch.inference_mode()
def test_compiled_blocks_are_near_pytorchs(changes):
    model = tiny(hidden_dim=64, mlp_dim=96, **changes)
    size = model.image_size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    config, half = GameConfig(stages=(1, 2)), copy.deepcopy(model).bfloat16()
    game = TokenGame(wrap(half), config)
    agents = game.reset(images.bfloat16()).total
    table = torch.randn(2, 3, agents, generator=torch.Generator().manual_seed(2))
    assert type(game.backend_for(images.bfloat16())) is CompiledBlocks
    found = game.predict(game.play(images.bfloat16(), Scripted(table)))
    with kernels.disabled():
        assert type(game.backend_for(images.bfloat16())) is TorchBackend
        slow = game.predict(game.play(images.bfloat16(), Scripted(table)))
    whole = TokenGame(wrap(model), config)
    exact = whole.predict(whole.play(images, Scripted(table)))
    assert off(found, exact) < max(0.02, 1.5 * off(slow, exact))


@needs_kernels
@torch.inference_mode()
def test_the_fused_forward_is_near_pytorchs():
    """The whole game in one call, from pixels to logits."""
    model = tiny(hidden_dim=64, mlp_dim=96)
    half = copy.deepcopy(model).bfloat16()
    backbone, images = wrap(half), IMAGES.bfloat16()
    fast = prune_by(half, GameConfig(stages=(1, 2)), keep_all)
    assert type(fast.game.backend_for(images)) is CompiledBlocks
    assert off(fast(images), model(IMAGES)) < 0.02
    tokens = fast.game.backend_for(images).embed(images)
    assert off(tokens, backbone.embed(images)) < 0.01
    assert backbone.head(tokens.flatten(0, 1), layout_of([17] * 3)).shape == (3, 5)
