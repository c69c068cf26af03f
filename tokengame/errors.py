"""The one exception that users meet, and warnings: a sentence that says what is wrong, where, and how to fix it."""

from __future__ import annotations

import sys
import warnings


class TokenGameError(Exception):
    """Bad input or an impossible request. The command line prints it without a traceback and exits with 2."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type where the text is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def warn(sentence: str) -> None:
    """A warning that points at the line outside this package that led to it; shown once for each such line."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "tokengame":
        depth, frame = depth + 1, frame.f_back
    warnings.warn(sentence, stacklevel=depth)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, met where a run can stop; its text says what is kept and how to go on.

    Args:
        text: one sentence.
        number: of the signal.
    """

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.number = number
