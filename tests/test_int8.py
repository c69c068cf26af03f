"""Linear layers in int8: the same decisions and outputs as the quantised native model, in each engine."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import tiny_vit
from torch import nn

import tokengame
from tokengame.backbones import load_model, preprocessing_of
from tokengame.backbones.timm_blocks import linear_part
from tokengame.data.batches import plain_views
from tokengame.data.datasets import open_images
from tokengame.deploy.int8 import onnx_int8, torchao_int8
from tokengame.deploy.parity import compare_int8
from tokengame.errors import TokenGameError

pytest.importorskip("torchao", reason="needs tokengame[int8]")
pytest.importorskip("nncf", reason="needs tokengame[int8]")


@pytest.fixture(scope="module")
def model():
    return load_model("fashion")


@pytest.fixture(scope="module")
def images(model):
    loader = plain_views(open_images("fashion", "validation"), preprocessing_of(model)).loader(16, 1)
    return next(iter(loader)).images


def by_hand(layer, rows):
    """A linear layer with weights [out, in] in int8 by output and rows [M, in] in int8 by row."""
    weights, scale = symmetric(layer.weight.detach())
    activations, of_row = symmetric(rows)
    return (activations.double() @ weights.double().T * of_row * scale.T).float() + layer.bias.detach()


def symmetric(matrix):
    """Whole numbers from -128 to 127, and the scale of each row: its largest number is 127.5 steps."""
    scale = matrix.abs().amax(1, keepdim=True) / 127.5
    return (matrix / scale).round().clamp(-128, 127), scale


def logits(model, images):
    with torch.no_grad():
        return model(images)


# torchao


def test_a_layer_of_torchao_is_the_layer_by_hand():
    torch.manual_seed(0)
    layer, rows = nn.Linear(96, 64), torch.randn(7, 96)
    quantised = torchao_int8(layer)
    torch.testing.assert_close(logits(quantised, rows), by_hand(layer, rows), rtol=0, atol=3e-3)  # ties of rounding
    assert float((by_hand(layer, rows) - logits(layer, rows)).abs().max()) > 1e-2, "float32 is further away"
    some = slice(16, 40)
    with torch.no_grad():
        assert torch.equal(linear_part(quantised, rows, some), quantised(rows)[:, some]), "these outputs and no others"


def test_all_tokens_kept_is_the_quantised_model(model, images):
    weights = torchao_int8(model, weights_only=True)
    fast = tokengame.prune(weights, gmacs_ratio=0.7)
    fast.dial = 0.0
    torch.testing.assert_close(logits(fast, images), logits(weights, images), rtol=1e-4, atol=1e-4)
    dynamic = torchao_int8(model)
    fast = tokengame.prune(dynamic, gmacs_ratio=0.7)
    fast.dial = 0.0
    want = logits(dynamic, images)
    # a sum rounded otherwise may change a whole number of int8, and through it the next layers
    assert float((logits(fast, images) - want).norm() / want.norm()) < 0.03
    assert torch.equal(logits(fast, images).argmax(1), want.argmax(1))


def test_the_policy_decides_in_int8_as_in_float32(model, images):
    fast = tokengame.prune(model, gmacs_ratio=0.7)
    small = tokengame.prune(torchao_int8(model), gmacs_ratio=0.7)
    exact, found = fast.predict(images), small.predict(images)
    assert float((exact.alive == found.alive).float().mean()) > 0.97
    assert small.macs(found)[0] == fast.macs(exact)[0]
    assert type(model.head.weight) is nn.Parameter, "the model itself is as it was"


# Exported graphs


@pytest.fixture(scope="module", params=[".onnx", ".xml"])
def exported(request, model, images, tmp_path_factory):
    """A pruned model, its file in int8, and what the export found."""
    fast = tokengame.prune(model, gmacs_ratio=0.7)
    path = tmp_path_factory.mktemp("int8") / f"pruned{request.param}"
    return fast, path, tokengame.export(fast, path, images, int8=True, batch_size=1)


def test_an_export_says_how_like_float32_it_is(exported, images):
    fast, _, found = exported
    assert found["int8"]
    assert found["images"] == 8, "the other half chose ranges"
    assert found["like_float32"] >= 0.75
    assert 0 <= found["kl_native"] < 0.5
    np.testing.assert_allclose(found["tokens_kept"], found["tokens_kept_float32"], atol=0.05)
    want = torch.stack(fast.predict(images[8:]).kept, 1).double().mean(0) / 196
    np.testing.assert_allclose(found["tokens_kept_float32"], want, atol=0.01)
    parameters = sum(parameter.numel() for parameter in fast.model.parameters())
    assert found["bytes"] < 2.5 * parameters, "float32 takes four bytes of each"


def test_only_layers_are_quantised(exported, model):
    _, path, _ = exported
    if path.suffix != ".onnx":
        pytest.skip("of ONNX")
    nodes = onnx.load(path).graph.node
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    # queries, keys and values are a product each; the last block computes some outputs of a layer apart
    assert (
        len(layers) <= sum(node.op_type == "MatMulInteger" for node in nodes) <= len(layers) + 2 * len(model.blocks) + 4
    )
    assert sum(node.op_type == "MatMul" for node in nodes) >= 2 * len(model.blocks), "attention"
    about = [entry for entry in onnx.load(path).metadata_props if entry.key == "tokengame"]
    assert json.loads(about[0].value)["int8"]


def test_with_all_tokens_a_graph_is_near_the_quantised_native_one(exported, model, images, tmp_path):
    _, path, _ = exported
    if path.suffix != ".onnx":
        pytest.skip("of ONNX")
    file = tmp_path / "native.onnx"
    torch.onnx.export(model, (images[:1],), file, dynamo=True, external_data=False, verbose=False)
    onnx_int8(file, file)
    native, pruned = onnxruntime.InferenceSession(file), onnxruntime.InferenceSession(path)
    for image in images[8:12]:
        batch = image[None].numpy()
        want = native.run(None, {native.get_inputs()[0].name: batch})[0]
        got = pruned.run(None, {"images": batch, "dial": np.zeros(1, np.float32)})[0]
        # the last block of a pruned model runs for the class token alone, whose range is another
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.15


def test_what_cannot_be_quantised_is_one_sentence(model, images, tmp_path):
    fast = tokengame.prune(model, gmacs_ratio=0.7)
    with pytest.raises(TokenGameError, match="has no quantiser here"):
        tokengame.export(fast, tmp_path / "a.pt2", images, int8=True)
    assert not list(tmp_path.iterdir())

    def wrong(batch, _dial):
        output = fast.predict(torch.from_numpy(batch))
        return [-output.logits.numpy(), torch.stack(output.kept, 1).numpy(), output.alive.numpy()]

    with pytest.raises(TokenGameError, match="in int8 the graph is only"):
        compare_int8(wrong, fast, images, 4)


def test_a_model_of_torchao_is_exported_to_torch(tmp_path):
    fast, small = tokengame.prune(torchao_int8(tiny_vit()), gmacs_ratio=0.7), torch.randn(2, 3, 32, 32)
    found = tokengame.export(fast, tmp_path / "pruned.pt2", small, batch_size=1)
    assert found["like_float32"] == 1, "the class of the same model in PyTorch"
    assert found["tokens_kept"] == found["tokens_kept_float32"]
