"""The project's compiled kernels for packed rows: bfloat16 on x86 processors that compute in it.

`status()` says what they can do on this machine. Where they cannot run, PyTorch's kernels do everything.
"""

from tokengame.kernels.library import Status, announce, available, disabled, status, usable, usable_heads, why_slow

__all__ = ["Status", "announce", "available", "disabled", "status", "usable", "usable_heads", "why_slow"]
