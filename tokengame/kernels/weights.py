"""A model's weights in the order in which the kernels read them: packed once, and again when the model has changed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from operator import attrgetter
from threading import Lock
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengame.kernels.library import INSTRUCTIONS, TILE, call, level, operand_bytes, weight_version
from tokengame.kernels.structs import BlockStruct, LinearStruct, NormStruct, PackedLinear
from tokengame.modules import Watch, global_hooks

Activation = Literal["gelu", "quick_gelu", "tanh_gelu"]
"""in the order of csrc/interface.h: GELU; x sigmoid(1.702 x); the approximation of GELU by tanh"""
WIDEST = 1.5
"""times as wide as the model's heads may be, filled up with zeros, on which attention computes for nothing"""
HASHED_PARTS = 32
"""parts of the weights, of which every call hashes another: some of all rows would take 5 % of an image's time"""
_write_count = attrgetter("_version")


@dataclass(frozen=True)
class NormWeights:
    """A LayerNorm over the last dimension: weight and bias [C]."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class LinearWeights:
    """A linear layer: weight [outputs, inputs], bias [outputs] or None, and a LayerScale [outputs] that follows."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None


@dataclass(frozen=True)
class BlockWeights:
    """A pre-norm block: norm, attention of `heads` heads, norm, MLP."""

    norm1: NormWeights
    qkv: LinearWeights
    proj: LinearWeights
    norm2: NormWeights
    fc1: LinearWeights
    fc2: LinearWeights
    heads: int
    head_dim: int
    scale: float
    """factor on q.k"""
    activation: Activation = "gelu"
    """of the MLP"""


@dataclass(frozen=True)
class ModelWeights:
    """What a backbone family exports of a model for the kernels (see `Backbone.plain_weights`)."""

    blocks: list[BlockWeights]
    patches: LinearWeights | None
    """patch embedding [C, channels * patch^2]; None where the family must embed itself"""
    head: tuple[NormWeights, LinearWeights] | None
    """final norm and classifier of the class token; None where the head is more than that"""


@dataclass(frozen=True)
class PackedWeights:
    """The same, packed for the kernels."""

    blocks: Any
    """array of `BlockStruct`"""
    patches: PackedLinear | None
    head: tuple[NormStruct, PackedLinear] | None
    last_qkv: Tensor
    """[3 * H * D, C] of the last block, D as the kernels have it"""
    tensors: list[Tensor]
    """what the structs point at"""
    slots: Tensor | None
    """[D] where the numbers of a head are among those of a wider one; None where heads are as wide as the model's"""
    start: dict[torch.Size, Tensor] = field(default_factory=dict)
    """by the shape of an image, [prefix + N, C]: what the model adds to patches, its prefix tokens first"""

    def widened(self, heads: Tensor) -> Tensor:
        """[..., D] of the model as the kernels have it, zeros between."""
        if self.slots is None:
            return heads
        wide = heads.new_zeros(*heads.shape[:-1], self.blocks[0].width)
        return wide.index_copy_(-1, self.slots, heads)


class PackedModel:
    """Packed weights of a model, and how to tell that they are still its weights."""

    def __init__(self, model: nn.Module, watch: Watch, export: Callable[[], ModelWeights | None]):
        self.watch, self.level, parameters = watch, level(), list(model.parameters())
        plain = all(_is_plain(p) for p in parameters) and len({p.dtype for p in parameters}) == 1
        self.tensors: list[Tensor] = parameters if plain else []  # type: ignore[assignment]
        self.counted = [t for t in (*self.tensors, *model.buffers()) if not t.is_inference()]
        self.places, self.versions = self._storage_state()
        self.pointers = (ctypes.c_void_p * len(self.places))(*self.places)
        shapes = [(len(p), p[0].numel()) if p.ndim > 1 else (1, p.numel()) for p in self.tensors]
        halves = [p.element_size() // 2 for p in self.tensors]  # numbers of 16 bits
        self.rows = (ctypes.c_long * len(shapes))(*[rows for rows, _ in shapes])
        self.columns = (ctypes.c_long * len(shapes))(*[n * each for (_, n), each in zip(shapes, halves, strict=True)])
        self.hashes = [self._hash(part) for part in range(HASHED_PARTS)]
        self.calls = count()
        exported = export() if plain else None
        self.weights = None if exported is None else _packed(exported)

    def _storage_state(self) -> tuple[list[int], list[int]]:
        """Where parameters lie, and how often they and buffers were written to."""
        return [*map(Tensor.data_ptr, self.tensors)], [*map(_write_count, self.counted)]  # fast: for every batch

    def _hash(self, part: int) -> int:
        return weight_version(self.pointers, self.rows, self.columns, len(self.tensors), part, HASHED_PARTS)

    def is_current(self, watch: Watch) -> bool:
        """Whether no part or parameter was replaced or written to since.

        Writes through `.data` count no version: most are seen at once, those to a row or a column within
        `HASHED_PARTS` calls.

        Args:
            watch: of the model, known to be unchanged.
        """
        if self.level != level() or (self.watch is not watch and not self.watch.unchanged):
            return False
        if self._storage_state() != (self.places, self.versions):
            return False
        part = next(self.calls) % HASHED_PARTS
        return self._hash(part) == self.hashes[part]


_PACKED: WeakKeyDictionary[nn.Module, PackedModel] = WeakKeyDictionary()
"""one packed copy for a model, however many backbones wrap it"""
_PACKING = Lock()


def packed_weights(
    model: nn.Module, watch: Watch, export: Callable[[], ModelWeights | None]
) -> PackedWeights | None:  # fmt: skip
    """Weights of `model` for the kernels; None where they cannot do its work, or where it has hooks.

    Args:
        model: in one number format.
        watch: of the model, known to be unchanged.
        export: its plain weights, called when they must be packed (anew).
    """
    if watch.hooked or global_hooks() or watch.training:
        return None
    packed = _PACKED.get(model)
    if packed is None or not packed.is_current(watch):
        stale = packed
        with _PACKING:  # one thread packs for all
            packed = _PACKED.get(model)
            if packed is None or packed is stale:
                packed = _PACKED[model] = PackedModel(model, watch, export)
    return packed.weights


def _is_plain(p: Tensor) -> bool:
    """Whether a parameter is plain numbers in this machine's memory, in a format that the kernels serve."""
    plain = type(p) is nn.Parameter and p.dtype in INSTRUCTIONS and p.device.type == "cpu"
    return plain and p.layout == torch.strided and p.is_contiguous()


def _slots(head_dim: int) -> Tensor | None:
    """`PackedWeights.slots`: each half of a head at the beginning of a half of the wider one.

    So halves still turn with each other, and the same values are compared (see `decisions.similarity_of`).
    """
    if head_dim % TILE == 0:
        return None
    half = torch.arange(head_dim // 2)
    return torch.cat([half, half + _up(head_dim) // 2])


def _up(width: int) -> int:
    return width + -width % TILE


def _widened(block: BlockWeights) -> BlockWeights:
    """The same block with heads and MLP filled up with zeros to multiples of `TILE`; it computes the same."""
    heads, width, dim, hidden = block.heads, block.head_dim, len(block.proj.weight), len(block.fc1.weight)
    slots, spare = _slots(width), -hidden % TILE
    fc1 = replace(
        block.fc1, weight=F.pad(block.fc1.weight.detach(), (0, 0, 0, spare)), bias=_filled(block.fc1.bias, spare)
    )
    fc2 = replace(block.fc2, weight=F.pad(block.fc2.weight.detach(), (0, spare)))
    block = replace(block, fc1=fc1, fc2=fc2) if spare else block
    if slots is None:
        return block
    weight = block.qkv.weight.detach().view(3 * heads, width, -1)
    qkv = weight.new_zeros(3 * heads, _up(width), weight.shape[2]).index_copy_(1, slots, weight).flatten(0, 1)
    bias = block.qkv.bias
    if bias is not None:
        wide = bias.new_zeros(3 * heads, _up(width))
        bias = wide.index_copy_(1, slots, bias.detach().view(3 * heads, width)).flatten()
    output = block.proj.weight.detach().view(dim, heads, width)
    proj = output.new_zeros(dim, heads, _up(width)).index_copy_(2, slots, output).flatten(1)
    wider = replace(block.qkv, weight=qkv, bias=bias), replace(block.proj, weight=proj)
    return replace(block, head_dim=_up(width), qkv=wider[0], proj=wider[1])


def _filled(bias: Tensor | None, spare: int) -> Tensor | None:
    return None if bias is None else F.pad(bias.detach(), (0, spare))


def _fits(model: ModelWeights) -> bool:
    """Whether all widths are multiples of `TILE` now and all blocks have the same heads."""
    layers = [layer for block in model.blocks for layer in (block.qkv, block.proj, block.fc1, block.fc2)]
    widths = [width for layer in layers for width in layer.weight.shape] + [block.head_dim for block in model.blocks]
    if model.patches is not None:
        widths.append(model.patches.weight.shape[0])
    if model.head is not None:
        widths.append(model.head[1].weight.shape[1])
    same = len({(block.heads, block.head_dim) for block in model.blocks}) == 1
    return same and all(width % TILE == 0 for width in widths)


def _is_whole(block: BlockWeights) -> bool:
    """Whether layers take what those before them give."""
    dim, inner, hidden = len(block.norm1.weight), block.heads * block.head_dim, len(block.fc1.weight)
    layers = (block.qkv, block.proj, block.fc1, block.fc2)
    shapes = (3 * inner, dim), (dim, inner), (hidden, dim), (dim, hidden)
    return all(tuple(layer.weight.shape) == shape for layer, shape in zip(layers, shapes, strict=True))


def _packed(model: ModelWeights) -> PackedWeights | None:
    """None where the kernels cannot take its widths."""
    width = model.blocks[0].head_dim
    if width % 2 or _up(width) > WIDEST * width:
        return None
    if not all(map(_is_whole, model.blocks)):
        return None
    slots, model = _slots(width), replace(model, blocks=[_widened(block) for block in model.blocks])
    if not _fits(model):
        return None
    tensors: list[Tensor] = []
    structs = [_block(block, tensors) for block in model.blocks]
    patches = None if model.patches is None else pack(model.patches)
    head = None if model.head is None else (_norm(model.head[0], tensors), pack(model.head[1]))
    last_qkv = model.blocks[-1].qkv.weight.detach()
    return PackedWeights((BlockStruct * len(structs))(*structs), patches, head, last_qkv, tensors, slots)


def pack(layer: LinearWeights) -> PackedLinear:
    """Order weight [outputs, inputs] so that the processor reads it in sequence."""
    (outputs, inputs), dtype = layer.weight.shape, layer.weight.dtype
    spare = -outputs % TILE
    numbers = (outputs + spare) * (inputs + -inputs % TILE)
    packed = layer.weight.new_empty(numbers * operand_bytes(dtype), dtype=torch.uint8)
    call("pack_weight", dtype, layer.weight.detach().contiguous(), outputs, inputs, packed)
    none = layer.weight.new_zeros(outputs, dtype=torch.float32)
    bias = F.pad(none if layer.bias is None else layer.bias.detach().float(), (0, spare))
    scale = None if layer.scale is None else layer.scale.detach().float()
    return PackedLinear(packed, bias, scale, inputs, outputs)


def _norm(norm: NormWeights, tensors: list[Tensor]) -> NormStruct:
    tensors += [part.detach().float().contiguous() for part in (norm.weight, norm.bias)]
    return NormStruct(tensors[-2].data_ptr(), tensors[-1].data_ptr(), norm.eps)


def _linear(layer: LinearWeights, tensors: list[Tensor]) -> LinearStruct:
    linear = pack(layer)
    tensors += [linear.packed, linear.bias] + ([] if linear.scale is None else [linear.scale])
    return linear.struct


def _block(block: BlockWeights, tensors: list[Tensor]) -> BlockStruct:
    norms = [_norm(norm, tensors) for norm in (block.norm1, block.norm2)]
    linears = [_linear(layer, tensors) for layer in (block.qkv, block.proj, block.fc1, block.fc2)]
    sizes = block.qkv.weight.shape[1], block.heads, block.head_dim, block.fc1.weight.shape[0]
    return BlockStruct(*norms, *linears, *sizes, get_args(Activation).index(block.activation), block.scale)
