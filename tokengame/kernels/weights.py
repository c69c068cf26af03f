"""A model's weights in the order in which the kernels read them: packed once, and again when the model has changed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter
from threading import Lock
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengame.kernels.library import INSTRUCTIONS, TILE, call, level, operand_bytes, weight_version
from tokengame.kernels.plain import Activation, ActorWeights, BlockWeights, LinearWeights, ModelWeights, NormWeights
from tokengame.kernels.structs import ActorStruct, BlockStruct, LinearStruct, MlpStruct, NormStruct, PackedLinear
from tokengame.kernels.widths import fits, slots_of, widened
from tokengame.modules import Watch, global_hooks

HASHED_PARTS = 64
"""parts of the weights, of which every call hashes another: some of all rows would take 5 % of an image's time"""
_write_count = attrgetter("_version")


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


def _packed(model: ModelWeights) -> PackedWeights | None:
    """None where the kernels cannot take its widths."""
    if not fits(model):
        return None
    tensors: list[Tensor] = []
    structs = [_block(widened(block), tensors) for block in model.blocks]
    patches = None if model.patches is None else pack(model.patches)
    head = None if model.head is None else (_norm(model.head[0], tensors), pack(model.head[1]))
    last_qkv = widened(model.blocks[-1]).qkv.weight.detach()
    slots = slots_of(model.blocks[0].head_dim)
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
    weight = norm.weight.detach().float().contiguous()
    bias = torch.zeros_like(weight) if norm.bias is None else norm.bias.detach().float().contiguous()
    tensors += [weight, bias]
    counted, spare = None, 0
    if norm.counted is not None and not norm.counted.all():
        tensors.append(norm.counted.float().contiguous())
        counted, spare = tensors[-1].data_ptr(), int((norm.counted == 0).sum())
    return NormStruct(weight.data_ptr(), bias.data_ptr(), norm.eps, counted, spare, norm.rms)


def _linear(layer: LinearWeights, tensors: list[Tensor]) -> LinearStruct:
    linear = pack(layer)
    tensors += [linear.packed, linear.bias] + ([] if linear.scale is None else [linear.scale])
    return linear.struct


def _block(block: BlockWeights, tensors: list[Tensor]) -> BlockStruct:
    norms = [
        NormStruct() if norm is None else _norm(norm, tensors)
        for norm in (block.norm1, block.proj_norm, block.norm2, block.fc1_norm, block.fc2_norm)
    ]
    linears = [_linear(layer, tensors) for layer in (block.qkv, block.proj, block.fc1, block.fc2)]
    hidden, activation = block.fc2.weight.shape[1], get_args(Activation).index(block.activation)
    mlp = MlpStruct(*norms[2:], *linears[2:], hidden, activation, block.gated)
    sizes = block.qkv.weight.shape[1], block.heads, block.head_dim
    return BlockStruct(*norms[:2], *linears[:2], mlp, *sizes, block.scale)


@dataclass(frozen=True)
class PackedActor:
    """RL4EViT's actor, packed for the kernels. It is small, so every call packs it anew and none has old weights."""

    struct: ActorStruct
    """pointers for the kernels"""
    tensors: tuple[Any, ...]
    """what it points at"""

    @classmethod
    def of(cls, actor: ActorWeights) -> PackedActor:
        """Packed; widths are filled up with zeros, and what comes of them is multiplied by zeros."""
        layers = [pack(layer) for layer in actor.layers]
        structs = (LinearStruct * len(layers))(*(layer.struct for layer in layers))
        widths = torch.tensor([layers[0].inputs, *(len(layer.bias) for layer in layers)], device="cpu")
        identity = F.pad(actor.identity.detach(), (0, int(widths[1]) - actor.identity.shape[1])).contiguous()
        struct = ActorStruct(ctypes.addressof(structs), widths.data_ptr(), identity.data_ptr(), len(layers))
        return cls(struct, (layers, structs, widths, identity))
