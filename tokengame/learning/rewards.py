"""Rewards of the agents. Plain tensors in, plain tensors out; T stages, B games, N agents.

`share` is RL4EViT's: the kept tokens of a correctly classified image share alpha equally and each pays beta, so that in
equilibrium about alpha * p(correct) / beta are kept. `target` is the reward that the authors' published code runs: the
share, and a penalty around keep targets. `fidelity` (this project's) needs no labels. When an agent's episode ends, it
is charged the loss of the whole game, KL(native || pruned) or that of another kind (`measure.kinds`), less what other
games on the same image were charged (leave-one-out, Kool et al. 2019). At each stage that keeps it, it is charged the
compute that its own row causes until the next. The compute part is a difference reward (Wolpert & Tumer 2001), free of
the other agents' noise; it counts blocks and leaves out that attention is quadratic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokengame.config import RewardConfig
from tokengame.errors import TokenGameError


@dataclass(frozen=True)
class Outcome:
    """The outcome of a batch of games."""

    acting: Tensor
    """[T, B, N] bool, alive before the decision"""
    alive: Tensor
    """[T, B, N] bool, alive after it"""
    correct: Tensor | None
    """[B] bool, final prediction right; None without labels"""
    loss: Tensor
    """[B] what the game lost: KL(native || pruned) in nats at the reward's temperature, or the scaled loss of another
    `measure.kinds.Kind`"""
    segment: Tensor
    """[T] share of the native compute that one row causes from this decision to the next"""
    rollouts: int = 1
    """games per image; games of one image lie together"""

    @property
    def ends(self) -> Tensor:
        """[T, B, N] bool: the agent's own episode ends here, because it is pruned or the stage is the last."""
        ends = ~self.alive
        ends[-1] = True
        return ends


def leave_one_out(values: Tensor, group: int) -> Tensor:
    """Each value of [B] less the mean of the others in its group of `group`; unchanged for groups of one."""
    if group == 1:
        return values
    grouped = values.view(-1, group)
    others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).flatten()


def share(outcome: Outcome, config: RewardConfig) -> Tensor:
    """[T, B, N] alive * (alpha * [correct] / kept - beta): RL4EViT's reward."""
    return torch.where(outcome.alive, _shares(outcome, config.alpha) - config.beta, 0.0)


def target(outcome: Outcome, config: RewardConfig) -> Tensor:
    """[T, B, N] the reward that RL4EViT's published code runs: a share of alpha, and the distance from a keep target.

    n tokens are left after a stage, and d = n / N - keep_target^(t+1) is how far that is above the target. A kept token
    gets alpha * [correct] / n, less e^d where d > 0. Where d <= 0 every pruned token gets -e^-d, also one of an earlier
    stage: that one no longer acts, so no decision is charged for it.
    """
    stages, _, agents = outcome.alive.shape
    kept = outcome.alive.sum(2, keepdim=True) / agents  # [T, B, 1]
    goal = config.keep_target ** torch.arange(1, stages + 1, device=kept.device).view(-1, 1, 1)
    charged = torch.where(kept > goal, outcome.alive, ~outcome.alive)
    earned = torch.where(outcome.alive, _shares(outcome, config.alpha), 0.0)
    return earned - torch.where(charged, (kept - goal).abs().exp(), 0.0)


def _shares(outcome: Outcome, alpha: float) -> Tensor:
    if outcome.correct is None:
        raise TokenGameError(
            "this reward pays for correct predictions and the images have no labels; use reward fidelity"
        )
    kept = outcome.alive.sum(2, keepdim=True).clamp(min=1)  # [T, B, 1]
    return alpha * outcome.correct.view(1, -1, 1) / kept


def fidelity(outcome: Outcome, config: RewardConfig, kl_weight: float) -> Tensor:
    """[T, B, N] own compute at each stage that keeps one; the game's loss (leave-one-out) when its episode ends."""
    price = kl_weight * outcome.loss.clamp(max=config.kl_clamp)
    reward = -torch.where(outcome.alive, outcome.segment.view(-1, 1, 1), 0.0)
    if config.credit == "team":
        price, reward = price - reward.sum((0, 2)), torch.zeros_like(reward)
    charged = leave_one_out(price, outcome.rollouts)
    return torch.where(outcome.acting & outcome.ends, reward - charged.view(1, -1, 1), reward)


class PriceController:
    """Moves the price of KL so that the measured value reaches `target`: multiplicative integral control.

    Args:
        weight: price at the start.
        target: mean KL of the sampled games wanted, in nats, or points of top-1 they may lose.
        scale: difference from `target` at which the price moves at full speed.
        smoothing: share of the running mean that an update keeps; 0 for none.
        rate: largest change of log(price) in an update.
    """

    def __init__(self, weight: float, target: float, scale: float, smoothing: float = 0.0, rate: float = 0.02):
        self.weight, self.target, self.scale, self.smoothing, self.rate = weight, target, scale, smoothing, rate
        self.mean = target

    @staticmethod
    def of(config: RewardConfig) -> PriceController:
        """As configured: of KL, or of lost points where a `target_drop` is given."""
        if config.target_drop is None:
            return PriceController(config.kl_weight, config.target_kl, scale=config.target_kl)
        return PriceController(config.kl_weight, config.target_drop, scale=1.0, smoothing=0.95)

    def update(self, measured: float) -> None:
        """Raise the price where the smoothed value is above target, lower it below."""
        self.mean = self.smoothing * self.mean + (1 - self.smoothing) * measured
        error = max(-1.0, min(1.0, (self.mean - self.target) / self.scale))
        self.weight *= math.exp(self.rate * error)
