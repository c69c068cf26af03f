"""The game with single images compiled: what `torch.compile(fast)` runs.

An image alone spends much of its time in small operations, so everything from one decision to the next, the policy
included, is one graph, dynamic in the number of rows. Batches run as they are: their counts change every time, nothing
may recompile for that, and their operations are large.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokengame.attention import Kernel, Shape, by_cost
from tokengame.backbone import Backbone
from tokengame.blocks import Heads
from tokengame.config import GameConfig
from tokengame.game import TokenGame
from tokengame.ops import Layout, Memory
from tokengame.state import Decide, State


def _compile(function: Callable) -> Callable:
    """Sizes dynamic from the start; each graph with a recompilation limit of its own where torch can do that."""
    known = inspect.signature(torch.compile).parameters
    isolated: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    return torch.compile(function, dynamic=True, **isolated)


class CompiledGame(TokenGame):
    """The same game; a graph for each stage and attention kernel is made when first needed."""

    def __init__(self, backbone: Backbone, config: GameConfig, features: bool = True):
        super().__init__(backbone, config, features)
        self._graphs: dict[tuple[int, Kernel], Callable] = {}

    def turn(self, state: State, decide: Decide) -> tuple[State, Tensor]:
        """As `TokenGame.turn`."""
        if state.layout.images > 1:
            return super().turn(state, decide)
        x, heads, similarity, logits = self._graph(state)(*self._tensors(state), decide)
        return replace(state, x=x, memory=None, heads=heads, similarity=similarity), logits

    def finish(self, state: State) -> State:
        """As `TokenGame.finish`; of single images `logits` does it, in one graph with the head."""
        return super().finish(state) if state.layout.images > 1 else state

    def logits(self, state: State) -> Tensor:
        """As `TokenGame.logits`."""
        if state.layout.images > 1:
            return super().logits(state)
        return self._graph(state)(*self._tensors(state), None)[3]

    @staticmethod
    def _tensors(state: State) -> tuple[Any, ...]:
        """What a stretch is given; a `Layout` of one image is the number of its rows."""
        memory = state.memory and (state.memory.keys, state.memory.values, state.memory.bias)
        return state.x, state.position, state.size, memory, state.kept, state.total, state.dither

    def _graph(self, state: State) -> Callable:
        """The kernel is chosen outside: it is measured, and which is best changes with the number of rows."""
        attention = self.backbone.blocks[0].attn
        shape = Shape(state.x.device, state.x.dtype, attention.num_heads, attention.head_dim, torch.get_num_threads())
        key = state.stage, by_cost(state.layout, shape)
        if key not in self._graphs:
            self._graphs.setdefault(key, _compile(self._stretch(key[1])))  # two threads get the same one
        return self._graphs[key]

    def _stretch(self, kernel: Kernel) -> Callable:
        game = TokenGame(Backbone(self.backbone.model, kernel), self.config, self.features)

        def stretch(
            x: Tensor, position: Tensor, size: Tensor | None, seen: tuple[Tensor, Tensor, Tensor | None] | None,
            kept: tuple[Tensor, ...], total: int, dither: Tensor, decide: Decide | None,
        ) -> tuple[Tensor, Heads | None, Tensor | None, Tensor]:  # fmt: skip
            layout, agents = (Layout([n], x.device) for n in (len(x), len(x) - game.backbone.prefix))
            memory = None if seen is None else Memory(*seen[:2], Layout([len(seen[0])], x.device), seen[2])
            state = State(x, position, layout, agents, total, dither, size, memory=memory, kept=kept)
            if decide is None:
                return state.x, None, None, game.logits(game.finish(state))
            state, logits = game.turn(state, decide)
            return state.x, state.heads if game.merge else None, state.similarity, logits

        return stretch
