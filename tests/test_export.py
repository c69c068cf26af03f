"""Exported graphs: PyTorch's decisions and outputs in other engines, for any batch size and dial."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import timm
import torch
from conftest import policy_for, randomise, tiny_vit
from hypothesis import given
from hypothesis import strategies as st

import tokengame
from tokengame import kernels
from tokengame.config import GameConfig
from tokengame.deploy import FORMATS, PrunedGraph, export
from tokengame.deploy.fixed import best, with_fixed_counts
from tokengame.deploy.game import absorbers
from tokengame.deploy.graph import FixedGraph
from tokengame.deploy.parity import compare
from tokengame.errors import TokenGameError
from tokengame.policies.networks import TokenActor
from tokengame.runtime import PrunedViT, prune_by

IMAGES = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def pruned(transition="merge", dial=0.5, **changes):
    model = tiny_vit(**changes)
    return PrunedViT(model, policy_for(model, transition), dial)


def wanted(fast, images):
    with kernels.disabled(), torch.inference_mode():
        return fast.predict(images)


def agree(got, fast, images):
    want = wanted(fast, images)
    np.testing.assert_allclose(got[0], want.logits, rtol=1e-4, atol=1e-4)
    assert np.array_equal(got[1], torch.stack(want.kept, 1))
    assert np.array_equal(got[2], want.alive)


@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_the_graph_plays_the_same_game_in_pytorch(transition):
    fast = pruned(transition)
    graph = PrunedGraph(fast, (32, 32))
    for dial in (0.0, 0.3, 0.5, 0.8, 1.0):
        fast.dial = dial
        for images in (IMAGES, IMAGES[:1]):
            agree([part.numpy() for part in graph(images, torch.full((len(images),), dial))], fast, images)


def test_every_image_has_a_dial_of_its_own():
    fast, dials = pruned(), torch.linspace(0.1, 0.9, len(IMAGES))
    output, _, alive = PrunedGraph(fast, (32, 32))(IMAGES, dials)
    for image, dial in enumerate(dials):
        fast.dial = float(dial)
        want = wanted(fast, IMAGES[image : image + 1])
        assert torch.equal(alive[image], want.alive[0])
        torch.testing.assert_close(output[image], want.logits[0], rtol=1e-4, atol=1e-5)


BOTH = [("onnx", "merge"), ("openvino", "drop"), ("torch", "drop"), ("torch", "merge")]


@pytest.mark.parametrize(("name", "transition"), BOTH)
def test_formats_agree_with_pytorch_in_any_batch_and_at_any_dial(name, transition, tmp_path):
    kind = next(kind for kind in FORMATS if kind.name == name)
    fast, path = pruned(transition), tmp_path / f"pruned{kind.suffix}"
    found = tokengame.export(fast, path, IMAGES)
    assert found["file"] == str(path)
    assert found["format"] == kind.name
    assert found["max_abs_difference"] < 1e-4
    run = kind.open(path)
    for dial in (0.0, 0.4, 0.7):
        fast.dial = dial
        for number in (1, 2, 9):
            images = IMAGES[:number]
            agree(run(images.numpy(), np.full(number, dial, np.float32)), fast, images)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A pruned model and its ONNX file, for any batch size."""
    fast, path = pruned(dial=0.4), tmp_path_factory.mktemp("export") / "pruned.onnx"
    export(fast, path, IMAGES)
    return fast, path


def test_a_graph_for_one_image_masks_nothing(exported, tmp_path):
    fast, path = exported
    export(fast, tmp_path / "one.onnx", IMAGES, batch_size=1)
    whole, one = (onnx.load(file).graph for file in (path, tmp_path / "one.onnx"))
    assert len(one.node) < 0.9 * len(whole.node)
    masked = ["And" in {node.op_type for node in graph.node} for graph in (whole, one)]  # decisions of what is there
    assert masked == [True, False]
    assert [dim.dim_value for dim in one.input[0].type.tensor_type.shape.dim] == [1, 3, 32, 32]
    assert whole.input[0].type.tensor_type.shape.dim[0].dim_param


def rotary():
    torch.manual_seed(0)
    model = timm.create_model(
        "eva02_tiny_patch14_224", img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=2, num_classes=5
    ).eval()
    randomise(model)
    return model


def ranked(logits, number):
    """The indices of the greatest, one by one, of equals the first."""
    left, found = list(logits), set()
    for _ in range(number):
        place = max(range(len(left)), key=lambda i: (left[i], -i))
        found.add(place)
        left[place] = -math.inf
    return [place in found for place in range(len(left))]


@given(st.lists(st.sampled_from([-1.5, 0.0, 0.1, 2.0]), min_size=1, max_size=9), st.data())
def test_the_best_are_ranked_by_hand(logits, data):
    number = data.draw(st.integers(1, len(logits)))
    assert best(torch.tensor([logits]), number)[0].tolist() == ranked(logits, number)


@pytest.mark.parametrize(("suffix", "transition"), [(".onnx", "merge"), (".xml", "merge"), (".pt2", "drop")])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_fixed_counts_are_the_mean_and_nothing_is_an_input_but_images(suffix, transition, batch_size, tmp_path):
    fast, path = pruned(transition, embed_dim=96), tmp_path / f"pruned{suffix}"
    found = export(fast, path, IMAGES, fixed_counts=True, batch_size=batch_size)
    assert found["max_abs_difference"] < 1e-4
    assert found["dial"] == 0.5
    mean = torch.stack(wanted(fast, IMAGES).kept).double().mean(1)
    assert found["tokens_kept"] == [round(float(count)) / 16 for count in mean]
    number = batch_size or 9
    _, kept, alive = next(kind for kind in FORMATS if kind.suffix == suffix).open(path)(IMAGES[:number].numpy())
    assert (kept == mean.round().numpy()).all()
    assert (alive.sum(1) == kept[:, -1]).all()


def test_with_fixed_counts_all_sizes_are_known(tmp_path):
    export(pruned(), tmp_path / "one.onnx", IMAGES, fixed_counts=True, batch_size=1)
    graph = onnx.load(tmp_path / "one.onnx").graph
    assert [entry.name for entry in graph.input] == ["images"]
    shapes = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "one.onnx")).graph.value_info
    assert all(dim.dim_value for entry in shapes for dim in entry.type.tensor_type.shape.dim)


def test_a_package_is_compiled_for_this_processor(tmp_path):
    fast, path = pruned(), tmp_path / "pruned.pt2"
    with pytest.raises(TokenGameError, match="only graphs whose sizes are known"):
        export(fast, path, IMAGES, format="aotinductor", batch_size=1)
    found = export(fast, path, IMAGES, format="aotinductor", fixed_counts=True)
    assert found["format"] == "aotinductor"
    package = torch._inductor.aoti_load_package(str(path))
    assert json.loads(package.get_metadata()["tokengame"])["dial"] == 0.5
    own = with_fixed_counts(fast, IMAGES)
    agree([part.numpy() for part in package(IMAGES[:4])], own, IMAGES[:4])


def test_the_paper_s_actor_has_no_fixed_counts(tmp_path):
    fast = pruned("drop")
    fast.actor = TokenActor(32, 16, (16, 8)).eval()
    with pytest.raises(TokenGameError, match="TokenActor has no fixed counts"):
        export(fast, tmp_path / "a.pt2", IMAGES, fixed_counts=True)


def test_openvino_compiles_narrow_blocks_of_known_sizes(tmp_path):
    """With its snippets it ends the process here."""
    assert export(pruned(), tmp_path / "a.xml", IMAGES, fixed_counts=True)["max_abs_difference"] < 1e-4


MODELS = {
    "average pooling": lambda: tiny_vit(global_pool="avg"),
    "no class token": lambda: tiny_vit(global_pool="avg", class_token=False),
    "attention pooling": lambda: tiny_vit(global_pool="map", class_token=False),
    "registers": lambda: tiny_vit(reg_tokens=3),
    "layer scale": lambda: tiny_vit(init_values=0.3),
    "norm of queries": lambda: tiny_vit(qk_norm=True),
    "embedding": lambda: tiny_vit(num_classes=0),
    "distilled": lambda: tiny_vit(name="deit_tiny_distilled_patch16_224"),
    "rotary": rotary,
}


@pytest.mark.parametrize("key", MODELS)
@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_models_of_all_kinds_are_exported(key, transition, tmp_path):
    model = MODELS[key]()
    fast = PrunedViT(model, policy_for(model, transition), 0.5)
    found = export(fast, tmp_path / "pruned.pt2", IMAGES[:8])
    assert found["max_abs_difference"] < 1e-4
    assert 0 < found["tokens_kept"][-1] < 1


@pytest.mark.parametrize("key", MODELS)
@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_fixed_counts_are_exact_on_models_of_all_kinds(key, transition):
    model = MODELS[key]()
    fast = with_fixed_counts(PrunedViT(model, policy_for(model, transition), 0.5), IMAGES)
    with torch.no_grad():
        found = FixedGraph(fast, (32, 32))(IMAGES)
    assert len(set(found[1][:, -1].tolist())) == 1
    agree([part.numpy() for part in found], fast, IMAGES)


@pytest.mark.parametrize("key", ["no class token", "average pooling", "attention pooling", "rotary"])
@pytest.mark.parametrize("transition", ["drop", "merge"])
def test_padding_changes_no_mean_and_no_pool(key, transition):
    model = MODELS[key]()
    fast = PrunedViT(model, policy_for(model, transition), 0.5)
    with torch.no_grad():
        found = PrunedGraph(fast, (32, 32))(IMAGES, torch.full((len(IMAGES),), 0.5))
    agree([part.numpy() for part in found], fast, IMAGES)


def test_of_equally_similar_agents_the_first_absorbs():
    similarity = torch.tensor([[[-5, -5, -5, -5], [-5, -5, 0.5, 0.5], [-5, 0.1, -5, 0.2], [-5, 0.1, 0.2, -5]]])
    stays = torch.tensor([[1.0, 0, 1, 1]])
    assert absorbers(similarity, stays, stays.cumsum(1) - 1).tolist() == [[0, 1, 1, 2]]


def test_models_of_other_libraries_are_exported(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs tokengame[hf]")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).eval()
    randomise(model, std=0.15)
    found = export(tokengame.prune(model, gmacs_ratio=0.7), tmp_path / "pruned.pt2", IMAGES[:8])
    assert found["max_abs_difference"] < 1e-4


def test_policies_of_all_kinds_are_exported(tmp_path):
    model = tiny_vit()
    rule = tokengame.prune(model, gmacs_ratio=0.7)  # budgets of each image
    assert export(rule, tmp_path / "rule.pt2", IMAGES[:8])["max_abs_difference"] < 1e-4
    paper = pruned("drop")
    torch.manual_seed(2)
    paper.actor = TokenActor(32, 16, (16, 8)).eval()
    assert export(paper, tmp_path / "paper.pt2", IMAGES[:8])["max_abs_difference"] < 1e-4
    early = prune_by(model, GameConfig(stages=(0, 2), transition="drop"), paper.actor, features=False)
    assert export(early, tmp_path / "early.pt2", IMAGES[:8])["max_abs_difference"] < 1e-4


def test_bfloat16_is_exported_in_float32(tmp_path):
    fast = pruned()
    exact = export(fast, tmp_path / "exact.pt2", IMAGES[:8])
    found = export(fast.bfloat16(), tmp_path / "half.pt2", IMAGES[:8])
    assert next(fast.parameters()).dtype == torch.bfloat16, "the model itself is as it was"
    assert found["bytes"] == pytest.approx(exact["bytes"], rel=0.1)


def test_the_file_says_what_it_is(exported):
    fast, path = exported
    (entry,) = [prop for prop in onnx.load(path).metadata_props if prop.key == "tokengame"]
    about = json.loads(entry.value)
    assert about["dial"] == 0.4
    assert about["card"]["game"] == fast.card["game"]
    assert about["preprocessing"]["mean"]
    assert about["tokengame"] == tokengame.__version__
    operators = {(node.domain, node.op_type) for node in onnx.load(path).graph.node}
    assert {domain for domain, _ in operators} <= {"", "ai.onnx"}, "no operators of our own"


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np
import onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
images = np.load(sys.argv[2])
np.savez(sys.argv[3], *session.run(None, {"images": images, "dial": np.full(len(images), 0.4, np.float32)}))
"""


def test_a_program_without_pytorch_runs_the_file(exported, tmp_path):
    fast, path = exported
    np.save(tmp_path / "images.npy", IMAGES.numpy())
    files = [str(path), *(str(tmp_path / name) for name in ("images.npy", "found.npz"))]
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *files], check=True, env=os.environ | {"PYTHONPATH": ""})
    found = np.load(tmp_path / "found.npz")
    agree([found[name] for name in found.files], fast, IMAGES)


TWO_ENGINES = """
import os, signal, sys
from pathlib import Path
from tokengame.deploy.formats import OpenVino
one, other = (OpenVino().open(Path(sys.argv[1])) for _ in range(2))
del one
del other
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_arrive_after_engines_are_gone(tmp_path):
    export(pruned(), tmp_path / "pruned.xml", IMAGES[:2], batch_size=1)
    command = [sys.executable, "-c", TWO_ENGINES, str(tmp_path / "pruned.xml")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "handled\n"


def test_a_graph_that_decides_otherwise_leaves_everything_as_it_was(tmp_path, monkeypatch):
    fast, path = pruned(), tmp_path / "pruned.pt2"
    opened = type(FORMATS[2]).open

    def other(self, file):
        run = opened(self, file)
        return lambda images, dial: run(images, dial + 0.2)

    monkeypatch.setattr(type(FORMATS[2]), "open", other)
    path.write_text("an earlier one")
    with pytest.raises(TokenGameError, match="keeps other tokens of image"):
        export(fast, path, IMAGES)
    assert path.read_text() == "an earlier one"
    assert list(tmp_path.iterdir()) == [path]


def test_outputs_that_are_off_are_refused():
    fast = pruned()
    graph = PrunedGraph(fast, (32, 32))

    def off(images, dial):
        output, *others = (part.numpy() for part in graph(torch.from_numpy(images), torch.from_numpy(dial)))
        return [output + 1e-2, *others]

    with pytest.raises(TokenGameError, match="outputs of the graph are up to"):
        compare(off, fast, IMAGES, 3)


def with_cascade(tmp_path):
    fast = pruned()
    fast.card["game"]["cascade_margin"] = 0.2
    return PrunedViT(fast.model, tokengame.Policy(fast.actor, fast.card), 0.5), tmp_path / "a.onnx", IMAGES


BAD = {
    "fall back to all tokens": with_cascade,
    "names no format": lambda tmp_path: (pruned(), tmp_path / "a.bin", IMAGES),
    "must be .B, channels, height, width.": lambda tmp_path: (pruned(), tmp_path / "a.onnx", IMAGES[0]),
}


@pytest.mark.parametrize("sentence", BAD)
def test_what_cannot_be_exported_is_one_sentence(sentence, tmp_path):
    with pytest.raises(TokenGameError, match=sentence):
        export(*BAD[sentence](tmp_path))
    assert not list(tmp_path.iterdir())


def test_formats_and_suffixes_must_agree(tmp_path):
    with pytest.raises(TokenGameError, match=r"ends in \.xml"):
        export(pruned(), tmp_path / "a.onnx", IMAGES, format="openvino")
    with pytest.raises(TokenGameError, match="there is no format 'tflite'"):
        export(pruned(), tmp_path / "a.onnx", IMAGES, format="tflite")


def test_the_engine_is_timed_beside_the_native_model(tmp_path):
    found = export(pruned(), tmp_path / "a.onnx", IMAGES[:2], batch_size=2, seconds=0.2)
    (row,) = found["timing"]
    assert row["batch_size"] == 2
    assert row["milliseconds_native"] > 0
    assert row["verdict"] == ("faster" if row["speedup"] > 1 else "slower")


def test_the_command_writes_checks_and_times(tmp_path):
    command = [sys.executable, "-m", "tokengame", "export", "--backbone", "fashion", "--images", "fashion", "--json"]
    command += ["--policy", "rule", "--count", "3", "--batch-size", "1", "--seconds", "0.2"]
    command += ["--output", str(tmp_path / "pruned.xml")]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = json.loads(ran.stdout)
    assert found["max_abs_difference"] < 1e-4
    assert found["bytes"] == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert [row["batch_size"] for row in found["timing"]] == [1]
    assert found["openvino"]
    assert "the same tokens as in PyTorch" in ran.stderr
