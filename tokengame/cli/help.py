"""The text of `--help`: the flags that matter first, then the others in groups."""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from tokengame.cli.common import Common, OnImages, WithModel

MAIN, IMAGES, OWN, TRAINING, RUN = "flags", "model and images", "this command", "training", "run"
GROUPS = (MAIN, IMAGES, OWN, TRAINING)
"""in this order, then those of nested settings and RUN"""
COLUMN = 26
"""where texts begin"""


@dataclass(frozen=True)
class Flag:
    """One flag as help shows it."""

    name: str
    hint: Any
    """its type"""
    default: Any
    """MISSING where there is none"""
    text: str
    group: str

    @property
    def typed(self) -> str:
        """The flag as it is typed."""
        name = self.name.replace("_", "-")
        if isinstance(self.default, bool):
            section, _, last = name.rpartition(".")
            return f"--{section}{'.' * bool(section)}no-{last}" if self.default else f"--{name}"
        return f"--{name} {_kind(self.hint)}"

    @property
    def note(self) -> str:
        """What holds without the flag."""
        if self.default in (MISSING, tyro.MISSING):
            return " (required)"
        if isinstance(self.default, bool) or self.default in (None, ()):
            return ""
        values = self.default if isinstance(self.default, tuple) else (self.default,)
        return f" [{' '.join(map(str, values))}]"

    def lines(self, width: int) -> str:
        """In two columns, `width` characters in all."""
        text = textwrap.wrap(self.text + self.note, width - COLUMN, break_on_hyphens=False)
        first = f"  {self.typed}"
        if len(first) >= COLUMN:
            return "\n".join([first, *(" " * COLUMN + line for line in text)])
        return "\n".join(f"{start:{COLUMN}}{line}".rstrip() for start, line in zip_longest([first], text, fillvalue=""))


def overview(commands: Iterable[type[Common]]) -> str:
    """The help of the program: what each command is for."""
    lines = [f"  {command.name:12}{(inspect.getdoc(command) or '').splitlines()[0]}" for command in commands]
    return "\n".join([
        "tokengame COMMAND [flags]: make a trained Vision Transformer faster by removing tokens; which ones, a small",
        "policy learns.", "", "commands:", *lines, "",
        "tokengame COMMAND --help shows the flags of one, tokengame --version the version.",
    ])  # fmt: skip


def help_of(command: type[Common], default: Common | None, everything: bool) -> str:
    """The help of one command: what it does, examples, flags.

    Args:
        command: its class.
        default: an instance with the defaults of a preset; None: the class's own.
        everything: whether nested settings are shown too.
    """
    width, shown, hidden = min(shutil.get_terminal_size((100, 24)).columns, 100), dict[str, list[str]](), list[str]()
    for flag in flags_of(command, default):
        if everything or "." not in flag.name:
            shown.setdefault(flag.group, []).append(flag.lines(width))
        else:
            hidden.append(flag.group)
    order = [*GROUPS, *(group for group in shown if group not in (*GROUPS, RUN)), RUN]
    examples = textwrap.indent(command.examples, "  ")
    parts = [f"tokengame {command.name}: {inspect.getdoc(command)}", f"Examples:\n{examples}"]
    parts += ["\n".join([f"{group}:", *shown[group]]) for group in order if group in shown]
    if hidden:
        parts.append(f"--help-all shows {len(hidden)} more: {', '.join(dict.fromkeys(hidden))}")
    return "\n\n".join(parts)


def flags_of(command: type[Common], default: Common | None = None) -> Iterator[Flag]:
    """All flags of a command, those that are required or named in its `first` in the group MAIN and in that order."""
    flags = list(_walk(command, default, "", ""))
    required = [flag.name for flag in flags if flag.default in (MISSING, tyro.MISSING)]
    place = {name: number for number, name in enumerate(dict.fromkeys([*required, *command.first]))}
    for flag in sorted(flags, key=lambda flag: place.get(flag.name, len(place))):
        yield replace(flag, group=MAIN) if flag.name in place else flag


def _walk(kind: Any, default: Any, prefix: str, group: str) -> Iterator[Flag]:
    """Flags of a dataclass: names begin with `prefix`, `group` is where they are shown ("": by their class)."""
    texts, hints = _texts(kind), get_type_hints(kind, include_extras=True)
    for one in fields(kind):
        hint, *extras = get_args(hints[one.name]) if get_origin(hints[one.name]) is Annotated else (hints[one.name],)
        if tyro.conf.Suppress in extras:
            continue
        value = _default(one) if default is None else getattr(default, one.name)
        if is_dataclass(hint):  # nested settings, whose names have no prefix where the field has none
            flat = any(getattr(extra, "name", None) == "" for extra in extras)
            yield from _walk(hint, value, prefix if flat else f"{one.name}.", TRAINING if flat else one.name)
        else:
            short = next((name for extra in extras for name in getattr(extra, "aliases", None) or ()), None)
            name = short.removeprefix("--").replace("-", "_") if short else prefix + one.name
            home = group or _home(kind, one.name)
            yield Flag(name, hint, value, texts.get(one.name, ""), TRAINING if short else home)


def _default(one: Field) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _home(kind: type, name: str) -> str:
    """The group of a command's own field: by the class that has it first."""
    owner = next(base for base in reversed(kind.__mro__) if name in vars(base).get("__annotations__", ()))
    return {Common: RUN, WithModel: IMAGES, OnImages: IMAGES}.get(owner, OWN)


def _texts(kind: type) -> dict[str, str]:
    """The docstring of each field, on one line; Python itself does not keep them."""
    found = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(definition, ast.ClassDef)
            for before, after in pairwise(definition.body):
                match before, after:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = " ".join(text.split())
    return found


def _kind(hint: Any) -> str:
    """What a flag of this type takes."""
    inner = [part for part in get_args(hint) if part not in (type(None), Ellipsis)]
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if get_origin(hint) is tuple:
        return f"{_kind(inner[0])} ..."
    return _kind(inner[0]) if inner else {int: "INT", float: "FLOAT", Path: "PATH"}.get(hint, "TEXT")
