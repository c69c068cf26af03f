"""Rewards by hand tables."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokengame.config import RewardConfig
from tokengame.errors import TokenGameError
from tokengame.learning.rewards import Outcome, PriceController, fidelity, leave_one_out, share, target
from tokengame.measure.fidelity import fidelity_loss


def outcome(alive, correct=None, kl=None, segment=None, rollouts=1):
    alive = torch.tensor(alive).bool()
    acting = torch.cat([torch.ones_like(alive[:1]), alive[:-1]])
    games = alive.shape[1]
    return Outcome(
        acting,
        alive,
        None if correct is None else torch.tensor(correct),
        torch.zeros(games) if kl is None else torch.tensor(kl),
        torch.zeros(len(alive)) if segment is None else torch.tensor(segment),
        rollouts,
    )


def test_share_by_hand():
    """alpha 12, beta 1. Game 0 (right): 3 then 2 of 4 are kept: 12/3 - 1 = 3, 12/2 - 1 = 5. Game 1 (wrong): -1 each."""
    played = outcome([[[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 1, 0, 0], [1, 1, 0, 0]]], correct=[True, False])
    expected = [[[3, 3, 3, 0], [-1, -1, 0, 0]], [[5, 5, 0, 0], [-1, -1, 0, 0]]]
    assert share(played, RewardConfig(alpha=12, beta=1)).tolist() == expected


def test_share_is_in_equilibrium_where_the_paper_says():
    """With one kept token more than alpha * p / beta each earns less than nothing, with one fewer more."""
    config, chance = RewardConfig(alpha=40, beta=2), 0.8
    payoff = []
    for n in (15, 16, 17):
        alive = [[[1] * n + [0] * (30 - n)]]
        right, wrong = (share(outcome(alive, correct=[c]), config)[0, 0, 0] for c in (True, False))
        payoff.append(float(chance * right + (1 - chance) * wrong))
    assert payoff[0] > 0 == pytest.approx(payoff[1], abs=1e-6)
    assert payoff[2] < 0


def test_pruning_everything_is_neither_free_nor_infinite():
    played = outcome([[[0, 0, 0]]], correct=[True])
    for reward in (share, target):
        assert reward(played, RewardConfig()).isfinite().all()


def test_target_by_hand():
    """alpha 24, wanted 0.7 and 0.49 of 4. Stage 0 keeps 2, 0.2 too few: each of the two others pays e^0.2. Stage 1
    keeps the same 2, 0.01 too many: each of these pays e^0.01."""
    played = outcome([[[1, 1, 0, 0]], [[1, 1, 0, 0]]], correct=[True])
    few, many = math.exp(0.2), math.exp(0.01)
    expected = torch.tensor([[[12, 12, -few, -few]], [[12 - many, 12 - many, 0, 0]]])
    torch.testing.assert_close(target(played, RewardConfig(alpha=24, keep_target=0.7)), expected)


def slow_target(alive, correct, alpha, keep_target):
    """One agent at a time, as the authors' code is described: survivors share alpha, and e^|d| is paid by the survivors
    of a stage that keeps too many, by all pruned tokens of one that does not."""
    rewards = torch.zeros(len(alive), len(alive[0]), len(alive[0][0]))
    for t, games in enumerate(alive):
        for b, game in enumerate(games):
            survivors = sum(game)
            d = survivors / len(game) - keep_target ** (t + 1)
            for i, lives in enumerate(game):
                if lives and correct[b]:
                    rewards[t, b, i] += alpha / survivors
                if lives and d > 0:
                    rewards[t, b, i] -= math.exp(d)
                if not lives and d <= 0:
                    rewards[t, b, i] -= math.exp(-d)
    return rewards


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(0, 999))
def test_target_equals_the_slow_version(stages, games, agents, seed):
    generator = torch.Generator().manual_seed(seed)
    alive = (torch.rand(stages, games, agents, generator=generator) < 0.75).long().cumprod(0)
    correct = [bool(value) for value in torch.rand(games, generator=generator) < 0.5]
    expected = slow_target(alive.tolist(), correct, 24.0, 0.71)
    found = target(outcome(alive.tolist(), correct), RewardConfig(alpha=24.0, keep_target=0.71))
    torch.testing.assert_close(found, expected)


def test_fidelity_charges_kl_once_at_the_end_and_compute_where_kept():
    """Price 10, two games on one image with KL 0.1 and 0.3: charged -2 and +2 against each other."""
    played = outcome([[[1, 0], [1, 1]], [[1, 0], [0, 1]]], kl=[0.1, 0.3], segment=[0.25, 0.5], rollouts=2)
    found = fidelity(played, RewardConfig(), kl_weight=10.0)
    expected = torch.tensor([[[-0.25, 2.0], [-0.25, -0.25]], [[-0.5 + 2.0, 0.0], [-2.0, -0.5 - 2.0]]])
    torch.testing.assert_close(found, expected)


def test_every_agent_of_a_team_is_charged_for_all_compute():
    """Two agents act, one is kept twice: each pays for KL 0.1 at price 10 and 0.25 + 0.5 of compute at its own end."""
    played = outcome([[[1, 0]], [[1, 0]]], kl=[0.1], segment=[0.25, 0.5])
    found = fidelity(played, RewardConfig(credit="team"), kl_weight=10.0)
    torch.testing.assert_close(found, torch.tensor([[[0.0, -1.75]], [[-1.75, 0.0]]]))


def test_fidelity_clamps_a_hopeless_image():
    found = fidelity(outcome([[[0]]], kl=[9.0]), RewardConfig(kl_clamp=1.5), kl_weight=2.0)
    assert found.flatten().tolist() == [-3.0]


def test_leave_one_out_by_hand():
    assert leave_one_out(torch.tensor([1.0, 2.0, 6.0]), 3).tolist() == [1 - 4, 2 - 3.5, 6 - 1.5]
    assert leave_one_out(torch.tensor([5.0, 7.0]), 1).tolist() == [5.0, 7.0]


@given(st.integers(0, 99), st.integers(2, 6))
def test_kl_equals_torch_distributions(seed, classes):
    native, pruned = torch.randn(2, 4, classes, generator=torch.Generator().manual_seed(seed)) * 3
    oracle = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=native), torch.distributions.Categorical(logits=pruned)
    )
    torch.testing.assert_close(fidelity_loss(native, pruned), oracle, atol=1e-5, rtol=1e-4)
    assert float(fidelity_loss(native, native).abs().max()) < 1e-6
    softened = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=native / 3), torch.distributions.Categorical(logits=pruned / 3)
    )
    torch.testing.assert_close(fidelity_loss(native, pruned, temperature=3.0), 9 * softened, atol=1e-5, rtol=1e-4)


def test_labelled_rewards_say_that_they_need_labels():
    with pytest.raises(TokenGameError, match="no labels"):
        share(outcome([[[1]]]), RewardConfig())


def test_the_controller_reaches_its_target():
    """A plant whose KL falls with the price: KL = 0.6 / weight; the target 0.06 wants 10."""
    controller = PriceController(weight=2.0, target=0.06, scale=0.06)
    for _ in range(300):
        controller.update(0.6 / controller.weight)
    assert controller.weight == pytest.approx(10, rel=0.01)


def test_the_controller_holds_a_drop_through_noise():
    """A game that loses 5 points at price 1, 1 at price 5, through noise of 4 points: half a point is held."""
    generator = torch.Generator().manual_seed(0)
    controller, losses = PriceController(2.0, 0.5, scale=1.0, smoothing=0.95), []
    for _ in range(2000):
        controller.update(5 / controller.weight + 4 * float(torch.randn(1, generator=generator)))
        losses.append(5 / controller.weight)
    assert sum(losses[500:]) / 1500 == pytest.approx(0.5, rel=0.15)
