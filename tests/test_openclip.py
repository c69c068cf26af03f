"""open_clip's image towers: exact, alone and inside the model around them."""

import copy

import pytest
import torch
from conftest import needs_kernels, off, randomise
from exact import check_all_tokens, check_bfloat16, check_gradients, check_macs, check_random_decisions
from torch import nn

from tokengame import TokenGameError
from tokengame.backbones import preprocessing_of, wrap
from tokengame.backbones.base import Backbone
from tokengame.backbones.openclip_vit import OpenCLIPTimm
from tokengame.backends import CompiledBlocks
from tokengame.baselines.heuristics import KeepBest, attention, keep_all
from tokengame.config import GameConfig
from tokengame.data.transforms import transform_for
from tokengame.game import TokenGame
from tokengame.game.testing import Scripted
from tokengame.packed.layout import RaggedLayout
from tokengame.runtime import prune_by
from tokengame.runtime.macs import native_macs

open_clip = pytest.importorskip("open_clip", reason="pip install tokengame[open_clip]")
from open_clip.timm_model import TimmModel  # noqa: E402
from open_clip.transformer import LayerNormFp32, PatchDropout, QuickGELU, Transformer, VisionTransformer  # noqa: E402

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
CONFIG = GameConfig(stages=(1, 2))
SMALL = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "mlp_ratio": 2.0}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 24, "heads": 2, "layers": 1}


def tiny(**changes):
    """4 x 4 patches, four blocks, random weights, an embedding of 24."""
    torch.manual_seed(0)
    model = VisionTransformer(**(SMALL | {"heads": 2, "output_dim": 24} | changes))
    randomise(model, std=0.15)
    return model.eval()


POOLER = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2}
VARIANTS = {
    "plain": {},
    "not square": {"image_size": (32, 48), "patch_size": (8, 16)},
    "quick GELU": {"act_layer": QuickGELU},
    "layer scale": {"ls_init_value": 0.3},
    "no norm before": {"no_ln_pre": True},
    "average pool": {"pool_type": "avg"},
    "norm after the pool": {"pool_type": "avg", "final_ln_after_pool": True},
    "fixed positions": {"pos_embed_type": "sin_cos_2d"},
    "attention pool": POOLER,
    "attention pool, mean": POOLER | {"pool_type": "avg"},
    "attention pool, all": POOLER | {"pool_type": "none"},
    "attention pool, same width": {"attentional_pool": True, "attn_pooler_heads": 2, "output_dim": 32},
    "tokens": {"output_tokens": True},
    "tokens of the mean": {"output_tokens": True, "pool_type": "avg", "final_ln_after_pool": True},
    "CoCa": POOLER | {"output_tokens": True},
    "custom blocks": {"block_type": "custom"},
    "query and key norms": {"qk_norm": True},
    "scaled heads": {"scale_heads": True, "scale_attn": True},
    "inner norms": {"scale_attn_inner": True, "scale_fc": True},
    "norms in float32": {"norm_layer": LayerNormFp32},
    "patch dropout": {"patch_dropout": 0.5},
}  # fmt: skip


def images_for(model):
    return torch.randn(3, 3, *model.image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("key", VARIANTS)
def test_exact(key):
    model = tiny(**VARIANTS[key])
    check_all_tokens(model, images_for(model))
    check_random_decisions(model, images_for(model))
    if key != "norms in float32":  # open_clip converts those in its own way, see below
        check_bfloat16(model, images_for(model))
    if key != "patch dropout":
        check_gradients(model, images_for(model))


@pytest.mark.parametrize("key", ["average pool", "norm after the pool", "attention pool", "attention pool, mean"])
@torch.no_grad()
def test_pooling_weighs_merged_rows(key):
    """A row that stands for three counts as three equal rows do natively."""
    model = tiny(**VARIANTS[key])
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    size = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0, 2.0, 1.0])
    found = wrap(model).head(x, RaggedLayout([4, 3], x.device), size)
    sizes = size.long()
    for image, rows in enumerate((slice(0, 4), slice(4, 7))):
        if rows.start:
            sizes[rows.start] = 1  # of the class token, which stands for itself
        pooled, _ = model._pool(x[rows].repeat_interleave(sizes[rows], 0)[None])
        torch.testing.assert_close(found[image], (pooled @ model.proj)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "key", ["plain", "average pool", "attention pool", "attention pool, all", "attention pool, same width"]
)
@torch.inference_mode()
def test_macs_equal_the_flop_counter(key):
    check_macs(tiny(**VARIANTS[key]).requires_grad_(False), IMAGES[:1], mean=key == "average pool")


@torch.no_grad()
def test_patch_dropout_of_training_is_the_models():
    """The same random numbers drop the same patches."""
    model = tiny(patch_dropout=0.5).train()
    fast = prune_by(model, CONFIG, keep_all).train()
    torch.manual_seed(4)
    native = model(IMAGES)
    torch.manual_seed(4)
    torch.testing.assert_close(fast(IMAGES), native, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(native, model.eval()(IMAGES), atol=1e-3)


@pytest.mark.parametrize("key", ["plain", "layer scale", "custom blocks"])
def test_checkpointed_gradients(key):
    model = tiny(**VARIANTS[key])
    fast = prune_by(model, CONFIG, keep_all).train()
    fast(IMAGES).sum().backward()
    expected = [p.grad.clone() for p in fast.model.parameters()]
    fast.zero_grad()
    fast.set_grad_checkpointing()
    assert not model.transformer.grad_checkpointing, "the wrapped model stays as it is"
    fast(IMAGES).sum().backward()
    for found, wanted in zip(fast.model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.grad, wanted)


# Models around a tower


def clip(kind=open_clip.CLIP, **vision):
    torch.manual_seed(0)
    named = {"multimodal_cfg": TEXT} if kind is open_clip.CoCa else {}
    config = SMALL | {"head_width": 16} | vision
    text = TEXT | ({"embed_cls": True, "output_tokens": True} if named else {})
    model = kind(embed_dim=24, vision_cfg=config, text_cfg=text, **named)
    randomise(model, std=0.15)
    return model.eval()


WORDS = torch.randint(1, 50, (3, 8), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP", "CoCa"])
@torch.no_grad()
def test_a_pruned_tower_in_its_model(kind):
    """At all tokens everything the model computes stays the same; with fewer it is still computed."""
    model = clip(getattr(open_clip, kind), **(VARIANTS[kind] if kind == "CoCa" else {}))
    native, embedded = model(IMAGES, WORDS), model.encode_image(IMAGES, normalize=True)
    names = dict(model.named_parameters())
    tower = model.visual
    model.visual = prune_by(tower, CONFIG, keep_all)
    torch.testing.assert_close(model(IMAGES, WORDS), native, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.encode_image(IMAGES, normalize=True), embedded, atol=1e-5, rtol=1e-4)
    model.visual = prune_by(tower, CONFIG, KeepBest(attention, (0.5, 0.25)))
    found = model.encode_image(IMAGES, normalize=True)
    assert found.shape == embedded.shape
    assert not torch.allclose(found, embedded, atol=1e-3)
    model.set_grad_checkpointing()
    assert not tower.transformer.grad_checkpointing
    model.visual = tower
    assert dict(model.named_parameters()).keys() == names.keys()


@torch.no_grad()
def test_what_the_model_around_reads_and_changes():
    model = clip()
    open_clip.set_model_preprocess_cfg(model, {"mean": (0.5,) * 3, "std": (0.5,) * 3})
    tower = model.visual
    unpruned = model.no_weight_decay()
    model.visual = prune_by(tower, CONFIG, keep_all)
    assert model.visual.image_size == (32, 32)
    assert open_clip.get_model_preprocess_cfg(model)["mean"] == (0.5,) * 3
    assert model.no_weight_decay() == {name.replace("visual.", "visual.model.") for name in unpruned}
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    model.lock_image_tower()
    assert not any(p.requires_grad for p in model.visual.parameters())
    assert all(p.requires_grad for p in tower.parameters()), "the wrapped tower stays as it is"
    with pytest.raises(TokenGameError, match="no prune_intermediate_layers: remove layers of the model"):
        model.visual.prune_intermediate_layers(1)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"image_indices": 2, "normalize_intermediates": True},
        {"image_indices": [0, 2], "image_output_fmt": "NLC"},
        {"image_output_extra_tokens": True},
        {"intermediates_only": True},
        {"intermediates_only": True, "stop_early": True, "image_indices": [1]},
    ],
    ids=str,
)
@pytest.mark.parametrize("timm", [False, True])
@torch.no_grad()
def test_forward_intermediates(timm, arguments):
    model, images = clip(), IMAGES
    if timm:
        model.visual = trunk_with_head("linear")
        images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    expected = model.forward_intermediates(images, WORDS[:2], **arguments)
    model.visual = prune_by(model.visual, CONFIG, keep_all)
    found = model.forward_intermediates(images, WORDS[:2], **arguments)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)  # sums of another order


def test_an_embedding_of_an_early_block_is_refused():
    fast = prune_by(tiny(), CONFIG, keep_all)
    with pytest.raises(TokenGameError, match="leave out stop_early, or add intermediates_only"):
        fast.forward_intermediates(IMAGES, [1], stop_early=True)


# Towers that hold a timm model


def trunk_with_head(proj, name="test_vit", pool="token", **settings):
    torch.manual_seed(0)
    model = TimmModel(name, 24, image_size=160, pool=pool, proj=proj, **settings)
    randomise(model, std=0.15)
    return model.eval()


TIMM_TOWERS = {
    "linear": ("linear", {}),
    "linear with bias": ("linear", {"proj_bias": True, "pool": "avg"}),
    "mlp": ("mlp", {}),
    "head of the trunk": ("", {}),
    "no projection": ("none", {"pool": "avg"}),
    "attention pool": ("none", {"name": "test_vit3", "pool": "map"}),
}


@pytest.mark.parametrize("key", TIMM_TOWERS)
def test_towers_of_timm_are_exact(key):
    proj, settings = TIMM_TOWERS[key]
    model = trunk_with_head(proj, **settings)
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    check_all_tokens(model, images)
    table = torch.randn(2, 2, 100, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        game, trunk = (TokenGame(wrap(part), CONFIG) for part in (model, model.trunk))
        pooled = trunk.predict(trunk.play(images, Scripted(table)))
        found = game.predict(game.play(images, Scripted(table)))
        torch.testing.assert_close(found, model.head(pooled), atol=1e-5, rtol=1e-4)
        assert native_macs(game.backbone, 100) - native_macs(trunk.backbone, 100) == sum(
            layer.weight.numel() for layer in model.head.modules() if isinstance(layer, nn.Linear)
        )
    check_bfloat16(model, images)
    check_gradients(model, images)


def test_everything_of_the_protocol_is_the_trunks_or_the_towers():
    """What a later version adds to the protocol must be taken from the trunk too."""
    own = {"refresh", "watch", "dtype", "device", "shape", "unfused", "native", "read_call", "positional"}
    named = {name for name in vars(Backbone) if not name.startswith("_")} - own
    assert named <= {name for kind in OpenCLIPTimm.__mro__ if kind is not Backbone for name in vars(kind)}
    values = {name for name in Backbone.__annotations__ if name not in ("model", "classes", "interface")}
    assert values <= vars(wrap(trunk_with_head("linear"))).keys()


@torch.no_grad()
def test_a_changed_trunk_is_noticed():
    model = trunk_with_head("linear")
    fast = prune_by(model, CONFIG, keep_all)
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    before = fast(images)
    model.trunk.norm = nn.LayerNorm(64)
    torch.testing.assert_close(fast(images), model(images), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(fast(images), before, atol=1e-3)
    model.trunk.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(TokenGameError, match=r"blocks\.1 has a forward hook"):
        fast(images)


# Preprocessing


@pytest.mark.parametrize(("mode", "name"), [("shortest", "center"), ("squash", "squash"), ("longest", "border")])
def test_preprocessing_is_the_towers(mode, name):
    model = clip()
    assert preprocessing_of(model.visual)["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    assert preprocessing_of(model.visual)["std"] == list(open_clip.OPENAI_DATASET_STD)
    settings = {"mean": (0.5, 0.4, 0.3), "std": (0.2,) * 3, "interpolation": "bilinear", "resize_mode": mode}
    open_clip.set_model_preprocess_cfg(model, settings)
    found = preprocessing_of(model.visual)
    assert (found["mean"], found["std"], found["interpolation"]) == ([0.5, 0.4, 0.3], [0.2] * 3, "bilinear")
    assert (found["crop_mode"], found["input_size"]) == (name, [3, 32, 32])
    assert transform_for(found, train=False) is not None


# Refusals


def with_part(where, part, **changes):
    model = tiny(**changes)
    parent, _, name = where.rpartition(".")
    setattr(model.get_submodule(parent), name, part)
    return model


REFUSED = {
    "pools by 'none': its output depends on every token": lambda: tiny(pool_type="none"),
    r"two attention pools \(parallel\)": lambda: tiny(attentional_pool="parallel", attn_pooler_heads=2),
    "pools with Identity": lambda: with_part("attn_pool", nn.Identity(), attentional_pool=True, attn_pooler_heads=2),
    "drops patches with PatchDropout, which is not known, or class tokens": lambda: with_part(
        "patch_dropout", PatchDropout(0.5, exclude_first_token=False)
    ),
    r"block 0 attends by scaled cosine \(scaled_cosine_attn\)": lambda: tiny(scaled_cosine_attn=True),
    "has a Identity; only open_clip's Transformer": lambda: with_part("transformer", nn.Identity()),
    "has no blocks": lambda: with_part("transformer", Transformer(32, 0, 2)),
    "block 1 is a Identity": lambda: with_part("transformer.resblocks.1", nn.Identity()),
    "block 1 attends with Identity": lambda: with_part("transformer.resblocks.1.attn", nn.Identity()),
    "block 1 holds a BatchNorm1d": lambda: with_part("transformer.resblocks.1.ln_2", nn.BatchNorm1d(32)),
    r"CLIP holds a open_clip VisionTransformer: prune that and put it back, model.visual = tokengame.prune": clip,
    "ModifiedResNet has no tokens to prune": lambda: open_clip.model.ModifiedResNet([1, 1, 1, 1], 24, 2, 32, 16),
    r"CLIP.visual cannot be pruned: ModifiedResNet has no tokens": lambda: clip(layers=[1, 1, 1, 1], width=16),
    "TimmModel.trunk cannot be pruned: ResNet is of no supported family": lambda: TimmModel(
        "test_resnet", 24, pool="avg"
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_exact_is_refused_with_the_reason(said):
    with pytest.raises(TokenGameError, match=said):
        wrap(REFUSED[said]())


def test_scaled_cosine_attention_does_not_run_natively_either():
    with pytest.raises(RuntimeError, match="batch1 must be a 3D tensor"):
        tiny(scaled_cosine_attn=True)(IMAGES)


@pytest.mark.parametrize("part", ["", "transformer", "transformer.resblocks.1", "transformer.resblocks.1.attn",
                                  "transformer.resblocks.1.attn.attn_drop"])  # fmt: skip
def test_hooks_that_would_be_skipped_are_refused(part):
    model = tiny(qk_norm=True)
    model.get_submodule(part).register_forward_hook(lambda *_: None)
    with pytest.raises(TokenGameError, match=f"the model{chr(39) + 's ' + part if part else ''} has a forward hook"):
        wrap(model)


# Number formats and compiled kernels


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
@torch.no_grad()
def test_precisions_of_open_clip(precision):
    """Norms and embeddings stay in float32 in "bf16", as open_clip has them."""
    mixed = torch.bfloat16 if precision == "bf16" else None  # gives norms that compute in float32
    half = open_clip.CLIP(24, SMALL | {"head_width": 16}, TEXT, cast_dtype=mixed)
    randomise(half, std=0.15)
    exact = half.eval().visual(IMAGES)
    if mixed:
        open_clip.model.convert_weights_to_lp(half, torch.bfloat16)
    else:
        half.bfloat16()
    found = prune_by(half.visual, CONFIG, keep_all)(IMAGES.bfloat16())
    assert found.dtype == torch.bfloat16
    native = half.visual(IMAGES.bfloat16())
    assert off(found, exact) < max(0.01, 2 * off(native, exact))


@needs_kernels
@pytest.mark.parametrize(("key", "backend"), [("plain", CompiledBlocks), ("layer scale", CompiledBlocks),
                                              ("no norm before", CompiledBlocks), ("average pool", CompiledBlocks),
                                              ("quick GELU", CompiledBlocks)])  # fmt: skip
@torch.inference_mode()
def test_compiled_kernels_are_near_pytorchs(key, backend):
    model = tiny(**(VARIANTS[key] | {"width": 64}))
    half, images = copy.deepcopy(model).bfloat16(), IMAGES.bfloat16()
    fast = prune_by(half, CONFIG, keep_all)
    assert type(fast.game.backend_for(images)) is backend
    exact = model(IMAGES)
    assert off(fast(images), exact) < max(0.01, 1.5 * off(half(images), exact))
