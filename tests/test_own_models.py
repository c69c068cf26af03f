"""Own models: settings by the command line, checkpoints as training programs write them, models of other libraries."""

import json
import sys
import types
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from accelerate import Accelerator
from conftest import randomise, tiny_vit
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from timm.utils import CheckpointSaver, ModelEmaV3

from tokengame.backbones import load_model, preprocessing_of, wrap
from tokengame.backbones.hf_processor import processor_preprocessing
from tokengame.backbones.load import blank, untrained
from tokengame.cli.main import main, parse
from tokengame.data.datasets import open_images
from tokengame.data.transforms import to_rgb, transform_for
from tokengame.errors import TokenGameError

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def small(seed=0, **changes):
    return tiny_vit(seed, depth=2, **changes)


def load(path, notes=None, **settings):
    return load_model(NAME, str(path), SMALL | settings, (notes if notes is not None else []).append)


def require_equal(found, wanted):
    """To the bit, name by name."""
    found, wanted = found.state_dict(), wanted.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# Checkpoints


def test_timms_own_checkpoint_is_loaded_with_its_moving_average(tmp_path):
    model, average = small(1), ModelEmaV3(small(2))
    optimizer = torch.optim.AdamW(model.parameters())
    saver = CheckpointSaver(model, optimizer, args=Namespace(model=NAME), model_ema=average, checkpoint_dir=tmp_path)
    saver.save_checkpoint(1, metric=0.5)
    notes = []
    require_equal(load(tmp_path / "last.pth.tar", notes), average.module)
    assert notes == [f"{tmp_path / 'last.pth.tar'}: the moving average state_dict_ema is taken, not state_dict"]
    saver.model_ema = None
    saver.save_checkpoint(2, metric=0.6)
    require_equal(load(tmp_path / "last.pth.tar", notes), model)
    assert len(notes) == 1


@pytest.mark.parametrize("safe", [True, False])
def test_shards_of_accelerate_are_loaded_from_their_folder_or_their_index(safe, tmp_path):
    model = small(1)
    Accelerator(cpu=True).save_model(model, tmp_path, max_shard_size="40KB", safe_serialization=safe)
    assert len(list(tmp_path.glob("*-of-*"))) > 1
    require_equal(load(tmp_path), model)
    require_equal(load(next(tmp_path.glob("*.index.json"))), model)
    next(tmp_path.glob("*-of-*")).unlink()
    with pytest.raises(TokenGameError, match=r"no shard, which .*index.json names, at "):
        load(tmp_path)


def test_the_state_that_accelerate_saves_is_loaded_from_its_folder(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = small(1)
    wrapped, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    accelerator.save_state(tmp_path)
    require_equal(load(tmp_path), wrapped)


def test_a_folder_of_fsdp_shards_says_how_to_merge_them(tmp_path):
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    (tmp_path / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"1")
    with pytest.raises(TokenGameError, match="accelerate merge-weights"):
        load(tmp_path)


class Secret:
    """Of a package that is not known to hold settings alone."""


def test_lightnings_hyperparameters_are_skipped_and_never_imported(tmp_path, monkeypatch):
    module = types.ModuleType("lightning.fabric.utilities.data")
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    model = small(1)
    content = {
        "state_dict": {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
        | {"criterion.weight": torch.ones(2)},
        "hyper_parameters": module.AttributeDict(lr=1e-3, data=Path("/photos"), sizes=(1, 2)),
        "pytorch-lightning_version": "2.5.0", "optimizer_states": [{"state": {}, "param_groups": []}],
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "dirpath": Path("runs")}},
    }  # fmt: skip
    with monkeypatch.context() as patch:
        for name in ("lightning", "lightning.fabric", "lightning.fabric.utilities"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save(content, tmp_path / "last.ckpt")
        torch.save(content | {"hyper_parameters": Secret()}, tmp_path / "secret.ckpt")
    notes = []
    require_equal(load(tmp_path / "last.ckpt", notes), model)
    assert notes == [
        f"{tmp_path / 'last.ckpt'}: the model's weights are those that begin with 'net.', and 1 others left out "
        "(criterion.weight)"
    ]
    assert module.__name__ not in sys.modules
    with pytest.raises(TokenGameError, match=r"are not opened \(\S*test_own_models.Secret\); save the state dict"):
        load(tmp_path / "secret.ckpt")


def test_the_head_is_that_of_the_file(tmp_path):
    torch.save(small(1, num_classes=9).state_dict(), tmp_path / "nine.pth")
    assert load(tmp_path / "nine.pth").num_classes == 9
    with pytest.raises(TokenGameError, match="has 9 classes and the model 7"):
        load(tmp_path / "nine.pth", num_classes=7)
    notes = []
    require_equal(load(tmp_path / "nine.pth", notes, num_classes=0), small(1, num_classes=0))
    assert "its classifier is left out" in notes[0]
    torch.save(small(1, num_classes=0).state_dict(), tmp_path / "none.pth")
    require_equal(load(tmp_path / "none.pth", notes), small(1, num_classes=0))
    assert "has no classifier: the model embeds" in notes[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_position_embeddings_of_another_size_are_resampled_as_by_timm(dtype, tmp_path):
    large = small(1, img_size=48).to(dtype)
    torch.save(large.state_dict() | {"mask_token": torch.zeros(1, 32)}, tmp_path / "large.pth")  # as DINOv2 has
    wanted, notes = small(2), []
    timm.models.load_checkpoint(wanted, str(tmp_path / "large.pth"), filter_fn=checkpoint_filter_fn)
    require_equal(load(tmp_path / "large.pth", notes), wanted)
    assert notes[0].endswith(
        "from 37 to 17 rows, for images of 32 x 32; --model-kwargs img_size=48 keeps them as they are"
    )
    require_equal(load(tmp_path / "large.pth", notes, img_size=48), large.float())
    assert len(notes) == 1


# Settings


def doctor(capsys, *flags):
    assert main(["doctor", "--json", "--backbone", *flags]) == 0
    return json.loads(capsys.readouterr().out)["backbone"]


def test_settings_of_timm_are_taken_by_the_command_line(capsys):
    found = doctor(capsys, NAME, "--model-kwargs", "img_size=(32,48)", "patch_size=8", "depth=3", "num_heads=6")
    assert (found["input_size"], found["depth"], found["heads"]) == ([32, 48], 3, 6)
    command = parse(["eval", "--backbone", NAME, "--images", "fashion", "--policy", "p", "--model-kwargs",
                     "img_size=518", "mean=0.5,0.4,0.3", "global_pool=avg", "class_token=False"])  # fmt: skip
    wanted = {"img_size": 518, "mean": (0.5, 0.4, 0.3), "global_pool": "avg", "class_token": False}
    assert command.settings == wanted
    model = untrained(NAME, SMALL | {key: wanted[key] for key in ("mean", "global_pool", "class_token")})
    assert (model.global_pool, model.cls_token) == ("avg", None)
    assert preprocessing_of(model)["mean"] == [0.5, 0.4, 0.3]
    assert preprocessing_of(model)["input_size"] == [3, 32, 32]


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        (["img_size"], "--model-kwargs takes KEY=VALUE pairs, e.g. img_size=518 num_classes=0, not 'img_size'"),
        (["img-size=3"], "not 'img-size=3'"),
        (["img_size=3", "img_size=4"], "sets img_size twice"),
        (["depth=10000000000"], "depth is 10000000000, and no model is that large"),
        (["deph=3"], "takes no --model-kwargs deph=3"),
        (["depth=-1.5"], "--model-kwargs depth=-1.5"),
        (["img_size=a"], "--model-kwargs img_size=a"),
        (["pretrained=True"], "--model-kwargs has no pretrained: weights are given by --weights"),
        (["checkpoint_path=x"], "--model-kwargs has no checkpoint_path"),
        (["mean=red"], "--model-kwargs mean is a number for each channel"),
    ],
)
def test_bad_settings_are_said_in_a_sentence(pairs, sentence, capsys):
    assert main(["doctor", "--backbone", NAME, "--model-kwargs", *pairs]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert sentence in said
    assert "Traceback" not in said


def test_a_random_classifier_is_refused(monkeypatch):
    fetched = tiny_vit()
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: fetched)
    with pytest.raises(TokenGameError, match="a classifier of 7 would be random; pass your own with --weights"):
        load_model(NAME, settings={"num_classes": 7})


def test_models_of_grey_images_get_grey_images(photo):
    model = untrained(NAME, SMALL | {"in_chans": 1, "std": 0.25})
    config = preprocessing_of(model)
    assert (config["input_size"], config["mean"], config["std"]) == ([1, 32, 32], [0.5], [0.25])
    found = transform_for(config, train=False)(photo)
    side = int(32 / config["crop_pct"])
    grey = torchvision.transforms.functional.center_crop(
        torchvision.transforms.functional.resize(
            photo.convert("L"), side, torchvision.transforms.InterpolationMode.BICUBIC
        ),
        [32, 32],
    )
    assert torch.equal(found[0], (torch.from_numpy(np.array(grey)).float() / 255 - 0.5) / 0.25)
    assert transform_for(config, train=True)(photo).shape == (1, 32, 32)
    four = untrained(NAME, SMALL | {"in_chans": 4})
    with pytest.raises(TokenGameError, match=r"takes 4 channels, and images are loaded as grey \(1\) or RGB \(3\)"):
        transform_for(preprocessing_of(four), train=False)


OWN = ["--model-kwargs", "img_size=64", "patch_size=16", "embed_dim=32", "depth=6", "num_heads=2"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Weights of a small model at twice the size of OWN, unlabelled photos, and the flags that name both."""
    root = tmp_path_factory.mktemp("own")
    torch.save(tiny_vit(img_size=128, patch_size=16, depth=6).state_dict(), root / "last.pth")
    (root / "photos").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{number}.png")
    flags = ["--backbone", NAME, "--weights", str(root / "last.pth"), "--workers", "0", *OWN]
    return root, flags


def test_a_flat_folder_trains_and_is_measured_on(own, capsys):
    root, model = own
    flat, some = ["--images", str(root / "photos")], ["--images", str(root / "photos" / "{0,3,1}*.png")]
    policy = ["--policy", str(root / "policy.safetensors")]
    run = ["--updates", "2", "--batch-size", "4", "--rollouts", "2", "--output", policy[1]]
    assert main(["train", *model, *flat, *run]) == 0
    said = capsys.readouterr().err
    assert "12 images in no class folder, unlabelled" in said
    assert "position embeddings are resampled from 65 to 17 rows, for images of 64 x 64" in said
    assert said.rstrip().endswith(" ".join(OWN)), "the next command has the settings"
    assert json.loads((root / "policy_log" / "config.json").read_text())["model_kwargs"] == OWN[1:]
    for command, images, more in (
        ("eval", some, ["--json"]),
        ("calibrate", flat, ["--output", str(root / "calibrated.safetensors")]),
        ("show", some, ["--output", str(root / "tokens.png"), "--count", "2"]),
    ):
        assert main([command, *model, *images, *policy, *more]) == 0
        assert "in no class folder, unlabelled" in capsys.readouterr().err
    assert main(["eval", *model, *flat, "--policy", str(root / "calibrated.safetensors"), "--max-drop", "1"]) == 2
    assert "calibrated without labels" in capsys.readouterr().err
    assert main(["eval", *model, "--images", "a.png", "b.png", *policy]) == 2
    assert "quote a pattern, --images 'photos/*.jpg'" in capsys.readouterr().err


# Names


def test_names_lead_to_their_library(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name, sentence in (
        ("./nowhere", "no folder at ./nowhere, which --backbone names"),
        ("a/b/c", "no folder at a/b/c"),
        (str(tmp_path / "config.json"), "is a file: --backbone names the model that it has weights of"),
        (
            str(tmp_path),
            "config.json of .* names neither a model_type, as transformers', nor an architecture, as timm's",
        ),
        ("torchvision:vit_z", "torchvision knows no model 'vit_z'; similar: vit_b_16"),
        ("torchvision:vit_b_16/MANY", "torchvision has no weights 'MANY' of vit_b_16; there are IMAGENET1K_V1"),
    ):
        with pytest.raises(TokenGameError, match=sentence):
            load_model(name)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(TokenGameError, match="is damaged: it is no JSON object"):
        load_model(str(tmp_path))
    with pytest.raises(TokenGameError, match="--model-kwargs is for models of libraries; fashion is as it is"):
        load_model("fashion", settings={"img_size": 32})


def test_a_folder_of_timms_needs_no_prefix(tmp_path):
    model = timm.create_model(NAME, num_classes=4)
    timm.models.save_for_hf(model, tmp_path)
    require_equal(load_model(str(tmp_path)), model)
    assert wrap(blank(str(tmp_path))).classes == 4


def test_torchvisions_models_are_loaded_from_files(tmp_path, monkeypatch):
    torch.manual_seed(0)

    def vit(_name, num_classes=1000, **_):
        return torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=num_classes)

    monkeypatch.setattr(torchvision.models, "get_model", vit)
    model = vit("", num_classes=7)
    torch.save({"state_dict": {f"model.{name}": t for name, t in model.state_dict().items()}}, tmp_path / "last.ckpt")
    require_equal(load_model("torchvision:vit_b_16", str(tmp_path / "last.ckpt")), model)
    with pytest.raises(TokenGameError, match=r"is a torchvision model|torchvision"):
        load_model(NAME, str(tmp_path / "last.ckpt"))


def test_without_a_network_torchvision_waits_for_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("tokengame.backbones.from_torchvision.reachable", lambda _: False)
    monkeypatch.setattr("tokengame.backbones.from_torchvision.get_dir", lambda: str(tmp_path))
    with pytest.raises(TokenGameError, match=r"no connection to download.pytorch.org, and no vit_b_16-.*"):
        load_model("torchvision:vit_b_16")


def test_open_clips_image_towers_are_loaded(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.CLIP(16, vision, text)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    torch.save(model.visual.state_dict(), tmp_path / "tower.pt")
    name = f"open_clip:local-dir:{tmp_path}"
    require_equal(load_model(name), model.visual)
    require_equal(load_model(name, str(tmp_path / "open_clip_model.safetensors")), model.visual)
    require_equal(load_model(name, str(tmp_path / "tower.pt")), model.visual)
    with pytest.raises(TokenGameError, match=r"has the names of open_clip: .* open_clip:ViT-B-32"):
        load(tmp_path / "tower.pt")
    for wrong, sentence in (
        ("open_clip:ViT-B-32", "open_clip has several weights of ViT-B-32; name them, open_clip:ViT-B-32/TAG"),
        ("open_clip:ViT-B-32/no", "open_clip has no weights 'no' of ViT-B-32"),
        ("open_clip:ViT-Z", "open_clip knows no model 'ViT-Z'; similar: ViT-"),
    ):
        with pytest.raises(TokenGameError, match=sentence):
            load_model(wrong)


@pytest.mark.parametrize(("module", "name"), [("transformers", "vit/"), ("open_clip", "open_clip:ViT-B-32")])
def test_libraries_that_are_not_installed_are_named(module, name, monkeypatch, tmp_path):
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TokenGameError, match=r"is a model of .*: pip install 'tokengame\["):
        load_model(name)


# Hugging Face transformers


@pytest.fixture(scope="module")
def photo():
    """Larger than any crop, neither side even, not square."""
    pixels = np.random.default_rng(0).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((431, 323), Image.Resampling.BICUBIC)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WIDE = SIZES | {"intermediate_size": 64}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 9}


@pytest.mark.parametrize(
    ("kind", "config", "settings", "loaded"),
    [
        ("ViTForImageClassification", "ViTConfig", WIDE | {"num_labels": 5}, "ViTForImageClassification"),
        ("ViTModel", "ViTConfig", WIDE, "ViTModel"),
        ("Dinov2ForImageClassification", "Dinov2Config", SIZES | {"num_labels": 5}, "Dinov2ForImageClassification"),
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", SIZES, "Dinov2WithRegistersModel"),
        ("DINOv3ViTModel", "DINOv3ViTConfig", WIDE, "DINOv3ViTModel"),
        ("CLIPVisionModelWithProjection", "CLIPVisionConfig", WIDE, "CLIPVisionModelWithProjection"),
        ("CLIPModel", "CLIPConfig", {"vision_config": WIDE, "text_config": TEXT, "projection_dim": 24},
         "CLIPVisionModelWithProjection"),
        ("SiglipModel", "SiglipConfig", {"vision_config": WIDE, "text_config": TEXT}, "SiglipVisionModel"),
        ("ViTMAEForPreTraining", "ViTMAEConfig", WIDE, "ViTMAEModel"),
    ],
)  # fmt: skip
def test_hugging_face_folders_are_loaded(kind, config, settings, loaded, tmp_path):
    """Equal to the bit, and in the call, to what was saved: the classifier or the image part of it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    saved = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    randomise(saved)
    saved.save_pretrained(tmp_path)
    found = load_model(str(tmp_path))
    assert type(found).__name__ == type(untrained(str(tmp_path))).__name__ == loaded
    assert not found.training
    assert found.name_or_path == str(tmp_path)
    own = saved.state_dict()
    prefixes = ("", "vision_model.", "vit.")
    for name, tensor in found.state_dict().items():
        assert any(torch.equal(tensor, own[prefix + name]) for prefix in prefixes if prefix + name in own), name
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in own.items()}}, tmp_path / "own.ckpt")
    require_equal(load_model(str(tmp_path), str(tmp_path / "own.ckpt")), found)


def test_bad_hugging_face_folders_are_said_in_a_sentence(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**WIDE, num_labels=5))
    model.save_pretrained(tmp_path / "vit")
    transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)).save_pretrained(tmp_path / "dino")
    name, other = str(tmp_path / "vit"), str(tmp_path / "dino" / "model.safetensors")
    with pytest.raises(TokenGameError, match=r"the configuration of .* has no deph, which --model-kwargs sets"):
        load_model(name, settings={"deph": 3})
    with pytest.raises(TokenGameError, match=r"2 weights are of another size \(the first is classifier.bias\)"):
        load_model(name, settings={"num_labels": 7})
    with pytest.raises(TokenGameError, match=r"holds no whole ViTForImageClassification: .* are missing"):
        load_model(name, other)
    with pytest.raises(TokenGameError, match="has the names of Hugging Face transformers: --backbone must be a model"):
        load(Path(name) / "model.safetensors")
    broken = model.state_dict() | {"classifier.bias": torch.full((5,), float("nan"))}
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(TokenGameError, match=r"values that are not finite in classifier\.bias"):
        load_model(name, str(tmp_path / "broken.safetensors"))
    config = json.loads((Path(name) / "config.json").read_text())
    for change, sentence in (
        ({"model_type": "magic"}, "transformers knows no model .*magic"),
        ({"model_type": "bert", "architectures": ["BertForImageClassification"]}, "no model of images of type 'bert'"),
        ({"quantization_config": {"quant_method": "torchao"}}, "is quantised: give the model"),
    ):
        (Path(name) / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(TokenGameError, match=sentence) as caught:
            load_model(name)
        assert "\n" not in str(caught.value)


PROCESSORS = [
    ("ViT", {}), ("DeiT", {}), ("CLIP", {}), ("Siglip", {}), ("Bit", {}), ("Beit", {}),
    ("ViT", {"size": {"height": 96, "width": 64}, "resample": 3}),
    ("CLIP", {"size": {"shortest_edge": 95}, "crop_size": {"height": 64, "width": 64}, "resample": 1}),
    ("Bit", {"size": {"shortest_edge": 256}, "do_normalize": False}),
    ("Siglip", {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), PROCESSORS)
def test_image_processors_are_followed_to_the_bit(kind, settings, photo, tmp_path):
    """Those that use Pillow; those of torchvision resize tensors, which rounds otherwise."""
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(**settings)
    transform = transform_for(processor_preprocessing(processor), train=False)
    for turned in (photo, photo.transpose(Image.Transpose.ROTATE_90)):
        wanted = processor(turned, return_tensors="pt")["pixel_values"][0]
        found = transform(turned)
        assert found.shape == wanted.shape
        if "rescale_factor" in settings:  # the same numbers, rounded otherwise
            assert torch.allclose(found, wanted, atol=1e-6)
        else:
            assert torch.equal(found, wanted)
    fast = getattr(transformers, f"{kind}ImageProcessor")(**settings)
    fast.save_pretrained(tmp_path)
    transform = transform_for(processor_preprocessing(str(tmp_path)), train=False)
    step = 2 * 255 * fast.rescale_factor / 255 / min(np.atleast_1d(fast.image_std)) if fast.do_normalize else 2 / 255
    if settings.get("resample") != 1:  # Lanczos is not torchvision's
        wanted = fast(photo, return_tensors="pt")["pixel_values"][0]
        assert (transform(photo) - wanted).abs().max() <= max(step, 0.05)


def test_a_real_photo_becomes_what_each_image_processor_makes_of_it(real_data):
    transformers = pytest.importorskip("transformers")
    source = open_images(str(real_data / "imagenet_sample.tar"))
    photos = [to_rgb(source.open(index)) for index in (0, 99)]
    for kind in ("ViT", "DeiT", "CLIP", "Siglip", "Bit", "Beit"):
        processor = getattr(transformers, f"{kind}ImageProcessorPil")()
        transform = transform_for(processor_preprocessing(processor), train=False)
        for real in photos:
            assert torch.equal(transform(real), processor(real, return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        ("ConvNextImageProcessor", {}, "the image processor ConvNextImageProcessor cannot be made here"),
        ("CLIPImageProcessor", {"do_center_crop": False}, "resizes the shortest edge and crops nothing"),
        ("CLIPImageProcessor", {"do_resize": False}, "has do_resize=False"),
        ("CLIPImageProcessor", {"do_rescale": False}, "has do_rescale=False"),
        (
            "CLIPImageProcessor",
            {"crop_size": {"height": 300, "width": 300}},
            "crops 300 pixels of 224, which",
        ),
        ("CLIPImageProcessor", {"crop_size": {"height": 200, "width": 100}}, "only squares are known"),
        ("ViTImageProcessor", {"size": {"longest_edge": 224}}, "and only height and width are known here"),
    ],
)
def test_what_an_image_processor_does_beyond_that_is_refused(kind, settings, sentence):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(TokenGameError, match=sentence):
        processor_preprocessing(getattr(transformers, kind)(**settings))


def test_a_folder_without_an_image_processor_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(TokenGameError, match="has no image processor that can be read"):
        processor_preprocessing(str(tmp_path))
