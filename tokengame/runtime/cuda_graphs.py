"""The pruned model with its launches captured in CUDA graphs: for batches of few tokens, which launches dominate.

1. Everything from one decision to the next is one graph, decision included (`game.buckets`). A graph has fixed shapes,
   so rows are filled up to buckets (`packed.buckets`): those of the batch together, since its longest image has about a
   third more tokens than the mean. In a batch of one that is the image filled up.
2. Between two graphs the host reads two numbers, all tokens that are left and the most of an image. They select the
   next graph.
3. The first batch of a bucket runs launch by launch, and is captured for those that follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokengame.backends import TorchBackend
from tokengame.errors import TokenGameError
from tokengame.game import State
from tokengame.game.buckets import BucketGame
from tokengame.game.state import ordered_dither
from tokengame.packed.attention import Shape, by_rule, padded_attention
from tokengame.packed.buckets import BucketLayout, bucket
from tokengame.packed.layout import RaggedLayout
from tokengame.runtime.cascade import PrunedOutput
from tokengame.runtime.pruned import PrunedViT

ROWS = 16
"""tokens of a batch are filled up to a multiple of this, in batches of more than four to four for each image"""
LONGEST = 64
"""the most tokens of an image count as a multiple of this; they bound decisions and attention, and cost little"""


@dataclass(frozen=True)
class Buffers:
    """What graphs of one batch size read and write, always in the same memory."""

    images: Tensor
    """[B, channels, height, width]"""
    dither: Tensor
    """[N]"""
    x: Tensor
    """[B * (prefix + N), C] rows after a decision; of these and the next two the first are used"""
    position: Tensor
    """[B * (prefix + N)]"""
    size: Tensor
    """[B * (prefix + N)]"""
    kept: Tensor
    """[T, B] agents left after each decision"""
    left: Tensor
    """[2] agents of the batch after the latest decision, and the most of an image"""


class CudaGraphs:
    """A pruned model whose launches are captured, for calls in evaluation mode without gradients.

    Policy and dial are captured with the rest. Every batch size and bucket has graphs of its own, which share memory
    and are kept until the model changes: fill up a smaller last batch. One thread at a time.

    Args:
        fast: the pruned model; it stays usable.
        capture: whether launches are captured; by default where the model is on a CUDA GPU.
        compiled: whether output projections and MLPs are compiled first (timm's models).

    Raises:
        TokenGameError: the game cannot be captured; the sentence says why.
    """

    def __init__(self, fast: PrunedViT, capture: bool | None = None, compiled: bool = False):
        self.fast, self.capture, self.compiled = fast, capture, compiled
        self._read()

    def __call__(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, classes]."""
        return self.predict(images).logits

    def predict(self, images: Tensor) -> PrunedOutput:
        """The prediction and which tokens were kept, as `PrunedViT.predict`."""
        self.fast._check(images)
        if not len(images):
            return self.fast.predict(images)
        if self._signature() != self._read_from:
            self._read()
        with torch.inference_mode(False), torch.no_grad():
            return self._play(images)

    def _read(self) -> None:
        """Take over the pruned model as it is now; what was captured of an earlier one is given up."""
        game = self.fast.game
        check(self.fast, self.compiled)
        game.backbone.refresh()
        backbone: Any = CompiledParts(game.backbone) if self.compiled else game.backbone
        self.game = BucketGame(backbone, game.config, game.features)
        self.backend = TorchBackend(backbone, attend)
        self.captures = game.backbone.device.type == "cuda" if self.capture is None else self.capture
        parts = [part for part in (game.backbone.model, self.fast.actor) if isinstance(part, nn.Module)]
        self._tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
        self._read_from = self._signature()
        self._buffers: dict[Any, Buffers] = {}
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if self.captures else None

    def _signature(self) -> tuple[Any, ...]:
        """What captured launches depend on; values of weights may change, their memory may not."""
        fast, memory = self.fast, tuple(tensor.data_ptr() for tensor in self._tensors)
        watch = fast.game.backbone.watch  # another one where the model was read anew
        return fast.game, fast.actor, fast.threshold, fast.training, watch, watch.unchanged, memory

    def _play(self, images: Tensor) -> PrunedOutput:
        key = images.shape, images.dtype
        if key not in self._buffers:
            self._buffers[key] = self._allocated(images)
        buffers, batch = self._buffers[key], len(images)
        buffers.images.copy_(images)
        rows, longest = batch * len(buffers.dither), len(buffers.dither)
        for stage in range(len(self.game.stages)):
            self._run(key, stage, rows, longest)
            left, most = buffers.left.tolist()
            rows, longest = bucket(left, max(ROWS, 4 * batch), rows), bucket(most, LONGEST, longest)
        logits, alive = self._run(key, len(self.game.stages), rows, longest)
        nothing = torch.zeros(0, dtype=torch.long, device=images.device)
        return PrunedOutput(logits.clone(), buffers.kept.clone().unbind(), alive.clone(), nothing)

    def _allocated(self, images: Tensor) -> Buffers:
        backbone, batch = self.game.backbone, len(images)
        dither = ordered_dither(*backbone.grid(*images.shape[2:])).to(images.device)
        x = images.new_zeros(batch * (backbone.prefix + len(dither)), backbone.dim, dtype=backbone.dtype)
        position, kept, left = (
            torch.zeros(shape, dtype=torch.long, device=images.device)
            for shape in ((len(x),), (len(self.game.stages), batch), (2,))
        )
        size = torch.ones_like(x[:, 0], dtype=torch.promote_types(x.dtype, torch.float32))
        return Buffers(torch.empty_like(images), dither, x, position, size, kept, left)

    def _run(self, key: Any, stage: int, rows: int, longest: int) -> Any:
        """A stretch by its graph, or launch by launch where there is none yet."""
        call, known = partial(self._stretch, self._buffers[key], stage, rows, longest), (key, stage, rows, longest)
        if known in self._graphs:
            graph, output = self._graphs[known]
            graph.replay()
            return output
        output = call()
        if self.captures:
            with torch.cuda.device(self.game.backbone.device):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool):  # records launches, computes nothing
                    static = call()
                self._graphs[known] = graph, static
        return output

    def _stretch(self, buffers: Buffers, stage: int, rows: int, longest: int) -> tuple[Tensor, Tensor] | None:
        """From decision `stage` - 1 through the next one, or to the prediction and what is left."""
        state = self._later(buffers, stage, rows, longest) if stage else self._first(buffers)
        if stage == len(self.game.stages):
            return self.game.finish(state)
        state = self.game.decide(state, self.fast.actor, self.fast.threshold)
        buffers.x[: len(state.x)].copy_(state.x)
        buffers.position[: len(state.x)].copy_(state.position)
        if state.size is not None:
            buffers.size[: len(state.x)].copy_(state.size)
        count = buffers.kept[stage].copy_(state.kept[-1])
        buffers.left.copy_(torch.stack([count.sum(), count.max()]))
        return None

    def _first(self, buffers: Buffers) -> State:
        """Embedded images, before the first block."""
        prefix, x = self.game.backbone.prefix, self.backend.embed(buffers.images)
        layout, agents = (RaggedLayout([n] * len(x), x.device) for n in (x.shape[1], x.shape[1] - prefix))
        position = torch.arange(-prefix, agents.longest, device=x.device).clamp(min=-1).repeat(len(x))
        return State(self.backend, x.flatten(0, 1), position, layout, agents, agents.longest, buffers.dither)

    def _later(self, buffers: Buffers, stage: int, rows: int, longest: int) -> State:
        """After decision `stage` - 1, filled up to `rows` agents, at most `longest` of an image."""
        prefix, count, dither = self.game.backbone.prefix, buffers.kept[stage - 1], buffers.dither
        layout = BucketLayout(count + prefix, rows + len(count) * prefix, longest + prefix)
        x, position, size = (tensor[: layout.rows] for tensor in (buffers.x, buffers.position, buffers.size))
        return State(
            self.backend, x, position, layout, BucketLayout(count, rows, longest), len(dither), dither,
            size if self.game.merge else None, kept=(count,) * stage,
        )  # fmt: skip


def attend(qkv: Tensor, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
    """Attention that needs no counts on the host; see `packed.attention.Kernel`."""
    return (by_rule(layout, Shape.of(qkv)) if qkv.is_cuda else padded_attention)(qkv, layout, bias)


class CompiledParts:
    """A backbone of timm's whose output projections and MLPs are compiled, once for all blocks and numbers of rows."""

    def __init__(self, backbone: Any):
        self.backbone, kind = backbone, type(backbone.parts[0])
        self._add_attention = torch.compile(kind.add_attention, dynamic=True)
        self._feed_forward = torch.compile(kind.feed_forward, dynamic=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)

    def add_attention(self, block: int, x: Tensor, attended: Tensor, layout: RaggedLayout) -> Tensor:
        return self._add_attention(self.backbone.parts[block], x, attended, layout)

    def feed_forward(self, block: int, x: Tensor, layout: RaggedLayout) -> Tensor:
        return self._feed_forward(self.backbone.parts[block], x, layout)


def check(fast: PrunedViT, compiled: bool = False) -> None:
    """Refuse what cannot be captured, or compiled first.

    Raises:
        TokenGameError: says what it is.
    """
    backbone, reason = fast.game.backbone, ""
    if fast.training:
        reason = "is in training mode: call fast.eval() first"
    elif fast.game.config.cascade_margin:
        reason = "lets images fall back to all tokens: prune with cascade_margin 0"
    elif backbone.positional or not backbone.has_class_token:
        reason = "has rotary or relative positions, or no class token: call the pruned model itself"
    elif compiled and len({type(part) for part in getattr(backbone, "parts", ())}) != 1:
        reason = "is not made of one kind of timm's blocks: leave out compiled"
    if reason:
        raise TokenGameError(f"{type(backbone.model).__name__} is not captured in CUDA graphs, since it {reason}")
