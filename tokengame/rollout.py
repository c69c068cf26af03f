"""Games as they are played while a policy is learned: decisions drawn by chance, everything about them kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokengame.game import TokenGame
from tokengame.networks import ContextActor
from tokengame.ppo import log_prob
from tokengame.ranks import Ranks
from tokengame.state import Observation, State


@dataclass(frozen=True)
class Rollout:
    """B games on packed rows, as played."""

    final: State
    observations: list[Observation]
    """one per stage, of the living agents"""
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
        return [obs.scene * agents + obs.agent for obs in self.observations]


def play_sampled(game: TokenGame, state: State, actor: nn.Module, noise: Tensor) -> Rollout:
    """Play from the first decision to the end, actions drawn from the actor's Bernoullis.

    Args:
        game: the rules.
        state: before the first decision.
        actor: observation -> keep logits.
        noise: [T, B, N] uniform in [0, 1): an agent stays where its chance to stay is above it.
    """
    shape = (state.layout.images, state.total)
    observations, actions, log_probs, alive = [], [], [], [torch.ones(shape, dtype=torch.bool)]
    alive[0] = alive[0].to(state.x.device)
    for stage in range(len(game.stages)):
        obs = game.observe(state)
        logits = actor(obs)
        action = noise[stage, obs.scene, obs.agent] < logits.sigmoid()
        state = game.step(state, action, logits)
        living = state.position[state.agent_rows] + state.agents.image * state.total
        observations.append(obs)
        actions.append(action)
        log_probs.append(log_prob(logits, action))
        alive.append(torch.zeros_like(alive[0]).view(-1).index_fill_(0, living, True).view(shape))
    return Rollout(state, observations, actions, log_probs, torch.stack(alive))


@torch.no_grad()
def set_out(game: TokenGame, actor: ContextActor, images: Tensor, keep: float, ranks: Ranks) -> None:
    """Set the biases so that a threshold keeps a share `keep` of the living at each stage, its root at the first.

    Whatever leaves at the first stage is missed by all later blocks. With one bias for all stages next to nobody would
    leave early and far too many late, for tokens grow alike with depth (docs/LOG.md).

    Args:
        game: the rules.
        actor: changed in place.
        images: [B, channels, height, width] this process's part of the first batch.
        keep: share of the agents alive, of all images and processes together.
        ranks: the processes that train together.
    """
    shares = [keep**0.5] + [keep] * (len(game.stages) - 1)
    actor.line.data[:, -1] -= thresholds_for(game, actor, images, shares, ranks)


def thresholds_for(
    game: TokenGame, actor: ContextActor, images: Tensor, shares: Sequence[float], ranks: Ranks
) -> Tensor:
    """[T] keep logits above which these shares of the living stay, those of earlier stages being in force.

    Args:
        game: the rules.
        actor: observation -> keep logits.
        images: [B, channels, height, width] this process's part of a batch.
        shares: [T] of the agents alive before each decision, of all images and processes together.
        ranks: the processes that train together.
    """
    found: list[Tensor] = []

    def decide(obs: Observation) -> Tensor:
        logits = actor(obs)
        everybody = torch.cat(ranks.gather(logits.cpu()))
        found.append(everybody.quantile(1 - shares[len(found)]).to(logits))
        return logits - found[-1]

    game.play(images, decide)
    return torch.stack(found)
