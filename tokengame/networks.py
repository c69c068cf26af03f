"""Actor and critic: small networks shared by all agents.

Rows are looked up by `index_select`: the gradient of indexing by a tensor is summed by several threads in any order,
and the same seed would give other bits.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokengame.config import ActorConfig
from tokengame.state import EXTRAS, Observation


class Line(NamedTuple):
    """The linear part of the context actor's logits; at the start all there is."""

    slope: float
    """on centred log attention; alone it is a fair adaptive threshold"""
    leader: float
    """on the similarity to a more attended token: whoever has a good absorber may leave"""
    dither: float
    """on the ordered dither"""
    bias: float
    """training sets out by setting it anew, see `rollout.set_out`"""


WARM = {"drop": Line(1.5, 0.0, 0.5, 0.0), "merge": Line(1.5, -6.0, 0.25, 3.6)}
"""Start values by transition (docs/LOG.md); the bias makes up for the usual similarity of 0.6."""


def _linear(inputs: int, outputs: int, gain: float = math.sqrt(2)) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _mlp(widths: tuple[int, ...], outputs: int, last_gain: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, width in pairwise(widths):
        layers += [_linear(inputs, width), nn.Tanh()]
    return nn.Sequential(*layers, _linear(widths[-1], outputs, last_gain))


class TokenActor(nn.Module):
    """RL4EViT's actor: [x_i, one-hot agent id] -> 64 -> 256 -> 64 -> (prune, keep), tanh, orthogonal.

    The one-hot's part of the first layer is a row look-up. Bound to `agents` positions, so to one resolution.
    """

    def __init__(self, dim: int, agents: int, hidden: tuple[int, ...]):
        super().__init__()
        joint = torch.empty(hidden[0], dim + agents)
        nn.init.orthogonal_(joint, math.sqrt(2))
        self.token = nn.Linear(dim, hidden[0])
        self.token.weight.data.copy_(joint[:, :dim])
        nn.init.zeros_(self.token.bias)
        self.identity = nn.Parameter(joint[:, dim:].T.contiguous())
        self.rest = _mlp(hidden, 2, 0.01)

    def forward(self, obs: Observation) -> Tensor:
        """[A] keep logits: a softmax over (prune, keep) is a Bernoulli of their difference."""
        identity = self.identity.index_select(0, obs.agent)
        hidden = torch.tanh(self.token(obs.token.to(self.token.weight.dtype)) + identity)
        prune, keep = self.rest(hidden).unbind(1)
        return keep - prune

    def macs_per_agent(self) -> int:
        """Multiply-accumulates of one decision; the identity look-up costs none."""
        return self.token.weight.numel() + sum(m.weight.numel() for m in self.rest if isinstance(m, nn.Linear))


class ContextActor(nn.Module):
    """Own and class token (normalised), stage and attention features -> one keep logit; holds at any resolution."""

    def __init__(self, dim: int, heads: int, stages: int, hidden: tuple[int, ...], warm: Line = WARM["drop"]):
        super().__init__()
        self.norm_token = nn.LayerNorm(dim)
        self.norm_cls = nn.LayerNorm(dim)
        self.token = _linear(dim, hidden[0])
        self.cls = _linear(dim, hidden[0])
        self.features = _linear(heads + len(EXTRAS), hidden[0])
        self.stage = nn.Parameter(torch.zeros(stages, hidden[0]))
        self.rest = _mlp(hidden, 1, 0.01)
        self.line = nn.Parameter(torch.tensor(warm).repeat(stages, 1))  # [T, 4], see `Line`

    def forward(self, obs: Observation) -> Tensor:
        """[A] keep logits."""
        dtype = self.features.weight.dtype
        scene = self.cls(self.norm_cls(obs.cls.to(dtype))) + self.stage.index_select(0, obs.stage)  # [S, h]
        line = self.line.index_select(0, obs.stage)  # [S, 4]
        if len(scene) > 1:  # one scene alone is broadcast
            scene, line = (values.index_select(0, obs.scene) for values in (scene, line))
        slope, leader, dither, bias = line.unbind(1)
        features = obs.features.to(dtype)
        own = self.token(self.norm_token(obs.token.to(self.token.weight.dtype)))
        hidden = own.to(dtype).add_(self.features(features)).add_(scene)
        logits = torch.addcmul(bias, slope, obs.attention.to(dtype)).addcmul(leader, obs.leader.to(dtype))
        return self.rest(hidden.tanh_()).squeeze(1) + logits.addcmul(dither, obs.dither.to(dtype))

    def beside(self, backbone: torch.dtype) -> ContextActor:
        """A copy whose widest layer, on the agents' own rows, computes in the backbone's number format."""
        other = copy.deepcopy(self)
        other.norm_token.to(backbone)
        other.token.to(backbone)
        return other

    def macs_per_agent(self) -> int:
        """Multiply-accumulates of one decision, the scene's share (at most one row in N) left out."""
        layers = [self.token, self.features, *(m for m in self.rest if isinstance(m, nn.Linear))]
        return sum(layer.weight.numel() for layer in layers)


Actor = TokenActor | ContextActor


class Critic(nn.Module):
    """Value of agent i's state from the agent-specific global state [x_i ; x_CLS] (and, where seen, its features).

    Not `central`, it sees x_i alone: independent learners, IPPO.
    """

    def __init__(
        self, dim: int, heads: int, stages: int, hidden: tuple[int, ...], features: bool, central: bool = True
    ):
        super().__init__()
        self.norm = nn.LayerNorm(dim) if features else nn.Identity()
        self.token, self.cls = _linear(dim, hidden[0]), _linear(dim, hidden[0]) if central else None
        self.features = _linear(heads + len(EXTRAS), hidden[0]) if features else None
        self.stage = nn.Parameter(torch.zeros(stages, hidden[0]))
        self.rest = _mlp(hidden, 1, 0.01)  # starts near 0: a wrong baseline is worse than none

    def forward(self, obs: Observation) -> Tensor:
        """[A] values."""
        scene = self.stage.index_select(0, obs.stage)
        if self.cls is not None:
            scene = scene + self.cls(self.norm(obs.cls.to(self.cls.weight.dtype)))
        hidden = self.token(self.norm(obs.token.to(self.token.weight.dtype))) + scene.index_select(0, obs.scene)
        if self.features is not None:
            hidden = hidden + self.features(obs.features.to(self.token.weight.dtype))
        return self.rest(torch.tanh(hidden)).squeeze(1)


def build_actor(config: ActorConfig, shape: dict[str, Any]) -> Actor:
    """Actor for a backbone and game of `shape` (dim, heads, agents, stages, transition)."""
    if config.observation == "token_id":
        return TokenActor(shape["dim"], shape["agents"], config.hidden)
    warm = WARM[shape["transition"]]
    return ContextActor(shape["dim"], shape["heads"], shape["stages"], config.hidden, warm)
