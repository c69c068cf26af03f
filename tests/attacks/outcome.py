"""What became of a case, and the one judge of exceptions."""

from __future__ import annotations

import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tokengame import TokenGameError

LONGEST_SENTENCE = 1000
"""characters; an error message beyond that is a dump, not a sentence"""


class Defect(Exception):
    """The package did what it must not do."""


class Refused(Exception):
    """A command ended as it must on bad input: its exit code and its sentence have been judged."""


@dataclass(frozen=True)
class Outcome:
    """Of one case."""

    attack: str
    seed: int
    number: int
    verdict: str
    """ok: it worked and is right; refused: a sentence; defect: anything else"""
    what: str
    """the case and what became of it, in words"""
    mib: float = 0.0
    """memory that the case took at most, above that of the process before"""

    def __str__(self) -> str:
        case = f"--only {self.attack} --seed {self.seed} --number {self.number}"
        return f"{self.verdict}: {self.what} (python runs/reliability.py {case})"


def require(holds: object, what: str) -> None:
    """Raise `Defect` with `what` unless `holds`."""
    if not holds:
        raise Defect(what)


@contextmanager
def accepted(what: str, wanted: bool = True) -> Iterator[None]:
    """Where it is `wanted`, a refusal in this context is a defect: `what` is sound."""
    try:
        yield
    except (TokenGameError, Refused) as error:
        if wanted:
            raise Defect(f"{what} is refused: {error}") from None
        raise


def judged(case: Callable[[], str]) -> tuple[str, str]:
    """Verdict and words: `case` returns what it is when all is right; a `TokenGameError` refuses it with a sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "ok", case()
    except TokenGameError as error:
        fault = fault_of_sentence(str(error))
        return ("defect", f"{fault}: {str(error)[:200]!r}") if fault else ("refused", str(error))
    except Refused as refusal:
        return "refused", str(refusal)
    except Defect as defect:
        return "defect", str(defect)
    except MemoryError:
        return "defect", "memory without limit"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "defect", f"{type(error).__name__} in {place.name}: {error}"[:300]


def fault_of_sentence(sentence: str) -> str | None:
    """What is wrong with an error message, or None."""
    if not sentence.strip():
        return "an empty sentence"
    if len(sentence) > LONGEST_SENTENCE or len(sentence.strip().splitlines()) > 1:
        return "more than a sentence"
    if "allocate memory" in sentence or "not enough memory" in sentence:
        return "memory without limit"
    return None


def generator(attack: str, seed: int, number: int) -> random.Random:
    """Random numbers of one case."""
    return random.Random(f"{attack} {seed} {number}")
