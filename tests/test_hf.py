"""Hugging Face models: same call, output class and result with all tokens kept; masks and loops with pruned ones."""

import copy
import tarfile

import pytest
import torch
import transformers
from conftest import needs_kernels, policy_for, randomise, tiny_vit
from converted_hf import hugging_face
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

import tokengame
from tokengame import kernels
from tokengame.backbones import HuggingFaceViT, load_model, preprocessing_of, unfused, wrap
from tokengame.baselines.heuristics import KeepBest, attention, keep_all
from tokengame.baselines.tome import ToMe
from tokengame.config import GameConfig
from tokengame.data.transforms import to_rgb, transform_for
from tokengame.errors import TokenGameError
from tokengame.game import TokenGame
from tokengame.game.testing import Scripted, check_contract, masked_features, merged_by_loops, played_features
from tokengame.packed.attention import fastest_attention, unfused_attention
from tokengame.policies.policy import fingerprint
from tokengame.runtime import prune_by
from tokengame.runtime.macs import native_macs, pruned_macs

SIZES = {
    "image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
    "intermediate_size": 96, "projection_dim": 24, "vocab_size": 99, "max_position_embeddings": 9,
}  # fmt: skip
DINO = {"mlp_ratio": 2, "layerscale_value": 0.5, "num_labels": 5}
CASES = {
    "vit": ("ViTModel", {}),
    "vit without pooler": ("ViTModel", {}),
    "vit classifier": ("ViTForImageClassification", {"num_labels": 5, "qkv_bias": False}),
    "vit not square": ("ViTForImageClassification", {"num_labels": 5, "image_size": (24, 48)}),
    "deit": ("DeiTModel", {"hidden_act": "gelu_new"}),
    "deit classifier": ("DeiTForImageClassification", {"num_labels": 5}),
    "deit with teacher": ("DeiTForImageClassificationWithTeacher", {"num_labels": 5}),
    "msn": ("ViTMSNModel", {}),
    "msn classifier": ("ViTMSNForImageClassification", {"num_labels": 5}),
    "mae": ("ViTMAEModel", {"mask_ratio": 0.0}),
    "ijepa": ("IJepaModel", {}),
    "ijepa classifier": ("IJepaForImageClassification", {"num_labels": 5}),
    "dinov2": ("Dinov2Model", DINO),
    "dinov2 swiglu": ("Dinov2Model", DINO | {"use_swiglu_ffn": True}),
    "dinov2 classifier": ("Dinov2ForImageClassification", DINO),
    "dinov2 registers": ("Dinov2WithRegistersModel", DINO),
    "dinov2 registers classifier": ("Dinov2WithRegistersForImageClassification", DINO),
    "dinov3": ("DINOv3ViTModel", {"layerscale_value": 0.5, "num_register_tokens": 4}),
    "dinov3 gated": ("DINOv3ViTModel", {"layerscale_value": 0.5, "use_gated_mlp": True}),
    "clip": ("CLIPVisionModel", {}),
    "clip projection": ("CLIPVisionModelWithProjection", {}),
    "clip classifier": ("CLIPForImageClassification", {"num_labels": 5}),
    "metaclip": ("MetaClip2VisionModelWithProjection", {}),
    "siglip": ("SiglipVisionModel", {}),
    "siglip without head": ("SiglipVisionModel", {"vision_use_head": False}),
    "siglip classifier": ("SiglipForImageClassification", {"num_labels": 5}),
    "aimv2": ("Aimv2VisionModel", {}),
    "aimv2 native": ("Aimv2VisionModel", {"is_native": True}),
    "aimv2 without head": ("Aimv2VisionModel", {"use_head": False}),
}
TWO_TOWERS = ("CLIPForImageClassification", "SiglipForImageClassification", "CLIPModel", "SiglipModel")
ANY_SIZE = {"dinov2", "dinov2 registers classifier", "dinov3", "aimv2 native"}
"""models that take other sizes without being told to"""


def build(key, **more):
    name, changes = CASES.get(key, (key, {}))
    kind, settings = getattr(transformers, name), SIZES | changes | more
    if name in TWO_TOWERS:
        towers = {"vision_config": settings, "text_config": SIZES}
        settings = {**towers, "projection_dim": 24, "num_labels": settings.get("num_labels", 2)}
    torch.manual_seed(0)
    options = {"add_pooling_layer": False} if "without pooler" in key else {}
    model = kind(kind.config_class(**settings), **options).eval()
    randomise(model, std=0.15)
    return model


def images_for(model, batch=3, size=None):
    size = size or wrap(model).input_size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def in_order(model, images):
    """Options of a native call that leave patches in order, where a masked autoencoder would shuffle them."""
    return {"noise": torch.arange(16.0).expand(len(images), -1)} if "MAE" in type(model).__name__ else {}


def off(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def table_for(model, images, stages=2):
    tokens = torch.Size(wrap(model).grid(*images.shape[2:])).numel()
    return torch.randn(stages, len(images), tokens, generator=torch.Generator().manual_seed(2))


def assert_same(found, native, tolerance=1e-5):
    """The same class with the same parts."""
    assert type(found) is type(native)
    assert list(found.keys()) == list(native.keys())
    for key, expected in native.items():
        pairs = zip(found[key], expected, strict=True) if isinstance(expected, tuple) else [(found[key], expected)]
        for part, other in pairs:
            assert part.shape == other.shape, key
            assert part.dtype == other.dtype, key
            assert torch.equal(part, other) if not other.is_floating_point() else off(part, other) < tolerance or (
                not other.any() and not part.any()
            ), key  # fmt: skip


@pytest.mark.parametrize("transition", ["drop", "merge"])
@pytest.mark.parametrize("key", CASES)
@torch.no_grad()
def test_a_call_with_all_tokens_kept_is_the_native_one(key, transition):
    model = build(key)
    images = images_for(model)
    fast = prune_by(model, GameConfig(stages=(1, 2), transition=transition), keep_all)
    options = in_order(model, images)
    assert_same(fast(images), model(images, **options))
    assert_same(fast(pixel_values=images, output_hidden_states=True),
                model(images, output_hidden_states=True, **options))  # fmt: skip
    found, expected = fast(images, return_dict=False), model(images, return_dict=False, **options)
    assert type(found) is tuple
    assert [part.shape for part in found] == [part.shape for part in expected]
    backbone = wrap(model)
    assert off(fast.predict(images).logits, backbone.native(images)) < 1e-5
    assert off(fast.forward_features(images), backbone.native_features(images)) < 1e-5


@pytest.mark.parametrize("key", CASES)
@torch.no_grad()
def test_dropping_equals_masking(key):
    model = build(key)
    backbone, images = wrap(model), images_for(model)
    table = table_for(model, images)
    expected = masked_features(backbone, (1, 2), images, table)
    config = GameConfig(stages=(1, 2), transition="drop")
    found, there = played_features(TokenGame(backbone, config, keep_patches=True), images, table)
    assert off(found[there], expected[there]) < 1e-5
    native = backbone.native_features(images)
    assert off(found[there], native[there]) > 1e-3, "the decisions changed nothing"


@pytest.mark.parametrize("key", CASES)
@torch.no_grad()
def test_merging_equals_loops(key):
    model = build(key)
    backbone, images = wrap(model), images_for(model)
    table = table_for(model, images)
    game = TokenGame(backbone, GameConfig(stages=(1, 2), transition="merge"))
    found = game.predict(game.play(images, Scripted(table)))
    expected = merged_by_loops(backbone, (1, 2), images, table)
    assert off(found, expected) < 1e-5
    assert off(found, backbone.native(images)) > 1e-3


@pytest.mark.parametrize("transition", ["drop", "merge"])
@pytest.mark.parametrize("key", ["vit", "deit with teacher", "mae", "ijepa", "dinov3", "clip classifier", "siglip"])
def test_contract(key, transition):
    model = build(key)
    check_contract(TokenGame(wrap(model), GameConfig(stages=(0, 2), transition=transition)), images_for(model))


@pytest.mark.parametrize("key", ["vit", "deit classifier", "mae", "clip projection", "siglip", *sorted(ANY_SIZE)])
@pytest.mark.parametrize("size", [(48, 24), (40, 40)])
@torch.no_grad()
def test_other_sizes(key, size):
    model = build(key)
    images = images_for(model, size=size)
    fast = prune_by(model, GameConfig(stages=(1, 2), transition="merge"), keep_all)
    if key in ANY_SIZE:
        assert_same(fast(images), model(images))
        return
    options = {"noise": torch.arange(size[0] * size[1] / 64).expand(3, -1)} if key == "mae" else {}
    assert_same(fast(images, interpolate_pos_encoding=True), model(images, interpolate_pos_encoding=True, **options))
    with pytest.raises(TokenGameError, match=f"are of {size[0]} x {size[1]} pixels .* 32 x 32: .*interpolate_pos_enc"):
        fast(images)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("key", ["vit classifier", "dinov3", "siglip"])
@torch.no_grad()
def test_every_implementation_of_attention_is_pruned_alike(key, implementation):
    model = build(key)
    images, config = images_for(model), GameConfig(stages=(1, 2), transition="merge")
    expected = prune_by(model, config, KeepBest(attention, (0.5, 0.25))).predict(images).logits
    if implementation == "flash_attention_2":  # is not installed here, and not needed by a pruned model
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = implementation
    else:
        model.set_attn_implementation(implementation)
    fast = prune_by(model, config, KeepBest(attention, (0.5, 0.25)))
    assert torch.equal(fast.predict(images).logits, expected)
    if implementation == "flash_attention_2":
        return
    assert off(prune_by(model, config, keep_all).predict(images).logits, wrap(model).native(images)) < 1e-5
    assert unfused(model).config._attn_implementation == "eager"
    assert off(wrap(unfused(model)).native(images), wrap(model).native(images)) < 1e-5


@pytest.mark.parametrize("transition", ["drop", "merge"])
@pytest.mark.parametrize("key", [key for key in CASES if key != "siglip classifier"])
@torch.inference_mode()
def test_macs_equal_the_flop_counter(key, transition):
    """SigLIP's classifier natively computes a pooling that nothing reads; a weighted mean is a product, a mean none."""
    model = build(key)
    backbone, config, images = wrap(model), GameConfig(stages=(1, 2), transition=transition), images_for(model, 1)
    game = TokenGame(backbone, config, features=False, attention=unfused_attention)
    table = table_for(model, images)
    agents = table.shape[2]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone.native(images)
    assert native_macs(backbone, agents) == counter.get_total_flops() / 2
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        state = game.play(images, Scripted(table))
        game.predict(state)
    analytic = float(pruned_macs(game, None, torch.stack(state.kept), agents))
    mean = 0 if backbone.reads_prefix_only or "siglip" in key else state.layout.rows * backbone.dim
    assert analytic == pytest.approx(counter.get_total_flops() / 2, rel=0, abs=mean)


@pytest.mark.parametrize("key", ["vit classifier", "dinov2 classifier", "dinov3", "clip projection", "siglip"])
@torch.no_grad()
def test_number_formats_and_copies(key):
    model = build(key)
    images = images_for(model)
    for decide, tolerance in [(keep_all, 0.03), (KeepBest(attention, (0.5, 0.25)), 0.1)]:
        fast = prune_by(model, GameConfig(stages=(1, 2), transition="merge"), decide)
        native = fast.predict(images).logits
        in_bfloat16 = copy.deepcopy(fast).bfloat16()
        assert in_bfloat16.dtype == torch.bfloat16
        assert off(in_bfloat16(images)[0], fast(images)[0]) < tolerance, "images are converted, as natively"
        assert torch.equal(copy.deepcopy(fast)(images)[0], fast(images)[0])
        assert fast.double().predict(images.double()).logits.dtype == torch.float64
        assert off(fast.predict(images.double()).logits, native) < 1e-5
        assert model.dtype == torch.float32


@pytest.mark.parametrize(
    "key", ["vit classifier", "deit with teacher", "dinov2", "dinov3", "clip projection", "siglip"]
)
def test_gradients_in_training(key):
    model = build(key)
    if key == "dinov3":
        model.config.pos_embed_rescale = None
    images, config = images_for(model), GameConfig(stages=(1, 2), transition="drop")
    fast = prune_by(model, config, keep_all).train()
    assert not fast.model.config.to_dict().get("hidden_dropout_prob")
    fast.predict(images).logits.square().sum().backward()
    wrap(model).native(images).square().sum().backward()
    native = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in fast.model.named_parameters() if p.grad is not None}
    assert found.keys() == native.keys()
    for name, gradient in native.items():
        scale = gradient.norm() if "k_proj.bias" not in name else 1.0  # it cancels in the softmax
        assert float((found[name] - gradient).norm() / scale) < 1e-4, name
    assert not fast.eval()(images)[0].requires_grad


@pytest.mark.parametrize(("key", "dropped"), [
    ("vit classifier", {"hidden_dropout_prob": 1.0}), ("vit classifier", {"attention_probs_dropout_prob": 1.0}),
    ("clip projection", {"attention_dropout": 1.0}), ("dinov2", {"drop_path_rate": 0.999999}),
])  # fmt: skip
def test_what_training_drops_is_dropped(key, dropped):
    """All of it, so that nothing is left to chance."""
    model = build(key, **dropped)
    images = images_for(model)
    fast = prune_by(model, GameConfig(stages=(1, 2), transition="drop"), keep_all)
    evaluated = fast.predict(images).logits
    assert off(evaluated, wrap(model).native(images)) < 1e-5
    trained = fast.train().predict(images).logits
    assert off(trained, wrap(model.train()).native(images)) < 1e-5
    assert off(trained, evaluated) > 1e-2


def test_losses_are_the_models_own():
    model = build("vit classifier")
    images, labels = images_for(model), torch.tensor([0, 4, 2])
    fast = prune_by(model, GameConfig(stages=(1, 2)), keep_all)
    native = model(images, labels=labels)
    assert_same(fast(images, labels), native)
    fast.train()
    fast(images, labels=labels).loss.backward()
    native.loss.backward()
    assert off(fast.model.classifier.weight.grad, model.classifier.weight.grad) < 1e-5


def test_what_pruned_tokens_cannot_give_is_one_sentence():
    model = build("vit")
    images = images_for(model)
    fast = prune_by(model, GameConfig(stages=(1, 2)), keep_all)
    for name in ("bool_masked_pos", "attention_mask", "head_mask"):
        with pytest.raises(TokenGameError, match=rf"{name} .*; pass it to fast.restore\(\)"):
            fast(images, **{name: torch.ones(3, 16)})
    with pytest.raises(TokenGameError, match="output_attentions is not possible with pruned tokens"):
        fast(images, output_attentions=True)
    fast(images, output_attentions=False, attention_mask=None)
    with pytest.raises(TokenGameError, match="pixel_values is missing"):
        fast()
    for method in ("save_pretrained", "push_to_hub"):
        with pytest.raises(TokenGameError, match=rf"{method}: .*fast.restore\(\).{method}"):
            getattr(fast, method)("folder")


def test_the_interface_of_the_model():
    model = build("dinov2 classifier")
    fast = prune_by(model, GameConfig(stages=(1, 2)), keep_all)
    assert fast.config is model.config
    assert (fast.dtype, fast.device, fast.main_input_name) == (torch.float32, torch.device("cpu"), "pixel_values")
    assert fast.get_input_embeddings() is model.get_input_embeddings()
    fast.activation_checkpointing_enable()
    assert fast.is_activation_checkpointing
    assert not model.is_activation_checkpointing
    fast.train()
    images = images_for(model)
    fast(images).logits.sum().backward()
    model(images).logits.sum().backward()
    assert off(fast.model.classifier.weight.grad, model.classifier.weight.grad) < 1e-5


@pytest.mark.parametrize("wanted", [True, -2, [0, -1, 9], 4])
@torch.no_grad()
def test_hidden_states_by_index(wanted):
    model = build("clip")
    images = images_for(model)
    fast = prune_by(model, GameConfig(stages=(1, 2)), keep_all)
    found, native = (of(images, output_hidden_states=wanted).hidden_states for of in (fast, model))
    assert [part is None for part in found] == [part is None for part in native]
    assert all(off(part, other) < 1e-5 for part, other in zip(found, native, strict=True) if other is not None)
    model.config.output_hidden_states = True
    assert len(fast(images).hidden_states) == 5


def test_hooks_that_record_outputs_are_no_obstacle():
    model = build("vit classifier")
    images = images_for(model)
    fast = prune_by(model, GameConfig(stages=(1, 2)), keep_all)
    model(images, output_hidden_states=True)  # puts hooks on the blocks
    assert model.vit.layers[0]._forward_hooks
    assert_same(fast(images), model(images))
    model.vit.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(TokenGameError, match=r"the model's vit.layers.0 has a forward hook"):
        wrap(model)


@pytest.mark.parametrize(("key", "sentence"), [
    ("ViTMAEForPreTraining", "ViTMAEForPreTraining masks patches at random .* pass its encoder, model.vit"),
    ("ViTMAEModel", r"ViTMAEModel masks 75% of the patches at random: set model.config.mask_ratio = 0.0"),
    ("Siglip2VisionModel", "Siglip2VisionModel reads patches .* fixed-size SigLIP 2 models are SiglipVisionModel"),
    ("CLIPModel", r"holds a transformers CLIPVisionModel: .* model.vision_model = tokengame.prune\(model.vision_model"),
    ("SiglipModel", r"SiglipModel holds a transformers SiglipVisionModel: .* model.vision_model = tokengame.prune"),
    ("ViTForMaskedImageModeling", r"holds a transformers ViTModel: .* model.vit = tokengame.prune\(model.vit, ...\)"),
    ("BeitModel", "BeitModel is a Hugging Face model of a kind that is not supported; supported are ViT"),
])  # fmt: skip
def test_what_cannot_be_exact_is_refused_with_the_reason(key, sentence):
    with pytest.raises(TokenGameError, match=sentence):
        wrap(build(key))


def test_foreign_parts_are_refused():
    class Own(torch.nn.Module):
        pass

    model = build("vit")
    model.layers[1].mlp = Own()
    with pytest.raises(TokenGameError, match="ViTModel block 1 has a Own where transformers"):
        wrap(model)
    model = build("vit")
    model.config._attn_implementation = "mine"
    with pytest.raises(TokenGameError, match=r"attends by 'mine', .*: model.set_attn_implementation\('sdpa'\)"):
        wrap(model)
    model = transformers.IJepaModel(build("ijepa").config, add_pooling_layer=True)
    with pytest.raises(TokenGameError, match="IJepaModel pools the first patch"):
        wrap(model)
    model = build("dinov3")
    fast = prune_by(model, GameConfig(stages=(1, 2)), keep_all).train()
    with pytest.raises(TokenGameError, match=r"at random in training: set model.config.pos_embed_rescale"):
        fast(images_for(model))


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
@torch.no_grad()
def test_a_tower_is_pruned_inside_its_model(name):
    model = build(name)
    images, text = torch.randn(3, 3, 32, 32), torch.randint(0, 99, (2, 7))
    native, expected = model.get_image_features(images), model(text, images).logits_per_image
    model.vision_model = prune_by(model.vision_model, GameConfig(stages=(1, 2)), keep_all)
    assert_same(model.get_image_features(images), native)
    assert off(model(text, images).logits_per_image, expected) < 1e-5


@torch.no_grad()
def test_weights_that_change_are_noticed():
    model = build("dinov3")
    images = images_for(model)
    fast = prune_by(model, GameConfig(stages=(1, 2)), keep_all)
    before = fast(images).pooler_output
    model.rope_embeddings.inv_freq.mul_(0.5)
    assert off(fast(images).pooler_output, model(images).pooler_output) < 1e-5
    assert off(fast(images).pooler_output, before) > 1e-4


@pytest.mark.parametrize("key", ["vit classifier", "clip projection", "dinov3"])
@torch.no_grad()
def test_pruning_really_prunes(key):
    model = build(key)
    images = images_for(model)
    for fast in (
        prune_by(model, GameConfig(stages=(1, 2)), KeepBest(attention, (0.5, 0.25))),
        ToMe(model, (3, 3, 2, 1)),
    ):
        output = fast.predict(images)
        native, macs = fast.macs(output)
        assert 0 < float(macs.max()) < native
        assert off(output.logits, wrap(model).native(images)) > 1e-4


def test_preprocessing(tmp_path):
    model = build("clip")
    usual = preprocessing_of(model)
    assert usual["input_size"] == [3, 32, 32]
    assert usual["mean"] == pytest.approx([0.481, 0.458, 0.408], abs=1e-3)
    model.save_pretrained(tmp_path)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0]}
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}, **settings).save_pretrained(tmp_path)
    loaded = transformers.CLIPVisionModel.from_pretrained(tmp_path)
    assert isinstance(wrap(loaded), HuggingFaceViT)
    found = preprocessing_of(loaded)
    assert (found["input_size"], found["mean"], found["std"]) == ([3, 32, 32], *settings.values())
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    with pytest.raises(TokenGameError, match=r"makes images of 48 x 48 pixels and the model takes 32 x 32: set"):
        preprocessing_of(loaded)
    dinov2 = build("dinov2")
    dinov2.save_pretrained(tmp_path)
    assert preprocessing_of(transformers.Dinov2Model.from_pretrained(tmp_path))["input_size"] == [3, 48, 48]


def test_weights_are_known_again_in_another_library():
    """A policy that was made for timm's model fits the same weights without a warning, and decides the same."""
    model = tiny_vit()
    policy, other = policy_for(model), hugging_face(model)
    assert fingerprint(wrap(other)) == fingerprint(wrap(model))
    images = images_for(other)
    ours, native = tokengame.prune(other, policy), tokengame.prune(model, policy)
    assert torch.equal(ours.predict(images).alive, native.predict(images).alive)
    assert not ours.predict(images).alive.all()
    assert off(ours(images).logits, native(images)) < 1e-5
    other.vit.layers[1].mlp.fc1.weight.data.neg_()
    with pytest.warns(UserWarning, match="trained for other weights"):
        tokengame.prune(other, policy)


@torch.inference_mode()
def test_real_weights_give_timms_predictions(real_data):
    """With all tokens and pruned by the shipped policy, on photos that chose nothing."""
    name = "vit_tiny_patch16_224"
    model = load_model(name, str(real_data / f"{name}.safetensors"))
    other, images = hugging_face(model), photos(real_data / "flickr_sample.tar", preprocessing_of(model))
    assert off(other(images).logits, model(images)) < 1e-5
    ours, native = tokengame.prune(other, name), tokengame.prune(model, name)
    assert off(ours(images).logits, native(images)) < 1e-4
    assert torch.equal(ours.predict(images).alive, native.predict(images).alive)
    assert not ours.predict(images).alive.all()


def photos(archive, preprocessing, number=6):
    """The first photos of a tar as a batch."""
    transform = transform_for(preprocessing, train=False)
    with tarfile.open(archive) as files:
        names = [name for name in files.getnames() if name.endswith((".jpg", ".jpeg", ".JPEG"))][:number]
        return torch.stack([transform(to_rgb(Image.open(files.extractfile(name)))) for name in names])


@pytest.mark.parametrize("key", ["vit classifier", "clip projection"])
def test_compiled_by_torch(key):
    model = build(key)
    images = images_for(model)
    fast = prune_by(model, GameConfig(stages=(1, 2)), KeepBest(attention, (0.5, 0.25)))
    compiled = torch.compile(fast, backend="eager")
    assert_same(compiled(images), fast(images))


@needs_kernels
@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("key", sorted(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_whole_game_is_one_call_and_the_game_step_by_step(key, dtype, monkeypatch):
    model = build(key).to(dtype)
    images, fast = images_for(model).to(dtype), tokengame.prune(model, gmacs_ratio=0.7)
    with kernels.disabled():
        slow = fast.predict(images)
    monkeypatch.setattr(TokenGame, "step", None)
    found = fast.predict(images)
    assert fast.game.backend_for(images).name == "compiled"
    if dtype == torch.float32:
        assert torch.equal(found.alive, slow.alive)
        assert off(found.logits, slow.logits) < 1e-5
    else:  # rounding changes a decision now and then
        assert (found.alive == slow.alive).float().mean() > 0.9
        assert off(found.logits, slow.logits) < 0.15


@needs_kernels
@torch.inference_mode()
def test_an_epsilon_of_an_rms_norm_may_change():
    model = build("aimv2")
    images, fast = images_for(model), tokengame.prune(model, gmacs_ratio=0.7)
    before = fast.predict(images).logits
    for layer in model.encoder.layers:
        layer.rms_norm1.variance_epsilon = 1.0
    with kernels.disabled():
        expected = fast.predict(images).logits
    assert off(before, expected) > 0.05
    assert off(fast.predict(images).logits, expected) < 1e-5


@needs_kernels
@torch.inference_mode()
def test_another_rms_norm_runs_on_pytorch():
    """Gemma's multiplies by 1 + weight, and its epsilon has another name."""
    model = build("vit")
    model.layers[1].layernorm_before = GemmaRMSNorm(64)
    assert wrap(model).plain_weights() is None


@needs_kernels
@pytest.mark.parametrize("key", ["dinov2", "dinov3 gated", "aimv2"])
@torch.inference_mode()
def test_other_blocks_keep_their_own_layers(key):
    """An activation that the kernels do not have."""
    model = build(key, hidden_act="relu")
    assert wrap(model).plain_weights() is None
    assert TokenGame(wrap(model), GameConfig(stages=(1, 2))).backend_for(images_for(model)).name == "compiled attention"


class Adapted(torch.nn.Module):
    """A convolution with something beside it, as adapters are put on."""

    def __init__(self, conv):
        super().__init__()
        self.base_layer, self.beside = conv, copy.deepcopy(conv)
        self.weight, self.kernel_size, self.in_channels = conv.weight, conv.kernel_size, conv.in_channels

    def forward(self, images):
        return self.base_layer(images) + 0.5 * self.beside(images)


class Shifted(torch.nn.Module):
    def forward(self, x):
        return x + 0.3


def scaled_otherwise(model):
    scale = model.encoder.layer[1].layer_scale1
    scale.__class__ = type("Other", (type(scale),), {"forward": lambda self, x: -x * self.lambda1})


def subclassed(model):
    embedding = model.embeddings
    forward = type(embedding).forward
    embedding.__class__ = type(
        "Other", (type(embedding),), {"forward": lambda self, *a, **b: forward(self, *a, **b) * 2}
    )


REPLACED = {
    "adapter on the patches": ("vit", lambda model: setattr(
        model.embeddings.patch_embeddings, "projection", Adapted(model.embeddings.patch_embeddings.projection))),
    "norm in the embedding": ("vit", lambda model: setattr(model.embeddings, "dropout", torch.nn.LayerNorm(64))),
    "another embedding": ("dinov2", subclassed),
    "something for a dropout": ("vit", lambda model: setattr(model.layers[1], "dropout", Shifted())),
    "something for a dropped path": ("dinov2", lambda model: setattr(model.encoder.layer[1], "drop_path", Shifted())),
    "another layer scale": ("dinov2", scaled_otherwise),
    "another activation": ("vit", lambda model: setattr(model.layers[1].mlp, "activation_fn", torch.nn.SiLU())),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*runs on packed rows")
@pytest.mark.parametrize("name", REPLACED)
@torch.inference_mode()
def test_replaced_parts_act_as_natively(name):
    key, change = REPLACED[name]
    model = build(key)
    change(model)
    images = images_for(model)
    fast = tokengame.prune(model, gmacs_ratio=0.7)
    fast.dial = 0.0
    assert off(fast.predict(images).logits, wrap(model).native(images)) < 1e-5


@needs_kernels
@torch.no_grad()
def test_layers_of_other_sizes_are_not_run_by_the_kernels():
    model = build("vit")
    attn = model.layers[1].attention
    attn.q_proj, attn.k_proj, attn.v_proj = (torch.nn.Linear(64, 32) for _ in range(3))
    attn.o_proj = torch.nn.Linear(32, 64)
    game = TokenGame(wrap(model), GameConfig(stages=(1, 2)))
    assert game.backend_for(images_for(model)).name == "compiled attention"


@torch.no_grad()
def test_constant_tokens_are_found_without_touching_the_model(monkeypatch):
    """Other threads may be calling it."""
    model = build("dinov2")
    images, seen = images_for(model), []
    bias = model.embeddings.patch_embeddings.projection.bias
    before, convolve = bias.clone(), torch.nn.Conv2d.forward
    monkeypatch.setattr(
        torch.nn.Conv2d, "forward", lambda layer, x: (seen.append(torch.equal(bias, before)), convolve(layer, x))[1]
    )
    start = wrap(model).constant_tokens(images)
    assert seen == [True]
    assert model.embeddings.patch_embeddings.projection.bias is bias
    patches = model.embeddings.patch_embeddings(images)
    torch.testing.assert_close(start[1:] + patches[0], model.embeddings(images)[0, 1:])


@needs_kernels
@pytest.mark.parametrize("key", ["dinov2", "siglip"])
@torch.inference_mode()
def test_the_compiled_attention_serves_bfloat16(key):
    """Heads of 32 columns: attention and decisions between the model's own layers."""
    model = build(key, hidden_act="relu").bfloat16()
    images = images_for(model).bfloat16()
    game = TokenGame(wrap(model), GameConfig(stages=(1, 2), transition="merge"), attention=fastest_attention)
    table = table_for(model, images)
    state = game.play(images, Scripted(table))
    assert state.backend.name == "compiled attention"
    slow = TokenGame(wrap(model), game.config, attention=unfused_attention)
    played = slow.play(images, Scripted(table))
    assert played.backend.name == "PyTorch"
    assert torch.equal(state.alive, played.alive)
    assert off(game.predict(state), slow.predict(played)) < 0.03


@torch.no_grad()
def test_a_tower_is_pruned_inside_a_language_model():
    """Llava reads hidden states by index."""
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIZES),
        text_config=transformers.LlamaConfig(**text, vocab_size=99, max_position_embeddings=64),
        image_token_index=98,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tokens = torch.tensor([[1, *[98] * 16, 5, 6]])
    images = torch.randn(1, 3, 32, 32)
    native = model(input_ids=tokens, pixel_values=images).logits
    with pytest.raises(TokenGameError, match=r"model.model.vision_tower = tokengame.prune\(model.model.vision_tower"):
        wrap(model)
    model.model.vision_tower = prune_by(model.model.vision_tower, GameConfig(stages=(1, 2)), keep_all)
    assert off(model(input_ids=tokens, pixel_values=images).logits, native) < 1e-5
    assert model.generate(input_ids=tokens, pixel_values=images, max_new_tokens=2, do_sample=False).shape == (1, 21)
