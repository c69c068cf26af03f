"""Widths, heads and tokens of real architectures: the game is exact; other models of timm are refused by name."""

import pytest
import timm
import torch
from conftest import randomise
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokengame.backbones import wrap
from tokengame.config import GameConfig
from tokengame.errors import TokenGameError
from tokengame.game import TokenGame
from tokengame.game.testing import Scripted, masked_forward
from tokengame.packed.attention import unfused_attention
from tokengame.runtime.macs import pruned_macs

MODELS = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch32_224": {},
    "vit_small_patch16_384": {},
    "vit_base_patch32_224": {},
    "vit_base_patch16_224": {"img_size": (160, 320)},
    "vit_base_patch16_384": {"img_size": 256},
    "vit_base_patch8_224": {"img_size": 112},
    "vit_large_patch32_384": {},
    "vit_base_patch16_224_miil": {},
    "vit_base_patch16_gap_224": {},
    "vit_medium_patch16_gap_384": {},
    "vit_base_patch16_reg4_gap_256": {},
    "vit_betwixt_patch16_reg1_gap_256": {},
    "vit_mediumd_patch16_reg4_gap_256": {},
    "vit_so150m_patch16_reg4_map_256": {},
    "deit_tiny_patch16_224": {},
    "deit_small_patch16_224": {},
    "deit_base_patch16_384": {"img_size": 224, "dynamic_img_size": True},
    "deit_tiny_distilled_patch16_224": {},
    "deit_base_distilled_patch16_384": {"img_size": 224},
    "deit3_small_patch16_224": {},
    "deit3_base_patch16_384": {"img_size": 224},
    "vit_small_patch14_dinov2": {"img_size": 224},
    "vit_base_patch14_reg4_dinov2": {"img_size": 224},
    "vit_giant_patch14_reg4_dinov2": {"img_size": 112},
    "vit_base_patch16_siglip_256": {},
    "vit_base_patch16_siglip_gap_224": {},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch32_clip_quickgelu_224": {},
    "vit_xsmall_patch16_clip_224": {},
    "test_vit3": {},
    "flexivit_small": {"img_size": (192, 256)},
}


@pytest.fixture(params=MODELS, scope="module")
def wide(request):
    """Two blocks of the real thing, random weights, and two images."""
    model = timm.create_model(request.param, depth=2, num_classes=7, **MODELS[request.param]).eval()
    randomise(model)
    return model, torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
def test_all_tokens_and_random_decisions_against_native_and_masks(wide):
    """With all tokens kept the native output, with random decisions that of the masked model, both within 1e-5."""
    model, images = wide
    game = TokenGame(wrap(model), GameConfig(stages=(1,)))
    native = model(images)
    kept = game.play(images, lambda obs: torch.ones(len(obs.token)))
    assert distance(game.predict(kept), native) < 1e-5
    table = torch.randn(1, len(images), kept.total, generator=torch.Generator().manual_seed(2))
    found = game.predict(game.play(images, Scripted(table)))
    assert distance(found, masked_forward(game.backbone, (1,), images, table)) < 1e-5
    assert distance(found, native) > 1e-4, "the decisions changed nothing"


def width_of_the_last_attention(backbone):
    """Of one product of one query: each head attends to the rows themselves, or to its keys and values."""
    folded = backbone.key_value_weights(backbone.depth - 1) is not None
    return backbone.heads * (backbone.dim if folded else backbone.head_dim)


@pytest.mark.parametrize("transition", ["drop", "merge"])
@torch.inference_mode()
def test_macs_of_packed_execution(wide, transition):
    """The formula gives what the flop counter counts on packed rows."""
    model, images = wide
    backbone, config = wrap(model), GameConfig(stages=(1,), transition=transition)
    game = TokenGame(backbone, config, features=False, attention=unfused_attention)
    table = torch.randn(1, len(images), backbone.patches, generator=torch.Generator().manual_seed(2))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # not all torch count fused ones
        state = game.play(images, Scripted(table))
        if backbone.reads_prefix_only:
            state.backend.finish(game.end, state.x, state.layout, state.bias)
    kept = torch.stack(state.kept)
    expected = pruned_macs(game, None, kept, state.total) - backbone.head_macs(kept[-1].double() + backbone.prefix)
    if backbone.reads_prefix_only and transition == "drop":
        # The last attention, of prefix tokens alone, is padded to the longest image. In merge games the last block
        # decides, and its attention has the queries of kept patches too.
        padding = state.layout.longest - state.layout.count
        expected = expected + 2 * padding * backbone.prefix * width_of_the_last_attention(backbone)
    assert counter.get_total_flops() / 2 == pytest.approx(float(expected.sum()), rel=1e-6)


REFUSED = {
    "DiffAttention": "attends with DiffAttention",
    "DiffParallelScalingBlock": "is a DiffParallelScalingBlock",
}


MODULES = ("vision_transformer", "deit", "eva", "beit", "naflexvit", "vision_transformer_hybrid",
           "vision_transformer_relpos", "vitamin")  # fmt: skip


@pytest.mark.parametrize("name", [name for module in MODULES for name in timm.list_models(module=module)])
def test_every_variant_is_supported_or_refused_by_name(name):
    with torch.device("meta"):
        model = timm.create_model(name, depth=1, **({"num_kv_heads": 1} if "sapiens2" in name else {}))
    parts = {type(module).__name__ for module in model.modules()}
    reasons = [reason for part, reason in REFUSED.items() if part in parts]
    if not reasons:
        wrap(model)
        return
    with pytest.raises(TokenGameError, match=reasons[0]):
        wrap(model)


@pytest.mark.parametrize(
    "name", ["mobilevitv2_050", "samvit_base_patch16", "volo_d1_224", "cait_xxs24_224", "xcit_nano_12_p16_224"]
)
def test_relatives_are_refused_by_name(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(TokenGameError, match=type(model).__name__):
        wrap(model)
