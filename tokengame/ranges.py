"""What a setting may be: ranges of numbers, and the check of a dataclass's fields against its annotations."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tokengame.errors import TokenGameError


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`; no bool is one.

    Args:
        low, high: the least and the greatest.
        whole: whether only integers are allowed.
        above, below: whether `low` and `high` themselves are excluded.
    """

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    above: bool = False
    below: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        large_enough = self.low < value if self.above else self.low <= value  # NaN is neither
        small_enough = value < self.high if self.below else value <= self.high
        return large_enough and small_enough and abs(value) != math.inf

    def __str__(self) -> str:
        kind, low, high = "a whole number" if self.whole else "a number", f"{self.low:,.15g}", f"{self.high:,.15g}"
        if math.inf in (-self.low, self.high):
            return kind
        if not self.above and not self.below:
            return f"{kind} from {low} to {high}"
        return (
            f"{kind} {'above' if self.above else 'of at least'} {low} and {'below' if self.below else 'at most'} {high}"
        )


def require(holds: bool, sentence: str) -> None:
    """Raise TokenGameError with `sentence` unless `holds`."""
    if not holds:
        raise TokenGameError(sentence)


def require_in(allowed: Range, value: Any, name: str) -> None:
    """Raise TokenGameError unless `value` is a number that is `allowed`."""
    require(value in allowed, f"{name} must be {allowed}, not {shown(value)}")


def shown(value: Any) -> str:
    """`value` in a sentence: one line, and short whatever it is."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"


@lru_cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Annotations of the fields of a dataclass."""
    return get_type_hints(kind, include_extras=True)


def check_fields(kind: type, values: Mapping[str, Any], name: Callable[[str], str]) -> None:
    """Compare settings with what the annotations of a dataclass allow: `Range`, `Literal`, bool, str, None, tuples.

    Args:
        kind: the dataclass.
        values: of its fields; those left out have their defaults.
        name: what the user calls a field.

    Raises:
        TokenGameError: a value is not allowed.
    """
    for field, hint in hints_of(kind).items():
        if field in values:
            _check(hint, values[field], name(field))


def _check(hint: Any, value: Any, name: str) -> None:
    allowed = next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)), Range())
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(hint) in (UnionType, Union):  # float | None, Literal[...] | None
        if value is None:
            return
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        known = isinstance(value, str) and value in choices
        require(known, f"{name} must be {' or '.join(map(repr, choices))}, not {shown(value)}")
    elif get_origin(hint) is tuple:
        require(isinstance(value, (tuple, list)), f"{name} must be a list of numbers, not {shown(value)}")
        for item in value:
            require_in(allowed, item, f"each of {name}")
    elif hint is bool:
        require(isinstance(value, bool), f"{name} must be True or False, not {shown(value)}")
    elif hint is str or is_dataclass(hint):
        kind = "text" if hint is str else f"a {hint.__name__}"  # type: ignore[union-attr]
        require(isinstance(value, hint), f"{name} must be {kind}, not {shown(value)}")  # type: ignore[arg-type]
    else:
        require_in(allowed, value, name)
