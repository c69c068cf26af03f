"""MAPPO against hand tables, slow versions, TorchRL and a game whose optimum is known."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tokengame.config import PPOConfig
from tokengame.errors import TokenGameError
from tokengame.learning.ppo import Experience, entropy, gae, log_prob, normalise, policy_loss, update


def slow_gae(rewards, values, acting, ends, gamma, lam):
    """One agent, one stage at a time: sum of discounted temporal differences until its episode ends."""
    advantages = torch.zeros_like(rewards)
    stages, batch, agents = rewards.shape
    for b in range(batch):
        for n in range(agents):
            for t in range(stages):
                if not acting[t, b, n]:
                    continue
                weight, total = 1.0, 0.0
                for s in range(t, stages):
                    over = bool(ends[s, b, n])
                    following = 0.0 if over else float(values[s + 1, b, n])
                    total += weight * (float(rewards[s, b, n]) + gamma * following - float(values[s, b, n]))
                    if over:
                        break
                    weight *= gamma * lam
                advantages[t, b, n] = total
    return advantages


def random_episodes(stages, batch, agents, seed):
    generator = torch.Generator().manual_seed(seed)
    alive = (torch.rand(stages, batch, agents, generator=generator) < 0.7).cumprod(0).bool()
    acting = torch.cat([torch.ones_like(alive[:1]), alive[:-1]])
    ends = ~alive
    ends[-1] = True
    rewards, values = torch.randn(2, stages, batch, agents, generator=generator)
    return rewards, values, acting, ends


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 999), st.sampled_from([0.0, 0.9, 1.0]))
def test_gae_equals_the_slow_version(stages, batch, agents, seed, lam):
    rewards, values, acting, ends = random_episodes(stages, batch, agents, seed)
    advantages, returns = gae(rewards, values, acting, ends, 0.99, lam)
    torch.testing.assert_close(advantages, slow_gae(rewards, values, acting, ends, 0.99, lam))
    torch.testing.assert_close(returns, torch.where(acting, advantages + values, 0.0))


def test_gae_by_hand():
    """Rewards 1, 2; values 0.5, 0.25; gamma 0.5, lambda 0.5. Kept agent: d1 = 2 - 0.25, d0 = 1 + 0.125 - 0.5."""
    rewards, values = torch.tensor([1.0, 2.0]).view(2, 1, 1), torch.tensor([0.5, 0.25]).view(2, 1, 1)
    yes, no = torch.tensor(True).view(1, 1, 1), torch.tensor(False).view(1, 1, 1)
    kept, _ = gae(rewards, values, torch.cat([yes, yes]), torch.cat([no, yes]), 0.5, 0.5)
    assert kept.flatten().tolist() == pytest.approx([0.625 + 0.25 * 1.75, 1.75])
    pruned, _ = gae(rewards, values, torch.cat([yes, no]), torch.cat([yes, yes]), 0.5, 0.5)
    assert pruned.flatten().tolist() == pytest.approx([0.5, 0.0]), "a pruned agent's last value is not bootstrapped"


def test_lambda_zero_is_one_temporal_difference():
    """What the authors' code has in place of GAE: r + gamma V' - V, without V' where an agent's episode ends."""
    rewards, values, acting, ends = random_episodes(3, 4, 6, 2)
    following = torch.cat([values[1:], torch.zeros_like(values[:1])]).masked_fill(ends, 0.0)
    advantages, returns = gae(rewards, values, acting, ends, 0.99, 0.0)
    expected = torch.where(acting, rewards + 0.99 * following - values, 0.0)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, torch.where(acting, rewards + 0.99 * following, 0.0))


def test_gae_equals_torchrl():
    functional = pytest.importorskip("torchrl.objectives.value.functional", reason="pip install tokengame[oracle]")
    rewards, values, acting, ends = random_episodes(4, 3, 5, 0)
    advantages, _ = gae(rewards, values, acting, ends, 0.99, 0.95)
    # TorchRL wants [batch, time, 1] and next values; a value behind an end is never used
    shape = lambda x: x.permute(1, 2, 0).reshape(15, 4, 1)  # noqa: E731
    following = torch.cat([values[1:], torch.full_like(values[:1], 123.0)])
    oracle, _ = functional.generalized_advantage_estimate(
        0.99, 0.95, shape(values), shape(following), shape(rewards), shape(ends), terminated=shape(ends)
    )
    oracle = oracle.reshape(3, 5, 4).permute(2, 0, 1)
    torch.testing.assert_close(advantages[acting], oracle[acting])


def test_nan_of_a_pruned_agent_reaches_no_other():
    rewards, values, acting, ends = random_episodes(3, 4, 6, 1)
    clean, _ = gae(rewards, values, acting, ends, 0.99, 0.95)
    dirty_values = torch.where(acting, values, float("nan"))
    dirty_rewards = torch.where(acting, rewards, float("nan"))
    dirty, returns = gae(dirty_rewards, dirty_values, acting, ends, 0.99, 0.95)
    torch.testing.assert_close(dirty, clean)
    assert returns.isfinite().all()
    assert normalise(torch.where(acting, dirty, float("nan")), acting).isfinite().all()


def test_normalisation_is_over_all_acting_agents_and_no_others():
    advantages = torch.tensor([[[1.0, 3.0, 1000.0]], [[5.0, 1000.0, 1000.0]]])
    acting = torch.tensor([[[True, True, False]], [[True, False, False]]])
    found = normalise(advantages, acting)
    taken = found[acting]
    assert float(taken.mean()) == pytest.approx(0, abs=1e-6)
    assert float(taken.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert (found[~acting] == 0).all()
    assert taken[2] - taken[1] == pytest.approx(taken[1] - taken[0]), "one scale for all stages"


def test_bernoulli_equals_torch_distributions():
    logits, action = torch.linspace(-6, 6, 25), torch.arange(25) % 2 == 0
    oracle = torch.distributions.Bernoulli(logits=logits)
    torch.testing.assert_close(log_prob(logits, action), oracle.log_prob(action.float()))
    torch.testing.assert_close(entropy(logits), oracle.entropy())


@given(st.floats(-3, 3), st.floats(-3, 3), st.booleans(), st.floats(-2, 2))
def test_clipped_surrogate_case_by_case(new, old, action, advantage):
    new, old, action = torch.tensor([new]), torch.tensor([old]), torch.tensor([action])
    loss, parts = policy_loss(new, action, log_prob(old, action), torch.tensor([advantage]), 0.2)
    chance = [float(torch.sigmoid(x if action else -x)) for x in (new, old)]
    ratio = chance[0] / chance[1]
    expected = (min(ratio, 1.2) if advantage >= 0 else max(ratio, 0.8)) * advantage
    assert float(loss) == pytest.approx(-expected, abs=1e-4, rel=1e-3)
    assert float(parts["clipfrac"]) == float(abs(ratio - 1) > 0.2) or abs(abs(ratio - 1) - 0.2) < 1e-4


@dataclass
class Cards:
    """Observations of the toy game."""

    seen: torch.Tensor

    def take(self, rows):
        return Cards(self.seen[rows])


class Net(nn.Module):
    def __init__(self, zero: bool):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 1))
        if zero:
            nn.init.zeros_(self.layers[2].weight)

    def forward(self, cards):
        return self.layers(cards.seen).squeeze(1)


KINDS = torch.eye(3)
PAY = torch.tensor([[0.5, 0.5], [-1.0, 2.0], [0.3, -1.0]])
"""what each kind of agent earns if kept, at the two stages: always good, patient (pays first), worth one stage"""
OPTIMUM = torch.tensor([[1, 1], [1, 1], [1, 0]]).bool()
"""which kinds are kept at each stage when played best"""


def play_toy(actor, critic, generator, sign=1.0, gamma=1.0):
    """64 games of 12 agents and two stages; a pruned agent is out and earns nothing more."""
    kind = torch.randint(3, (64, 12), generator=generator)
    alive, steps = torch.ones(64, 12, dtype=torch.bool), []
    for t in range(2):
        stage = torch.eye(2)[t].expand(64, 12, 2)
        cards = Cards(torch.cat([KINDS[kind], stage], 2)[alive])
        logits = actor(cards).detach()
        action = torch.rand(logits.shape, generator=generator) < logits.sigmoid()
        kept = alive.clone()
        kept[alive] = action
        values = torch.zeros(64, 12)
        values[alive] = critic(cards).detach()
        reward = torch.where(kept, sign * PAY[kind, t], 0.0)
        steps.append((cards, action, log_prob(logits, action), reward, values, alive, ~kept | (t == 1)))
        alive = kept
    cards, action, old, rewards, values, acting, ends = zip(*steps, strict=True)
    acting = torch.stack(acting)
    advantages, returns = gae(torch.stack(rewards), torch.stack(values), acting, torch.stack(ends), gamma, 0.95)
    advantages = normalise(advantages, acting)
    seen = Cards(torch.cat([c.seen for c in cards]))
    index = torch.arange(2 * 64 * 12).view(2, 64, 12)[acting]
    advantages, returns = advantages[acting], returns[acting]
    return Experience(seen, torch.cat(action), torch.cat(old), advantages, returns, index, 2 * 64 * 12, 12)


def solve_toy(seed=0, agents="tokens", **changes):
    torch.manual_seed(seed)
    actor, critic, generator = Net(True), Net(True), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=5e-3)
    config = PPOConfig(entropy=0.003, minibatches=2, max_grad_norm=1.0, agents=agents)
    for _ in range(80):
        update(actor, critic, optimizer, play_toy(actor, critic, generator, **changes), config, generator)
    stages = torch.eye(2)
    cards = Cards(torch.cat([KINDS.repeat_interleave(2, 0), stages.repeat(3, 1)], 1))
    return (actor(cards) > 0).view(3, 2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_toy_game_is_solved(seed):
    assert torch.equal(solve_toy(seed), OPTIMUM)


def test_one_agent_for_each_image_solves_it_too():
    """The toy is small enough for ratios that multiply over an image."""
    assert torch.equal(solve_toy(agents="image"), OPTIMUM)


def test_the_ratio_of_one_agent_for_an_image_is_the_product():
    logits, old = torch.tensor([0.3, -0.2, 1.0]), torch.tensor([-0.7, -0.6, -0.4])
    action, image = torch.tensor([True, False, True]), torch.tensor([7, 7, 2])
    loss, _ = policy_loss(logits, action, old, torch.tensor([1.0, 3.0, -1.0]), 0.2, image)
    new = log_prob(logits, action)
    ratio = [float((new[2] - old[2]).exp()), float((new[:2] - old[:2]).sum().exp())]
    clipped = [min(max(r, 0.8), 1.2) for r in ratio]
    gains = [min(-1 * ratio[0], -1 * clipped[0]), min(2 * ratio[1], 2 * clipped[1])]
    assert float(loss) == pytest.approx(-sum(gains) / 2, rel=1e-5)


def test_a_broken_reward_does_not_solve_it():
    assert not torch.equal(solve_toy(sign=-1.0), OPTIMUM)


def test_without_credit_through_the_stages_the_patient_agent_is_pruned():
    """gamma = 0 turns the Markov game into two bandits: the first stage's cost is all that is seen."""
    assert not solve_toy(gamma=0.0)[1, 0]


def experience_of(seed=0, rows=50):
    generator = torch.Generator().manual_seed(seed)
    actor, critic = Net(False), Net(False)
    cards = Cards(torch.randn(rows, 5, generator=generator))
    logits = actor(cards).detach()
    action = torch.rand(rows, generator=generator) < logits.sigmoid()
    advantage, returns = torch.randn(2, rows, generator=generator)
    return (
        actor,
        critic,
        Experience(cards, action, log_prob(logits, action), advantage, returns, torch.arange(rows), rows, 10),
    )


def test_first_ratio_is_one_only_if_the_stored_action_is_the_sampled_one():
    actor, critic, experience = experience_of()
    config, generator = PPOConfig(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(actor.parameters(), lr=0.0)
    assert update(actor, critic, optimizer, experience, config, generator)["losses/first_ratio_error"] < 1e-5
    wrong = replace(experience, action=~experience.action)
    assert update(actor, critic, optimizer, wrong, config, generator)["losses/first_ratio_error"] > 1e-3


def test_a_reward_that_is_not_finite_stops_before_the_step():
    actor, critic, experience = experience_of()
    before = [p.clone() for p in actor.parameters()]
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()])
    broken = replace(experience, returns=experience.returns * float("nan"))
    with pytest.raises(TokenGameError, match="not finite"):
        update(actor, critic, optimizer, broken, PPOConfig(), torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(before, actor.parameters(), strict=True))
