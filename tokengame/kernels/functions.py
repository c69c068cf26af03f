"""The compiled kernels as functions of tensors; see csrc/interface.h for what each computes."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokengame.kernels.library import call
from tokengame.kernels.plain import ActorWeights
from tokengame.kernels.structs import (
    ActorStruct,
    AnglesStruct,
    CachedKeysValuesStruct,
    FusedGameStruct,
    FusedResultsStruct,
    LinearStruct,
    NormStruct,
    ObservationRequestStruct,
    PackedLinear,
    RotaryStruct,
)
from tokengame.kernels.weights import PackedActor, PackedWeights
from tokengame.packed.heads import EXTRA_FEATURES, CachedKeysValues, ObservationRequest, Observed
from tokengame.packed.layout import RaggedLayout


def normed_linear(x: Tensor, norm: NormStruct, linear: PackedLinear) -> Tensor:
    """linear(norm(x)): [M, inputs] -> [M, outputs]."""
    width, struct = len(linear.bias), linear.struct
    out = x.new_empty(len(x), width)
    call("normed_linear", x.dtype, x.contiguous(), len(x), linear.inputs, ctypes.addressof(norm),
          ctypes.addressof(struct), width, out, torch.get_num_threads())  # fmt: skip
    return out[:, : linear.outputs]


class HalfBlocks(NamedTuple):
    """What `run_half_blocks` returns."""

    x: Tensor
    """[M, C]"""
    qkv: Tensor | None
    """[M, 3, H, D] of the last attention among the rows themselves"""
    next_keys_values: Tensor | None
    """[M, 2, H, D] of the attention that comes next, where it was requested"""
    next_query: Tensor | None
    """[B, H, D] query of each image's first row in it, or the mean of all rows' queries"""
    observed: Observed | None = None
    """what agents observe of it"""


def run_half_blocks(
    blocks: Any, first: int, last: int, x: Tensor, layout: RaggedLayout, bias: Tensor | None,
    cached: CachedKeysValues | None = None, request: ObservationRequest | None = None, class_query: bool = False,
    angles: Tensor | None = None,
) -> HalfBlocks:  # fmt: skip
    """Half-blocks `first` to `last` - 1 in one call; see `Backend.run`.

    Args:
        blocks: array of `BlockStruct`.
        first, last: half-blocks.
        x: [M, C].
        layout: of the M rows.
        bias: [M] added to the attention logits of each key, or None.
        cached: what the first half, an attention, reads in place of the rows' own keys and values.
        request: for keys and values of the next attention, and for observations.
        class_query: whether each image's first row gives the query of the observations, not the mean of all rows.
        angles: of rotary positions, as `Backbone.rotary_table`; `layout` then says where its rows come from.
    """
    heads, width = blocks[0].heads, blocks[0].width
    x, rows = x.contiguous(), len(x)
    out = x.new_empty(x.shape) if first < last else x
    qkv, attended = x.new_empty(rows, 3, heads, width), x.new_empty(rows, max(heads * width, x.shape[1]))
    keys_values = x.new_empty(rows, 2, heads, width) if request else None
    query = x.new_empty(layout.images, heads, width) if request else None
    observation, observed = ObservationRequestStruct(), None
    if request is not None and request.features:
        observation, observed = _observation(request, heads)
    (struct, kept_alive), rotary = _cached(cached), _rotary(layout, angles)
    call("run_half_blocks", x.dtype, ctypes.addressof(blocks), first, last, x, rows, layout.cu_seqlens, layout.images,
         _floats(bias), ctypes.addressof(struct), ctypes.addressof(observation),
         ctypes.addressof(rotary), class_query, qkv, attended, out, keys_values, query,
         torch.get_num_threads())  # fmt: skip
    del kept_alive
    among_rows = any(half % 2 == 0 for half in range(first + (cached is not None), last))
    return HalfBlocks(out, qkv if among_rows else None, keys_values, query, observed)


def _cached(cached: CachedKeysValues | None) -> tuple[CachedKeysValuesStruct, Any]:
    """The struct, and what must live as long as it."""
    if cached is None:
        return CachedKeysValuesStruct(), None
    keys, values, bias = _strided(cached.keys), _strided(cached.values), _floats(cached.bias)
    tensors = (keys[0], values[0], cached.layout.cu_seqlens, bias)
    where = [*map(_address, tensors)]
    return CachedKeysValuesStruct(*where[:2], *keys[1:], *values[1:], *where[2:]), tensors


def _rotary(layout: RaggedLayout, angles: Tensor | None) -> RotaryStruct:
    """The struct; position and angles live as long as their owners."""
    if angles is None:
        return RotaryStruct()
    assert layout.places is not None
    return RotaryStruct(layout.places.position.data_ptr(), AnglesStruct.of(angles))


def _observation(request: ObservationRequest, heads: int) -> tuple[ObservationRequestStruct, Observed]:
    """The struct, and where the kernels write the observation."""
    agents = request.agents.rows
    features = torch.empty(agents, heads + len(EXTRA_FEATURES), dtype=torch.float32, device="cpu")
    index = torch.empty(3, agents, dtype=torch.long, device="cpu")
    at = [tensor.data_ptr() for tensor in (request.position, request.dither, features, index)]
    struct = ObservationRequestStruct(*at[:2], request.total, request.prefix, *at[2:], agents)
    return struct, Observed(features, *index)


def last_block(block: Any, qkv: Tensor, x: Tensor, layout: RaggedLayout, prefix: int, bias: Tensor | None) -> Tensor:
    """The last block for the first `prefix` rows of each image alone: [M, C] -> [B * prefix, C].

    Keys and values are never computed (see `TorchBackend._attend_rows`).

    Args:
        block: `BlockStruct`.
        qkv: [3 * H * D, C] the weight of its first layer.
        x, layout: packed rows.
        prefix: rows of each image that are computed.
        bias: [M] added to the attention logits of each key, or None.
    """
    normed, out = torch.empty_like(x), x.new_empty(layout.images * prefix, x.shape[1])
    call("last_block", x.dtype, ctypes.addressof(block), qkv.contiguous(), x.contiguous(), len(x), layout.cu_seqlens,
         layout.images, prefix, _floats(bias), normed, out, torch.get_num_threads())  # fmt: skip
    return out


def self_attention(qkv: Tensor, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
    """Attention inside each image: [M, 3, H, D] -> [M, H * D]; pads to 32 rows at most, D a multiple of 32."""
    q, k, v = qkv.unbind(1)
    return attention(q, k, v, layout, layout, bias).flatten(1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, query_layout: RaggedLayout, layout: RaggedLayout, bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """As `packed.attention.cross_attention`; D is a multiple of 32."""
    out = q.new_empty(q.shape)
    call("attention", q.dtype, *_strided(q), *_strided(k), *_strided(v), query_layout.cu_seqlens, layout.cu_seqlens,
         query_layout.images, q.shape[1], q.shape[2], _floats(bias),
         float(q.shape[2] ** -0.5 if scale is None else scale), out, torch.get_num_threads())  # fmt: skip
    return out


def embed(images: Tensor, linear: PackedLinear, patch: int, start: Tensor, prefix: int) -> Tensor:
    """Patches through the linear layer of a patch embedding, added to constant tokens.

    Args:
        images: [B, channels, height, width].
        linear: channels * patch^2 inputs.
        patch: side of a patch.
        start: [prefix + N, C] prefix tokens, then position embeddings of the patches.
        prefix: rows of `start` that are no patches.

    Returns:
        [B, prefix + N, C]
    """
    out, struct = images.new_empty(len(images), *start.shape), linear.struct
    call("embed", images.dtype, images.contiguous(), *images.shape, patch, ctypes.addressof(struct),
         linear.outputs, start.contiguous(), prefix, out, torch.get_num_threads())  # fmt: skip
    return out


def class_attention(keys: Tensor, query: Tensor, scale: float, layout: RaggedLayout, bias: Tensor | None) -> Tensor:
    """Log of the attention of queries [B, H, D] to each row [M, H, D] of their image: [M, H]."""
    out = keys.new_empty(keys.shape[:2], dtype=torch.float32)
    call("class_attention", keys.dtype, *_strided(keys), *keys.shape[1:], query.contiguous(), float(scale),
         layout.cu_seqlens, layout.images, _floats(bias), out, torch.get_num_threads())  # fmt: skip
    return out


def observe(
    keys: Tensor, values: Tensor, query: Tensor, scale: float, layout: RaggedLayout, bias: Tensor | None,
    request: ObservationRequest,
) -> Tensor:  # fmt: skip
    """[A, H + 6] features of the agents, see `Observation.features`; D is a multiple of 32.

    Args:
        keys, values: [M, H, D].
        query: [B, H, D] of the class token.
        scale: factor on q.k.
        layout: of the M rows.
        bias: [M] log sizes, or None.
        request: where the agents are, and whether values are compared.
    """
    heads, width = keys.shape[1:]
    features = keys.new_empty(request.agents.rows, heads + len(EXTRA_FEATURES), dtype=torch.float32)
    call("observe", keys.dtype, *_strided(keys), *_strided(values), heads, width, query.contiguous(), float(scale),
         layout.cu_seqlens, layout.images, request.prefix, _floats(bias), request.position, request.dither.float(),
         request.total, int(request.similarity), features, None, 0, 0, torch.get_num_threads())  # fmt: skip
    return features


def merge(
    values: Tensor, x: Tensor, size: Tensor | None, position: Tensor, keep: Tensor, layout: RaggedLayout,
    kept_layout: RaggedLayout, prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Merge every pruned token into its most similar kept token; see `Backend.merge`. D and C are multiples of 32.

    Args:
        values: [M, H, D].
        x, size, position: [M, C], [M] or None, [M].
        keep: [A] bool, at least one of each image.
        layout: of the M rows, the first `prefix` of each image no agents.
        kept_layout: of the M' rows that are kept.
        prefix: prefix tokens of an image.

    Returns:
        rows [M', C], sizes [M'], positions [M'], and for each agent [A] the one that absorbed it
    """
    rest, sizes = x.new_empty(kept_layout.rows, x.shape[1]), x.new_empty(kept_layout.rows, dtype=torch.float32)
    positions = position.new_empty(kept_layout.rows)
    absorber = position.new_empty(len(keep))
    call("absorb", x.dtype, *_strided(values), *values.shape[1:], x.contiguous(), x.shape[1], _floats(size), position,
         keep.contiguous(), layout.cu_seqlens, kept_layout.cu_seqlens, layout.images, prefix, rest, sizes, positions,
         absorber, torch.get_num_threads())  # fmt: skip
    return rest, sizes, positions, absorber


class FusedOutput(NamedTuple):
    """What a fused forward returns of B images."""

    logits: Tensor
    """[B, classes]"""
    kept: tuple[Tensor, ...]
    """[B] agents alive after each decision"""
    alive: Tensor
    """[B, N] bool: the agents that are left at the end"""
    tokens_before: Tensor | None
    """[B, prefix + N, C] tokens before the first decision, where they were wanted"""


class FusedGame(NamedTuple):
    """A whole game in one call: `FusedOutput`, with logits or the rows [M, C] that are left and their sizes [M]."""

    logits: Tensor | None
    kept: tuple[Tensor, ...]
    alive: Tensor
    tokens_before: Tensor | None
    rows: Tensor | None
    sizes: Tensor | None


class Entry(NamedTuple):
    """How images enter a game in one call."""

    images: Tensor
    """[B, channels, height, width] pixels, or [B, prefix + N, C] tokens, whose `patch` is 0"""
    start: Tensor
    """[prefix + N, C] as in `embed`; only its shape counts for tokens"""
    patch: int
    """side of a patch"""
    prefix: int
    """prefix tokens of an image"""
    class_query: bool
    """whether an image's first row observes; else the mean of all"""


def fused_forward(
    weights: PackedWeights, entry: Entry, classify: bool, stages: tuple[int, ...], merges: bool, end: int,
    linear: Tensor | None, thresholds: Tensor, shares: Tensor | None, dither: Tensor, tokens_before: bool,
    actor: ActorWeights | None = None, angles: Tensor | None = None,
) -> FusedGame:  # fmt: skip
    """Whole games in one call.

    Args:
        weights: of the model.
        entry: the images.
        classify: whether the last block and the classifier run too; `end` is then the end of the block before.
        stages, merges, end, linear, thresholds, shares, dither, tokens_before, actor: see `backends.base.FusedRequest`.
        angles: of rotary positions, as `Backbone.rotary_table`.
    """
    images, start = entry.images.contiguous(), entry.start.contiguous()
    number, rows, prefix = len(images), len(start), entry.prefix
    shape = images.shape[1:] if entry.patch else (0, 0, 0)
    patches = weights.patches.struct if weights.patches is not None and entry.patch else LinearStruct()
    norm, head, classes = NormStruct(), LinearStruct(), 0
    if classify:
        assert weights.head is not None
        norm, head, classes = weights.head[0], weights.head[1].struct, len(weights.head[1].bias)
    blocks = torch.tensor(stages, device="cpu", dtype=torch.long)
    linear, packed = None if linear is None else linear.contiguous(), None if actor is None else PackedActor.of(actor)
    game = FusedGameStruct(
        ctypes.addressof(weights.blocks), len(weights.blocks), patches, head, norm, start.data_ptr(),
        weights.last_qkv.data_ptr(), *shape, entry.patch, prefix, rows - prefix, classes, merges, entry.class_query,
        end, blocks.data_ptr(), len(blocks), *map(_address, (linear, dither, thresholds, shares)),
        ActorStruct() if packed is None else packed.struct, AnglesStruct.of(angles),
    )  # fmt: skip
    logits = images.new_empty(number, classes) if classify else None
    tokens = images.new_empty(number, *start.shape) if tokens_before else None
    left = None if classify else images.new_empty(number, *start.shape)
    sizes = torch.empty(number, rows, device="cpu") if merges and stages and not classify else None
    kept = torch.empty(len(blocks), number, dtype=torch.long, device="cpu")
    alive = torch.zeros(number, rows - prefix, dtype=torch.bool, device="cpu")
    _play(game, images, FusedResultsStruct(*map(_address, (logits, tokens, kept, alive, left, sizes))))
    if left is None:
        assert weights.head is not None
        return FusedGame(logits[:, : weights.head[1].outputs], kept.unbind(0), alive, tokens, None, None)  # type: ignore[index]
    last = kept[-1] if stages else torch.full((number,), rows - prefix)
    there = torch.arange(rows) < (last + prefix)[:, None]
    return FusedGame(None, kept.unbind(0), alive, tokens, left[there], None if sizes is None else sizes[there])


def _play(game: FusedGameStruct, images: Tensor, results: FusedResultsStruct) -> None:
    """Run it, with the working memory that it needs."""
    threads, where = torch.get_num_threads(), ctypes.addressof(game)
    size = call("fused_workspace", images.dtype, where, len(images), threads)
    memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    call("fused_forward", images.dtype, where, images, len(images), ctypes.addressof(results), memory, threads)


def _address(numbers: Tensor | None) -> int:
    return 0 if numbers is None else numbers.data_ptr()


def _strided(heads: Tensor) -> tuple[Tensor, int, int]:
    """[M, H, D] as its first element and the strides of rows and heads."""
    heads = heads if heads.stride(2) == 1 else heads.contiguous()
    return heads, heads.stride(0), heads.stride(1)


def _floats(numbers: Tensor | None) -> Tensor | None:
    return None if numbers is None else numbers.float().contiguous()
