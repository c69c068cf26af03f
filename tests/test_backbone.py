"""Keeping all tokens gives the native prediction, for every plain architecture; all others are refused by name."""

import pytest
import timm
import torch
from conftest import tiny_vit
from timm.layers import Attention

from tokengame.backbones import wrap
from tokengame.config import GameConfig
from tokengame.errors import TokenGameError
from tokengame.game import TokenGame
from tokengame.game.testing import Scripted, check_contract, masked_forward, merged_forward

ARCHITECTURES = {
    "plain": {},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "deit3": {"name": "deit3_small_patch16_224"},
    "registers": {"reg_tokens": 4},
    "registers without class token": {"class_token": False, "reg_tokens": 3, "global_pool": "avg"},
    "layer scale": {"init_values": 0.3},
    "qk norm": {"qk_norm": True},
    "pre norm": {"pre_norm": True},
    "average pool": {"global_pool": "avg"},
    "average pool, no class token": {"global_pool": "avg", "class_token": False},
    "max pool": {"global_pool": "max"},
    "avgmax pool": {"global_pool": "avgmax"},
    "pool with prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "attention pool": {"global_pool": "map", "class_token": False},
    "attention pool with class token": {"global_pool": "map"},
    "not square": {"img_size": (24, 48)},
    "dynamic size": {"dynamic_img_size": True},
    "dinov2": {"name": "vit_small_patch14_reg4_dinov2", "patch_size": 8},
    "swiglu": {"name": "vit_giant_patch14_dinov2", "patch_size": 8},
    "siglip": {"name": "vit_base_patch16_siglip_224"},
    "clip": {"name": "vit_base_patch32_clip_224"},
    "no head": {"num_classes": 0},
    "gated attention": {},
    "another linear layer": {},
}


class Scaled(torch.nn.Linear):
    """A layer that does more than its weight says, like those of adapters and quantisation."""

    def forward(self, rows):
        return 1.5 * super().forward(rows)


def build(key):
    model = tiny_vit(**ARCHITECTURES[key])
    if key == "gated attention":
        torch.manual_seed(0)
        for block in model.blocks:
            block.attn = Attention(32, num_heads=2, gated=True).eval()
    if key == "another linear layer":
        for block in model.blocks:
            scaled = Scaled(32, 96)
            scaled.load_state_dict(block.attn.qkv.state_dict())
            block.attn.qkv = scaled
    size = model.patch_embed.img_size or (32, 32)
    return model, torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:.*treats every token alone")  # of the other linear layer, as it should be
@pytest.mark.parametrize("transition", ["drop", "merge"])
@pytest.mark.parametrize("key", ARCHITECTURES)
@torch.no_grad()
def test_keeping_all_tokens_gives_the_native_prediction(key, transition):
    model, images = build(key)
    game = TokenGame(wrap(model), GameConfig(stage_count=2, transition=transition))
    found = game.predict(game.play(images, lambda obs: torch.ones(len(obs.token))))
    torch.testing.assert_close(found, model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*treats every token alone")  # of the other linear layer, as it should be
@pytest.mark.parametrize("transition", ["drop", "merge"])
@pytest.mark.parametrize("key", ARCHITECTURES)
@torch.no_grad()
def test_packed_equals_the_slow_reference(key, transition):
    model, images = build(key)
    backbone = wrap(model)
    game = TokenGame(backbone, GameConfig(stages=(1, 2), transition=transition))
    agents = game.reset(images).total
    table = torch.randn(2, 3, agents, generator=torch.Generator().manual_seed(2))
    found = game.predict(game.play(images, Scripted(table)))
    reference = masked_forward if transition == "drop" else merged_forward
    expected = reference(backbone, (1, 2), images, table)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    native = model(images)
    assert float((found - native).norm() / native.norm()) > 1e-3, "the decisions changed nothing"


@pytest.mark.parametrize("transition", ["drop", "merge"])
@pytest.mark.parametrize("key", ["plain", "distilled", "registers", "average pool, no class token"])
def test_contract(key, transition):
    model, images = build(key)
    check_contract(TokenGame(wrap(model), GameConfig(transition=transition)), images)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("swin_tiny_patch4_window7_224", {}, "SwinTransformer is of no supported family: it attends inside windows"),
        ("vit_base_patch16_224", {"attn_layer": "diff"}, "attends with DiffAttention"),
        ("vit_base_patch16_224", {"global_pool": ""}, "pools by ''"),
        ("resnet18", {}, "ResNet is of no supported family;"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_reason(name, changes, reason):
    small = {"depth": 1, "embed_dim": 48, "num_heads": 2} if "vit_base" in name else {}
    with pytest.raises(TokenGameError, match=reason):
        wrap(timm.create_model(name, **small, **changes))


def test_stages_outside_the_model_are_refused(model):
    for stages in [(1, 4), (2, 1), (-1,), (1, 1)]:
        with pytest.raises(TokenGameError, match="from 0 to 3"):
            TokenGame(wrap(model), GameConfig(stages=stages))


@pytest.mark.parametrize(("depth", "count", "stages"), [(12, 3, (3, 6, 9)), (24, 3, (6, 12, 18)), (8, 3, (2, 4, 6)),
                                                        (12, 5, (2, 4, 6, 8, 10)), (4, 9, (0, 1, 2, 3))])  # fmt: skip
def test_default_stages_scale_with_depth(depth, count, stages):
    assert GameConfig(stage_count=count).blocks(depth) == stages
    earlier = stages if count >= depth else tuple(stage - 1 for stage in stages)
    assert GameConfig(stage_count=count, transition="merge").blocks(depth) == earlier, "inside the block before"
