"""The pruned model in real programs: conversions, modes, gradients, copies, workers, threads, the compiler."""

import copy
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import policy_for, tiny_vit
from torch._dynamo.utils import counters

from tokengame.backends import TorchBackend
from tokengame.config import ActorConfig, GameConfig
from tokengame.measure.profile import PARTS, peak_memory, time_shares
from tokengame.measure.synthetic import synthetic_model
from tokengame.packed.attention import _cheapest, fastest_attention, looped_attention, measured_cost, unfused_attention
from tokengame.policies import Policy
from tokengame.policies.networks import build_actor
from tokengame.runtime import PrunedViT, prune, torch_compile

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def fast_model(transition="drop", dial=0.5, seed=0, margin=0.0):
    """A model under a random policy whose decisions differ from token to token."""
    model = tiny_vit(seed)
    torch.manual_seed(seed)
    shape = {"dim": 32, "heads": 2, "agents": 16, "stages": 2, "transition": transition}
    actor = build_actor(ActorConfig("context", (16,)), shape)
    torch.nn.init.normal_(actor.weight.data[:, :3])  # on attention; the other features hardly differ in so few tokens
    game = {"stages": (1, 2), "transition": transition, "cascade_margin": margin}
    card = {"game": game, "actor": {"observation": "context"}, "dial": dial}
    return PrunedViT(model, Policy(actor.eval(), card), dial)


@pytest.fixture(params=["drop", "merge"])
def fast(request):
    return fast_model(request.param)


def kept(fast, images):
    return [k.tolist() for k in fast.predict(images).kept]


def snapshot(model):
    """Mode of each module; memory, number format, gradient flag and values of each parameter and buffer."""
    modes = {name: module.training for name, module in model.named_modules()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    facts = {name: (id(t), t.data_ptr(), t.dtype, t.requires_grad) for name, t in tensors}
    return modes, facts, {name: t.detach().clone() for name, t in tensors}


def assert_unchanged(model, before):
    modes, facts, values = snapshot(model)
    assert modes == before[0]
    assert facts == before[1]
    assert all(torch.equal(values[name], value) for name, value in before[2].items())


def other_weights(fast):
    """A state dict of other numbers."""
    return {name: tensor + 1 for name, tensor in fast.state_dict().items()}


CHANGES = {
    "half": lambda fast: fast.half(),
    "float64": lambda fast: fast.to(torch.float64),
    "float64 and back": lambda fast: fast.double().float(),
    "train": lambda fast: fast.train(),
    "train, then half": lambda fast: fast.train().half(),
    "half, then train": lambda fast: fast.half().train(),
    "no gradients": lambda fast: fast.requires_grad_(False),
    "state dict": lambda fast: fast.load_state_dict(other_weights(fast)),
    "assigned state dict": lambda fast: fast.load_state_dict(other_weights(fast), assign=True),
    "train, then state dict": lambda fast: fast.train().load_state_dict(other_weights(fast)),
    "converted copy": lambda fast: copy.deepcopy(fast).half(),
    "copy in training mode": lambda fast: copy.deepcopy(fast).train().requires_grad_(False),
    "copy with other weights": lambda fast: [p.data.zero_() for p in copy.deepcopy(fast).parameters()],
}


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_pruned_model_leave_the_wrapped_one_and_the_policy_alone(change, used):
    model = tiny_vit(proj_drop_rate=0.5)
    model.blocks[1].requires_grad_(False)
    policy = policy_for(model)
    before, native = [snapshot(part) for part in (model, policy.actor)], model(IMAGES)
    fast = prune(model, policy, 0.5)
    if used:
        fast(IMAGES)
    CHANGES[change](fast)
    fast(IMAGES.to(next(fast.model.parameters()).dtype))
    assert fast.restore() is model
    for part, its in zip((model, policy.actor), before, strict=True):
        assert_unchanged(part, its)
    assert torch.equal(model(IMAGES), native)


def test_a_changed_pruned_model_predicts_with_its_own_weights():
    model = tiny_vit()
    fast = prune(model, policy_for(model), dial=0.0)
    changed = {name: tensor * 0.7 for name, tensor in model.state_dict().items()}
    fast.load_state_dict(fast.state_dict() | {f"model.{name}": tensor for name, tensor in changed.items()})
    native, other = model(IMAGES), copy.deepcopy(model)
    other.load_state_dict(changed)
    torch.testing.assert_close(fast(IMAGES), other(IMAGES), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(fast(IMAGES), native, atol=1e-2)


def same_memory(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return [p.data_ptr() == q.data_ptr() for p, q in pairs]


def test_weights_share_memory_until_they_are_converted():
    model = tiny_vit()
    fast = prune(model, policy_for(model), 0.5)
    assert all(same_memory(fast.model, model))
    assert all(same_memory(fast.train().model, model))
    assert all(same_memory(fast.requires_grad_(False).model, model))
    assert all(same_memory(fast.eval().to(torch.float32).model, model)), "nothing to convert"
    assert not any(same_memory(fast.half().model, model))


def test_restore_gives_back_the_model_with_all_of_its_modes():
    model = tiny_vit(proj_drop_rate=0.5)
    model.train()
    model.patch_embed.eval()
    model.blocks[0].eval()
    model.blocks[2].mlp.eval()
    before = snapshot(model)
    fast = prune(model, policy_for(model), dial=0.0)
    assert not any(module.training for module in fast.modules()), "a pruned model starts in evaluation mode"
    found, native = fast(IMAGES), copy.deepcopy(model).eval()(IMAGES)
    torch.testing.assert_close(found, native, atol=1e-5, rtol=1e-4)
    assert fast.restore() is model
    fast.train().eval().half()
    assert fast.restore() is model
    assert_unchanged(model, before)


def used_weights(model, logits):
    """Names of the weights that a gradient of `logits` reaches."""
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(logits.square().sum(), list(named.values()), allow_unused=True)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None and gradient.any()}


def test_gradients_are_recorded_in_training_mode_or_on_request(fast):
    model, every = fast.restore(), {name for name, _ in fast.model.named_parameters()}
    assert model(IMAGES).requires_grad, "the caller records gradients"
    assert not fast(IMAGES).requires_grad
    assert not fast.predict(IMAGES).logits.requires_grad
    assert not fast.forward_features(IMAGES).requires_grad
    assert not any(
        features.requires_grad for features in fast.forward_intermediates(IMAGES, 2, intermediates_only=True)
    )
    assert min(kept(fast, IMAGES)[-1]) < 16
    requested = fast.predict(IMAGES, gradients=True).logits
    assert used_weights(fast.model, requested) == every
    torch.testing.assert_close(requested.detach(), fast(IMAGES), atol=1e-5, rtol=1e-4)
    trained = fast.train()(IMAGES)
    assert used_weights(fast.model, trained) == every
    torch.testing.assert_close(trained, requested)
    assert fast.forward_features(IMAGES).requires_grad
    assert not fast.predict(IMAGES, gradients=False).logits.requires_grad
    with torch.no_grad():
        assert not fast(IMAGES).requires_grad
        assert not fast.predict(IMAGES, gradients=True).logits.requires_grad
    fast(IMAGES).sum().backward()
    assert all(p.grad is not None for p in fast.model.parameters())
    assert all(p.grad is None for p in model.parameters()), "gradients are those of the pruned model"
    assert not fast.eval()(IMAGES).requires_grad


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
    expected, other = fast(IMAGES), copy.deepcopy(fast)
    other.dial = 0.0
    other.model.head.weight.zero_()
    assert torch.equal(fast(IMAGES), expected)
    assert fast.dial == 0.5
    other.dial, other.model = 0.5, fast.model
    other.game.backbone.model = fast.model
    assert torch.equal(other(IMAGES), expected)


class Predictions(torch.utils.data.Dataset):
    """Predictions that a worker process makes."""

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
    """From the very first call, before anything is measured or cached."""
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
def test_compiled_equals_eager_and_stops_compiling(transition, monkeypatch):
    """200 batches of other counts, some falling back: one graph for each stretch and attention kernel, then no more."""
    kernels = looped_attention, unfused_attention  # by number of rows, not as this machine happens to measure them
    monkeypatch.setattr(torch_compile, "by_cost", lambda layout, _: kernels[layout.rows % 2])
    fast = fast_model(transition, margin=0.2)
    torch.compiler.reset()
    counters.clear()
    compiled, counts, fallbacks = torch.compile(fast), set(), 0
    generator = torch.Generator().manual_seed(5)
    for batch in range(200):
        fast.dial = 0.3 + 0.4 * float(torch.rand((), generator=generator))
        images = torch.randn(1 + batch % 2, 3, 32, 32, generator=generator)
        torch.testing.assert_close(compiled(images), fast(images), atol=1e-5, rtol=1e-4)
        output = fast.predict(images)
        counts.add(tuple(tuple(number.tolist()) for number in output.kept))
        fallbacks += len(output.fallback)
        if batch == 99:
            half_way = counters["stats"]["unique_graphs"]
    assert len(counts) > 50, "counts change from batch to batch"
    assert 20 < fallbacks < 280
    stretches = 3
    assert 0 < counters["stats"]["unique_graphs"] <= len(kernels) * stretches
    assert counters["stats"]["unique_graphs"] == half_way, "all graphs were compiled by then"
    torch.testing.assert_close(copy.deepcopy(fast)(images), fast(images))


@torch.inference_mode()
def test_an_empty_batch_gives_no_prediction(fast):
    assert fast(IMAGES[:0]).shape == fast.model(IMAGES[:0]).shape == (0, 5)


def test_time_shares_are_shares():
    fast = synthetic_model(tiny_vit(), GameConfig(stages=(1, 2)), (0.6, 0.3))
    measured = fast.game, fast.game.backbone, fast.actor
    with torch.inference_mode():
        fast.actor.fit(fast, IMAGES)
        before = [dict(vars(part)) for part in measured]
        found = time_shares(fast, IMAGES)
    assert [vars(part) for part in measured] == before, "timing leaves nothing behind"
    assert fast.game.attention is fastest_attention
    assert fast.game.backend_for(IMAGES).section is TorchBackend.section
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
