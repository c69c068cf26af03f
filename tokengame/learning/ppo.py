"""Multi-agent PPO with parameter sharing (MAPPO, Yu et al. 2022). Knows tensors and masks, no Vision Transformer.

T stages, B games, N agents; an agent that is not `acting` took no decision and appears in no loss and no statistic.
Selection is by `torch.where` or indexing, never by multiplying with a mask (nan * 0 is nan).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengame.config import PPOConfig
from tokengame.distributed import Processes
from tokengame.errors import TokenGameError

ALONE = Processes()


class Observations(Protocol):
    """Observations of many agents, of which some can be taken."""

    def take(self, rows: Tensor) -> Any: ...


@dataclass(frozen=True)
class Experience:
    """Decisions of A agents over all stages, one row each."""

    obs: Observations
    action: Tensor
    """[A] bool, as sampled"""
    log_prob: Tensor
    """[A] of the action when it was sampled"""
    advantage: Tensor
    """[A] normalised"""
    returns: Tensor
    """[A] targets of the critic"""
    index: Tensor
    """[A] index of each decision among all possible ones of the update, other processes' included"""
    possible: int
    """how many those are"""
    agents: int
    """possible decisions of an image at a stage; they lie together"""

    @property
    def group(self) -> Tensor:
        """[A] image and stage of each decision, as one number"""
        return self.index // self.agents


def log_prob(logits: Tensor, action: Tensor) -> Tensor:
    """Log probability of a Bernoulli `action` (true = keep) under keep `logits`."""
    return -F.binary_cross_entropy_with_logits(logits, action.to(logits.dtype), reduction="none")


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the Bernoulli in nats."""
    return F.softplus(logits) - logits * torch.sigmoid(logits)


def gae(
    rewards: Tensor, values: Tensor, acting: Tensor, ends: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) through the stages, for each agent on its own.

    Args:
        rewards, values: [T, ...].
        acting: [T, ...] bool, the agent decides at this stage.
        ends: [T, ...] bool, nothing follows for this agent: no bootstrap from the next value.

    Returns:
        advantages and returns (advantage + value), [T, ...], zero where not acting.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        next_value = torch.where(ends[t], 0.0, values[t + 1]) if t + 1 < len(rewards) else torch.zeros_like(values[t])
        delta = rewards[t] + gamma * next_value - values[t]
        following = torch.where(acting[t], delta + gamma * gae_lambda * torch.where(ends[t], 0.0, following), 0.0)
        advantages[t] = following
    return advantages, torch.where(acting, advantages + values, 0.0)


def normalise(advantages: Tensor, acting: Tensor, processes: Processes = ALONE) -> Tensor:
    """Zero mean and unit deviation over all acting agents of all stages, games and processes; zero elsewhere."""
    taken = advantages[acting]
    total, count = processes.sum(torch.stack([taken.sum(), taken.new_tensor(len(taken))]))
    centred = taken - total / count
    deviation = (processes.sum((centred**2).sum()) / count).sqrt()
    return torch.zeros_like(advantages).masked_scatter(acting, centred / (deviation + 1e-8))


def policy_loss(
    logits: Tensor, action: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float, group: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate (Schulman et al. 2017, eq. 7) over [A] decisions.

    With `group` [A], decisions of one group are one: their log probabilities add up, their advantages are averaged.

    Returns:
        loss, and detached diagnostics approx_kl (estimator k3, Schulman 2020) and clipfrac.
    """
    log_ratio = log_prob(logits, action) - old_log_prob
    if group is not None:
        _, group, count = group.unique(return_inverse=True, return_counts=True)
        log_ratio, advantage = (
            torch.zeros(len(count), device=v.device).index_add(0, group, v) for v in (log_ratio, advantage)
        )
        advantage = advantage / count
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).mean()
        clipfrac = ((ratio - 1).abs() > clip).float().mean()
    return -surrogate.mean(), {"approx_kl": approx_kl, "clipfrac": clipfrac}


def update(
    actor: nn.Module,
    critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    config: PPOConfig,
    generator: torch.Generator,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Several epochs of minibatch PPO on one batch of experience, of which each process has a part.

    Returns:
        losses/policy, losses/value, losses/entropy, losses/approx_kl, losses/clipfrac (means over minibatches),
        losses/explained_variance, and losses/first_ratio_error: how far the very first ratio is from 1.

    Raises:
        TokenGameError: a loss or gradient is not finite; the networks keep the last good step.
    """
    sums: dict[str, float] = {}
    steps = 0
    first_ratio_error = explained = 0.0
    for _ in range(config.epochs):
        for chosen in _minibatches(experience, config, generator, processes):
            total, parts = _losses(actor, critic, experience, chosen, config, processes)
            if not steps:
                first_ratio_error, explained = float(parts["ratio_error"]), float(parts["explained"])
            _step(optimizer, (actor, critic), total, config, processes)
            steps += 1
            for name in ("policy", "value", "entropy", "approx_kl", "clipfrac"):
                sums[name] = sums.get(name, 0.0) + float(parts[name].detach())
    metrics = {f"losses/{name}": total / steps for name, total in sums.items()}
    return metrics | {"losses/first_ratio_error": first_ratio_error, "losses/explained_variance": explained}


def _losses(
    actor: nn.Module, critic: nn.Module, experience: Experience, chosen: Tensor, config: PPOConfig, processes: Processes
) -> tuple[Tensor, dict[str, Tensor]]:
    """This process's part of the loss of a minibatch, of which it has the rows `chosen` [a], and what it consists of.

    Each loss is a mean over the rows of all processes, so that their gradients add up. A process without any row in
    the minibatch takes one along, at weight 0.
    """
    own, chosen = len(chosen), chosen if len(chosen) else chosen.new_zeros(1)
    obs = experience.obs.take(chosen)
    logits, values = actor(obs), critic(obs)
    action, old, returns = experience.action[chosen], experience.log_prob[chosen], experience.returns[chosen]
    group = experience.group[chosen] if config.agents == "image" else None
    loss, parts = policy_loss(logits, action, old, experience.advantage[chosen], config.clip, group)
    parts |= {"policy": loss, "value": F.mse_loss(values, returns), "entropy": entropy(logits).mean()}
    parts["ratio_error"] = ((log_prob(logits.detach(), action) - old).exp() - 1).abs().max()
    parts["explained"] = _explained_variance(values.detach(), returns)
    every = processes.share(own, action.device)
    units = every if group is None else processes.share(len(group.unique()) * (own > 0), action.device)
    return units * loss + every * (config.value * parts["value"] - config.entropy * parts["entropy"]), parts


def _minibatches(
    experience: Experience, config: PPOConfig, generator: torch.Generator, processes: Processes
) -> Iterator[Tensor]:
    """[a] rows of each minibatch of one epoch; where an image is one agent, all of its decisions at a stage.

    A minibatch is drawn for every possible decision, so that it does not depend on the process that takes it.
    """
    unit = experience.index if config.agents == "tokens" else experience.group * experience.agents
    part = torch.randint(config.minibatches, (experience.possible,), generator=generator)
    mine = part.to(unit.device)[unit]
    for number in range(config.minibatches):
        chosen = (mine == number).nonzero().squeeze(1)
        if len(chosen) or processes.size > 1:  # all processes step together
            yield chosen


def _step(
    optimizer: torch.optim.Optimizer,
    networks: tuple[nn.Module, ...],
    loss: Tensor,
    config: PPOConfig,
    processes: Processes,
) -> None:
    """Each network's gradient is clipped on its own, or the scale of the values would decide the actor's step."""
    optimizer.zero_grad()
    loss.backward()
    processes.sum_gradients([p for network in networks for p in network.parameters()])
    norms = [nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm) for network in networks]
    if not all(torch.isfinite(norm) for norm in norms):
        raise TokenGameError(
            f"the PPO loss is {loss.item():g} and its gradient is not finite: check rewards and observations"
        )
    optimizer.step()


def _explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """nan where there is nothing to explain"""
    variance = returns.var(correction=0)
    return 1 - (returns - values).var(correction=0) / torch.where(variance > 0, variance, float("nan"))
