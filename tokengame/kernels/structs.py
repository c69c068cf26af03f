"""Memory layout of the arguments of csrc/, as ctypes structures; field order as in csrc/interface.h ."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class NormStruct(ctypes.Structure):
    """Norm in csrc/interface.h: a LayerNorm or an RMSNorm."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("weight", "bias")],
        ("eps", ctypes.c_double),
        ("counted", ctypes.c_void_p),
        *[(name, ctypes.c_long) for name in ("spare", "rms")],
    )


class LinearStruct(ctypes.Structure):
    """Linear in csrc/interface.h: a linear layer with packed weights."""

    _fields_ = (("packed", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("scale", ctypes.c_void_p))


class MlpStruct(ctypes.Structure):
    """Mlp in csrc/interface.h: the norm of a block's MLP, and the MLP."""

    _fields_ = (
        *[(name, NormStruct) for name in ("norm", "fc1_norm", "fc2_norm")],
        *[(name, LinearStruct) for name in ("fc1", "fc2")],
        *[(name, ctypes.c_long) for name in ("hidden", "activation", "gated")],
    )


class BlockStruct(ctypes.Structure):
    """Block in csrc/interface.h: a pre-norm transformer block."""

    _fields_ = (
        *[(name, NormStruct) for name in ("norm", "proj_norm")],
        *[(name, LinearStruct) for name in ("qkv", "proj")],
        ("mlp", MlpStruct),
        *[(name, ctypes.c_long) for name in ("dim", "heads", "width")],
        ("scale", ctypes.c_double),
    )


@dataclass(frozen=True)
class PackedLinear:
    """A linear layer's parameters in the order in which the kernels read them."""

    packed: Tensor
    """outputs * inputs numbers in bytes, both rounded up to multiples of 32, with zeros"""
    bias: Tensor
    """[outputs] float32"""
    scale: Tensor | None
    """[outputs] float32, a LayerScale that follows, or None"""
    inputs: int
    outputs: int

    @property
    def struct(self) -> LinearStruct:
        """Pointers for the kernels."""
        scale = None if self.scale is None else self.scale.data_ptr()
        return LinearStruct(self.packed.data_ptr(), self.bias.data_ptr(), scale)


class CachedKeysValuesStruct(ctypes.Structure):
    """CachedKeysValues in csrc/interface.h."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("keys", "values")],
        *[(name, ctypes.c_long) for name in ("key_row", "key_head", "value_row", "value_head")],
        *[(name, ctypes.c_void_p) for name in ("cu_seqlens", "bias")],
    )


class ObservationRequestStruct(ctypes.Structure):
    """ObservationRequest in csrc/interface.h."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("position", "dither")],
        *[(name, ctypes.c_long) for name in ("total_agents", "prefix")],
        *[(name, ctypes.c_void_p) for name in ("features", "index")],
        *[(name, ctypes.c_long) for name in ("batch_agents", "first_image")],
    )


class AnglesStruct(ctypes.Structure):
    """Angles in csrc/interface.h."""

    _fields_ = (("at", ctypes.c_void_p), *[(name, ctypes.c_long) for name in ("block", "position", "head")])

    @classmethod
    def of(cls, angles: Tensor | None) -> AnglesStruct:
        """Of a table as `Backbone.rotary_table`, contiguous."""
        if angles is None:
            return cls()
        steps = [0 if size == 1 else step for size, step in zip(angles.shape, angles.stride(), strict=True)]
        return cls(angles.data_ptr(), *steps[:3])


class RotaryStruct(ctypes.Structure):
    """Rotary in csrc/interface.h."""

    _fields_ = (("position", ctypes.c_void_p), ("angles", AnglesStruct))


class ActorStruct(ctypes.Structure):
    """Actor in csrc/interface.h."""

    _fields_ = (*[(name, ctypes.c_void_p) for name in ("layers", "widths", "identity")], ("count", ctypes.c_long))


class FusedGameStruct(ctypes.Structure):
    """FusedGame in csrc/interface.h."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("depth", ctypes.c_long),
        *[(name, LinearStruct) for name in ("patches", "head")],
        ("norm", NormStruct),
        *[(name, ctypes.c_void_p) for name in ("start", "last_qkv")],
        *[(name, ctypes.c_long) for name in ("channels", "height", "width", "patch", "prefix", "agents", "classes")],
        *[(name, ctypes.c_long) for name in ("merges", "class_query", "end")],
        ("stages", ctypes.c_void_p),
        ("stage_count", ctypes.c_long),
        *[(name, ctypes.c_void_p) for name in ("linear", "dither", "thresholds", "shares")],
        ("actor", ActorStruct),
        ("angles", AnglesStruct),
    )


class FusedResultsStruct(ctypes.Structure):
    """FusedResults in csrc/interface.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("logits", "tokens_before", "kept", "alive", "rows", "sizes"))


SIGNATURES = {
    "pack_weight": "pllp",
    "normed_linear": "pllpplpl",
    "residual_linear": "pllplppl",
    "residual_mlp": "pllppl",
    "embed": "plllllplplpl",
    "attention": "pllpllpllpplllpdpl",
    "class_attention": "pllllpdplppl",
    "observe": "pllpllllpdpllpppllpplll",
    "absorb": "pllllplpppppllppppl",
    "run_half_blocks": "pllplplpppplpppppl",
    "last_block": "ppplpllpppl",
    "fused_workspace": "pll",
    "fused_forward": "pplppl",
}
"""arguments of each function of Table in csrc/interface.h, in order: p pointer, l long, d double"""
TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "d": ctypes.c_double}


def _prototype(name: str, arguments: str) -> Any:
    returned = ctypes.c_long if name == "fused_workspace" else ctypes.c_int
    return ctypes.CFUNCTYPE(returned, *[TYPES[kind] for kind in arguments])


class TableStruct(ctypes.Structure):
    """Table in csrc/interface.h: the functions of an instruction set for one number format."""

    _fields_ = (
        ("operand_bytes", ctypes.c_long),
        *[(name, _prototype(name, arguments)) for name, arguments in SIGNATURES.items()],
    )


STRUCTS = (
    NormStruct, LinearStruct, MlpStruct, BlockStruct, CachedKeysValuesStruct, ObservationRequestStruct, AnglesStruct,
    RotaryStruct, ActorStruct, FusedGameStruct, FusedResultsStruct, TableStruct,
)  # fmt: skip
"""in the order of struct_bytes in csrc/processor.cpp"""
