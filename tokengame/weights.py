"""A timm model's weights as `kernels` wants them: packed once, and again whenever the model has changed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from timm.layers import LayerNorm, LayerScale, Mlp
from torch import Tensor, nn

from tokengame.kernels import SIDE, BlockStruct, Linear, Norm, pack


@dataclass(frozen=True)
class BlockWeights:
    """What the kernels need of one block."""

    norm1: Norm
    norm2: Norm
    qkv: Linear
    proj: Linear
    fc1: Linear
    fc2: Linear
    struct: BlockStruct
    """pointers to all of them"""


Weights = TypeVar("Weights")


class Packed(Generic[Weights]):
    """What `build` makes of a module's weights, and how to see that they are still the module's."""

    def __init__(self, module: Any, build: Callable[[Any], Weights]):
        self.weights = build(module)
        self.parts, self.tensors, self.hooks = [], [], []
        for own in module.modules():
            self.parts += [(held, name, part) for held in (own._modules, own._parameters) for name, part in held.items()]
            self.tensors += [(p, *_state(p)) for p in own._parameters.values() if p is not None]
            self.hooks += [own._forward_hooks, own._forward_pre_hooks]

    @property
    def holds(self) -> bool:
        """Whether nothing was replaced or written to since."""
        for held, name, part in self.parts:  # plain loops: this is asked for every block of every batch
            if held.get(name) is not part:
                return False
        for parameter, where, version in self.tensors:
            if _state(parameter) != (where, version):
                return False
        return True


_PACKED: WeakKeyDictionary[nn.Module, Packed] = WeakKeyDictionary()


def block_weights(block: Any) -> BlockWeights | None:
    """Weights of a timm `Block` in bfloat16; None where it does what the kernels do not, or is watched by hooks."""
    return _weights(block, _of_block)


def patch_weights(patch_embed: Any) -> Linear | None:
    """Weights of a timm `PatchEmbed` in bfloat16, likewise."""
    return _weights(patch_embed, _of_patches)


def all_weights(blocks: Sequence[Any]) -> Any | None:
    """Array of the structs of all `blocks`; None where one of them is not for the kernels."""
    found = [block_weights(block) for block in blocks]
    known = [weights.struct for weights in found if weights is not None]
    return (BlockStruct * len(known))(*known) if len(known) == len(found) else None


def _weights(module: Any, build: Callable[[Any], Weights]) -> Weights | None:
    packed = _PACKED.get(module)
    if packed is None or not packed.holds:
        packed = _PACKED[module] = Packed(module, build)
    return None if module.training or any(packed.hooks) else packed.weights


def _state(parameter: Tensor) -> tuple[int, int]:
    """Where a parameter lies, and how often it was written to."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


def _of_patches(patch_embed: Any) -> Linear | None:
    proj = patch_embed.proj
    plain = type(proj) is nn.Conv2d and type(patch_embed.norm) is nn.Identity and not patch_embed.dynamic_img_pad
    if not plain or proj.weight.dtype != torch.bfloat16 or proj.kernel_size not in ((8, 8), (16, 16), (32, 32)):
        return None
    weight = proj.weight.flatten(1)
    return pack(weight, proj.bias) if _fits(*weight.shape) else None


def _of_block(block: Any) -> BlockWeights | None:
    if not _plain(block):
        return None
    attn, mlp = block.attn, block.mlp
    scales = [None if isinstance(ls, nn.Identity) else ls.gamma for ls in (block.ls1, block.ls2)]
    norms = [Norm(norm.weight.detach().float(), norm.bias.detach().float(), norm.eps) for norm in (block.norm1, block.norm2)]
    linears = [
        pack(layer.weight, layer.bias, scale)
        for layer, scale in zip((attn.qkv, attn.proj, mlp.fc1, mlp.fc2), (None, scales[0], None, scales[1]), strict=True)
    ]
    pointers = [p.struct for p in (*norms, *linears)]
    struct = BlockStruct(*pointers, attn.qkv.in_features, attn.num_heads, attn.head_dim, mlp.fc1.out_features, attn.scale)
    return BlockWeights(*norms, *linears, struct)


def _plain(block: Any) -> bool:
    """Whether a block is norm, attention, GELU and layer scale as the kernels compute them, by exact type."""
    attn, mlp = block.attn, block.mlp
    if type(mlp) is not Mlp or type(mlp.act) is not nn.GELU or mlp.act.approximate != "none":
        return False
    linears = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
    if not all(type(layer) is nn.Linear and _fits(*layer.weight.shape) for layer in linears):
        return False
    if any(layer.weight.dtype != torch.bfloat16 for layer in linears) or not _fits(attn.head_dim):
        return False
    norms = (block.norm1, block.norm2)
    if not all(type(norm) in (nn.LayerNorm, LayerNorm) and norm.bias is not None for norm in norms):
        return False
    nothing = (attn.q_norm, attn.k_norm, attn.norm, mlp.norm)
    scales = (block.ls1, block.ls2)
    return (
        all(type(part) is nn.Identity for part in nothing)
        and all(type(scale) in (nn.Identity, LayerScale) for scale in scales)
        and getattr(attn, "gate", None) is None
    )


def _fits(*widths: int) -> bool:
    return all(width % SIDE == 0 for width in widths)
