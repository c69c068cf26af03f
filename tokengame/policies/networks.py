"""Actor and critic: small networks shared by all agents.

Rows are selected by `index_select`: threads sum the gradient of indexing by a tensor in any order, so the same seed
would not repeat bitwise.
"""

from __future__ import annotations

import math
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokengame.backbones import Backbone
from tokengame.config import MOST_WEIGHTS, ActorConfig, GameConfig
from tokengame.game.state import Observation
from tokengame.kernels.plain import ActorWeights, LinearWeights
from tokengame.modules import hooks_of
from tokengame.packed.heads import EXTRA_FEATURES
from tokengame.ranges import require


class Scale(NamedTuple):
    """Centre and inverse spread of a feature on ViT-Ti/16 and ImageNet, so that all weights have one magnitude."""

    centre: float = 0.0
    factor: float = 1.0


SCALES = {
    "attention": Scale(),
    "log size": Scale(0.5, 1.5),
    "similarity": Scale(0.6, 6.0),
    "alive": Scale(0.7, 2.0),
    "leader": Scale(0.6, 6.0),
    "dither": Scale(),
}
"""of the features that follow the attention of each head; that attention is taken relative to their centred mean"""

START = {"drop": {"attention": 1.5, "dither": 0.5}, "merge": {"attention": 1.5, "leader": -1.0, "dither": 0.25}}
"""Weights of the context actor before it has learned, by transition; the others are 0 (docs/LOG.md). Centred log
attention is an adaptive threshold, and a token with a similar, more attended neighbour can be merged. Training starts
by initialising the biases (`learning.rollout.initialise_biases`); without learning this is the starting rule
(`runtime.rule`)."""


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

    def of_images(self, _first: int, _last: int) -> TokenActor:
        """The policy for some images of a batch: the same, it decides for every image alone."""
        return self

    @property
    def decision(self) -> Decision | None:
        """The layers; None where one was replaced, or fits no other."""
        if type(self.rest) is not nn.Sequential or len(self.rest) % 2 == 0:
            return None
        layers, between = [self.token, *self.rest[::2]], self.rest[1::2]
        if not all(type(layer) is nn.Linear for layer in layers) or not all(type(step) is nn.Tanh for step in between):
            return None
        if not _fit_together(layers) or self.identity.shape[1:] != layers[0].weight.shape[:1]:
            return None
        weights = tuple(LinearWeights(layer.weight, layer.bias) for layer in layers)
        return Decision(actor=ActorWeights(weights, self.identity))

    def macs_per_agent(self) -> int:
        """Multiply-accumulates of one decision; the identity look-up costs none."""
        return self.token.weight.numel() + sum(m.weight.numel() for m in self.rest if isinstance(m, nn.Linear))


def _fit_together(layers: list[nn.Linear]) -> bool:
    """Whether each layer takes what the one before it gives, and the last gives (prune, keep)."""
    outputs = [len(layer.weight) for layer in layers]
    biases = all(layer.bias is None or layer.bias.shape == layer.weight.shape[:1] for layer in layers)
    return biases and outputs == [*(layer.weight.shape[1] for layer in layers[1:]), 2]


class Decision(NamedTuple):
    """What a forward pass in one call needs of a policy: weights of a line, or an actor that reads tokens and ids."""

    weights: Tensor | None = None
    """[T, F] of the observed features at each stage, a bias last"""
    actor: ActorWeights | None = None
    """of the same layers at all stages"""
    shift: Tensor | None = None
    """[T, B] subtracted from the logits of each image, or None"""
    shares: tuple[float, ...] | None = None
    """of T: logits are taken relative to that of the last token in this share of an image's (see `BudgetActor`)"""


def decision_of(policy: Any) -> Decision | None:
    """What the compiled kernels play a policy by; None where it is more than that, has hooks, or lies elsewhere.

    Only a class that defines `decision` itself counts: a subclass may have another `forward`.
    """
    if not isinstance(policy, nn.Module) or "decision" not in vars(type(policy)):
        return None
    if any(hooks_of(module) or "forward" in vars(module) for module in policy.modules()):
        return None
    decision: Decision | None = policy.decision  # type: ignore[assignment]
    plain = decision is not None and all(map(_is_plain, chain(policy.parameters(), policy.buffers())))
    return decision if plain else None


def _is_plain(weight: Tensor) -> bool:
    """Whether it is float32 numbers in this machine's memory, not a class of tensors of its own."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided
    return plain and weight.dtype == torch.float32 and weight.device.type == "cpu"


class ContextActor(nn.Module):
    """Observed features -> keep logit, linear at each stage; works at any resolution.

    A hidden layer on the tokens themselves took a quarter of the decisions' time and improved nothing on held-back
    images (docs/LOG.md).

    Args:
        heads: of the backbone.
        stages: of the game.
        start: weights of features before anything is learned.
    """

    fold: Tensor
    """[F, F] from weights of scaled features and a bias to weights of the features as they are"""

    def __init__(self, heads: int, stages: int, start: dict[str, float]):
        super().__init__()
        self.heads = heads
        scales = [Scale()] * heads + [SCALES[name] for name in EXTRA_FEATURES] + [Scale()]  # the last of a bias
        fold = torch.diag(torch.tensor([scale.factor for scale in scales]))
        fold[-1, :-1] = -torch.tensor([scale.centre * scale.factor for scale in scales[:-1]])
        fold[heads, :heads] = -1.0  # attention of a head is taken relative to the mean
        self.register_buffer("fold", fold, persistent=False)
        weight = torch.tensor([0.0] * heads + [start.get(name, 0.0) for name in EXTRA_FEATURES] + [0.0])
        self.weight = nn.Parameter(weight.repeat(stages, 1))  # [T, F], the last column a bias

    def forward(self, obs: Observation) -> Tensor:
        """[A] keep logits."""
        return self.scores(obs)

    def scores(self, obs: Observation) -> Tensor:
        """[A] by which agents are ranked: the line itself."""
        features = obs.features.to(self.weight.dtype)
        if obs.at_stage is not None:
            weight = torch.mv(self.fold, self.weight[obs.at_stage])
            return torch.addmv(weight[-1:], features, weight[:-1])
        return self.by_rows(obs)

    def by_rows(self, obs: Observation) -> Tensor:
        """[A] keep logits, each computed on its own: bitwise the same whatever else is in the batch."""
        weights = self.line.index_select(0, obs.stage).index_select(0, obs.image)  # [A, F]
        return (obs.features.to(weights.dtype) * weights[:, :-1]).sum(1) + weights[:, -1]

    def of_images(self, _first: int, _last: int) -> ContextActor:
        """The policy for some images of a batch: the same, it decides for every image alone."""
        return self

    @property
    def line(self) -> Tensor:
        """[T, F] weights of each stage for features as they are observed, a bias last."""
        return self.weight @ self.fold.T

    @property
    def decision(self) -> Decision:
        """The line."""
        return Decision(self.line)

    def macs_per_agent(self) -> int:
        """Multiply-accumulates of one decision."""
        return self.weight.shape[1]


SMALLEST = 1e-6
"""keep logit of a token that is within its image's budget by a tie"""


class BudgetActor(ContextActor):
    """The starting rule with a budget: of each image the same share of tokens stays, those with the best logits.

    A keep logit is relative to that of the last token within the budget, so that the threshold 0 keeps the budget and
    others shift it. Computed row by row: the same observations give an image the same decisions in any batch, bitwise.

    Args:
        heads, stages, start: as in `ContextActor`.
        shares: of each image's tokens that stay at each stage, of those before it.
    """

    def __init__(self, heads: int, stages: int, start: dict[str, float], shares: tuple[float, ...]):
        super().__init__(heads, stages, start)
        self.shares = shares

    def forward(self, obs: Observation) -> Tensor:
        """[A] keep logits."""
        layout, share = obs.layout, self._share(obs)
        assert layout is not None
        logits = self.by_rows(obs).float()
        padded = layout.pad(logits, float("-inf"))  # [B, longest]
        number = (layout.count * share).round().clamp(min=1).long()[:, None]
        order = {} if torch.compiler.is_exporting() else {"stable": True}  # ONNX's order is stable without a name
        ranked = padded.sort(dim=1, descending=True, **order)
        numbers = torch.arange(layout.longest, device=padded.device).expand_as(padded)
        rank = torch.empty_like(ranked.indices).scatter_(1, ranked.indices, numbers)
        relative = padded - ranked.values.gather(1, number - 1)
        within = relative.clamp(min=SMALLEST)
        return layout.unpad(torch.where(rank < number, within, relative.clamp(max=0.0)))

    @property
    def decision(self) -> Decision:
        """The line, and the budgets."""
        return Decision(self.line, shares=self.shares)

    def _share(self, obs: Observation) -> Tensor | float:
        """Of each image [B], or one of all of them, which copies nothing from the host."""
        if obs.at_stage is not None:
            return self.shares[obs.at_stage]
        return torch.tensor(self.shares, device=obs.stage.device)[obs.stage]


Actor = TokenActor | ContextActor


class Critic(nn.Module):
    """Value of agent i's state from the agent-specific global state [x_i ; x_CLS] (and its features, where observed).

    Without `central` it reads x_i alone: independent learners, IPPO. With `agents` it also reads the one-hot id, of so
    many agents; its part of the first layer is a row look-up.
    """

    def __init__(
        self, dim: int, heads: int, stages: int, hidden: tuple[int, ...], features: bool, central: bool = True,
        agents: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.norm = nn.LayerNorm(dim) if features else nn.Identity()
        self.token, self.cls = _linear(dim, hidden[0]), _linear(dim, hidden[0]) if central else None
        self.features = _linear(heads + len(EXTRA_FEATURES), hidden[0]) if features else None
        self.stage = nn.Parameter(torch.zeros(stages, hidden[0]))
        self.rest = _mlp(hidden, 1, 0.01)  # starts near 0: a wrong baseline is worse than none
        self.identity = None if agents is None else nn.Parameter(_linear(agents, hidden[0]).weight.T.contiguous())

    def forward(self, obs: Observation) -> Tensor:
        """[A] values."""
        shared = self.stage.index_select(0, obs.stage)  # of all agents of an image at a stage
        if self.cls is not None:
            shared = shared + self.cls(self.norm(obs.cls.to(self.cls.weight.dtype)))
        hidden = self.token(self.norm(obs.token.to(self.token.weight.dtype))) + shared.index_select(0, obs.image)
        if self.features is not None:
            hidden = hidden + self.features(obs.features.to(self.token.weight.dtype))
        if self.identity is not None:
            hidden = hidden + self.identity.index_select(0, obs.agent)
        return self.rest(torch.tanh(hidden)).squeeze(1)


def actor_shape(backbone: Backbone, game: GameConfig) -> dict[str, Any]:
    """What the size of an actor depends on: dim, heads, agents, stages, transition.

    Args:
        backbone: that it decides for.
        game: whose stages it has.
    """
    return {
        "dim": backbone.dim,
        "heads": backbone.heads,
        "agents": backbone.patches,
        "stages": len(game.blocks(backbone.depth)),
        "transition": game.transition,
    }


def build_actor(config: ActorConfig, shape: dict[str, Any]) -> Actor:
    """Actor for a backbone and game of `shape` (dim, heads, agents, stages, transition).

    Raises:
        TokenGameError: it has more weights than a policy may have.
    """
    weights = sum(math.prod(size) for size in weight_shapes(config, shape).values())
    large = (
        f"an actor of {weights:,} weights is too large, {MOST_WEIGHTS:,} are possible; give a smaller --actor.hidden"
    )
    require(weights <= MOST_WEIGHTS, large)
    return _actor(config, shape)


def weight_shapes(config: ActorConfig, shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and size of each weight of such an actor; none is allocated."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in _actor(config, shape).state_dict().items()}


def _actor(config: ActorConfig, shape: dict[str, Any]) -> Actor:
    if config.observation == "token_id":
        return TokenActor(shape["dim"], shape["agents"], config.hidden)
    start, stages = START[shape["transition"]], shape["stages"]
    if config.shares is None:
        return ContextActor(shape["heads"], stages, start)
    require(len(config.shares) == stages, f"actor.shares must have {stages} entries, one a stage")
    return BudgetActor(shape["heads"], stages, start, config.shares)
