"""The Markov game on one backbone: `reset`, then `observe` and `step` for each stage, then `predict`.

One image is one episode. A batch is played at once on packed rows, and a pruned token's row is really gone. Prefix
tokens are never pruned, and pruning is final. Training, run time, features and measurement all play this game.

`drop`: the stage at block s decides before block s; agents observe the attention of block s - 1.
`merge`: it decides inside the attention of block s, when all tokens have keys and values and none has a query. A pruned
token keeps its key and value in that attention and has no query. The kept token with the most similar values (cosine
over all heads; half the KL of ToMe's keys, docs/LOG.md) absorbs it: size-weighted mean of the rows, stretched to the
length of the longest of them (ToFu's MLERP, Kim et al. 2024: a mean is shorter, and what later blocks add to it would
weigh more), sizes added, log size added to the attention logits from then on, as in ToMe (Bolya et al. 2023).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tokengame import backends
from tokengame.backbones.base import Backbone
from tokengame.backends import Backend
from tokengame.backends.base import predict
from tokengame.backends.decisions import no_features
from tokengame.config import GameConfig
from tokengame.game.state import Decide, Observation, State, ordered_dither
from tokengame.game.transition import remove
from tokengame.packed.attention import Kernel, deterministic_attention
from tokengame.packed.heads import ObservationRequest
from tokengame.packed.layout import RaggedLayout
from tokengame.packed.rows import segment_mean


class TokenGame:
    """The game on one backbone.

    Args:
        backbone: the network that is played through.
        config: stages and transition.
        features: whether policies read `Observation.features`; otherwise they are zeros.
        attention: inside each image. `deterministic_attention` repeats bitwise, `fastest_attention` measures first.
        keep_patches: whether patches are computed to the last block, also where the prediction does not need them.

    Raises:
        TokenGameError: a stage lies outside the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: GameConfig,
        features: bool = True,
        attention: Kernel = deterministic_attention,
        keep_patches: bool = False,
    ):
        self.backbone, self.config, self.features, self.attention = backbone, config, features, attention
        self.keep_patches, self.merge = keep_patches, config.transition == "merge"
        self.stages = config.blocks(backbone.depth)

    @property
    def end(self) -> int:
        """The half-block (see `Backend.run`) up to which patches are computed; prefix tokens go on alone."""
        if self.keep_patches:
            return 2 * self.backbone.depth
        return self.backbone.last_half(2 * self.stages[-1] + self.merge)

    def backend_for(self, images: Tensor) -> Backend:
        """The backend that computes a game on such images."""
        return backends.choose(self.backbone, images, self.attention)

    def reset(self, images: Tensor, backend: Backend | None = None) -> State:
        """Run a batch [B, channels, height, width] to its first decision.

        Args:
            images: the batch.
            backend: what computes the game; by default the best one for these images.
        """
        return self._advance(self._embedded(images, backend or self.backend_for(images)), 0)

    def _embedded(self, images: Tensor, backend: Backend) -> State:
        (tokens, places), prefix = self.backbone.drop_patches(backend.embed(images)), self.backbone.prefix
        batch, rows, _ = tokens.shape
        dither = ordered_dither(*self.backbone.grid(*images.shape[2:])).to(tokens.device)
        if places is None:
            places = torch.arange(-prefix, rows - prefix, device=tokens.device).clamp(min=-1).repeat(batch, 1)
        layout = self.backbone.whole_layout(tokens, self.backbone.grid(*images.shape[2:]))
        if layout.places is not None:
            layout = layout.at(layout.places._replace(position=places.flatten()))
        return State(
            backend=backend,
            x=tokens.flatten(0, 1),
            position=places.flatten(),
            layout=layout,
            agents=RaggedLayout([rows - prefix] * batch, tokens.device),
            total=len(dither),
            dither=dither,
        )

    def observe(self, state: State) -> Observation:
        """What the agents of a state before a decision observe."""
        agents, layout, seen = state.agents, state.layout, state.observed
        stage = torch.full((agents.images,), state.stage, device=state.x.device)
        if self.backbone.has_class_token:
            class_tokens = partial(layout.first, state.x)
        else:
            class_tokens = partial(segment_mean, state.x, layout)
        if seen is None:  # no attention has run
            features, agent = no_features(agents, self.backbone.heads), state.of_agents(state.position).long()
            image, row = agents.image, state.agent_rows
        else:
            features, agent, image, row = seen[:4]
        return Observation(
            state.x, class_tokens, features, image, agent, stage, agents, state.total, row, state.stage
        )  # fmt: skip

    def step(self, state: State, keep: Tensor, logits: Tensor) -> State:
        """Carry out a decision, then run to the next one or to the end.

        Args:
            state: before the decision.
            keep: [A] bool, the agents' actions.
            logits: [A] keep logits (see `transition.remove`).
        """
        return self._advance(remove(state, keep, logits, self.merge), self._decides_before(state.stage))

    def play(self, images: Tensor, decide: Decide, threshold: float = 0.0, backend: Backend | None = None) -> State:
        """A whole deterministic game: an agent is kept where its keep logit exceeds `threshold`."""
        return self.play_on(self.reset(images, backend), decide, threshold)

    def play_on(self, state: State, decide: Decide, threshold: float = 0.0) -> State:
        """The rest of a game."""
        while state.stage < len(self.stages):
            logits, keep = self.decisions(state, decide, threshold)
            state = self.step(state, keep, logits)
        return state

    @torch.no_grad()
    def decisions(self, state: State, decide: Decide, threshold: float) -> tuple[Tensor, Tensor]:
        """[A] keep logits, and whether each exceeds `threshold`; they have no gradient.

        At -inf (dial 0) every agent is kept, whatever the policy says.
        """
        if threshold == -math.inf:
            return torch.zeros(state.agents.rows, device=state.x.device), torch.ones_like(
                state.of_agents(state.position), dtype=torch.bool
            )
        logits = decide(self.observe(state))
        return logits, logits > threshold

    def predict(self, state: State) -> Tensor:
        """[B, classes] the network's prediction at the end of a game."""
        return predict(state.backend, self.end, state.x, state.layout, state.bias, state.size)

    def predict_unpruned(self, tokens: Tensor, grid: tuple[int, int], backend: Backend) -> Tensor:
        """[b, classes] the prediction for tokens [b, prefix + N, C] before the first decision, if all are kept."""
        layout = self.backbone.whole_layout(tokens, grid)
        x = backend.run(self._decides_before(0), self.end, tokens.flatten(0, 1), layout).x
        return predict(backend, self.end, x, layout)

    def _decides_before(self, stage: int) -> int:
        """The half-block before which a stage decides; past the last stage, the end."""
        return 2 * self.stages[stage] if stage < len(self.stages) else self.end

    def _advance(self, state: State, half: int) -> State:
        """Run from half-block `half` to the next decision, or to the end."""
        stop, decides = self._decides_before(state.stage), state.stage < len(self.stages)
        request = self._request(state) if decides else None
        next_attention = request if self.merge else None
        ran = state.backend.run(half, stop, state.x, state.layout, state.bias, state.cached, next_attention)
        heads, observed = ran.heads, ran.observed
        if request is not None and heads is None and ran.qkv is not None:
            heads = self.backbone.heads_of(ran.qkv, state.layout)
            with torch.no_grad():
                observed = state.backend.observe(heads, state.layout, state.bias, request)
        return replace(state, x=ran.x, cached=None, heads=heads, observed=observed)

    def _request(self, state: State) -> ObservationRequest:
        return ObservationRequest(
            state.position, state.agents, state.dither, state.total, state.prefix, self.features, self.merge
        )
