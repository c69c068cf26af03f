"""Loading the compiled library, and choosing its functions by instruction set and number format.

A forward pass of a Vision Transformer spends much of its time between matrix products. The kernels of csrc/ do a norm,
the product that follows, its bias, activation and residual in one pass over rows that stay in the cache, attention
stores no matrix of pairs, and nothing is compiled for a shape, which packed batches have a new one of every time. Sums
are float32, so results in bfloat16 are nearer to float32's than PyTorch's own (tests/test_kernels.py).
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from tokengame.kernels.structs import SIGNATURES, STRUCTS, TableStruct

TILE = 32
"""widths must be multiples of it"""
LIBRARY = Path(__file__).parents[1] / "_kernels.so"
"""the compiled kernels, of any Python"""
SOURCES = Path(__file__).parents[2] / "csrc"
"""the kernels' sources, in a checkout of the repository"""
LEVELS = ("none", "generic", "avx2", "avx512", "avx512_bf16", "amx")
"""instructions to use, or the best ones below, by the environment variable TOKENGAME_KERNELS"""
VIOLATED = 2
"""what a function returns that was called with what it does not allow, see csrc/table.h"""
INSTRUCTIONS = {
    torch.float32: ("the compiler's vectors", "AVX2", "AVX-512", "AVX-512", "AVX-512"),
    torch.bfloat16: ("the compiler's vectors", "AVX2", "AVX-512", "AVX-512 bfloat16", "AMX"),
}
"""what the kernels use of each level from "generic" on, by the number formats that they serve"""


class Loaded(NamedTuple):
    """What became of loading the library."""

    library: Any
    """None where it cannot be used"""
    highest: int
    """the highest level of the processor, counted from "generic" """
    fastest: int
    """the level that is used unless another one is chosen"""
    reason: str
    """why it cannot be used; empty where it can"""


@cache
def loaded() -> Loaded:
    """The library of this installation."""
    if not LIBRARY.is_file():
        return Loaded(None, -1, -1, "tokengame was installed without a C++ compiler")
    try:
        kernels = _open()
    except OSError as error:
        return Loaded(None, -1, -1, f"{LIBRARY} cannot be loaded: {error}")
    advice = "install tokengame again (make, or pip install -e .)"
    if (SOURCES.is_dir() and _checksum(kernels) != _checksum_of(SOURCES)) or not _same_structs(kernels):
        warnings.warn(f"{LIBRARY} was not compiled from {SOURCES} and is not used: {advice}", stacklevel=3)
        return Loaded(None, -1, -1, f"compiled from other sources: {advice}")
    kernels.weight_version.restype, kernels.kernels.restype = ctypes.c_ulonglong, ctypes.c_void_p
    return Loaded(kernels, kernels.highest_level(), kernels.fastest_level(), "")


def _open() -> ctypes.CDLL:
    """The library, whose threads are those of PyTorch: it is not linked with an OpenMP, but finds PyTorch's."""
    try:
        return ctypes.CDLL(str(LIBRARY))
    except OSError:  # a PyTorch that keeps its OpenMP to itself, or has none
        ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(LIBRARY))


def _checksum(kernels: ctypes.CDLL) -> int | None:
    """Of the sources that a library was compiled from."""
    return kernels.source_checksum() & 0xFFFFFFFF if hasattr(kernels, "source_checksum") else None


def _checksum_of(folder: Path) -> int:
    """Of the sources in `folder`, computed as in setup.py."""
    return crc32(b"".join(path.read_bytes() for kind in ("*.cpp", "*.h") for path in sorted(folder.glob(kind))))


def _same_structs(kernels: ctypes.CDLL) -> bool:
    """Whether C++ and Python lay out the same bytes."""
    if not hasattr(kernels, "struct_bytes"):
        return False
    kernels.struct_bytes.restype = ctypes.c_long
    return [kernels.struct_bytes(i) for i in range(len(STRUCTS) + 1)] == [*map(ctypes.sizeof, STRUCTS), 0]


_LIMIT: ContextVar[int | None] = ContextVar("limit", default=None)


@contextmanager
def limited(level: str) -> Iterator[None]:
    """Within this context the kernels use the instructions of `level`, or the best ones below, for comparison.

    Args:
        level: one of "none", "generic", "avx2", "avx512", "avx512_bf16", "amx"; at "none" PyTorch's kernels run.

    Raises:
        ValueError: no such level.
    """
    token = _LIMIT.set(LEVELS.index(level) - 1)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def disabled() -> Any:
    """Within this context everything runs on PyTorch's kernels, for comparison."""
    return limited("none")


@cache
def _limit_of_process() -> int | None:
    wanted = os.environ.get("TOKENGAME_KERNELS")
    return LEVELS.index(wanted) - 1 if wanted in LEVELS else None


def level() -> int:
    """The level in use now, counted from "generic"; -1 where the kernels do not run."""
    limits = [limit for limit in (_LIMIT.get(), _limit_of_process()) if limit is not None]
    return min(loaded().highest, *limits) if limits else loaded().fastest


def available() -> bool:
    """Whether the compiled kernels can run here."""
    return level() >= 0


def usable(rows: Tensor) -> bool:
    """Whether the kernels can run on `rows`: float32 or bfloat16 on a CPU, without gradients or autocast."""
    if rows.dtype not in INSTRUCTIONS or rows.device.type != "cpu" or torch.compiler.is_compiling() or not len(rows):
        return False
    gradients = rows.requires_grad or torch.is_grad_enabled()
    return not gradients and not torch.is_autocast_enabled("cpu") and available()


def usable_heads(heads: Tensor) -> bool:
    """Whether attention kernels can run on [..., D]."""
    return heads.shape[-1] % TILE == 0 and usable(heads)


@cache
def _table(at: int, dtype: torch.dtype) -> dict[str, Any]:
    """The functions of a level, and the bytes of a packed number, by their names in csrc/interface.h."""
    table = TableStruct.from_address(loaded().library.kernels(at, dtype.itemsize))
    return {name: getattr(table, name) for name in ("operand_bytes", *SIGNATURES)}


def operand_bytes(dtype: torch.dtype) -> int:
    """Of a number of a packed weight."""
    return _table(level(), dtype)["operand_bytes"]


def call(name: str, dtype: torch.dtype, *arguments: Any) -> int:
    """Call a function of the table for `dtype`: tensors become pointers, None a null pointer.

    Raises:
        MemoryError: there was none for the kernels' own use.
        AssertionError: an argument is not as csrc/interface.h says; only a debug build finds it (scripts/sanitize).
    """
    function: Callable[..., int] = _table(level(), dtype)[name]
    found = function(*[argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments])
    if name == "fused_workspace" or not found:
        return found
    if found == VIOLATED:
        raise AssertionError(f"{name} of the compiled kernels was called with what csrc/interface.h does not allow")
    raise MemoryError("no memory for the compiled kernels: make the batch smaller")


def weight_version(pointers: Any, rows: Any, columns: Any, number: int, part: int, parts: int) -> int:
    """See csrc/processor.cpp."""
    return loaded().library.weight_version(pointers, rows, columns, *map(ctypes.c_long, (number, part, parts)))
