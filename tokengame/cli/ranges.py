"""The numbers that a flag takes: written beside the flag, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from tokengame.config import require


@dataclass(frozen=True)
class Range:
    """Annotates a number or a tuple of numbers: all are finite and within these bounds."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        if None not in (self.least, self.most):
            return f"between {self.least} and {self.most}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)


COUNT, NATURAL = Range(least=1), Range(least=0)
SHARE, PART = Range(least=0, most=1), Range(above=0, below=1)
"""with both ends, and without"""
COMPUTE = Range(above=0, most=1)
"""pruned / native"""


def require_in_range(flags: Any) -> None:
    """Check every field of a dataclass that is annotated with a `Range`.

    None stands for no number; a tuple may be empty where that is its default.

    Raises:
        TokenGameError: a number is not finite or out of range; the sentence has the flag as it is typed.
    """
    hints = get_type_hints(type(flags), include_extras=True)
    for field in fields(flags):
        flag, value = "--" + field.name.replace("_", "-"), getattr(flags, field.name)
        for limits in getattr(hints[field.name], "__metadata__", ()):
            if isinstance(limits, Range):
                require(value != () or field.default == (), f"{flag} takes at least one number")
                for number in value if isinstance(value, tuple) else (value,):
                    require(number is None or number in limits, f"{flag} must be {limits}, not {number}")
