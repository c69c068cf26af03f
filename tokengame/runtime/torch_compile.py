"""What `torch.compile(fast)` runs: the game with the stretches of single images compiled.

A single image spends much of its time in small operations, so everything from one decision to the next is one graph,
dynamic in the number of rows. Larger batches run eagerly: their counts change every time, nothing may recompile for
that, and their operations are large.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokengame.backbones.base import Backbone
from tokengame.backends import Backend, TorchBackend
from tokengame.config import GameConfig
from tokengame.game import State, TokenGame
from tokengame.packed.attention import Kernel, Shape, by_cost, fastest_attention
from tokengame.packed.heads import CachedKeysValues, Heads, Observed
from tokengame.packed.layout import RaggedLayout


def _compile(function: Callable) -> Callable:
    """Sizes dynamic from the start; each graph with a recompilation limit of its own where torch can do that."""
    known = inspect.signature(torch.compile).parameters
    isolated: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    return torch.compile(function, dynamic=True, **isolated)


class CompiledGame(TokenGame):
    """The same game; a graph for each stage and attention kernel is compiled when it is first needed."""

    def __init__(self, backbone: Backbone, config: GameConfig, features: bool = True):
        super().__init__(backbone, config, features, fastest_attention)
        self._graphs: dict[tuple[int, Kernel], Callable] = {}

    def backend_for(self, _images: Tensor) -> Backend:
        """PyTorch's, whose operations can be compiled."""
        return TorchBackend(self.backbone, self.attention)

    def _advance(self, state: State, half: int) -> State:
        if state.layout.images > 1:
            return super()._advance(state, half)
        if state.stage == len(self.stages):
            return state  # `predict` runs it to the end, in one graph with the head
        x, heads, observed = self._graph(state)(*self._tensors(state))
        return replace(state, x=x, cached=None, heads=heads, observed=observed)

    def predict(self, state: State) -> Tensor:
        if state.layout.images > 1:
            return super().predict(state)
        return self._graph(state)(*self._tensors(state))

    @staticmethod
    def _tensors(state: State) -> tuple[Any, ...]:
        """What a graph is given; the layout of one image is the number of its rows."""
        cached = state.cached and (state.cached.keys, state.cached.values, state.cached.bias)
        return state.x, state.position, state.size, cached, state.kept, state.total, state.dither

    def _graph(self, state: State) -> Callable:
        """The attention kernel is chosen outside: it is measured, and the best one changes with the number of rows."""
        shape = Shape(
            state.x.device, state.x.dtype, self.backbone.heads, self.backbone.head_dim, torch.get_num_threads()
        )
        key = state.stage, by_cost(state.layout, shape)
        if key not in self._graphs:
            self._graphs.setdefault(key, _compile(self._stretch(*key)))  # two threads get the same one
        return self._graphs[key]

    def _stretch(self, stage: int, kernel: Kernel) -> Callable:
        game = TokenGame(self.backbone, self.config, self.features)
        backend = TorchBackend(self.backbone, kernel)
        half, to_the_end = (game._decides_before(stage - 1) if stage else 0), stage == len(self.stages)

        def stretch(
            x: Tensor, position: Tensor, size: Tensor | None, keys_values: tuple[Tensor, Tensor, Tensor | None] | None,
            kept: tuple[Tensor, ...], total: int, dither: Tensor,
        ) -> Tensor | tuple[Tensor, Heads | None, Observed | None]:  # fmt: skip
            layout, agents = (RaggedLayout([n], x.device) for n in (len(x), len(x) - game.backbone.prefix))
            cached = None
            if keys_values is not None:
                rows = RaggedLayout([len(keys_values[0])], x.device)
                cached = CachedKeysValues(keys_values[0], keys_values[1], rows, keys_values[2])
            state = State(backend, x, position, layout, agents, total, dither, size, cached=cached, kept=kept)
            state = game._advance(state, half)
            if to_the_end:
                return game.predict(state)
            return state.x, state.heads, state.observed

        return stretch
