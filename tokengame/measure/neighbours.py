"""Busy processes beside what is timed, as on a shared machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

BUSY = "while True: pass"


@contextmanager
def neighbours(number: int) -> Iterator[None]:
    """Keep `number` processes busy within this context, each of which wants a core for itself."""
    with ExitStack() as stack:
        for _ in range(number):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-S", "-c", BUSY]))
            stack.callback(process.kill)  # before its context waits for it
        yield
