"""Second looks against playing every image alone and the native model, their price against PyTorch's flop counter."""





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
from tokengame.runtime import PrunedViT
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
def test_equals_playing_every_image_alone(transition, batch, margin, threshold, seed):
    """Nobody to many in doubt; whoever is has the native prediction, and is where a game without losers ends."""
    game, actor = games(transition, margin)
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    found, edges = cascade.predict(game, images, actor, threshold), []

    def decide(obs):
        logits = actor(obs)
        edges.append(float((logits - threshold).abs().min()))
        return logits

    for number in range(batch):
        first = game.play(images[number : number + 1], decide, threshold)
        prediction = game.predict(first)[0]
        second, best = sorted(prediction.softmax(0).tolist())[-2:]
        dial = 1 / (1 + 2.718281828459045**-threshold)
        at_dial = 2 * (1 - dial) * margin
        if abs(best - second - at_dial) < 1e-4 or min(edges) < 1e-5:
            return  # another batch rounds otherwise
        last = first
        assert (number in found.again.tolist()) == (best - second < at_dial)
        if best - second < at_dial:
            last = game.play(images[number : number + 1], actor, -math.inf)
            prediction = MODEL(images[number : number + 1])[0]
        torch.testing.assert_close(found.prediction[number], prediction, atol=1e-4, rtol=1e-4)
        assert [int(n[number]) for n in found.first] == [int(n) for n in first.kept]
        assert [int(n[number]) for n in found.kept] == [int(n) for n in last.kept]
        left = last.position[last.agent_rows]
        assert found.alive[number].nonzero().squeeze(1).tolist() == left.tolist()


def fast_of(transition, margin, dial, model=MODEL):
    policy = POLICIES[transition]
    card = policy.card | {"game": policy.card["game"] | {"cascade_margin": margin}}
    return PrunedViT(model, Policy(policy.actor, card), dial)


@pytest.mark.parametrize("transition", ["drop", "merge"])
@torch.no_grad()
def test_a_second_look_costs_what_the_flop_counter_sees(transition):
    """What follows the first decision, all tokens there, to the digit."""
    model, images = tiny_vit(img_size=112), torch.randn(4, 3, 112, 112)
    set_fused_attn(False)
    try:
        counted, analytic = [], []
        for margin in (0.0, 2.0):
            fast = fast_of(transition, margin, 0.7, model)
            fast.game.attention = unfused_attention
            with (
                sdpa_kernel(SDPBackend.MATH),
                FlopCounterMode(display=False) as counter,
            ):  # not all torch count fused ones
                played = fast.predict(images)
            counted.append(counter.get_total_flops() / 2)
            analytic.append(float(fast.macs(played)[1].sum()))
        assert len(played.again) == 4
        assert analytic[1] - analytic[0] == pytest.approx(counted[1] - counted[0], rel=1e-6)
    finally:
        set_fused_attn(True)


@torch.no_grad()
def test_nobody_looks_twice_without_a_doubt_a_dial_or_a_classifier():
    images = torch.randn(5, 3, 32, 32)
    assert len(fast_of("merge", 1.0, 0.5).play(images).again) == 5
    assert len(fast_of("merge", 0.0, 0.5).play(images).again) == 0
    gentlest = fast_of("merge", 1.0, 0.0)  # nothing was pruned
    assert len(gentlest.play(images).again) == 0
    torch.testing.assert_close(gentlest(images), MODEL(images), atol=1e-5, rtol=1e-4)
    features = tiny_vit(num_classes=0)
    assert len(fast_of("merge", 1.0, 0.5, features).play(images).again) == 0


def test_doubt_by_hand():
    prediction = torch.tensor([[0.5, 0.3, 0.2], [0.45, 0.4, 0.15], [0.1, 0.1, 0.8]]).log()
    assert uncertain_images(prediction, 0.1).tolist() == [1]
    assert uncertain_images(prediction, 0.25).tolist() == [0, 1]
    assert uncertain_images(prediction, 0.01).tolist() == []


@torch.no_grad()
def test_trace_shows_the_last_look():
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    apart = fast_of("merge", 0.0, 0.9)(images).softmax(1).topk(2).values
    fast = fast_of("merge", 5 * float((apart[:, 0] - apart[:, 1]).median()) + 1e-3, 0.9)  # 2 (1 - 0.9) of it counts
    played, trace = fast.predict(images), fast.trace(images)
    assert 0 < len(played.again) < 6
    assert torch.equal(trace.sum(2), torch.stack(played.kept))
    assert not torch.equal(torch.stack(played.kept), torch.stack(played.first))
    assert torch.equal(trace[-1], played.alive)


@torch.no_grad()
def test_compare_measures_a_policy_with_the_other_number_of_looks_too():
    images, budgets = torch.randn(8, 3, 32, 32), ["attention at the budgets of ours", "random at the budgets of ours"]
    likeliest = fast_of("merge", 0.0, 0.3)(images).softmax(1).topk(2).values
    close = int((likeliest[:, 0] - likeliest[:, 1] < 2 * 0.7 * CASCADE_MARGIN).sum())
    assert 0 < close < 8
    for cascade_margin, names, again in (
        (10.0, ["ours", "ours, one look", *budgets], [8, 0, 0, 0]),
        (0.0, ["ours", "ours, two looks", *budgets], [0, close, 0, 0]),
    ):
        fast = fast_of("merge", cascade_margin, 0.3)
        entries = policy_entries(MODEL, "ours", Policy(fast.actor, fast.card), [0.3], budgets=True)
        assert [entry.method for entry in entries] == names
        assert [len(entry.runs.play(images).again) for entry in entries] == again
