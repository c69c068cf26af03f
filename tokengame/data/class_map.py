"""Class maps, and what may be a label."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tokengame.data.decode import MAX_BYTES, printable
from tokengame.errors import TokenGameError


def normal(name: str) -> str:
    """A class name without what differs between file systems: forms of Unicode, %20 for a space, edges."""
    return unicodedata.normalize("NFC", unquote(name)).strip()


class ClassMap:
    """Class indices by name, from a text file with one class a line in the model's order.

    A line may go on after the name, as in "n01440764 tench, Tinca tinca": its first word will do as well.

    Raises:
        TokenGameError: there is no such file, it is no text, or a line is blank or there twice.
    """

    def __init__(self, path: str):
        self.path, self.index = path, dict[str, int]()
        first_words = Counter[str]()
        for i, line in enumerate(_lines(path)):
            if not line:
                raise TokenGameError(f"line {i + 1} of {path} is blank; every line is a class of the model")
            if line in self.index:
                raise TokenGameError(f"{path} has {line!r} twice, in lines {self.index[line] + 1} and {i + 1}")
            self.index[line] = i
            first_words[_first_word(line)] += 1
        self._by_first_word = {w: i for line, i in self.index.items() if first_words[w := _first_word(line)] == 1}

    def __len__(self) -> int:
        return len(self.index)

    def find(self, name: str) -> int | None:
        """The index of a class, None where the file does not have it."""
        known = normal(name)
        return self.index.get(known, self._by_first_word.get(known))

    def require_classes(self, classes: int) -> None:
        """Raise TokenGameError if the file has another number of classes than the model."""
        if len(self) != classes:
            rule = "it needs one line for each, in the model's order"
            raise TokenGameError(f"{self.path} names {len(self)} classes but the model has {classes}; {rule}")


def _first_word(line: str) -> str:
    return line.split()[0].rstrip(",;")


def _lines(path: str) -> list[str]:
    file = Path(path)
    if not file.is_file():
        raise TokenGameError(f"no class map at {path}; --class-map is a text file with one class name a line")
    try:
        if file.stat().st_size > MAX_BYTES:
            raise TokenGameError(f"the class map {path} has more than {MAX_BYTES:,} bytes; it is no list of names")
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeError:
        raise TokenGameError(f"the class map {path} is no UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise TokenGameError(f"cannot read the class map {path} ({error.strerror})") from None
    if not text.strip():
        raise TokenGameError(f"the class map {path} is empty")
    return [normal(line) for line in text.rstrip().split("\n")]


def class_index(label: Any, name: str, classes: int) -> int:
    """The label of image `name` as a class index.

    Raises:
        TokenGameError: it is none of the model's: out of range, no whole number, a name.
    """
    if isinstance(label, Integral) and not isinstance(label, bool) and 0 <= int(label) < classes:
        return int(label)
    hint = ""
    if isinstance(label, str):
        hint = "; --class-map FILE says which class is which"
    elif label == -1:
        hint = ", which means that there are none; another --split may have some"
    reason = f"not class indices below {classes}: that of {printable(name)} is {label!r}{hint}"
    raise TokenGameError(f"the labels that come with the images are {reason}")


def mapped_index(label: Any, name: str, class_map: ClassMap, class_names: Sequence[str] | None) -> int:
    """The label of image `name`, a name or a number that counts `class_names`, as an index by `class_map`.

    Raises:
        TokenGameError: it has no name, or the class map does not have it.
    """
    if class_names is not None and not isinstance(label, str):
        label = class_names[class_index(label, name, len(class_names))]
    if not isinstance(label, str):
        raise TokenGameError(f"--class-map needs class names, but the label of {printable(name)} is {label!r}")
    found = class_map.find(label)
    if found is None:
        raise TokenGameError(f"the class {label!r} of {printable(name)} is not in {class_map.path}: rename or add it")
    return found
