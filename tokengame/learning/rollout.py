"""Games as they are played while a policy is learned: decisions are sampled, and all that PPO needs is recorded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokengame.distributed import Processes
from tokengame.game import Observation, State, TokenGame
from tokengame.learning.ppo import log_prob
from tokengame.policies.networks import ContextActor
from tokengame.runtime.features import Grid
from tokengame.runtime.rule import thresholds_for


@dataclass(frozen=True)
class Rollout:
    """B sampled games."""

    final: State
    observations: list[Observation]
    """one per stage, of the agents that are left"""
    action: list[Tensor]
    """[A_t] bool, as sampled"""
    log_prob: list[Tensor]
    """[A_t]"""
    alive: Tensor
    """[T + 1, B, N] bool: before the first decision, after each"""

    @property
    def rows(self) -> list[Tensor]:
        """For each stage the [A_t] indices of its agents in a flattened [B, N]."""
        agents = self.alive.shape[2]
        return [obs.image * agents + obs.agent for obs in self.observations]


def sample_games(game: TokenGame, state: State, actor: nn.Module, noise: Tensor, grid: Grid | None = None) -> Rollout:
    """Play from the first decision to the end, actions sampled from the actor's Bernoulli distributions.

    Args:
        game: the rules.
        state: before the first decision.
        actor: observation -> keep logits.
        noise: [T, B, N] uniform in [0, 1): an agent is kept where its probability exceeds it.
        grid: where given, follows the games, so that it can be filled in at their end.
    """
    shape = (state.layout.images, state.total)
    observations, actions, log_probs, alive = [], [], [], [torch.ones(shape, dtype=torch.bool)]
    alive[0] = alive[0].to(state.x.device)
    for stage in range(len(game.stages)):
        obs = game.observe(state)
        logits = actor(obs)
        action = noise[stage, obs.image, obs.agent] < logits.sigmoid()
        before, state = state, game.step(state, action, logits)
        if grid is not None:
            grid.follow(before, state)
        observations.append(obs)
        actions.append(action)
        log_probs.append(log_prob(logits, action))
        alive.append(state.alive)
    return Rollout(state, observations, actions, log_probs, torch.stack(alive))


@torch.no_grad()
def initialise_biases(game: TokenGame, actor: ContextActor, images: Tensor, keep: float, processes: Processes) -> None:
    """Set the biases so that thresholds keep a share `keep` of the tokens at each stage, its root at the first.

    All later blocks miss what the first stage prunes. With one bias for all stages next to no token would be pruned
    early and far too many late, for tokens grow alike with depth (docs/LOG.md).

    Args:
        game: the rules.
        actor: changed in place.
        images: [B, channels, height, width] this process's part of the first batch.
        keep: share of the agents that are left, of all images and processes together.
        processes: those that train together.
    """
    shares = [keep**0.5] + [keep] * (len(game.stages) - 1)
    actor.weight.data[:, -1] -= thresholds_for(game, actor, [game.reset(images)], shares, processes)[0]
