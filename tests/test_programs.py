"""The faster model where real programs put models: casts, copies, workers, threads, the compiler."""

import copy
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import tiny_vit
from torch._dynamo.utils import counters

import tokengame
from tokengame.config import ActorConfig, GameConfig
from tokengame.measure.profile import PARTS, peak_memory, time_shares
from tokengame.measure.synthetic import synthetic_model
from tokengame.packed.attention import _cheapest, fastest_attention, looped_attention, measured_cost, unfused_attention
from tokengame.policies import Policy
from tokengame.policies.networks import build_actor

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def fast_model(transition="drop", dial=0.5, seed=0, **changes):
    """A model under a random policy whose decisions differ from token to token."""
    model = tiny_vit(seed, **changes)
    torch.manual_seed(seed)
    shape = {"dim": 32, "heads": 2, "agents": 16, "stages": 2, "transition": transition}
    actor = build_actor(ActorConfig("context", (16,)), shape)
    torch.nn.init.normal_(actor.weight.data[:, :3])  # on attention; the other features hardly differ in so few tokens
    card = {"game": {"stages": (1, 2), "transition": transition}, "actor": {"observation": "context"}, "dial": dial}
    policy = Policy(actor.eval(), card)
    return tokengame.runtime.PrunedViT(model, policy, dial)


@pytest.fixture(params=["drop", "merge"])
def fast(request):
    return fast_model(request.param)


def kept(fast, images):
    return [k.tolist() for k in fast.predict(images).kept]


def test_inference_mode_gives_the_same(fast):
    with torch.no_grad():
        expected = fast(IMAGES)
    with torch.inference_mode():
        assert torch.equal(fast(IMAGES), expected)
        assert len(set(kept(fast, IMAGES)[0])) > 1, "images keep different numbers of tokens"


@torch.inference_mode()
def test_autocast(fast):
    expected, plain = kept(fast, IMAGES), fast(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        found = fast(IMAGES)
        native = fast.model(IMAGES)
    assert found.dtype == native.dtype
    assert float((found.float() - plain).norm() / plain.norm()) < 0.1, expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.inference_mode()
def test_casts(dtype):
    for transition in ("drop", "merge"):
        fast = fast_model(transition, dial=0.0).to(dtype)
        found, native = fast(IMAGES.to(dtype)), fast.model(IMAGES.to(dtype))
        assert found.dtype == native.dtype == dtype
        tolerance = 1e-10 if dtype == torch.float64 else 0.03
        assert float((found - native).norm() / native.norm()) < tolerance
        fast.dial = 0.5
        assert fast(IMAGES.to(dtype)).isfinite().all()
        assert min(kept(fast, IMAGES.to(dtype))[0]) < 16


@torch.inference_mode()
def test_state_dict_moves_weights_and_policy(fast):
    other = fast_model("merge" if fast.game.merge else "drop", seed=1)
    assert not torch.equal(other(IMAGES), fast(IMAGES))
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(IMAGES), fast(IMAGES))


@torch.inference_mode()
def test_copies_are_independent(fast):
    expected, twin = fast(IMAGES), copy.deepcopy(fast)
    twin.dial = 0.0
    twin.model.head.weight.zero_()
    assert torch.equal(fast(IMAGES), expected)
    assert fast.dial == 0.5
    twin.dial, twin.model = 0.5, fast.model
    twin.game.backbone.model = fast.model
    assert torch.equal(twin(IMAGES), expected)


class Predictions(torch.utils.data.Dataset):
    """What a worker process makes of an image."""

    def __init__(self, fast):
        self.fast = fast

    def __len__(self):
        return len(IMAGES)

    @torch.inference_mode()
    def __getitem__(self, index):
        return self.fast(IMAGES[index : index + 1])[0].clone()


@torch.inference_mode()
def test_workers_get_a_working_pickle(fast):
    if fast.game.merge:
        pytest.skip("a worker takes seconds to start; one game shows it")
    loader = torch.utils.data.DataLoader(Predictions(fast), 4, num_workers=1, multiprocessing_context="spawn")
    (found,) = loader
    torch.testing.assert_close(found, torch.cat([fast(image[None]) for image in IMAGES]), atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def test_two_threads_get_right_answers(fast):
    """From the very first call, when nothing is measured or cached yet."""
    batches = [torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 3, 4, 5, 6)]
    expected = [copy.deepcopy(fast)(batch) for batch in batches]
    measured_cost.cache_clear()
    _cheapest.cache_clear()

    def call(index):
        with torch.inference_mode():
            return fast(batches[index % 6])

    with ThreadPoolExecutor(2) as pool:
        for index, found in enumerate(pool.map(call, range(60))):
            assert torch.allclose(found, expected[index % 6], atol=1e-5)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("transition", ["drop", "merge"])
@torch.inference_mode()
def test_compiled_equals_eager_and_settles(transition, monkeypatch):
    """200 batches of other counts, some looked at twice: a graph for each stretch and attention kernel, then none."""
    kernels = looped_attention, unfused_attention  # by turns, not as this machine happens to measure them
    monkeypatch.setattr(tokengame.compiled, "by_cost", lambda layout, _: kernels[layout.rows % 2])
    fast = fast_model(transition)
    fast.game.config = replace(fast.game.config, cascade_margin=0.2)
    torch.compiler.reset()
    counters.clear()
    compiled, seen, doubts = torch.compile(fast), set(), 0
    generator = torch.Generator().manual_seed(5)
    for batch in range(200):
        fast.dial = 0.3 + 0.4 * float(torch.rand((), generator=generator))
        images = torch.randn(1 + batch % 2, 3, 32, 32, generator=generator)
        torch.testing.assert_close(compiled(images), fast(images), atol=1e-5, rtol=1e-4)
        seen.add(tuple(map(tuple, kept(fast, images))))
        doubts += len(fast.predict(images).again)
        if batch == 99:
            half_way = counters["stats"]["unique_graphs"]
    assert len(seen) > 50, "counts change from batch to batch"
    assert 20 < doubts < 280
    stretches = 3
    assert 0 < counters["stats"]["unique_graphs"] <= len(kernels) * stretches
    assert counters["stats"]["unique_graphs"] == half_way, "it goes on compiling"
    twin = copy.deepcopy(fast)
    torch.testing.assert_close(twin(images), fast(images))


@torch.inference_mode()
def test_no_image_gives_no_prediction(fast):
    assert fast(IMAGES[:0]).shape == fast.model(IMAGES[:0]).shape == (0, 5)


def test_time_shares_are_shares():
    fast = synthetic_model(tiny_vit(), GameConfig(stages=(1, 2)), (0.6, 0.3))
    with torch.inference_mode():
        fast.actor.force(fast, IMAGES)
        found = time_shares(fast, IMAGES)
    assert fast.game.attention is fastest_attention, "the stopwatch is gone"
    assert not {"observe", "remove", "logits"} & set(vars(fast.game))
    assert not {"run", "embed", "read_heads"} & set(vars(fast.game.backbone))
    assert "forward" not in vars(fast.actor)
    assert set(found) == set(PARTS)
    assert min(found.values()) > 0
    assert sum(found.values()) == pytest.approx(1)


def test_peak_memory_of_known_allocations():
    def call():
        first = torch.ones(1 << 20)  # 4 MiB
        second = first + 1
        del first
        return second + torch.ones(1 << 18)[0]  # 1 MiB and, at the same time, 4 of the sum

    assert peak_memory(call, torch.device("cpu")) == pytest.approx(9, abs=0.1)
