"""The Markov game: every patch token of an image is an agent that decides, stage after stage, whether it stays.

One image is one episode; a batch is played at once on packed rows, and a pruned agent's row is really gone. Prefix
tokens never play. Pruning is final. Training, run time and measurement all play this one game.

`drop`: stage at block s decides before block s; attention is observed in block s - 1.
`merge`: it decides inside the attention of block s, when all have keys and values and before anybody has asked: whoever
leaves is heard once more, but asks no more. Each pruned token is absorbed by the survivor whose values are most similar
(cosine over all heads: what a token tells the others; half the KL of ToMe's keys, docs/LOG.md): size-weighted mean of
the rows, stretched to the length of the longest of them (ToFu's MLERP, Kim et al. 2024: a mean is shorter, and what
later blocks add to it would weigh more), sizes added, log size added to the attention logits from then on, as in ToMe
(Bolya et al. 2023).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tokengame.backbone import Backbone
from tokengame.config import GameConfig
from tokengame.decisions import absorb, drop, features_of, similarity_of
from tokengame.ops import Layout, Look, Memory, keep_at_least_one, ordered_dither, segment_mean
from tokengame.state import EXTRAS, Decide, Observation, State


class TokenGame:
    """The game on one backbone: `reset`, then `observe` and `step` for each stage, then `logits`.

    Args:
        backbone: the network that is played through.
        config: stages and transition.
        features: whether observations carry attention features; where nobody looks at them they stay zero.
    """

    def __init__(self, backbone: Backbone, config: GameConfig, features: bool = True):
        self.backbone, self.config, self.features = backbone, config, features
        self.merge = config.transition == "merge"
        self.stages = config.blocks(backbone.depth)

    @property
    def end(self) -> int:
        """The half-block (see `Backbone.run`) up to which patches play; what follows concerns prefix tokens alone."""
        return self.backbone.end(2 * self.stages[-1] + self.merge)

    def begin(self, images: Tensor) -> State:
        """Embed a batch [B, channels, height, width]; no block has run."""
        tokens, prefix = self.backbone.embed(images), self.backbone.prefix
        batch, rows, _ = tokens.shape
        position = torch.arange(-prefix, rows - prefix, device=tokens.device).clamp(min=-1)
        grid = self.backbone.model.patch_embed.dynamic_feat_size(tuple(images.shape[2:]))
        return State(
            x=tokens.flatten(0, 1),
            position=position.repeat(batch),
            layout=Layout([rows] * batch, tokens.device),
            agents=Layout([rows - prefix] * batch, tokens.device),
            total=rows - prefix,
            dither=ordered_dither(*grid).to(tokens.device),
        )

    def reset(self, images: Tensor) -> State:
        """`begin`, and run to the first decision."""
        return self._advance(self.begin(images), 0)

    def observe(self, state: State) -> Observation:
        """What the living agents see before the next decision."""
        agents, device = state.agents, state.x.device
        stage = torch.full((agents.images,), state.stage, device=device)
        if self.features and state.heads is not None and state.heads.seen is not None:
            features, agent, scene, row = state.heads.seen
        else:
            if self.features and state.heads is not None:
                features = features_of(state, state.heads, self.merge)
            else:
                features = torch.zeros(agents.rows, self.backbone.heads + len(EXTRAS), device=device)
            scene, agent, row = agents.image, state.of_agents(state.position), state.agent_rows
        has_cls, layout = self.backbone.model.has_class_token, state.layout
        lead = partial(layout.first, state.x) if has_cls else partial(segment_mean, state.x, layout)
        return Observation(
            state.x, lead, features, scene, agent, stage, agents, state.total, row, state.stage
        )  # fmt: skip

    def turn(self, state: State, decide: Decide) -> tuple[State, Tensor]:
        """Run a state that has begun, or whose pruned agents are gone, to its decision; also the keep logits [A]."""
        state = self._advance(state, self._starts_at(state.stage))
        with torch.no_grad():  # a decision has none
            return state, decide(self.observe(state))

    def remove(self, state: State, keep: Tensor, logits: Tensor) -> State:
        """The state without the agents that decided to leave.

        Args:
            state: before the decision.
            keep: [A] bool, the agents' actions.
            logits: [A] keep logits; they say who stays where all of an image's agents would leave.
        """
        counts = state.agents.per_image(keep)
        if 0 in counts:
            keep = keep_at_least_one(keep, logits, state.agents)
            counts = [max(n, 1) for n in counts]
        agents = Layout(counts, keep.device)
        layout = Layout([n + state.prefix for n in counts], keep.device)
        rest, memory = (absorb if self.merge else drop)(state, keep, layout), None
        if self.merge:
            assert state.heads is not None
            memory = Memory(state.heads.keys, state.heads.values, state.layout, state.bias)
        return State(
            rest.x, rest.position, layout, agents, state.total, state.dither, rest.size, memory=memory,
            absorber=rest.absorber, kept=(*state.kept, agents.count),
        )  # fmt: skip

    def step(self, state: State, keep: Tensor, logits: Tensor) -> State:
        """`remove`, then play on to the next decision or the end."""
        return self._advance(self.remove(state, keep, logits), self._starts_at(state.stage + 1))

    def finish(self, state: State) -> State:
        """Run a state without decisions left to the end of the game."""
        return self._advance(state, self._starts_at(state.stage))

    def spared(self, tokens: Tensor) -> Tensor:
        """[b, classes] what is predicted of tokens [b, prefix + N, C] before the first decision if all of them stay."""
        layout = Layout([tokens.shape[1]] * len(tokens), tokens.device)
        x = self.backbone.run(self._decides_before(0), self.end, tokens.flatten(0, 1), layout).x
        return self.backbone.predict(self.end, x, layout)

    def play(self, images: Tensor, decide: Decide, threshold: float = 0.0) -> State:
        """A whole game, deterministic: an agent stays where its keep logit exceeds `threshold`."""
        return self.play_on(*self.turn(self.begin(images), decide), decide, threshold)

    def play_on(self, state: State, logits: Tensor, decide: Decide, threshold: float = 0.0) -> State:
        """The rest of a game that is at a decision, about which agents have the keep logits [A]."""
        state = self.remove(state, logits > threshold, logits)
        while state.stage < len(self.stages):
            state, logits = self.turn(state, decide)
            state = self.remove(state, logits > threshold, logits)
        return self.finish(state)

    def logits(self, state: State) -> Tensor:
        """[B, classes] the network's prediction at the end of the game."""
        return self.backbone.predict(self.end, state.x, state.layout, state.size)

    def _decides_before(self, stage: int) -> int:
        """The half-block (see `Backbone.run`) before which a stage decides; past the last stage, the end."""
        return 2 * self.stages[stage] if stage < len(self.stages) else self.end

    def _starts_at(self, stage: int) -> int:
        """The half-block from which a state runs when `stage` decisions are behind it."""
        return self._decides_before(stage - 1) if stage else 0

    def _advance(self, state: State, half: int) -> State:
        """Run from half-block `half` to the next decision, or to the end."""
        stop, decides = self._decides_before(state.stage), state.stage < len(self.stages)
        look = None
        if self.merge and decides:
            look = Look(state.position, state.dither, state.total, state.prefix, self.features)
        ran = self.backbone.run(half, stop, state.x, state.layout, state.bias, state.memory, look)
        heads, similarity = ran.heads, None
        if heads is not None:
            with torch.no_grad():
                similarity = similarity_of(state, heads)
        elif decides and ran.qkv is not None:
            heads = self.backbone.read_heads(ran.qkv, state.layout)
        return replace(state, x=ran.x, memory=None, heads=heads, similarity=similarity)
