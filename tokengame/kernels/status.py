"""Which kernels run on this machine, in a line."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from functools import cache

import torch

from tokengame.kernels.library import INSTRUCTIONS, level, loaded

FAST = {
    torch.bfloat16: {"avx512_bf16": "AVX-512 bfloat16", "amx_bf16": "AMX", "sve_bf16": "SVE bfloat16"},
    torch.float16: {"avx512_fp16": "AVX-512 float16", "amx_fp16": "AMX float16"},
}
"""number formats that are slow on a processor without one of these, by PyTorch's name of it"""
STEP_BY_STEP = (
    "training, which draws its actions",
    "policies of your own that are not linear in what they observe",
    "rotary positions of a NaFlexViT",
    "blocks with relative positions, normed queries and keys, norms after, or hooks",
)
"""what the compiled kernels do not run as one call from pixels to the last decision"""


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
    def step_by_step(self) -> tuple[str, ...]:
        """What is not one call of the compiled kernels here, in words."""
        return STEP_BY_STEP if self.active else ("everything",)

    @property
    def active(self) -> bool:
        """Whether the kernels run here, in `dtype` and on `device`."""
        served = self.dtype is None or self.dtype in INSTRUCTIONS
        return self.instructions is not None and served and self.device == "cpu"

    def __str__(self) -> str:
        if self.device != "cpu":
            return f"kernels: PyTorch's on {self.device}"
        if self.active:
            named = "float32 and bfloat16" if self.dtype is None else _name(self.dtype)
            others = "" if self.dtype else "; PyTorch's for other number formats"
            return f"kernels: compiled for {named}, on {self.instructions}{others}"
        if self.dtype is not None and self.dtype not in INSTRUCTIONS:
            return f"kernels: PyTorch's for {_name(self.dtype)} (compiled ones serve float32 and bfloat16)"
        named = _name(self.dtype) if self.dtype else "every number format"
        return f"kernels: PyTorch's for {named} ({self.reason})"


def status(dtype: torch.dtype | None = None, device: str = "cpu") -> Status:
    """Say which kernels run on this machine.

    Args:
        dtype: the number format in question; None for a general answer.
        device: the kind of device in question ("cpu", "cuda").
    """
    if level() >= 0:
        names = [INSTRUCTIONS[d][level()] for d in INSTRUCTIONS if dtype in (None, d)]
        return Status(" and ".join(dict.fromkeys(names)) or None, "", dtype, device)
    off = "switched off by TOKENGAME_KERNELS or tokengame.kernels.disabled()"
    return Status(None, off if loaded().highest >= 0 else loaded().reason, dtype, device)


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
