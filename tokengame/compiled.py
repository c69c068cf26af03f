"""The game with its dense stretches compiled: what `torch.compile(fast)` runs.

As long as all images of a batch have the same number of rows (always at batch 1, and before the first decision at any
batch size) the blocks up to the next decision are one graph, dynamic in images and rows. Everything else runs eagerly:
counts change with every batch, nothing may recompile for that, and checking a compiled decision's inputs takes longer
than the decision.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokengame.attention import Shape, by_cost, dense_attention, padded_attention, written_attention
from tokengame.backbone import Backbone, run_halves
from tokengame.ops import Layout


def _compile(function: Callable) -> Callable:
    """Sizes dynamic from the start; each graph with a recompilation limit of its own where torch can do that."""
    known = inspect.signature(torch.compile).parameters
    isolated: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    return torch.compile(function, dynamic=True, **isolated)


class CompiledBackbone(Backbone):
    """A backbone whose dense stretches are one graph each."""

    def __init__(self, model: Any):
        super().__init__(model, by_cost)
        self._graphs: dict[tuple[int, int], Callable] = {}

    def run(
        self, first: int, last: int, x: Tensor, layout: Layout, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `Backbone.run`."""
        shape = Shape(x.device, x.dtype, self.heads, self.blocks[0].attn.head_dim, torch.get_num_threads())
        kernel = self.choose(layout, shape)
        dense = kernel is padded_attention or layout.images == 1
        if not layout.uniform or not dense or first == last:
            return super().run(first, last, x, layout, bias)
        if (first, last) not in self._graphs:
            self._graphs[first, last] = _compile(self._stretch(first, last))
        bias = None if bias is None else layout.pad(bias)
        return self._graphs[first, last](layout.pad(x), bias, kernel is not written_attention)

    def _stretch(self, first: int, last: int) -> Callable:
        halves = [(self.blocks[half // 2], half % 2) for half in range(first, last)]

        def stretch(images: Tensor, bias: Tensor | None, fused: bool) -> tuple[Tensor, Tensor | None]:
            shape = images.shape[:2]
            attend = lambda qkv: dense_attention(qkv.unflatten(0, shape), bias, fused).flatten(0, 1)  # noqa: E731
            return run_halves(halves, images.flatten(0, 1), attend)

        return stretch
