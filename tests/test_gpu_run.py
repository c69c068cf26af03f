"""Rows filled up to buckets against the packed game, capture on a recorder of launches, and runs/gpu.sh on a CPU."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import layout_of, policy_for, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokengame.config import GameConfig
from tokengame.errors import TokenGameError
from tokengame.game.testing import Scripted
from tokengame.packed import attention
from tokengame.packed.buckets import BucketLayout, bucket
from tokengame.runtime import cuda_graphs, prune, prune_by
from tokengame.runtime.cuda_graphs import CudaGraphs

ROOT = Path(__file__).parents[1]
MODELS = {
    "class token": tiny_vit(),
    "registers, another size": tiny_vit(img_size=(24, 40), reg_tokens=2),
    "mean of patches": tiny_vit(global_pool="avg"),
}
TRANSITIONS = ["drop", "merge"]
POLICIES = {transition: policy_for(tiny_vit(), transition) for transition in TRANSITIONS}


def images_for(model, batch, seed=0):
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(seed))


def scripted(model, transition, batch, stages=(1, 2), lean=0.0, seed=0):
    """A model whose decisions are given: from image to image other counts, one token and all tokens among them."""
    agents, generator = model.patch_embed.num_patches, torch.Generator().manual_seed(seed)
    table = torch.randn(len(stages), batch, agents, generator=generator) + lean
    table += torch.linspace(-2, 2, batch)[:, None]
    return prune_by(model, GameConfig(stages=stages, transition=transition), Scripted(table))


@contextmanager
def small_buckets():
    """Several buckets among sixteen tokens."""
    with patch.object(cuda_graphs, "ROWS", 3), patch.object(cuda_graphs, "LONGEST", 2):
        yield


def assert_same(found, exact, tolerance=1e-5):
    assert torch.equal(torch.stack(found.kept), torch.stack(exact.kept))
    assert torch.equal(found.alive, exact.alive)
    assert float((found.logits - exact.logits).norm() / exact.logits.norm()) < tolerance


# Layouts


@pytest.mark.parametrize(
    ("number", "step", "most", "wanted"),
    [(1, 16, 196, 16), (16, 16, 196, 16), (17, 16, 196, 32), (193, 16, 196, 196), (196, 16, 196, 196), (5, 16, 9, 9)],
)
def test_numbers_are_rounded_up_to_buckets(number, step, most, wanted):
    assert bucket(number, step, most) == wanted


@given(
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=6), spare=st.integers(0, 5), longer=st.integers(0, 3),
    prefix=st.integers(1, 2),
)  # fmt: skip
def test_a_bucket_layout_is_the_ragged_one_with_padding_behind(counts, spare, longer, prefix):
    exact = layout_of(counts)
    layout = BucketLayout(torch.tensor(counts), exact.rows + spare, exact.longest + longer)
    rows = torch.randn(layout.rows, 2)
    own = rows[: exact.rows]
    assert torch.equal(layout.start, exact.start)
    assert torch.equal(layout.first(rows), exact.first(own))
    assert torch.equal(layout.image[: exact.rows], exact.image)
    assert layout.filled.tolist() == [True] * exact.rows + [False] * spare
    assert layout.cu_seqlens.tolist() == exact.cu_seqlens.tolist()
    padded = layout.pad(rows, -1.0)
    assert torch.equal(padded[:, : exact.longest], exact.pad(own, -1.0))
    assert bool((padded[:, exact.longest :] == -1).all())
    assert torch.equal(layout.unpad(padded)[: exact.rows], own)
    behind = layout.behind(prefix)
    assert torch.equal(behind[: exact.rows], exact.behind(prefix))
    with_prefix = layout.rows + prefix * len(counts)
    assert (
        sorted({*range(with_prefix)} - {*behind.tolist()})
        == layout_of([c + prefix for c in counts]).first_rows(prefix).tolist()
    ), "every row but the prefix tokens is an agent's or padding"


# The game


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(MODELS)),
    transition=st.sampled_from(TRANSITIONS),
    stages=st.sets(st.integers(0, 3), min_size=1).map(sorted).map(tuple),
    batch=st.integers(1, 5),
    lean=st.floats(-2, 2),
    seed=st.integers(0, 999),
)
def test_rows_filled_up_to_buckets_equal_the_packed_game(name, transition, stages, batch, lean, seed):
    model = MODELS[name]
    fast, images = scripted(model, transition, batch, stages, lean, seed), images_for(model, batch, seed)
    with small_buckets():
        assert_same(CudaGraphs(fast).predict(images), fast.predict(images))


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("dial", [0.0, 0.4, 0.6, 1.0])
def test_policies_decide_the_same(transition, dial):
    fast = prune(tiny_vit(), POLICIES[transition], dial)
    images = images_for(fast.model, 5)
    with small_buckets():
        assert_same(CudaGraphs(fast).predict(images), fast.predict(images))


def test_the_starting_rule_decides_the_same():
    model = tiny_vit(depth=6)
    fast = prune(model, gmacs_ratio=0.6)
    images = images_for(model, 3)
    assert_same(CudaGraphs(fast).predict(images), fast.predict(images))
    assert CudaGraphs(fast)(images[:0]).shape == (0, 5)


def slow_varlen(query, key, value, of_queries, of_keys, max_q, max_k, *, scale):
    """PyTorch's `varlen_attn`, by loops; what is in no sequence stays undefined."""
    out = torch.full_like(query, float("nan"))
    bounds = [of_queries.tolist(), of_queries[1:].tolist(), of_keys.tolist(), of_keys[1:].tolist()]
    for first, last, start, stop in zip(*bounds, strict=False):
        assert last - first <= max_q
        assert stop - start <= max_k
        scores = torch.einsum("qhd,khd->hqk", query[first:last].float(), key[start:stop].float()) * scale
        out[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(2), value[start:stop].float()).to(out.dtype)
    return out


def attend_as_on_a_gpu(qkv, layout, bias):
    return attention.by_rule(layout, attention.Shape.of(qkv))(qkv, layout, bias)


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_padding_is_harmless_where_attention_leaves_it_undefined(transition, name):
    """Variable-length attention of half precision on GPUs writes no rows that belong to no image."""
    model = copy.deepcopy(MODELS[name]).bfloat16()
    fast, images = scripted(model, transition, 4), images_for(model, 4).bfloat16()
    exact = fast.predict(images)
    with (
        small_buckets(),
        patch.object(varlen, "varlen_attn", slow_varlen),
        patch.object(attention, "has_varlen", lambda *_: True),
        patch.object(cuda_graphs, "attend", attend_as_on_a_gpu),
    ):
        assert_same(CudaGraphs(fast).predict(images), exact, 0.1)


# Capture


class NothingFromTheHost(TorchDispatchMode):
    """Every operation works on the GPU alone: none copies from or to the host."""

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
        assert devices <= {"cuda"}, f"{function} uses {devices}"
        return out


def on_fake_gpu(module, dtype):
    """Replace the parameters and buffers of a module by tensors on a GPU that there need not be."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=dtype, device="cuda")
                part._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        for name, buffer in part._buffers.items():
            part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")


@pytest.mark.parametrize("policy", ["rule", "drop", "merge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stretch_needs_nothing_of_the_host(policy, dtype):
    """Capture fails at copies from the host and at numbers read by it; PyTorch's fake tensors raise at the latter."""
    model = tiny_vit()
    fast = prune(model, gmacs_ratio=0.6) if policy == "rule" else prune(model, POLICIES[policy])
    graphs = CudaGraphs(fast)
    with FakeTensorMode(), patch.object(attention, "has_varlen", lambda *_: True), torch.no_grad():
        on_fake_gpu(model, dtype)
        on_fake_gpu(fast.actor, torch.float32)
        buffers = graphs._allocated(torch.empty(4, 3, 32, 32, dtype=dtype, device="cuda"))
        stages = len(fast.game.stages)
        with NothingFromTheHost():
            for stage, rows, longest in zip(range(stages + 1), (64, 48, 32, 16), (16, 12, 8, 4), strict=False):
                out = graphs._stretch(buffers, stage, rows, longest)
        assert [tuple(tensor.shape) for tensor in out] == [(4, 5), (4, 16)]


class Recording(TorchDispatchMode):
    """A CUDA graph without a GPU: operations are recorded, and repeated on the very same memory."""

    def __init__(self):
        super().__init__()
        self.launches = []

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.launches.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, out in self.launches:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def contents(graphs):
    return [tensor.clone() for buffers in graphs._buffers.values() for tensor in vars(buffers).values()]


def refill(graphs, old):
    tensors = [tensor for buffers in graphs._buffers.values() for tensor in vars(buffers).values()]
    for tensor, values in zip(tensors, old, strict=True):
        tensor.copy_(values)


@pytest.fixture
def captured(monkeypatch):
    """Makes `CudaGraphs` that capture on a recorder.

    A recorder computes while it records, and a GPU does not. So launches are recorded on what they were given the first
    time, and then buffers are as they were before.
    """
    made, given = [], []

    def stretch(self, *which, native=CudaGraphs._stretch):
        given[:] = contents(self)
        return native(self, *which)

    @contextmanager
    def capture(graph, pool):
        assert pool == "pool"
        first, after = list(given), contents(made[-1])
        refill(made[-1], first)
        monkeypatch.setattr(CudaGraphs, "_stretch", stretch.__kwdefaults__["native"])
        with graph:
            yield
        monkeypatch.setattr(CudaGraphs, "_stretch", stretch)
        refill(made[-1], after)

    def make(fast):
        made.append(CudaGraphs(fast, capture=True))
        return made[-1]

    monkeypatch.setattr(CudaGraphs, "_stretch", stretch)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    return make


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_replayed_launches_play_other_images(transition, captured):
    """Other images, weights and counts in the same buckets; results of earlier calls stay as they were."""
    fast = prune(tiny_vit(), POLICIES[transition])
    with small_buckets():
        graphs, outputs = captured(fast), []
        for seed in range(8):
            images = images_for(fast.model, 4, seed % 4)
            outputs.append((graphs.predict(images), fast.predict(images)))
        for found, exact in outputs:
            assert_same(found, exact)
        known = len(graphs._graphs)
        assert known < 4 * (len(fast.game.stages) + 1), "some stretches were replayed with other images"
        fast.model.blocks[2].mlp.fc1.weight.data.mul_(1.5)  # values of weights may change
        assert_same(graphs.predict(images), fast.predict(images))
        assert len(graphs._graphs) >= known


def half_of_all(fast):
    fast.half().float()


def other_dial(fast):
    fast.dial = 0.8


def other_head(fast):
    fast.model.head = torch.nn.Linear(32, 5)


def other_memory(fast):
    fast.model.blocks[0].mlp.fc1.weight.data = torch.randn(128, 32)


def other_policy(fast):
    fast.actor = copy.deepcopy(fast.actor)
    fast.actor.weight.data.neg_()


@pytest.mark.parametrize("seen", [False, True], ids=["", "seen by the pruned model first"])
@pytest.mark.parametrize("change", [half_of_all, other_dial, other_head, other_memory, other_policy])
def test_changes_are_followed(change, seen, captured):
    fast, images = prune(tiny_vit(), POLICIES["merge"]), images_for(tiny_vit(), 4)
    graphs = captured(fast)
    graphs(images)
    change(fast)
    if seen:
        fast(images)
    assert_same(graphs.predict(images), fast.predict(images))
    assert_same(graphs.predict(images), fast.predict(images))


def test_calls_in_and_out_of_inference_mode_mix():
    fast, images = prune(tiny_vit(), POLICIES["merge"]), images_for(tiny_vit(), 4)
    graphs = CudaGraphs(fast)
    with torch.inference_mode():
        graphs(images.clone())
    assert not graphs(images).is_inference()


@pytest.mark.parametrize(
    ("fast", "words"),
    [
        (lambda: prune(tiny_vit(global_pool="avg", class_token=False), gmacs_ratio=0.7), "no class token"),
        (lambda: prune(tiny_vit(), gmacs_ratio=0.7).train(), "in training mode"),
        (lambda: prune_by(tiny_vit(), GameConfig(cascade_margin=0.1), lambda obs: obs.attention), "fall back"),
    ],
)
def test_what_cannot_be_captured_is_refused(fast, words):
    with pytest.raises(TokenGameError, match=words):
        CudaGraphs(fast())


def test_compiled_rows_equal_the_packed_game():
    """One compilation for all blocks, whatever the number of rows."""
    model = tiny_vit(init_values=0.5)
    fast = scripted(model, "merge", 4)
    counters.clear()
    with small_buckets(), patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        graphs = CudaGraphs(fast, compiled=True)
        assert_same(graphs.predict(images_for(model, 4)), fast.predict(images_for(model, 4)), 1e-4)
    assert counters["stats"]["unique_graphs"] <= 4, "not two for each of four blocks"


# The script


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "runs" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu"]


def fail():
    raise RuntimeError("out of memory\nand so on")


def test_a_failing_row_is_a_sentence_and_the_next_one_runs(gpu, tmp_path):
    rows = gpu.Rows(tmp_path, {"torch": "2"})
    assert rows.attempt(fail, 5.0, kind="speed", model="a") is None
    assert rows.attempt(lambda: time.sleep(5), 0.05, kind="speed", model="b") is None
    assert rows.attempt(lambda: 3, 5.0, kind="speed", model="c") == 3
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["torch"] == "2"
    assert [row["failed"] for row in written["rows"]] == [
        "RuntimeError: out of memory", "TimeoutError: stopped after 0 seconds",
    ]  # fmt: skip


def test_a_variant_that_fails_leaves_the_others(gpu, tmp_path, monkeypatch):
    makers = gpu.native_variants
    monkeypatch.setattr(gpu, "native_variants", lambda *args: {"native compiled": fail} | makers(*args))
    rows, device = gpu.Rows(tmp_path, {}), torch.device("cpu")
    with torch.no_grad():
        gpu.speed(rows, gpu.SHAPES["tiny"][1], device, time.perf_counter() + 60, 0.05)
    failed = [row["variant"] for row in rows.rows if "failed" in row]
    timed = [row["variant"] for row in rows.rows if "milliseconds" in row]
    assert failed == ["native compiled"]
    assert timed == ["native", "pruned merge eager", "pruned merge captured"]


def test_speed_is_reported_over_the_best_native_forms(gpu, tmp_path):
    rows = gpu.Rows(tmp_path, {})
    median = {
        "native": 4e-3, "native compiled": 3e-3, "native captured": 2e-3, "native compiled captured": 1e-3,
        "pruned merge captured": 2e-3,
    }  # fmt: skip
    about = {"kind": "speed", "model": gpu.BASE, "batch": 32}
    gpu.report(rows, median, about, {"merge": 0.62}, dict.fromkeys(median, 0.0))
    last, aim = rows.rows[-2:]
    assert (last["over_eager"], last["over_compiled"], last["over_captured"]) == (2.0, 1.5, 0.5)
    assert last["gmacs_ratio"] == 0.62
    assert last["images_per_second"] == pytest.approx(16_000)
    assert aim["reached"]
    assert aim["wanted"] == 1.2


BLOCKER = """
import sys
class Missing:
    def find_spec(name, *rest):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing)
"""
OPTIONAL = (
    "tyro", "rich", "braceexpand", "scipy", "matplotlib", "jinja2", "tensorboard", "accelerate", "transformers",
    "open_clip", "datasets",
)  # fmt: skip


def test_the_script_runs_without_packages_beside_timm(tmp_path):
    """From any folder, on a CPU, with small models and without compiled kernels."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(names=set(OPTIONAL)))
    environment = os.environ | {
        "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "OUT": str(tmp_path / "out"), "TOKENGAME_KERNELS": "0",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = ["bash", str(ROOT / "runs" / "gpu.sh"), "--device", "cpu", "--models", "tiny", "--seconds", "0.05"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert not [row for row in found["rows"] if "failed" in row]
    assert {row["kind"] for row in found["rows"]} == {"equality", "speed", "profile"}
    assert all(row["passed"] for row in found["rows"] if row["kind"] == "equality")
    assert found["processor"]
    assert len((tmp_path / "out" / "gpu.txt").read_text().splitlines()) == len(found["rows"])
    profiles = [row["file"] for row in found["rows"] if row["kind"] == "profile"]
    assert all("Self CPU" in (tmp_path / "out" / name).read_text() for name in profiles)


def test_without_a_gpu_it_says_so(gpu, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_what_is_not_reached_is_a_row(gpu, tmp_path):
    gpu.main(["--output", str(tmp_path), "--device", "cpu", "--models", "tiny", "--minutes", "0"])
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert all("failed" in row for row in rows)
    assert [row["failed"] for row in rows if row["kind"] == "speed"] == ["not begun: the time was over"] * 2
