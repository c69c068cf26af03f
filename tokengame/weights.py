"""A timm block's weights as `kernels` wants them: packed once, and again whenever the block has changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from timm.layers import LayerNorm, LayerScale, Mlp
from torch import Tensor, nn

from tokengame.kernels import SIDE, Linear, Norm, pack


@dataclass(frozen=True)
class BlockWeights:
    """What the kernels need of one block."""

    norm1: Norm
    qkv: Linear
    proj: Linear
    norm2: Norm
    fc1: Linear
    fc2: Linear


class Packed:
    """The weights of one block, and how to see that they are still the block's."""

    def __init__(self, block: Any):
        self.weights = _packed(block) if _plain(block) else None
        self.modules = [(m._modules, name, part) for m in block.modules() for name, part in m._modules.items()]
        self.tensors = [(m._parameters, name, p, _state(p)) for m in block.modules() for name, p in m._parameters.items()]
        self.hooks = [hooks for m in block.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    @property
    def holds(self) -> bool:
        """Whether nothing was replaced or written to since."""
        return all(held.get(name) is part for held, name, part in self.modules) and all(
            held.get(name) is p and _state(p) == state for held, name, p, state in self.tensors
        )


_PACKED: WeakKeyDictionary[nn.Module, Packed] = WeakKeyDictionary()


def block_weights(block: Any) -> BlockWeights | None:
    """Packed weights of a timm `Block` in bfloat16; None where it does what the kernels do not, or is watched by hooks."""
    packed = _PACKED.get(block)
    if packed is None or not packed.holds:
        packed = _PACKED[block] = Packed(block)
    return None if block.training or any(packed.hooks) else packed.weights


def _state(parameter: Tensor | None) -> tuple[int, int] | None:
    if parameter is None:
        return None
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


def _packed(block: Any) -> BlockWeights:
    attn, mlp = block.attn, block.mlp
    scales = [None if isinstance(ls, nn.Identity) else ls.gamma for ls in (block.ls1, block.ls2)]
    return BlockWeights(
        norm1=_norm(block.norm1),
        qkv=pack(attn.qkv.weight, attn.qkv.bias),
        proj=pack(attn.proj.weight, attn.proj.bias, scales[0]),
        norm2=_norm(block.norm2),
        fc1=pack(mlp.fc1.weight, mlp.fc1.bias),
        fc2=pack(mlp.fc2.weight, mlp.fc2.bias, scales[1]),
    )


def _norm(norm: Any) -> Norm:
    return Norm(norm.weight.detach().float(), norm.bias.detach().float(), norm.eps)


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
