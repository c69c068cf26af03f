"""Other forms and engines of the native model: each gives its output, refusals are sentences, the fastest is found."""

import csv
import json
import os
import shutil
import sys
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import THREADS, tiny_vit
from PIL import Image

import tokengame
from tokengame.backbones import wrap
from tokengame.cli.common import show_rivals
from tokengame.cli.main import main
from tokengame.config import GameConfig
from tokengame.data.batches import Batch
from tokengame.errors import TokenGameError
from tokengame.measure import against
from tokengame.measure.against import RivalRun, Rivals, alike, check, fastest
from tokengame.measure.conditions import engines
from tokengame.measure.evaluate import evaluate
from tokengame.measure.in_turn import WARM_UP, interleave
from tokengame.measure.kinds import kind_of
from tokengame.measure.rivals import RIVALS, Native, Rival, _openvino, _session, max_autotune
from tokengame.measure.synthetic import synthetic_model
from tokengame.report.html import table, verdict

CPU = torch.device("cpu")
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
OTHERS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
COMPILE = {rival.name for rival in RIVALS if rival.compiles}
EAGER = ["eager, fused", "eager, unfused"]


def built(dtype=torch.float32, keep_what=None, depth=1):
    model = tiny_vit(depth=depth).to(dtype)
    rivals = Rivals(compiled=False)
    rivals.build(model, IMAGES.to(dtype), kind_of(wrap(model), keep_what))
    return model, rivals


@pytest.fixture(scope="module")
def in_float32():
    return built(depth=4)


@pytest.fixture
def few(monkeypatch):
    """Rivals that are built at once: the eager ones."""
    monkeypatch.setattr(against, "RIVALS", RIVALS[:2])


def outputs(rivals, images):
    return {name: call() for name, call in rivals.calls(images).items()}


@torch.inference_mode()
def test_each_gives_the_native_output_on_other_images(in_float32):
    model, rivals = in_float32
    assert set(rivals.refused) == COMPILE
    found, want = outputs(rivals, OTHERS), model(OTHERS)
    for name in (*EAGER, "ONNX Runtime", "OpenVINO"):
        assert rivals.ready[name].precision == "float32"
        torch.testing.assert_close(found[name], want, rtol=1e-3, atol=1e-4, msg=name)
    int8 = found["ONNX Runtime int8"]
    assert rivals.ready["ONNX Runtime int8"].precision == "int8"
    assert 1e-3 < float((int8 - want).abs().max()) < 0.3 * float(want.abs().max())


@torch.inference_mode()
def test_in_bfloat16_an_engine_computes_in_it_or_says_that_it_cannot():
    model, rivals = built(torch.bfloat16)
    assert rivals.refused["ONNX Runtime"] == "it has no bfloat16 kernels for a Vision Transformer on CPUs"
    found = outputs(rivals, OTHERS.bfloat16())
    exact = model.float()(OTHERS.bfloat16().float())
    off = {name: float((found[name].float() - exact).abs().max()) for name in found}
    if "OpenVINO" in rivals.refused:
        assert rivals.refused["OpenVINO"] == "it does not compute in bfloat16 on this processor"
    else:
        assert 0.1 * off["eager, fused"] < off["OpenVINO"] < 10 * off["eager, fused"], "not in float32"
    assert off["ONNX Runtime int8"] < 0.3 * float(exact.abs().max())


@torch.inference_mode()
def test_features_of_every_place_are_compared_too():
    model, rivals = built(keep_what="features")
    want = model.forward_features(OTHERS)
    for name, found in outputs(rivals, OTHERS).items():
        # ranges of OpenVINO's are those of another batch, and without VNNI its sums of int8 saturate
        if "int8" in name:
            assert float((found - want).norm() / want.norm()) < 0.2, name
        else:
            torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4, msg=name)
        assert rivals.likeness[name] == pytest.approx([1.0] * 4, abs=1e-2)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime", "openvino"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    _, rivals = built()
    sentence = f"{package} is not installed: pip install 'tokengame[engines]'"
    without = {"onnxruntime": ["ONNX Runtime", "ONNX Runtime int8"], "openvino": ["OpenVINO"]}
    for name in without.get(package, ["ONNX Runtime", "ONNX Runtime int8", "OpenVINO"]):
        assert rivals.refused[name] == sentence
    assert list(rivals.ready)[:2] == EAGER
    rows = {row["rival"]: row for row in rivals.rows(dict.fromkeys(rivals.ready, 1.0))}
    assert list(rows) == [rival.name for rival in RIVALS], "none is left out silently"


def test_what_cannot_run_or_is_wrong_is_a_sentence(monkeypatch):
    def broken(_native):
        raise RuntimeError("Unsupported op\nat line 3")

    wrong = {
        "broken": broken,
        "shifted": lambda native: native.in_torch(lambda images: native.fused(images) + 0.1),
        "narrow": lambda native: native.in_torch(lambda images: native.fused(images)[:, :2]),
        "nan": lambda native: native.in_torch(lambda images: native.fused(images) * float("nan")),
    }
    monkeypatch.setattr(against, "RIVALS", [Rival(name, build) for name, build in wrong.items()])
    _, rivals = built()
    assert not rivals.ready
    assert rivals.refused["broken"] == "it cannot run this model: Unsupported op"
    assert rivals.refused["shifted"].startswith("its output is not the native one: off by ")
    assert rivals.refused["narrow"] == "its output is [4, 2], and the native model's [4, 5]"
    assert rivals.refused["nan"].startswith("its output is not the native one")
    assert [row["milliseconds"] for row in rivals.rows({})] == [None] * 4


def test_how_far_an_output_may_be_off_depends_on_the_precision():
    want = torch.tensor([[4.0, -2.0]])
    check(want + 0.003, want, "float32")
    check(want + 0.3, want, "bfloat16")
    with pytest.raises(TokenGameError, match=r"off by 1\.3e-03 of the largest number"):
        check(want + 0.005, want, "float32")


PRECISIONS = {"a": "float32", "b": "float32", "quick": "int8", "half": "bfloat16"}


@pytest.mark.parametrize(("milliseconds", "best"), [
    ({"a": 3.0, "b": 2.0, "quick": 1.0, "half": 1.5}, "b"), ({"a": 2.0, "b": 3.0, "quick": 9.0, "half": 9.0}, "a"),
])  # fmt: skip
def test_the_fastest_is_of_the_same_precision(milliseconds, best):
    assert fastest(PRECISIONS, milliseconds, "float32") == best
    assert fastest(PRECISIONS, milliseconds, "bfloat16") == "half"
    assert fastest(PRECISIONS, milliseconds, "float16") is None


def test_rows_by_hand(in_float32):
    _, rivals = in_float32
    times = {"eager, fused": 4.0, "eager, unfused": 5.0, "ONNX Runtime": 8.0, "OpenVINO": 2.0, "ONNX Runtime int8": 1.0}
    rows = {row["rival"]: row for row in rivals.rows(times | {"OpenVINO int8": 1.0})}
    assert rows["OpenVINO"]["fastest"]
    assert sum(row["fastest"] for row in rows.values()) == 1, "int8 never counts as the same precision"
    assert rows["ONNX Runtime"]["images_per_second"] == 500
    assert rows["ONNX Runtime int8"]["precision"] == "int8"
    assert 0 <= rows["ONNX Runtime int8"]["agreement"] <= 1
    assert rows["compiled"]["refused"] == "--no-compiled leaves it out"


def test_how_alike_by_hand():
    native, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    assert alike("logits", native, other) == [1, 0]
    assert alike("embedding", native, other) == [1, 0]
    assert alike("features", torch.stack([native, native]), torch.stack([native, other])) == [1, 0.5]


class Fake:
    """Stands for an engine: keeps what it is given."""

    def __init__(self, can=("FP32",)):
        self.can, self.entries, self.intra_op_num_threads, self.inter_op_num_threads = can, {}, 0, 0

    def get_property(self, *_):
        return self.can

    def compile_model(self, _model, _device, settings):
        self.settings = settings
        return SimpleNamespace(create_infer_request=lambda: None)

    def add_session_config_entry(self, key, value):
        self.entries[key] = value


def test_engines_get_the_threads_of_pytorch(tmp_path):
    core, options = Fake(), Fake()
    _openvino(core, None, "float32")
    assert core.settings == {
        "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }  # fmt: skip
    with pytest.raises(TokenGameError, match="does not compute in bfloat16 on this processor"):
        _openvino(core, None, "bfloat16")
    session = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="x")])
    _session(
        SimpleNamespace(SessionOptions=lambda: options, InferenceSession=lambda *_, **__: session), tmp_path / "a.onnx"
    )
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (THREADS, 1)
    assert options.entries == {"session.force_spinning_stop": "1"}


def test_engines_refuse_a_model_that_is_not_on_a_cpu(tmp_path):
    native = Native(tiny_vit(), IMAGES.to("meta"), kind_of(wrap(tiny_vit())), tmp_path)
    with pytest.raises(TokenGameError, match="it is timed on CPUs alone, and the model is on meta"):
        assert native.onnx


def test_max_autotune_freezes_weights_while_it_compiles_and_no_longer(tmp_path, monkeypatch):
    from torch._inductor import config

    seen = []

    def compile(model, mode):
        return lambda images: seen.append((mode, config.freezing)) or model(images)

    monkeypatch.setattr(torch, "compile", compile)
    model = tiny_vit()
    ready = max_autotune(Native(model, IMAGES, kind_of(wrap(model)), tmp_path))
    ready.run(IMAGES)
    assert seen == [("max-autotune-no-cudagraphs", True), ("max-autotune-no-cudagraphs", False)]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@torch.inference_mode()
def test_frozen_weights_give_the_native_output(tmp_path):
    from torch._inductor import config

    model = tiny_vit(depth=1, embed_dim=16, num_heads=1)
    with config.patch(max_autotune_gemm_backends="ATEN"):  # compiles sooner
        ready = max_autotune(Native(model, IMAGES, kind_of(wrap(model)), tmp_path))
    torch.testing.assert_close(ready.run(OTHERS), model(OTHERS), rtol=1e-3, atol=1e-5)
    assert not config.freezing


def globals_of(model):
    from torch._inductor import config

    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return {
        "threads": torch.get_num_threads(), "gradients": torch.is_grad_enabled(), "filters": list(warnings.filters),
        "inductor": (config.freezing, config.max_autotune), "environment": dict(os.environ), "cores": affinity,
        "stdout": sys.stdout, "fused": [block.attn.fused_attn for block in model.blocks], "training": model.training,
        "precision": torch.get_float32_matmul_precision(), "files": sorted(Path(tempfile.gettempdir()).iterdir()),
    }, weights  # fmt: skip


@pytest.mark.usefixtures("in_float32")  # has imported all
def test_nothing_global_is_left_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tiny_vit(depth=1)
    before, weights = globals_of(model)
    Rivals(compiled=False).build(model, IMAGES, kind_of(wrap(model)))
    after, same = globals_of(model)
    assert before == after
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_calls_take_turns_in_random_order_with_as_many_each():
    called, shares = [], []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    times = interleave(calls, CPU, 0.001, shares.append)
    rounds = [called[i : i + 3] for i in range(0, len(called), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds[: WARM_UP + 5]}) > 2
    before_a = {one for one, other in pairwise(called) if other == "a"}
    assert before_a >= {"b", "c"}, "no call always follows the same one"
    assert {len(seconds) for seconds in times.values()} == {len(rounds) - WARM_UP}
    assert len(rounds) - WARM_UP >= 5
    assert shares[-1] == 1
    first, called[:] = called[: 3 * 7], []
    interleave(calls, CPU, 0.001)
    assert called[: 3 * 7] == first, "the same seed, the same orders"


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [Batch(torch.randn(n, 3, 32, 32, generator=generator), None, torch.arange(n)) for n in sizes]


@pytest.fixture
def fast():
    fast = synthetic_model(tiny_vit(), GameConfig(stages=(1, 2)), (0.6, 0.3))
    fast.actor.fit(fast, IMAGES)
    return fast


@pytest.mark.usefixtures("few")
def test_eval_times_rivals_on_whole_batches_alone(fast):
    fast.dial = 0.0
    run = RivalRun(4)
    scores = evaluate(fast, batches(3, 4, 4, 2), rivals=run)
    found = scores.summary() | run.summary()
    assert found["images"] == 13
    assert {name: len(seconds) for name, seconds in run.seconds.items()} == dict.fromkeys(
        ("native", "pruned", "unpruned", *EAGER), 2
    )
    assert found["speedup_over"] in EAGER
    quickest = min(row["milliseconds"] for row in found["rivals"])
    assert found["images_per_second_native"] == pytest.approx(4e3 / quickest)
    assert found["speedup"] == pytest.approx(found["images_per_second_pruned"] / found["images_per_second_native"])
    assert found["speedup"] == pytest.approx(found["own_kernels_speedup"] * found["speedup_over_own_kernels"])
    assert [row["agreement"] for row in found["rivals"]] == [1.0, 1.0]
    assert f"native ({found['speedup_over']})" in verdict(found) or "slower" in verdict(found)
    assert ("over the fastest native form of the same precision", found["speedup_over"]) in table(found)


@pytest.mark.usefixtures("few")
def test_without_a_whole_batch_each_rival_says_so(fast):
    fast.dial = 0.0
    run = RivalRun(8)
    scores = evaluate(fast, batches(3, 4), rivals=run)
    found = scores.summary() | run.summary()
    assert [row["refused"] for row in found["rivals"]] == ["no batch of 8 images was measured"] * 2
    assert found["speedup_over"] is None
    assert found["speedup"] > 0, "over the native model as before"


@pytest.mark.usefixtures("few")
def test_evaluate_of_python_times_them_too():
    found = tokengame.evaluate(tokengame.prune(tiny_vit()), torch.cat([IMAGES, OTHERS]), rivals=True, progress=False)
    assert [row["rival"] for row in found["rivals"]] == EAGER
    assert (found["onnxruntime"], found["openvino"]) == tuple(engines().values())
    assert all(found[package] for package in engines())


def test_bench_times_them_and_its_speed_up_is_over_the_fastest(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tokengame.backbones.load.untrained", lambda *_: tiny_vit(img_size=64))
    run = ["bench", "--backbone", "deit_tiny_patch16_224", "--batch-sizes", "2", "--dtypes", "float32", "--json"]
    run += ["--seconds", "0.1", "--keep", "0.5", "0.25", "--no-compiled", "--rivals", "--output", str(tmp_path)]
    assert main(run) == 0
    shown = capsys.readouterr()
    (row,) = json.loads(shown.out)
    rivals = {rival["rival"]: rival for rival in row["rivals"]}
    assert list(rivals) == [rival.name for rival in RIVALS]
    same = {name: rival["milliseconds"] for name, rival in rivals.items() if rival["precision"] == "float32"}
    assert set(same) == {*EAGER, "ONNX Runtime", "OpenVINO"}
    assert row["speedup_over"] == row["native"] == min(same, key=same.get)
    assert rivals[row["native"]]["fastest"]
    assert row["milliseconds"][f"native {row['native']}"] == min(same.values())
    assert row["speedup"] == pytest.approx(min(same.values()) / row["milliseconds"]["pruned eager"])
    assert row["speedup"] == pytest.approx(row["own_kernels_speedup"] * row["speedup_over_unpruned"])
    assert "int8 ONNX Runtime int8" in row["milliseconds"]
    assert row["openvino"] == engines()["openvino"]
    assert "not timed: compiled (float32, batch 2): --no-compiled leaves it out" in shown.err
    (path,) = tmp_path.glob("*_rivals_*.csv")
    (written,) = csv.DictReader(path.read_text().splitlines())
    assert json.loads(written["rivals"]) == row["rivals"]


@pytest.mark.usefixtures("few")
def test_eval_of_the_command_line_times_them(tmp_path, capsys):
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (160, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    run = ["eval", "--backbone", "fashion", "--images", str(tmp_path), "--policy", "rule", "--rivals", "--json"]
    assert main([*run, "--batch-size", "2"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [row["rival"] for row in found["rivals"]] == EAGER
    assert "building eager, fused" in shown.err
    assert found["onnxruntime"] == engines()["onnxruntime"]


def test_a_table_in_which_none_ran_is_sentences(capsys):
    show_rivals([{"rival": "OpenVINO", "precision": None, "fastest": False, "refused": "it is not here"}])
    assert "not timed: OpenVINO: it is not here" in capsys.readouterr().err


def test_versions_of_engines_that_are_not_there_are_none(monkeypatch):
    monkeypatch.setattr("tokengame.measure.conditions.ENGINES", ("a-package-that-is-not-there",))
    assert engines() == {"a-package-that-is-not-there": None}
