"""Weights files: every usual kind is loaded, every other one is named in a sentence, and nothing in a file is run."""

import io
import os
import pickle
import socket
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
from conftest import tiny_vit
from huggingface_hub import constants
from safetensors.torch import save_file

from tokengame.backbones import load_model
from tokengame.backbones.checkpoint import load_into, read_state
from tokengame.errors import TokenGameError

NAME = "vit_tiny_patch16_224"


@pytest.fixture
def state():
    return tiny_vit(seed=1).state_dict()


def loaded(path):
    return load_into(tiny_vit(), read_state(str(path)), str(path)).state_dict()


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


CHECKPOINTS = {
    "a state dict": lambda s: s,
    "Lightning's": lambda s: {"state_dict": prefixed(s, "model.") | {"criterion.weight": torch.ones(3)}, "epoch": 3},
    "DDP's": lambda s: prefixed(s, "module."),
    "compiled, then DDP's": lambda s: prefixed(s, "module._orig_mod."),
    "DDP's, then compiled": lambda s: prefixed(s, "_orig_mod.module."),
    "compiled Lightning's": lambda s: {"state_dict": prefixed(s, "model._orig_mod.")},
    "in a backbone": lambda s: {"model": prefixed(s, "backbone.")},
    "in an image tower": lambda s: prefixed(s, "visual.trunk.") | {"logit_scale": torch.ones(())},
    "nested": lambda s: {"checkpoint": 1, "model": {"state_dict": s}},
    "PyTorch's tutorial": lambda s: {"model_state_dict": s, "optimizer_state_dict": {}, "loss": 0.5},
    "timm's": lambda s: {"epoch": 1, "arch": "vit", "state_dict": s, "optimizer": {"state": {}, "param_groups": []},
                         "args": Namespace(lr=1e-3)},
    "a moving average beside": lambda s: {"state_dict": other(s), "state_dict_ema": s},
    "a moving average beside, DeiT's": lambda s: {"model": other(s), "model_ema": prefixed(s, "module.")},
    "a moving average alone": lambda s: {"model_ema": s},
    "a moving average alone, timm's": lambda s: {"state_dict_ema": s},
    "no moving average yet": lambda s: {"state_dict": s, "state_dict_ema": None},
    "float64": lambda s: {name: tensor.double() for name, tensor in s.items()},
    "parameters": lambda s: {name: torch.nn.Parameter(tensor) for name, tensor in s.items()},
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_usual_checkpoints_are_loaded(kind, state, tmp_path):
    torch.save(CHECKPOINTS[kind](state), tmp_path / "weights.pth")
    found = loaded(tmp_path / "weights.pth")
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded_as_float32(dtype, state, tmp_path):
    torch.save({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path / "weights.bin")
    for name, tensor in loaded(tmp_path / "weights.bin").items():
        assert torch.equal(tensor, state[name].to(dtype).float())


@pytest.mark.parametrize("name", ["weights.safetensors", "weights", "weights.pth", "model.bin"])
def test_a_file_is_what_it_holds_whatever_it_is_called(name, state, tmp_path):
    save_file(state, tmp_path / "one.safetensors")
    os.rename(tmp_path / "one.safetensors", tmp_path / name)
    assert torch.equal(loaded(tmp_path / name)["cls_token"], state["cls_token"])


class Runs:
    """Pickled, it would make a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_not_run(state, tmp_path):
    trap = str(tmp_path / "trap")
    for content in ({"model": state, "args": Runs(trap)}, Runs(trap), tiny_vit()):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(TokenGameError, match="Python objects, which could run code and are not opened"):
            read_state(str(tmp_path / "weights.pth"))
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Runs(trap)))
    with pytest.raises(TokenGameError):
        read_state(str(tmp_path / "plain.pkl"))
    assert not os.path.exists(trap)


def test_other_kinds_of_files_are_named(state, tmp_path):
    archive = io.BytesIO()
    np.savez(archive, **{"Transformer/encoderblock_0": np.zeros(3)})
    for name, inner in (("script.pt", "script/code/__torch__.py"), ("images.zip", "a.txt")):
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr(inner, "a")
    files = {
        "model.onnx": (b"\x08\x07\x12\x07pytorch" * 9, "is an ONNX model"),
        "model.h5": (b"\x89HDF\r\n\x1a\n" * 9, "is an HDF5 file"),
        "model.gguf": (b"GGUF" * 9, "is a GGUF file"),
        "renamed.pth": (b"GGUF" * 9, "is a GGUF file"),
        "B_16.npz": (archive.getvalue(), "is a NumPy archive"),
        "renamed.bin": (archive.getvalue(), "is a NumPy archive"),
        "array.npy": (b"\x93NUMPY\x01\x00" * 9, "is a NumPy array"),
        "model.safetensors.index.json": (b'{"weight_map": {}}', "is a JSON file"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid ...", "is a Git LFS pointer"),
        "other.index.json": (
            b'{"weight_map": {"a": "../other.safetensors"}}',
            "is a JSON file, and no index of shards",
        ),
        "shards.index.json": (b'{"weight_map": {"a": "gone.safetensors"}}', "no shard, which shards.index.json names,"),
        "weights.pth.gz": (b"\x1f\x8b\x08" * 9, "is a gzip archive"),
        "script.pt": ((tmp_path / "script.pt").read_bytes(), "is a TorchScript program"),
        "images.zip": ((tmp_path / "images.zip").read_bytes(), "is a zip archive"),
        "empty.pth": (b"", "is empty"),
        "text.pth": (b"<!DOCTYPE html><html></html>", "is damaged or of no known format"),
    }
    torch.save(state, tmp_path / "whole.pth")
    save_file(state, tmp_path / "whole.safetensors")
    for whole in ("whole.pth", "whole.safetensors"):
        content = (tmp_path / whole).read_bytes()
        files |= {f"{n}{whole}": (content[:n], "damaged or of no known") for n in (9, 100, len(content) // 2)}
    for name, (content, sentence) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TokenGameError, match=sentence) as caught:
            read_state(str(tmp_path / name))
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
    os.mkdir(tmp_path / "folder")
    for name, sentence in (
        ("folder", "is a folder, not a weights file, and holds no model.safetensors"),
        ("nowhere", "no weights file"),
        ("pipe", "is a pipe"),
    ):
        if name == "pipe":
            os.mkfifo(tmp_path / name)
        with pytest.raises(TokenGameError, match=sentence):
            read_state(str(tmp_path / name))


CONTENTS = {
    "holds no weights": {},
    "holds a list": [1, 2],
    "holds a Tensor": lambda s: s["cls_token"],
    "holds teacher, student beside or instead": lambda s: {"teacher": s, "student": s},
    "holds epoch beside": lambda s: s | {"epoch": 3},
    "holds 2 models (student., teacher.)": lambda s: prefixed(s, "teacher.") | prefixed(s, "student."),
    "is the state of an optimizer": torch.optim.Adam([torch.zeros(1)]).state_dict(),
    "state of an optimizer, without": {"optimizer": {"state": {}, "param_groups": []}, "epoch": 3},
    "is an adapter (LoRA)": {"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.zeros(2, 2)},
    "names of Hugging Face transformers": {"vit.encoder.layer.0.output.dense.weight": torch.zeros(2, 2)},
    "names of torchvision": {"encoder.layers.encoder_layer_0.ln_1.weight": torch.zeros(2)},
    "names of open_clip": {"visual.transformer.resblocks.0.ln_1.weight": torch.zeros(2)},
    "is quantised: pass": {"blocks.0.attn.qkv.qweight": torch.zeros(2, 2, dtype=torch.int32)},
    "is quantised: blocks.0.attn.qkv.weight is torch.int8": lambda s: s | {
        "blocks.0.attn.qkv.weight": s["blocks.0.attn.qkv.weight"].char()},
    "cls_token in weights file": lambda s: s | {"cls_token": torch.quantize_per_tensor(s["cls_token"], 1, 0,
                                                                                     torch.qint8)},
    "is sparse; save it dense": lambda s: s | {"head.weight": s["head.weight"].to_sparse()},
    "has no values (meta device)": lambda s: s | {"head.weight": s["head.weight"].to("meta")},
    "not finite in head.weight (1 tensors)": lambda s: s | {"head.weight": s["head.weight"] * float("nan")},
    "not finite in head.bias": lambda s: s | {"head.bias": s["head.bias"].double() + 1e300},
    "has no classifier (head.weight, head.bias), and the model one of 5 classes": lambda s: {
        name: tensor for name, tensor in s.items() if not name.startswith("head")},
    "has 7 classes and the model 5": lambda s: s | {"head.weight": torch.zeros(7, 32), "head.bias": torch.zeros(7)},
    "of another input size: pos_embed is [1, 38, 32] in the file": lambda s: s | {"pos_embed": torch.zeros(1, 38, 32)},
    "of images with 1 channels and the model of 3: patch_embed.proj.weight is [32, 1, 8, 8]": lambda s: s | {
        "patch_embed.proj.weight": torch.zeros(32, 1, 8, 8)},
    "another architecture: patch_embed.proj.weight is [32, 3, 16, 16]": lambda s: s | {
        "patch_embed.proj.weight": torch.zeros(32, 3, 16, 16)},
    "another architecture: cls_token is [1, 1, 64] in the file and [1, 1, 32]": lambda s: s | {
        "cls_token": torch.zeros(1, 1, 64)},
    "another architecture; 1 of its weights are not the model's (extra.weight)": lambda s: s | {
        "extra.weight": torch.zeros(1)},
    "48 of the model's weights are missing in it (blocks.0.norm1.weight, blocks.0.norm1.bias, "
    "blocks.0.attn.qkv.weight, ...)": lambda s: {k: v for k, v in s.items() if not k.startswith("blocks")},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("sentence", CONTENTS)
def test_what_does_not_fit_is_said_in_a_sentence(sentence, state, tmp_path):
    path = tmp_path / "weights.pth"
    content = CONTENTS[sentence]
    torch.save(content(state) if callable(content) else content, path)
    with pytest.raises(TokenGameError) as caught:
        loaded(path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_tensor_larger_than_its_file_is_refused_by_its_shape(state, tmp_path):
    """One number, expanded to 4 TB: a copy would not fit into memory."""
    torch.save(state | {"cls_token": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "weights.pth")
    with pytest.raises(TokenGameError, match=r"cls_token is \[1000000, 1000000\]"):
        loaded(tmp_path / "weights.pth")


def test_the_classes_are_those_of_the_file_behind_any_prefix(tmp_path):
    state = timm.create_model(NAME, num_classes=7).state_dict()
    torch.save({"state_dict": prefixed(state, "model.")}, tmp_path / "weights.ckpt")
    assert load_model(NAME, str(tmp_path / "weights.ckpt")).num_classes == 7


# Names


def test_names_are_timms(tmp_path):
    for name, reason in (
        ("magic:vit", "valid sources: hf-hub, local-dir"),
        ("vit_colossal", "similar: "),
        (f"local-dir:{tmp_path}", "config.json"),
        (f"{NAME}.magic", "magic"),
    ):
        with pytest.raises(TokenGameError, match=reason):
            load_model(name)


def test_a_local_folder_of_timms_is_loaded(tmp_path):
    model = timm.create_model(NAME, num_classes=4)
    timm.models.save_for_hf(model, tmp_path)
    found = load_model(f"local-dir:{tmp_path}")
    assert torch.equal(found.state_dict()["head.weight"], model.state_dict()["head.weight"])


@pytest.mark.parametrize("name", [NAME, f"timm/{NAME}.augreg", f"hf-hub:timm/{NAME}.augreg", "org/name"])
def test_without_a_network_a_sentence_comes_without_retries(name, monkeypatch, tmp_path):
    tried = []

    def refuse(address, **_):
        tried.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("tokengame.backbones.hub.getproxies", dict)
    with pytest.raises(TokenGameError, match=r"no connection to huggingface.co, and no copy"):
        load_model(name)
    assert len(tried) == 1
    assert constants.HF_HUB_OFFLINE is False
