"""The cascade against single images and the native model, its cost against PyTorch's flop counter."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import policy_for, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import set_fused_attn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokengame.backbones import wrap
from tokengame.game import TokenGame
from tokengame.measure.compare import CASCADE_MARGIN, policy_entries
from tokengame.packed.attention import unfused_attention
from tokengame.policies import Policy
from tokengame.runtime import PrunedViT, cascade
from tokengame.runtime.cascade import uncertain_images

MODEL = tiny_vit()
POLICIES = {transition: policy_for(MODEL, transition) for transition in ("drop", "merge")}


def games(transition, margin):
    policy = POLICIES[transition]
    config = replace(policy.game, cascade_margin=margin)
    return TokenGame(wrap(MODEL), config), policy.actor


@settings(max_examples=40, deadline=None)
@given(
    transition=st.sampled_from(["drop", "merge"]),
    batch=st.integers(1, 6),
    margin=st.floats(0.01, 0.9),
    threshold=st.floats(-1, 3),
    seed=st.integers(0, 999),
)
@torch.no_grad()
def test_batches_equal_single_images(transition, batch, margin, threshold, seed):
    """Between no and all images fall back; those have the native prediction and all of their tokens."""
    game, actor = games(transition, margin)
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    found, edges = cascade.predict(game, images, actor, threshold), []

    def decide(obs):
        logits = actor(obs)
        edges.append(float((logits - threshold).abs().min()))
        return logits

    for number in range(batch):
        last = decided = game.play(images[number : number + 1], decide, threshold)
        logits = game.predict(decided)[0]
        second, best = sorted(logits.softmax(0).tolist())[-2:]
        dial = 1 / (1 + 2.718281828459045**-threshold)
        at_dial = 2 * (1 - dial) * margin
        if abs(best - second - at_dial) < 1e-4 or min(edges) < 1e-5:
            return  # a batch may round to the other side
        assert (number in found.fallback.tolist()) == (best - second < at_dial)
        if best - second < at_dial:
            last = game.play(images[number : number + 1], actor, -math.inf)
            logits = MODEL(images[number : number + 1])[0]
        torch.testing.assert_close(found.logits[number], logits, atol=1e-4, rtol=1e-4)
        assert [int(n[number]) for n in found.decided] == [int(n) for n in decided.kept]
        assert [int(n[number]) for n in found.kept] == [int(n) for n in last.kept]
        left = last.position[last.agent_rows]
        assert found.alive[number].nonzero().squeeze(1).tolist() == left.tolist()


def fast_of(transition, margin, dial, model=MODEL):
    policy = POLICIES[transition]
    card = policy.card | {"game": policy.card["game"] | {"cascade_margin": margin}}
    return PrunedViT(model, Policy(policy.actor, card), dial)


@pytest.mark.parametrize("transition", ["drop", "merge"])
@torch.no_grad()
def test_macs_of_the_fallback_equal_the_flop_counter(transition):
    """All tokens from the first decision on, to the digit."""
    model, images = tiny_vit(img_size=112), torch.randn(4, 3, 112, 112)
    set_fused_attn(False)
    try:
        counted, analytic = [], []
        for margin in (0.0, 2.0):
            fast = fast_of(transition, margin, 0.7, model)
            fast.game.attention = unfused_attention
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused ones may not count
                output = fast.predict(images)
            counted.append(counter.get_total_flops() / 2)
            analytic.append(float(fast.macs(output)[1].sum()))
        assert len(output.fallback) == 4
        assert analytic[1] - analytic[0] == pytest.approx(counted[1] - counted[0], rel=1e-6)
    finally:
        set_fused_attn(True)


@torch.no_grad()
def test_no_image_falls_back_without_margin_pruning_or_classes():
    images = torch.randn(5, 3, 32, 32)
    assert len(fast_of("merge", 1.0, 0.5).predict(images).fallback) == 5
    assert len(fast_of("merge", 0.0, 0.5).predict(images).fallback) == 0
    gentlest = fast_of("merge", 1.0, 0.0)  # nothing was pruned
    assert len(gentlest.predict(images).fallback) == 0
    torch.testing.assert_close(gentlest(images), MODEL(images), atol=1e-5, rtol=1e-4)
    features = tiny_vit(num_classes=0)
    assert len(fast_of("merge", 1.0, 0.5, features).predict(images).fallback) == 0


def test_uncertain_images_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.45, 0.4, 0.15], [0.1, 0.1, 0.8]]).log()
    assert uncertain_images(logits, 0.1).tolist() == [1]
    assert uncertain_images(logits, 0.25).tolist() == [0, 1]
    assert uncertain_images(logits, 0.01).tolist() == []


@torch.no_grad()
def test_trace_shows_the_tokens_after_the_fallback():
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    apart = fast_of("merge", 0.0, 0.9)(images).softmax(1).topk(2).values
    fast = fast_of("merge", 5 * float((apart[:, 0] - apart[:, 1]).median()) + 1e-3, 0.9)  # 2 (1 - 0.9) of it counts
    output, trace = fast.predict(images), fast.trace(images)
    assert 0 < len(output.fallback) < 6
    assert torch.equal(trace.sum(2), torch.stack(output.kept))
    assert not torch.equal(torch.stack(output.kept), torch.stack(output.decided))
    assert torch.equal(trace[-1], output.alive)


@torch.no_grad()
def test_compare_measures_a_policy_with_the_cascade_switched_too():
    images = torch.randn(8, 3, 32, 32)
    budgets = ["attention at the budgets of policy", "random at the budgets of policy"]
    likeliest = fast_of("merge", 0.0, 0.3)(images).softmax(1).topk(2).values
    close = int((likeliest[:, 0] - likeliest[:, 1] < 2 * 0.7 * CASCADE_MARGIN).sum())
    assert 0 < close < 8
    for margin, names, fallback in (
        (10.0, ["policy", "policy, no cascade", *budgets], [8, 0, 0, 0]),
        (0.0, ["policy", "policy, cascade", *budgets], [0, close, 0, 0]),
    ):
        fast = fast_of("merge", margin, 0.3)
        entries = policy_entries(MODEL, "policy", Policy(fast.actor, fast.card), [0.3], budgets=True)
        assert [entry.method for entry in entries] == names
        assert [len(entry.model.predict(images).fallback) for entry in entries] == fallback
