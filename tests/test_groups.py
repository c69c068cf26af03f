"""Images in groups on threads of their own: the same games as in one batch, and only where that is so."""

import multiprocessing

import pytest
import torch
from conftest import policy_for, tiny_vit
from torch.utils.flop_counter import FlopCounterMode

import tokengame.runtime.groups as groups
from tokengame import kernels
from tokengame.measure.synthetic import synthetic_model
from tokengame.policies.networks import TokenActor
from tokengame.runtime import PrunedViT, prune

IMAGES = torch.randn(23, 3, 32, 32, generator=torch.Generator().manual_seed(5))
THREADS = 2


@pytest.fixture(autouse=True)
def step_by_step():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with kernels.disabled():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def asked(monkeypatch):
    """Sizes of the groups that were computed."""
    sizes, on_threads = [], groups._on_threads

    def counted(tasks, threads):
        sizes.extend(len(task.args[0]) for task in tasks)
        return on_threads(tasks, threads)

    monkeypatch.setattr(groups, "_on_threads", counted)
    return sizes


def in_one(fast, images=IMAGES):
    """The same prediction by one thread, which forms no groups."""
    torch.set_num_threads(1)
    found = fast.predict(images)
    torch.set_num_threads(THREADS)
    return found


@pytest.mark.parametrize("transition", ["drop", "merge"])
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_groups_decide_and_predict_as_one_batch(transition, margin, asked):
    model = tiny_vit()
    policy = policy_for(model, transition)
    policy.card["game"]["cascade_margin"] = margin
    fast = PrunedViT(model, policy, 0.5)
    found, one = fast.predict(IMAGES), in_one(fast)
    assert asked == [6, 6, 6, 5]
    torch.testing.assert_close(found.logits, one.logits, rtol=1e-4, atol=1e-5)
    assert [k.tolist() for k in found.kept] == [k.tolist() for k in one.kept]
    assert torch.equal(found.alive, one.alive)
    assert torch.equal(found.fallback, one.fallback)
    assert bool(len(one.fallback)) == bool(margin)


@pytest.mark.parametrize("target", [0.6, 0.8])
def test_the_rule_with_budgets_does_too(target, asked):
    fast = prune(tiny_vit(), gmacs_ratio=target)
    found = fast(IMAGES)
    assert asked
    torch.testing.assert_close(found, in_one(fast).logits, rtol=1e-4, atol=1e-5)


def test_synthetic_decisions_know_their_images_in_a_group(asked):
    model = tiny_vit()
    fast = synthetic_model(model, policy_for(model).game, (0.7, 0.5))
    fast.actor.fit(fast, IMAGES, 2)
    assert not asked
    for draw in range(2):
        fast.actor.draw(draw)
        found, one = fast.predict(IMAGES), in_one(fast)
        assert [k.tolist() for k in found.kept] == [k.tolist() for k in one.kept]
    assert asked


def test_the_papers_actor_decides_for_every_image_alone(asked):
    model = tiny_vit()
    fast = PrunedViT(model, policy_for(model), 0.5)
    torch.manual_seed(2)
    fast.actor = TokenActor(32, 16, (16, 8)).eval()
    assert torch.equal(fast.predict(IMAGES).alive, in_one(fast).alive)
    assert asked


def with_hook(fast):
    fast.model.blocks[0].mlp.register_forward_hook(lambda *_: None)


def with_actor_hook(fast):
    fast.actor.register_forward_hook(lambda *_: None)


def with_other_policy(fast):
    actor = fast.actor
    fast.actor = torch.nn.Module()
    fast.actor.forward = lambda obs: actor(obs)


@pytest.mark.parametrize("change", [with_hook, with_actor_hook, with_other_policy, lambda fast: fast.train()])
@pytest.mark.filterwarnings("ignore:.*see packed rows")
def test_what_other_threads_might_not_honour_stays_in_one_batch(change, asked):
    model = tiny_vit()
    fast = PrunedViT(model, policy_for(model), 0.5)
    change(fast)
    fast.predict(IMAGES)
    assert not asked


def test_modes_of_this_thread_hold_for_all_images(asked):
    model = tiny_vit()
    fast = PrunedViT(model, policy_for(model), 0.5)
    with FlopCounterMode(display=False) as counter:
        fast(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(IMAGES).dtype == torch.bfloat16
    assert not asked
    with torch.inference_mode():
        assert fast(IMAGES).is_inference()
    assert counter.get_total_flops() > 0
    assert asked


def test_one_thread_few_images_and_errors(asked, monkeypatch):
    model = tiny_vit()
    fast = PrunedViT(model, policy_for(model), 0.5)
    fast(IMAGES[: 2 * THREADS - 1])
    in_one(fast)
    assert not asked
    monkeypatch.setattr(type(fast.actor), "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fast(IMAGES)


def test_threads_that_start_later_have_all_of_pytorchs(asked):
    model = tiny_vit()
    PrunedViT(model, policy_for(model), 0.5)(IMAGES)
    assert asked
    assert torch.get_num_threads() == THREADS
    with groups.ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == THREADS


def _predict(fast, connection):
    torch.set_num_threads(THREADS)
    with kernels.disabled():
        connection.send(fast(IMAGES).tolist())


def test_a_forked_process_has_threads_of_its_own():
    model = tiny_vit()
    fast = PrunedViT(model, policy_for(model), 0.5)
    expected, (here, there) = fast(IMAGES), multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_predict, args=(fast, there))
    process.start()
    assert here.poll(60), "the forked process hangs"
    torch.testing.assert_close(torch.tensor(here.recv()), expected, rtol=1e-4, atol=1e-5)
    process.join()
