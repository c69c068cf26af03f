"""Loading the compiled library, and what it can do here.

PyTorch's work between matrix products costs more than the products where a processor multiplies matrices in tiles
(AMX), and oneDNN compiles a kernel for every new number of rows, which packed batches have every time. The kernels of
csrc/ do a norm, the product that follows, its bias, activation and residual in one pass over rows that stay in the
cache, and none is compiled for a shape. Sums are float32 and intermediate results are not rounded, so results are
nearer to float32's than PyTorch's own in bfloat16 (tests/test_kernels.py).
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

TILE = 32
"""widths must be multiples of it"""
SOURCES = Path(__file__).parents[2] / "csrc"
"""the kernels' sources, in a checkout of the repository"""
LEVELS = {"none": 0, "avx512": 1, "amx": 2}
"""instructions to use at most, by the environment variable TOKENGAME_KERNELS"""
INSTRUCTIONS = {1: "AVX-512 bfloat16", 2: "AMX"}
FAST = {
    torch.bfloat16: {"avx512_bf16": "AVX-512 bfloat16", "amx_bf16": "AMX", "sve_bf16": "SVE bfloat16"},
    torch.float16: {"avx512_fp16": "AVX-512 float16", "amx_fp16": "AMX float16"},
}
"""number formats that are slow on a processor without one of these, by PyTorch's name of it"""


@dataclass(frozen=True)
class Status:
    """What the compiled kernels can do on this machine; its text is one line."""

    instructions: str | None
    """the instruction set in use; None where the kernels cannot run"""
    reason: str
    """why they cannot run; empty where they can"""
    dtype: torch.dtype | None = None
    """the number format in question; None for all"""
    device: str = "cpu"
    """the kind of device in question"""

    @property
    def active(self) -> bool:
        """Whether the kernels run here, in `dtype` and on `device`."""
        return self.instructions is not None and self.dtype in (None, torch.bfloat16) and self.device == "cpu"

    def __str__(self) -> str:
        if self.device != "cpu":
            return f"kernels: PyTorch's on {self.device}"
        if self.dtype not in (None, torch.bfloat16):
            return f"kernels: PyTorch's for {_name(self.dtype)} (compiled ones serve bfloat16)"
        if self.active:
            others = "" if self.dtype else "; PyTorch's for other number formats"
            return f"kernels: compiled for bfloat16, on {self.instructions}{others}"
        named = "bfloat16" if self.dtype else "every number format"
        return f"kernels: PyTorch's for {named} ({self.reason})"


def status(dtype: torch.dtype | None = None, device: str = "cpu") -> Status:
    """Say which kernels run on this machine.

    Args:
        dtype: the number format in question; None for a general answer.
        device: the kind of device in question ("cpu", "cuda").
    """
    loaded = _loaded()
    if loaded.library is not None and not _ENABLED.get():
        return Status(None, "switched off by tokengame.kernels.disabled()", dtype, device)
    return Status(INSTRUCTIONS.get(loaded.level), loaded.reason, dtype, device)


def why_slow(dtype: torch.dtype, device: str = "cpu") -> str:
    """Why this machine computes in `dtype` more slowly than in float32; empty where it does not.

    Args:
        dtype: a number format; only bfloat16 and float16 are ever slow.
        device: the kind of device ("cpu", "cuda").
    """
    if device == "cuda":
        emulated = dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False)
        return "the GPU has no bfloat16" if emulated else ""
    if device != "cpu" or dtype not in FAST:
        return ""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    lacking = "the processor has no " + " or ".join(FAST[dtype].values())
    return "" if any(able.get(name, False) for name in FAST[dtype]) else lacking


@cache
def announce(dtype: torch.dtype, device: str) -> None:
    """Say once in a process which kernels run, and whether the number format is slow here.

    It goes to the logger "tokengame", or to stderr where nothing is logged.
    """
    line, reason, logger = str(status(dtype, device)), why_slow(dtype, device), logging.getLogger("tokengame")
    slow = f"{_name(dtype)} is slow here ({reason}); float32 is usually faster"
    if logger.hasHandlers():
        logger.info(line)
        if reason:
            logger.warning(slow)
    else:
        print(f"tokengame: {line}" + f"\ntokengame: {slow}" * bool(reason), file=sys.stderr)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def library() -> ctypes.CDLL | None:
    """The compiled kernels, ready for use; None where they do not exist or cannot run."""
    return _loaded().library


def available() -> bool:
    """Whether the compiled kernels can run on this processor."""
    return library() is not None


class Loaded(NamedTuple):
    """What became of loading the library."""

    library: Any
    """None where it cannot be used"""
    level: int
    """of `LEVELS`, the instructions in use"""
    reason: str
    """why it cannot be used; empty where it can"""


@cache
def _loaded() -> Loaded:
    found = importlib.util.find_spec("tokengame._kernels")
    if found is None or found.origin is None:
        return Loaded(None, 0, "tokengame was installed without a C++ compiler")
    try:  # its threads are those of PyTorch, whose OpenMP is in the process already
        kernels = ctypes.CDLL(found.origin)
    except OSError as error:
        return Loaded(None, 0, f"{found.origin} cannot be loaded: {error}")
    if SOURCES.is_dir() and _checksum(kernels) != _checksum_of(SOURCES):
        advice = "install tokengame again (make, or pip install -e .)"
        warnings.warn(f"{found.origin} was not compiled from {SOURCES} and is not used: {advice}", stacklevel=3)
        return Loaded(None, 0, f"compiled from other sources: {advice}")
    kernels.weight_version.restype, kernels.fused_workspace.restype = ctypes.c_ulonglong, ctypes.c_long
    wanted = os.environ.get("TOKENGAME_KERNELS", "amx")
    if level := kernels.set_level(LEVELS.get(wanted, 2)):
        return Loaded(kernels, level, "")
    off = "switched off by TOKENGAME_KERNELS" if wanted == "none" else "the processor has no AVX-512 bfloat16"
    return Loaded(None, 0, off)


def _checksum(kernels: ctypes.CDLL) -> int | None:
    """Of the sources that a library was compiled from."""
    return kernels.source_checksum() & 0xFFFFFFFF if hasattr(kernels, "source_checksum") else None


def _checksum_of(folder: Path) -> int:
    """Of the sources in `folder`, computed as in setup.py."""
    return crc32(b"".join(path.read_bytes() for kind in ("*.cpp", "*.h") for path in sorted(folder.glob(kind))))


_ENABLED = ContextVar("enabled", default=True)


@contextmanager
def disabled() -> Iterator[None]:
    """Within this context everything runs on PyTorch's kernels, for comparison."""
    token = _ENABLED.set(False)
    try:
        yield
    finally:
        _ENABLED.reset(token)


def usable(rows: Tensor) -> bool:
    """Whether the kernels can run on `rows`: bfloat16 on a CPU that computes in it, without gradients or autocast."""
    if rows.dtype != torch.bfloat16 or rows.device.type != "cpu" or torch.compiler.is_compiling() or not len(rows):
        return False
    gradients = rows.requires_grad or torch.is_grad_enabled()
    return not gradients and not torch.is_autocast_enabled("cpu") and available() and _ENABLED.get()


def usable_heads(heads: Tensor) -> bool:
    """Whether attention kernels can run on [..., D]."""
    return heads.shape[-1] % TILE == 0 and usable(heads)


def call(name: str, *arguments: Any) -> int:
    """Call a function of the library: tensors become pointers, None a null pointer, numbers long or float."""
    kernels = library()
    assert kernels is not None
    return getattr(kernels, name)(*[_converted(argument) for argument in arguments])


def _converted(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_long(argument) if isinstance(argument, int) else argument
