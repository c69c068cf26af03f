"""A timm model's weights as `kernels` wants them: packed once, and again whenever the model has changed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerScale, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules import module

from tokengame.kernels import SIDE, call
from tokengame.structs import BlockStruct, Linear, NormStruct

DROPS = (nn.Identity, nn.Dropout, DropPath)
"""what does nothing but in training"""


@dataclass(frozen=True)
class Weights:
    """What the kernels need of a model."""

    patches: Linear | None
    """None where timm embeds"""
    head: tuple[NormStruct, Linear] | None
    """of a class token: final norm and classifier; None where timm does more"""
    blocks: Any
    """array of `BlockStruct`"""
    tensors: list[Tensor]
    """what the structs point at"""


class Packed:
    """Weights of a model, None where one of its blocks does what the kernels do not, and how to see that they hold."""

    def __init__(self, model: Any):
        self.parts, self.modules = [], [vars(module) for module in model.modules()]
        for own in self.modules:
            for held in (own["_modules"], own["_parameters"]):
                self.parts += [(held, name, part) for name, part in held.items()]
            self.parts += [
                (own, name, own[name]) for name in ("eps", "approximate", "scale", "num_heads") if name in own
            ]
        parameters = list(model.parameters())
        usual = all(_is_usual(p) for p in parameters)
        self.tensors = [(p, *_state(p)) for p in parameters] if usual else []
        self.places = (ctypes.c_void_p * len(self.tensors))(*[where for _, where, _ in self.tensors])
        self.sizes = (ctypes.c_long * len(self.tensors))(*[p.numel() for p, _, _ in self.tensors])
        self.seen = self._peek()
        self.weights = _of_model(model) if usual else None

    def _peek(self) -> int:
        return call("peek", self.places, self.sizes, len(self.tensors))

    @property
    def holds(self) -> bool:
        """Whether nothing was replaced or written to since, through `.data` either."""
        for held, name, part in self.parts:  # plain loops: this is asked for every batch
            if held.get(name) is not part:
                return False
        for parameter, *state in self.tensors:
            if _state(parameter) != state:
                return False
        return self._peek() == self.seen

    @property
    def watched(self) -> bool:
        """Whether modules do what the kernels leave out: hooks, dropout, a forward of their own."""
        for own in self.modules:
            if own["training"] or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
                return True
        return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


_PACKED: WeakKeyDictionary[nn.Module, Packed] = WeakKeyDictionary()


def weights_of(model: Any) -> Weights | None:
    """Weights of a timm VisionTransformer in bfloat16; None where the kernels cannot do its work, or hooks watch it."""
    if model.training:
        return None
    packed = _PACKED.get(model)
    if packed is None or not packed.holds:
        packed = _PACKED[model] = Packed(model)
    return None if packed.watched else packed.weights


def _of_model(model: Any) -> Weights | None:
    shapes = {(block.attn.num_heads, block.attn.head_dim) for block in model.blocks}
    if len(shapes) != 1 or not all(_plain(block) for block in model.blocks):
        return None
    tensors: list[Tensor] = []
    structs = [_of_block(block, tensors) for block in model.blocks]
    head = _of_head(model, tensors)
    return Weights(_of_patches(model.patch_embed), head, (BlockStruct * len(structs))(*structs), tensors)


def pack(weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Linear:
    """Arrange weight [outputs, inputs] so that a tile of the processor is in a row; inputs are a multiple of 32."""
    outputs, inputs = weight.shape
    spare = -outputs % SIDE
    packed = weight.new_empty((outputs + spare) * inputs)
    call("pack_weight", weight.detach().contiguous(), outputs, inputs, packed)
    bias = (
        weight.new_zeros(outputs + spare, dtype=torch.float32)
        if bias is None
        else F.pad(bias.detach().float(), (0, spare))
    )
    return Linear(packed, bias, None if scale is None else scale.detach().float(), inputs, outputs)


def _is_usual(p: Tensor) -> bool:
    """Whether a parameter is plain numbers in this machine's memory, which may be looked at."""
    plain = type(p) is nn.Parameter and p.dtype == torch.bfloat16 and p.device.type == "cpu"
    return plain and p.layout == torch.strided and p.is_contiguous()


def _state(parameter: Tensor) -> list[int]:
    """Where a parameter lies, and how often it was written to."""
    return [parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version]


def _of_patches(patch_embed: Any) -> Linear | None:
    proj = patch_embed.proj
    plain = type(proj) is nn.Conv2d and type(patch_embed.norm) is nn.Identity and not patch_embed.dynamic_img_pad
    if not plain or proj.kernel_size not in ((8, 8), (16, 16), (32, 32)):
        return None
    weight = proj.weight.flatten(1)
    return pack(weight, proj.bias) if _fits(*weight.shape) else None


def _of_head(model: Any, tensors: list[Tensor]) -> tuple[NormStruct, Linear] | None:
    norm, head = model.norm, model.head
    plain = type(model) is VisionTransformer and model.global_pool == "token" and type(model.fc_norm) is nn.Identity
    plain = plain and type(model.head_drop) in DROPS
    if not plain or not _is_norm(norm) or type(head) is not nn.Linear or not _fits(head.in_features):
        return None
    return NormStruct.of(norm.weight, norm.bias, norm.eps, tensors), pack(head.weight, head.bias)


def _of_block(block: Any, tensors: list[Tensor]) -> BlockStruct:
    attn, mlp = block.attn, block.mlp
    scales = [None if isinstance(ls, nn.Identity) else ls.gamma for ls in (block.ls1, block.ls2)]
    norms = [NormStruct.of(norm.weight, norm.bias, norm.eps, tensors) for norm in (block.norm1, block.norm2)]
    linears = []
    for layer, scale in ((attn.qkv, None), (attn.proj, scales[0]), (mlp.fc1, None), (mlp.fc2, scales[1])):
        linear = pack(layer.weight, layer.bias, scale)
        tensors += [linear.packed, linear.bias] + ([] if linear.scale is None else [linear.scale])
        linears.append(linear.struct)
    sizes = attn.qkv.in_features, attn.num_heads, attn.head_dim, mlp.fc1.out_features
    return BlockStruct(*norms, *linears, *sizes, attn.scale)


def _plain(block: Any) -> bool:
    """Whether a block is norm, attention, GELU and layer scale as the kernels compute them, by exact type."""
    attn, mlp = block.attn, block.mlp
    if type(mlp) is not Mlp or type(mlp.act) is not nn.GELU or mlp.act.approximate != "none":
        return False
    linears = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
    if not all(type(layer) is nn.Linear and _fits(*layer.weight.shape) for layer in linears):
        return False
    if not _fits(attn.head_dim):
        return False
    if not _is_norm(block.norm1) or not _is_norm(block.norm2):
        return False
    nothing = (attn.q_norm, attn.k_norm, attn.norm, mlp.norm)
    drops = (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2, block.drop_path1, block.drop_path2)
    scales = (block.ls1, block.ls2)
    return (
        all(type(part) is nn.Identity for part in nothing)
        and all(type(drop) in DROPS for drop in drops)
        and all(type(scale) in (nn.Identity, LayerScale) for scale in scales)
        and getattr(attn, "gate", None) is None
    )


def _is_norm(norm: Any) -> bool:
    return type(norm) in (nn.LayerNorm, LayerNorm) and norm.bias is not None and len(norm.normalized_shape) == 1


def _fits(*widths: int) -> bool:
    return all(width % SIDE == 0 for width in widths)
