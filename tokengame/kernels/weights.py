"""A model's weights in the order in which the kernels read them: packed once, and again when the model has changed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module

from tokengame.kernels.library import TILE, call
from tokengame.kernels.structs import BlockStruct, LinearStruct, NormStruct, PackedLinear


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
    """A pre-norm block: norm, attention of `heads` heads, norm, MLP with exact GELU."""

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
    """[3 * H * D, C] of the last block, as the model has it"""
    tensors: list[Tensor]
    """what the structs point at"""


class PackedModel:
    """Packed weights of a model, and how to tell that they are still its weights."""

    def __init__(self, model: nn.Module, export: Callable[[], ModelWeights | None]):
        self.parts, self.modules = [], [vars(module) for module in model.modules()]
        for own in self.modules:
            for held in (own["_modules"], own["_parameters"]):
                self.parts += [(held, name, part) for name, part in held.items()]
            settings = ("eps", "approximate", "scale", "num_heads")
            self.parts += [(own, name, own[name]) for name in settings if name in own]
        parameters = list(model.parameters())
        plain = all(_is_plain(p) for p in parameters)
        self.tensors = [(p, _storage_state(p)) for p in parameters] if plain else []
        self.pointers = (ctypes.c_void_p * len(self.tensors))(*[where for _, (where, _) in self.tensors])
        self.sizes = (ctypes.c_long * len(self.tensors))(*[p.numel() for p, _ in self.tensors])
        self.version = self._weight_version()
        exported = export() if plain else None
        self.weights = None if exported is None or not _fits(exported) else _packed(exported)

    def _weight_version(self) -> int:
        return call("weight_version", self.pointers, self.sizes, len(self.tensors))

    @property
    def is_current(self) -> bool:
        """Whether no module or parameter was replaced or written to since, through `.data` either."""
        for held, name, part in self.parts:  # plain loops: this runs for every batch
            if held.get(name) is not part:
                return False
        for parameter, state in self.tensors:
            if _storage_state(parameter) != state:
                return False
        return self._weight_version() == self.version

    @property
    def has_hooks(self) -> bool:
        """Whether modules do what the kernels leave out: hooks, training-mode dropout, a `forward` of their own."""
        for own in self.modules:
            if own["training"] or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
                return True
        return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


_PACKED: WeakKeyDictionary[nn.Module, PackedModel] = WeakKeyDictionary()
"""one packed copy for a model, however many backbones wrap it"""


def packed_weights(model: nn.Module, export: Callable[[], ModelWeights | None]) -> PackedWeights | None:
    """Weights of `model` for the kernels; None where they cannot do its work, or where it has hooks.

    Args:
        model: in bfloat16.
        export: its plain weights, called when they must be packed (anew).
    """
    if model.training:
        return None
    packed = _PACKED.get(model)
    if packed is None or not packed.is_current:
        packed = _PACKED[model] = PackedModel(model, export)
    return None if packed.has_hooks else packed.weights


def _is_plain(p: Tensor) -> bool:
    """Whether a parameter is plain bfloat16 numbers in this machine's memory."""
    plain = type(p) is nn.Parameter and p.dtype == torch.bfloat16 and p.device.type == "cpu"
    return plain and p.layout == torch.strided and p.is_contiguous()


def _storage_state(parameter: Tensor) -> tuple[int, int]:
    """Where a parameter lies, and how often it was written to."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


def _fits(model: ModelWeights) -> bool:
    """Whether all widths are multiples of `TILE` and all blocks have the same heads."""
    layers = [layer for block in model.blocks for layer in (block.qkv, block.proj, block.fc1, block.fc2)]
    widths = [width for layer in layers for width in layer.weight.shape] + [block.head_dim for block in model.blocks]
    if model.patches is not None:
        widths += model.patches.weight.shape
    if model.head is not None:
        widths.append(model.head[1].weight.shape[1])
    same = len({(block.heads, block.head_dim) for block in model.blocks}) == 1
    return same and all(width % TILE == 0 for width in widths)


def _packed(model: ModelWeights) -> PackedWeights:
    tensors: list[Tensor] = []
    structs = [_block(block, tensors) for block in model.blocks]
    patches = None if model.patches is None else pack(model.patches)
    head = None if model.head is None else (_norm(model.head[0], tensors), pack(model.head[1]))
    last_qkv = model.blocks[-1].qkv.weight.detach()
    return PackedWeights((BlockStruct * len(structs))(*structs), patches, head, last_qkv, tensors)


def pack(layer: LinearWeights) -> PackedLinear:
    """Order weight [outputs, inputs] so that the processor reads a tile in sequence; inputs are a multiple of 32."""
    outputs, inputs = layer.weight.shape
    spare = -outputs % TILE
    packed = layer.weight.new_empty((outputs + spare) * inputs)
    call("pack_weight", layer.weight.detach().contiguous(), outputs, inputs, packed)
    if layer.bias is None:
        bias = layer.weight.new_zeros(outputs + spare, dtype=torch.float32)
    else:
        bias = F.pad(layer.bias.detach().float(), (0, spare))
    scale = None if layer.scale is None else layer.scale.detach().float()
    return PackedLinear(packed, bias, scale, inputs, outputs)


def _norm(norm: NormWeights, tensors: list[Tensor]) -> NormStruct:
    tensors += [norm.weight.detach().float(), norm.bias.detach().float()]
    return NormStruct(tensors[-2].data_ptr(), tensors[-1].data_ptr(), norm.eps)


def _linear(layer: LinearWeights, tensors: list[Tensor]) -> LinearStruct:
    linear = pack(layer)
    tensors += [linear.packed, linear.bias] + ([] if linear.scale is None else [linear.scale])
    return linear.struct


def _block(block: BlockWeights, tensors: list[Tensor]) -> BlockStruct:
    norms = [_norm(norm, tensors) for norm in (block.norm1, block.norm2)]
    linears = [_linear(layer, tensors) for layer in (block.qkv, block.proj, block.fc1, block.fc2)]
    sizes = block.qkv.weight.shape[1], block.heads, block.head_dim, block.fc1.weight.shape[0]
    return BlockStruct(*norms, *linears, *sizes, block.scale)
