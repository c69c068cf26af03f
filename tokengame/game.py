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

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengame.backbone import Backbone, Heads, Memory
from tokengame.config import GameConfig
from tokengame.ops import Layout, keep_at_least_one, ordered_dither, segment_mean
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
        has_cls = self.backbone.model.has_class_token
        cls = state.layout.first(state.x) if has_cls else segment_mean(state.x, state.layout)
        if self.features and state.heads is not None:
            features = self._features(state, state.heads)
        else:
            features = torch.zeros(agents.rows, self.backbone.heads + len(EXTRAS), device=device)
        stage = torch.full((agents.images,), state.stage, device=device)
        position = state.of_agents(state.position)
        return Observation(state.of_agents(state.x), cls, features, agents.image, position, stage, agents, state.total)

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
        stays = self._with_prefix(state, keep)
        rows = torch.nonzero_static(stays, size=layout.rows).squeeze(1)
        x, size = self._absorb(state, keep, stays, rows) if self.merge else (state.x.index_select(0, rows), None)
        position, kept, memory = state.position.index_select(0, rows), (*state.kept, agents.count), None
        if self.merge:
            assert state.heads is not None
            memory = Memory(state.heads.keys, state.heads.values, state.layout, state.bias)
        return State(x, position, layout, agents, state.total, state.dither, size, memory=memory, kept=kept)

    def step(self, state: State, keep: Tensor, logits: Tensor) -> State:
        """`remove`, then play on to the next decision or the end."""
        return self._advance(self.remove(state, keep, logits), self._starts_at(state.stage + 1))

    def finish(self, state: State) -> State:
        """Run a state without decisions left to the end of the game."""
        return self._advance(state, self._starts_at(state.stage))

    def spare(self, state: State, images: Tensor) -> State:
        """Some images [b] of a state about to decide, run to the end of the game with all their agents."""
        state = replace(state, heads=None, similarity=None).take(images)
        x, _ = self.backbone.run(self._decides_before(state.stage), self.end, state.x, state.layout, state.bias)
        size = torch.ones_like(x[:, 0], dtype=torch.float32) if self.merge and state.size is None else state.size
        kept = (*state.kept, *[state.agents.count] * (len(self.stages) - state.stage))
        return replace(state, x=x, size=size, kept=kept)

    @staticmethod
    def _with_prefix(state: State, keep: Tensor) -> Tensor:
        """[A] -> [M] bool: prefix tokens always stay."""
        if state.layout.uniform:
            return F.pad(state.agents.pad(keep), (state.prefix, 0), value=True).flatten()
        stays = torch.ones(state.layout.rows, dtype=torch.bool, device=keep.device)
        return stays.index_copy_(0, state.agent_rows, keep)

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
        stop, x = self._decides_before(state.stage), state.x
        if state.memory is not None:
            x, half = self.backbone.ask(half // 2, x, state.layout, state.memory), half + 1
        x, qkv = self.backbone.run(half, stop, x, state.layout, state.bias)
        state = replace(state, x=x, memory=None)
        if state.stage == len(self.stages):
            return state
        if self.merge:
            heads = self.backbone.look(stop // 2, x, state.layout)
            with torch.no_grad():
                return replace(state, heads=heads, similarity=self._similarity(state, heads))
        return state if qkv is None else replace(state, heads=self.backbone.read_heads(qkv, state.layout))

    @staticmethod
    def _similarity(state: State, heads: Heads) -> Tensor:
        """Cosine of values; -1 to oneself, less to padding, who cannot absorb anybody.

        Half of the numbers of each head, which have no order: as good as all of them (docs/LOG.md), at half the cost.
        """
        agents, half = state.agents, (heads.values.shape[2] + 1) // 2
        metric = F.normalize(heads.values[..., :half].flatten(1), dim=1)
        metric = agents.pad(state.of_agents(metric))  # [B, L, H * D / 2]
        if agents.uniform:
            similarity = metric @ metric.transpose(1, 2)
        else:
            padding = (agents.mask[:, None].to(metric.dtype) - 1).mul_(2)
            similarity = torch.baddbmm(padding, metric, metric.transpose(1, 2))
        similarity.flatten(1)[:, :: metric.shape[1] + 1].fill_(-1)  # the diagonal
        return similarity

    @staticmethod
    def _features(state: State, heads: Heads) -> Tensor:
        """See `Observation.features`; computed on the padded batch, [B, heads or 1, L]."""
        layout, agents, prefix = state.layout, state.agents, state.prefix
        attention = heads.log_attention(layout, state.bias)[..., prefix:]
        log_size = zero = torch.zeros_like(attention[:, :1])
        if state.bias is not None:
            log_size = layout.pad(state.bias)[:, None, prefix:]
        rows: Tensor
        count: Tensor | int
        if layout.uniform:  # numbers instead of small tensors
            rows, count = torch.full((), layout.longest, device=attention.device), agents.longest
        else:
            rows, count = layout.count[:, None, None], agents.count[:, None, None]
        attention = attention + rows.log()  # [B, H, L]
        mean = attention.exp().sum(1, keepdim=True).clamp_(min=1e-30).log_()  # but for a constant
        known = mean if layout.uniform else mean.masked_fill(~agents.mask[:, None], 0.0)
        centred = mean - known.sum(2, keepdim=True) / count
        similarity = leader = zero
        if state.similarity is not None:
            alike = state.similarity.float()  # [B, L, L]; the maximum of half precision is slow on CPUs
            similarity = alike.amax(2)[:, None]
            # 1 where the second is paid more attention, otherwise -1; in place, many times faster than a mask
            ahead = (centred - centred.transpose(1, 2)).sub_(1e-30).sign_()
            leader = ahead.clamp_(max=alike).amax(2)[:, None]
        alive = zero + count / state.total
        features = torch.cat([attention, centred, log_size, similarity, alive, leader], 1)
        dither = state.dither.index_select(0, state.of_agents(state.position))
        return torch.cat([agents.unpad(features.transpose(1, 2)), dither[:, None]], 1)

    def _absorb(self, state: State, keep: Tensor, stays: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and sizes of the survivors `rows`, every leaving agent's row added to its most similar survivor's.

        A sum is then given the length of the longest row in it. In at least float32 whatever the network computes in:
        many small rows may meet in one.
        """
        leaving, target = self._pair(state, keep, state.layout.rows - len(rows))
        leaving_rows, target_rows = state.agent_rows.index_select(0, leaving), state.agent_rows.index_select(0, target)
        survivor = (stays.cumsum(0) - 1).index_select(0, target_rows)  # index among the survivors
        dtype = torch.promote_types(state.x.dtype, torch.float32)
        x, absorbed = (state.x.index_select(0, some).to(dtype) for some in (rows, leaving_rows))
        size, gone = torch.ones_like(x[:, 0]), torch.ones_like(absorbed[:, 0])
        length = torch.linalg.vector_norm(state.x, dim=1, dtype=dtype)
        longest, others = length.index_select(0, rows), length.index_select(0, leaving_rows)
        longest = longest.scatter_reduce(0, survivor, others, "amax")
        if state.size is not None:
            size, gone = state.size.index_select(0, rows), state.size.index_select(0, leaving_rows)
            x, absorbed = x.mul_(size[:, None]), absorbed.mul_(gone[:, None])
        x = x.index_add_(0, survivor, absorbed)
        x = x * (longest / x.norm(dim=1).clamp(min=1e-12))[:, None]
        return x.to(state.x.dtype), size.index_add(0, survivor, gone)

    @staticmethod
    def _pair(state: State, keep: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """[number] each: the agents who leave, and for each the most similar one of its image who stays."""
        agents = state.agents
        assert state.similarity is not None
        leaving = torch.nonzero_static(~keep, size=number).squeeze(1)
        image = agents.image.index_select(0, leaving)
        slot = agents.slot.index_select(0, leaving)
        similarity = state.similarity.flatten(0, 1).index_select(0, slot)  # [number, L]
        keepers = agents.pad(keep).index_select(0, image)
        target = similarity.masked_fill_(~keepers, float("-inf")).max(1).indices  # much faster than argmax
        return leaving, target + agents.start.index_select(0, image)
