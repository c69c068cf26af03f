"""The project's compiled kernels for packed rows: float32 and bfloat16 on any processor.

`status()` says what they use on this machine. Where they do not run, PyTorch's kernels do everything.
"""

from tokengame.kernels.library import available, disabled, limited, usable, usable_heads
from tokengame.kernels.status import Status, announce, status, why_slow

__all__ = [
    "Status",
    "announce",
    "available",
    "disabled",
    "limited",
    "status",
    "usable",
    "usable_heads",
    "why_slow",
]
