"""What the kernels of csrc/ are given, as they lay it out in memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from torch import Tensor


class NormStruct(ctypes.Structure):
    """As in csrc/network.h."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_double))

    @staticmethod
    def of(weight: Tensor, bias: Tensor, eps: float, keep: list[Tensor]) -> NormStruct:
        """Of a LayerNorm; what it points at is added to `keep`."""
        keep += [weight.detach().float(), bias.detach().float()]
        return NormStruct(keep[-2].data_ptr(), keep[-1].data_ptr(), eps)


class LinearStruct(ctypes.Structure):
    """As in csrc/network.h."""

    _fields_ = (("packed", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("scale", ctypes.c_void_p))


class BlockStruct(ctypes.Structure):
    """As in csrc/network.h."""

    _fields_ = (
        *[(name, NormStruct) for name in ("norm1", "norm2")],
        *[(name, LinearStruct) for name in ("qkv", "proj", "fc1", "fc2")],
        *[(name, ctypes.c_long) for name in ("dim", "heads", "width", "hidden")],
        ("scale", ctypes.c_double),
    )


@dataclass(frozen=True)
class Linear:
    """A linear layer's parameters as `pack` arranges them."""

    packed: Tensor
    """[outputs * inputs] bfloat16; outputs rounded up to a multiple of 32, with zeros"""
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


class MemoryStruct(ctypes.Structure):
    """As in csrc/network.h."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("keys", "values")],
        *[(name, ctypes.c_long) for name in ("key_row", "key_head", "value_row", "value_head")],
        *[(name, ctypes.c_void_p) for name in ("bounds", "bias")],
    )


class LookStruct(ctypes.Structure):
    """As in csrc/network.h."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("position", "dither")],
        *[(name, ctypes.c_long) for name in ("agents_at_start", "prefix")],
        *[(name, ctypes.c_void_p) for name in ("features", "index")],
        *[(name, ctypes.c_long) for name in ("agents", "image")],
    )


class GameStruct(ctypes.Structure):
    """As in csrc/game.cpp."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("depth", ctypes.c_long),
        *[(name, LinearStruct) for name in ("patches", "head")],
        ("norm", NormStruct),
        *[(name, ctypes.c_void_p) for name in ("start", "last_qkv")],
        *[(name, ctypes.c_long) for name in ("channels", "height", "width", "patch", "prefix", "classes")],
        ("stages", ctypes.c_void_p),
        ("decisions", ctypes.c_long),
        *[(name, ctypes.c_void_p) for name in ("lines", "dither", "cuts")],
    )


class ResultsStruct(ctypes.Structure):
    """As in csrc/game.cpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("prediction", "opening", "kept", "alive"))
