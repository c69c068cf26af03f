"""timm's families beside the plain ViT: rotary and relative positions, parallel and post-norm blocks, hybrids, NaFlex.

Small models with random weights. The references are the native model, with attention masks for `drop`, and loops over
tokens for `merge`.
"""

import copy

import pytest
import timm
import torch
from conftest import needs_kernels, randomise
from timm.layers import set_fused_attn
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokengame import kernels
from tokengame.backbones import preprocessing_of, unfused, wrap
from tokengame.baselines.evit import EViT
from tokengame.baselines.heuristics import KeepBest, attention, keep_all
from tokengame.baselines.tome import ToMe
from tokengame.config import GameConfig
from tokengame.errors import TokenGameError
from tokengame.game import TokenGame
from tokengame.game.testing import Scripted, check_contract, masked_features, merged_by_loops, played_features
from tokengame.packed.attention import unfused_attention
from tokengame.policies.networks import START, ContextActor
from tokengame.runtime import cascade, fused, prune, prune_by
from tokengame.runtime.macs import native_macs, pruned_macs

SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 3, "num_classes": 5}
PATCHES = {"img_size": (32, 48), "patch_size": 8}


def eva(**changes):
    return Eva(**(SMALL | PATCHES | {"init_values": 0.5} | changes))


def naflex(**changes):
    return NaFlexVit(**(SMALL | {"patch_size": 8, "pos_embed_grid_size": (3, 3)} | changes))


def named(name, **changes):
    return timm.create_model(name, **(SMALL | PATCHES | changes))


MODELS = {
    "eva giant": lambda: named("eva_giant_patch14_224"),
    "eva giant, class token": lambda: named("eva_giant_patch14_224", global_pool="token"),
    "eva02": lambda: named("eva02_base_patch14_224"),
    "eva02 small": lambda: named("eva02_small_patch14_224"),
    "eva02 clip": lambda: named("eva02_large_patch14_clip_224"),
    "eva, normed after": lambda: named("eva02_enormous_patch14_clip_224"),
    "dinov3": lambda: named("vit_small_patch16_dinov3"),
    "dinov3, query and value biases": lambda: named("vit_small_plus_patch16_dinov3_qkvb"),
    "dinov3, class token": lambda: named("vit_small_patch16_dinov3", global_pool="token"),
    "perception encoder": lambda: named("vit_pe_core_base_patch16_224"),
    "perception encoder, language": lambda: named("vit_pe_lang_large_patch14_448"),
    "perception encoder, dense": lambda: named("vit_pe_spatial_base_patch16_512"),
    "rope": lambda: named("vit_small_patch16_rope_224"),
    "rope, registers": lambda: named("vit_base_patch16_rope_reg1_gap_256"),
    "rope of each block": lambda: named("vit_small_patch16_rope_mixed_ape_224"),
    "sapiens2": lambda: named("vit_base_patch16_sapiens2", num_heads=4, num_kv_heads=2),
    "mrope": lambda: eva(use_rot_pos_emb=True, rope_type="mrope", rope_mrope_section=(2, 3, 3), global_pool="max"),
    "eva, pooled by attention": lambda: eva(use_rot_pos_emb=True, global_pool="map", num_reg_tokens=2),
    "eva without class token": lambda: eva(use_rot_pos_emb=True, class_token=False, dynamic_img_size=True),
    "beit": lambda: named("beit_base_patch16_224"),
    "beit, class token": lambda: named("beit_base_patch16_224", global_pool="token"),
    "beit, shared positions": lambda: named("beitv2_base_patch16_224", use_shared_rel_pos_bias=True),
    "beit, both": lambda: timm.models.Beit(**SMALL, **PATCHES, use_rel_pos_bias=True, use_shared_rel_pos_bias=True),
    "beit without positions": lambda: timm.models.Beit(**SMALL, **PATCHES, swiglu_mlp=True, scale_mlp=True),
    "relpos": lambda: named("vit_relpos_base_patch16_224"),
    "relpos, class token": lambda: named("vit_relpos_base_patch16_cls_224"),
    "relpos, a table": lambda: named("vit_relpos_medium_patch16_cls_224", rel_pos_type="bias"),
    "relpos, shared": lambda: named("vit_srelpos_small_patch16_224"),
    "relpos, normed after": lambda: named("vit_relpos_small_patch16_rpn_224"),
    "naflex": lambda: named("naflexvit_base_patch16_gap", img_size=None, pos_embed_grid_size=(3, 3)),
    "naflex, attention pool": lambda: naflex(global_pool="map", reg_tokens=1, init_values=0.5),
    "naflex, factorised": lambda: naflex(pos_embed="factorized", class_token=True, global_pool="token"),
    "naflex, axial": lambda: naflex(pos_embed="none", rope_type="axial", class_token=True, attn_gated=True),
    "naflex, of each block": lambda: naflex(rope_type="mixed", reg_tokens=2, global_pool="avg", qk_norm=True),
    "naflex, dinov3": lambda: naflex(rope_type="dinov3", rope_rotate_half=True, num_kv_heads=1, qkv_fused=False),
    "naflex, radio": lambda: naflex(pre_norm=True, class_token=True, reg_tokens=3, global_pool="avg"),
    "parallel": lambda: named("vit_base_patch16_xp_224"),
    "parallel, one output layer": lambda: named("vit_pwee_patch16_reg1_gap_256"),
    "two of each": lambda: named("vit_small_patch16_18x2_224"),
    "normed after": lambda: named("vit_base_patch16_rpn_224"),
    "hybrid": lambda: named("vit_tiny_r_s16_p8_224", img_size=(64, 96), patch_size=1),
    "conv stem": lambda: named("vitamin_small_224", img_size=(64, 96), patch_size=1, embed_dim=384, num_heads=6),
    "any size": lambda: named("vit_base_patch16_clip_224", dynamic_img_size=True),
}
POSITIONS = ["eva02", "dinov3, class token", "rope of each block", "sapiens2", "beit, class token", "relpos"]
"""one of each way to know places"""


@pytest.fixture(params=MODELS)
def case(request):
    return built(request.param)


def built(key):
    """A model, and images of a size that it takes."""
    torch.manual_seed(0)
    model = MODELS[key]().eval()
    randomise(model, std=0.15)
    size = getattr(getattr(model, "patch_embed", None), "img_size", (32, 48))
    return model, torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def distance(found, expected):
    return float((found - expected).detach().norm() / expected.detach().norm())


def all_tokens(model, images, transition="merge"):
    """The prediction of a game that keeps every token."""
    game = TokenGame(wrap(model), GameConfig(stages=(1, 2), transition=transition))
    return game.predict(game.play(images, keep_all))


def decisions(backbone, images, stages=2):
    rows, columns = backbone.grid(*images.shape[2:])
    return torch.randn(stages, len(images), rows * columns, generator=torch.Generator().manual_seed(2)) + 0.3


@torch.no_grad()
def test_all_tokens_give_the_native_output(case):
    model, images = case
    native = model(images)
    for transition in ("drop", "merge"):
        assert distance(all_tokens(model, images, transition), native) < 1e-5


@torch.no_grad()
def test_dropping_equals_masking(case):
    model, images = case
    backbone = wrap(model)
    table = decisions(backbone, images)
    game = TokenGame(backbone, GameConfig(stages=(1, 2), transition="drop"), keep_patches=True)
    found, there = played_features(game, images, table)
    calls = 2 if hasattr(backbone.blocks[0], "attns") else 1
    expected = masked_features(backbone, (1, 2), images, table, calls)
    assert distance(found[there], expected[there]) < 1e-5
    native = backbone.native_features(images)
    assert distance(found[there], native[there]) > 1e-4, "the decisions changed nothing"


@torch.no_grad()
def test_merging_equals_loops_over_tokens(case):
    model, images = case
    backbone = wrap(model)
    table = decisions(backbone, images)
    game = TokenGame(backbone, GameConfig(stages=(1, 2), transition="merge"))
    found = game.predict(game.play(images, Scripted(table)))
    assert distance(found, merged_by_loops(backbone, (1, 2), images, table)) < 1e-5
    assert distance(found, model(images)) > 1e-4, "the decisions changed nothing"


@pytest.mark.parametrize("transition", ["drop", "merge"])
@pytest.mark.parametrize("key", POSITIONS)
def test_contract(key, transition):
    model, images = built(key)
    check_contract(TokenGame(wrap(model), GameConfig(stages=(0, 2), transition=transition)), images)


# Positions


@pytest.mark.parametrize("size", [(24, 40), (48, 32), (56, 56)])
@pytest.mark.parametrize(
    "key", ["dinov3", "eva without class token", "any size", "naflex", "naflex, factorised", "naflex, of each block"]
)
@torch.no_grad()
def test_other_sizes(key, size):
    model, _ = built(key)
    images, backbone = torch.randn(2, 3, *size), wrap(model)
    assert distance(all_tokens(model, images), model(images)) < 1e-5
    table = decisions(backbone, images)
    game = TokenGame(backbone, GameConfig(stages=(1, 2), transition="drop"), keep_patches=True)
    found, there = played_features(game, images, table)
    assert distance(found[there], masked_features(backbone, (1, 2), images, table)[there]) < 1e-5


@pytest.mark.parametrize("key", ["beit", "relpos", "rope of each block"])
@torch.no_grad()
def test_positions_that_change_after_pruning_are_followed(key):
    model, images = built(key)
    game = TokenGame(wrap(model), GameConfig(stages=(1, 2)))
    before = game.predict(game.play(images, keep_all))
    for name, parameter in model.named_parameters():
        if "rel_pos" in name or "relative" in name or "freqs" in name:
            parameter.mul_(3)
    assert distance(model(images), before) > 1e-4
    assert distance(game.predict(game.play(images, keep_all)), model(images)) < 1e-5


# Number formats, training, copies


@pytest.mark.parametrize("key", [*POSITIONS, "parallel", "naflex, axial", "hybrid"])
@torch.no_grad()
def test_bfloat16(key):
    model, images = built(key)
    half, images = copy.deepcopy(model).bfloat16(), images.bfloat16()
    assert distance(all_tokens(half, images).float(), half(images).float()) < 0.03


@torch.no_grad()
def test_a_pruned_model():
    """Features on the full grid, copies and conversions of a model with rotary positions."""
    model, images = built("dinov3, class token")
    fast = prune_by(model, GameConfig(stages=(1, 2)), keep_all)
    assert distance(fast(images), model(images)) < 1e-5
    assert distance(fast.forward_features(images), model.forward_features(images)) < 1e-5
    assert distance(copy.deepcopy(fast)(images), model(images)) < 1e-5
    half = copy.deepcopy(model).bfloat16()(images.bfloat16()).float()
    assert distance(fast.bfloat16()(images.bfloat16()).float(), half) < 0.03


@torch.no_grad()
def test_compiled_attention_with_rotary_positions():
    """Heads of width 32: bfloat16 attention runs on the compiled kernels, where the processor has them."""
    torch.manual_seed(0)
    model = named("vit_small_patch16_dinov3", embed_dim=64, num_heads=2, global_pool="token").eval()
    randomise(model, std=0.1)
    images, policy = torch.randn(3, 3, 32, 48), KeepBest(attention, (0.7, 0.5))
    exact = prune_by(model, GameConfig(stages=(1, 2)), policy).predict(images)
    found = prune_by(model.bfloat16(), GameConfig(stages=(1, 2)), policy).predict(images.bfloat16())
    assert [kept.tolist() for kept in found.kept] == [kept.tolist() for kept in exact.kept]
    assert distance(found.logits.float(), exact.logits) < 0.1


ONE_CALL = [
    "dinov3", "dinov3, class token", "perception encoder", "perception encoder, language", "rope", "mrope",
    "eva, pooled by attention", "any size", "eva02", "eva02 small", "eva02 clip", "naflex", "naflex, attention pool",
    "naflex, factorised", "naflex, radio", "eva without class token", "rope of each block", "rope, registers",
    "conv stem",
]  # fmt: skip
STEP_BY_STEP = ["sapiens2", "beit", "relpos"]
ROTATED = ["rope", "rope of each block", "eva without class token"]
"""positions of all blocks and of each, with and without a class token"""


def wide(key, monkeypatch, dim=64, heads=2):
    """A model of widths that the kernels take, and images for it."""
    monkeypatch.setitem(SMALL, "embed_dim", dim)
    monkeypatch.setitem(SMALL, "num_heads", heads)
    return built(key)


@needs_kernels
@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("key", ONE_CALL)
@torch.inference_mode()
def test_a_whole_game_is_one_call_and_the_game_step_by_step(key, heads, monkeypatch):
    """Heads of 48 and 24 numbers, which the kernels fill up."""
    model, images = wide(key, monkeypatch, 96, heads)
    fast = prune(model, gmacs_ratio=0.7)
    with kernels.disabled():
        slow = fast.predict(images)
    in_steps = fast.game.predict(fast.game.play(images, fast.actor, fast.threshold))
    monkeypatch.setattr(TokenGame, "step", None)
    found = fast.predict(images)
    assert torch.equal(found.alive, slow.alive)
    assert distance(found.logits, slow.logits) < 1e-5
    assert distance(in_steps, slow.logits) < 1e-5


@needs_kernels
@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("key", ROTATED)
@torch.inference_mode()
def test_a_game_that_drops_rotated_tokens_is_one_call(key, monkeypatch):
    model, images = wide(key, monkeypatch)
    game = TokenGame(wrap(model), GameConfig(stages=(1, 2), transition="drop"))
    actor = ContextActor(game.backbone.heads, 2, START["drop"]).requires_grad_(False)
    with kernels.disabled():
        slow = cascade.step_by_step(game, game.backend_for(images), images, actor, 0.0, False)
    found = fused.forward(game, game.backend_for(images), images, actor, 0.0, False)
    assert 0 < slow.alive.float().mean() < 1
    assert torch.equal(found.alive, slow.alive)
    assert distance(found.logits, slow.logits) < 1e-5


@needs_kernels
@pytest.mark.parametrize("key", STEP_BY_STEP)
def test_other_positions_keep_their_own_layers(key, monkeypatch):
    assert wrap(wide(key, monkeypatch)[0]).plain_weights() is None


@pytest.mark.parametrize("key", [*POSITIONS, "two of each", "parallel", "naflex, axial"])
def test_training_is_the_native_one_while_all_tokens_are_kept(key):
    model, images = built(key)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # each draws numbers in its own order
    model.train()
    torch.manual_seed(5)
    found = all_tokens(model, images)
    found.square().sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    torch.manual_seed(5)  # places are jittered in the training of Sapiens2
    native = model(images)
    torch.testing.assert_close(found, native, atol=1e-4, rtol=1e-4)
    native.square().sum().backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert ours.keys() == theirs.keys()
    assert all(distance(ours[name], theirs[name]) < 1e-3 for name in theirs if float(theirs[name].norm()) > 1e-4)


@pytest.mark.parametrize(
    "model",
    [
        lambda: eva(use_rot_pos_emb=True, patch_drop_rate=0.4),
        lambda: eva(use_rot_pos_emb=True, rope_type="mixed", patch_drop_rate=0.4, dynamic_img_size=True),
        lambda: eva(use_rot_pos_emb=True, rope_type="dinov3", rope_jitter_coords=1.5, rope_shift_coords=0.3),
        lambda: naflex(rope_type="axial", patch_drop_rate=0.4, class_token=True, global_pool="token"),
    ],
    ids=["dropped patches", "dropped patches, rope of each block", "jittered places", "naflex"],
)
def test_what_training_does_to_positions(model):
    """Patches that are dropped and places that are jittered, from the same random numbers as natively."""
    torch.manual_seed(0)
    model, images = model().train(), torch.randn(2, 3, 32, 48)
    randomise(model, std=0.15)
    torch.manual_seed(5)
    native = model(images)
    torch.manual_seed(5)
    found = all_tokens(model, images)
    torch.testing.assert_close(found, native, atol=1e-5, rtol=1e-5)
    assert distance(model.eval()(images), native) > 1e-4


@torch.no_grad()
def test_unfused_attention_shares_weights_and_gives_the_same():
    for key in ("beit", "eva02", "parallel", "naflex, axial", "relpos"):
        model, images = built(key)
        twin = unfused(model)
        assert twin is not model
        assert next(twin.parameters()) is next(model.parameters())
        assert distance(twin(images), model(images)) < 1e-5


# Costs


@pytest.fixture
def counted():
    """The flop counter counts matrix products, and fused attention on CPUs is none."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


@pytest.mark.parametrize("key", [key for key in MODELS if not key.startswith("relpos") or key == "relpos, a table"])
@pytest.mark.usefixtures("counted")
@torch.inference_mode()
def test_macs_equal_the_flop_counter(key):
    """The MLP of relative positions is left out: it costs the same for a batch of any size."""
    model, images = built(key)
    backbone = wrap(model)
    patches = decisions(backbone, images).shape[2]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images[:1])
    assert native_macs(backbone, patches) == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)


@pytest.mark.parametrize(
    "key", ["eva giant, class token", "dinov3, class token", "two of each", "parallel", "beit, class token"]
)
@torch.inference_mode()
def test_macs_of_pruned_models_equal_the_flop_counter(key):
    model, images = built(key)
    backbone = wrap(model)
    game = TokenGame(backbone, GameConfig(stages=(1,), transition="drop"), False, unfused_attention)
    table = decisions(backbone, images[:1], 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        state = game.play(images[:1], Scripted(table))
        game.predict(state)
    found = float(pruned_macs(game, None, torch.stack(state.kept), state.total))
    assert found == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)


# Around the model


@pytest.mark.parametrize("key", ["eva02", "beit, class token", "two of each", "naflex, axial"])
@torch.inference_mode()
def test_baselines_run(key):
    model, images = built(key)
    torch.testing.assert_close(ToMe(model, (0, 0, 0))(images), model(images), atol=1e-5, rtol=1e-5)
    for method in (ToMe(model, (3, 3, 2)), EViT(model, 0.5, (1,))):
        native, macs = method.macs(method.predict(images))
        assert 0 < float(macs.max()) < native


def test_images_are_prepared_as_timm_says():
    model, _ = built("eva02")
    assert preprocessing_of(model)["input_size"] == [3, 32, 48]
    found = preprocessing_of(timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=48, num_heads=3))
    assert found["input_size"] == [3, 384, 384]
    assert wrap(timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=48, num_heads=3)).patches == 576


@pytest.mark.parametrize("part", ["blocks.1.attns", "blocks.1.attns.0.attn", "blocks.1.ffns.1", "blocks.1"])
def test_hooks_that_would_not_run_are_refused(part):
    model, _ = built("two of each")
    model.get_submodule(part).register_forward_hook(lambda *_: None)
    with pytest.raises(TokenGameError, match=rf"the model's {part} has a forward hook"):
        wrap(model)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("vit_dwee_patch16_reg1_gap_256", {}, "attends with DiffAttention: values are twice as wide"),
        ("vit_dpwee_patch16_reg1_gap_256", {}, "is a DiffParallelScalingBlock: values are twice as wide"),
        ("samvit_base_patch16", {}, "VisionTransformerSAM is of no supported family: it attends inside windows"),
        ("cait_xxs24_224", {}, "Cait is of no supported family: its heads exchange"),
        ("resnet18", {}, "ResNet is of no supported family;"),
        ("eva02_tiny_patch14_224", {"global_pool": ""}, "Eva pools by ''"),
        ("beit_base_patch16_224", {"global_pool": ""}, "Beit pools by ''"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_reason(name, changes, said):
    with torch.device("meta"):
        model = timm.create_model(name, **changes)
    with pytest.raises(TokenGameError, match=said):
        wrap(model)


def test_calls_that_a_pruned_model_cannot_honour_are_refused():
    model, images = built("naflex")
    fast = prune_by(model, GameConfig(stages=(1, 2)), keep_all)
    patches = {"patches": images.flatten(2), "patch_coord": None, "patch_valid": None}
    for arguments in [(patches,), (images, torch.zeros(2, 24, 2))]:
        with pytest.raises(TokenGameError, match="not patches with coordinates"):
            fast(*arguments)
    with pytest.raises(TokenGameError, match="takes no attention mask"):
        fast(images, attn_mask=torch.zeros(2, 1, 24, 24))


def test_subclasses_are_refused_by_name():
    class Changed(Eva):
        def forward_features(self, x):
            return x

    with pytest.raises(TokenGameError, match="subclass of timm's Eva that has its own forward_features"):
        wrap(Changed(**SMALL, **PATCHES))


def test_a_stem_that_says_another_grid_is_refused():
    class Overlapping(timm.layers.PatchEmbed):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.proj.stride = (4, 4)

    model = timm.models.VisionTransformer(**SMALL, **PATCHES, embed_layer=Overlapping, pos_embed="none")
    with pytest.raises(
        TokenGameError, match="Overlapping gives 77 patches of such images and says that they are 4 x 6"
    ):
        all_tokens(model, torch.zeros(1, 3, 32, 48))
