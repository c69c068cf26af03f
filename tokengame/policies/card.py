"""The card of a policy file: a JSON document, and the schema that all of it is compared with, read or written.

Two dozen checks of our own, and no library: `game` and `actor` are checked by the annotations of their dataclasses,
which a JSON schema would repeat, and every failure is one sentence that names the field.

Strict: an unknown field of `backbone`, `game` or `actor` is refused, since a version that does not know it would decide
otherwise than meant. Tolerated: unknown fields of the card and of calibration rows, and anything inside
`preprocessing`, `training` and `finetuning`, which inform and decide nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

from tokengame.config import GAME_VERSION, ActorConfig, GameConfig, KeepWhat, with_overrides
from tokengame.errors import TokenGameError
from tokengame.ranges import Range, check_fields, hints_of, require, require_in, shown

FORMAT = 5
READABLE = (4, 5)
"""formats that can be read"""

Check = Callable[[Any, str], None]
"""Raises TokenGameError where a value, found at a place of the card, is not what it must be."""


def number(low: float, high: float, whole: bool = False, above: bool = False) -> Check:
    """A number of a `Range`."""
    allowed = Range(low, high, whole, above)
    return lambda value, place: require_in(allowed, value, place)


def text(value: Any, place: str) -> None:
    """A short printable line."""
    readable = isinstance(value, str) and value.isprintable() and 0 < len(value) <= 1_000
    require(readable, f"{place} must be a line of text, not {shown(value)}")


def hexadecimal(value: Any, place: str) -> None:
    """A fingerprint."""
    found = isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value)
    require(bool(found), f"{place} must be 16 hexadecimal digits, not {shown(value)}")


def file_name(value: Any, place: str) -> None:
    """A file beside the policy: no path, so that a policy never leads to a file elsewhere."""
    plain = isinstance(value, str) and re.fullmatch(r"\w[\w. -]{0,200}\.safetensors", value)
    require(bool(plain), f"{place} must be the plain name of a .safetensors file, not {shown(value)}")


def one_of(choices: tuple[str, ...]) -> Check:
    """One of some words."""
    wanted = " or ".join(map(repr, choices))
    return lambda value, place: require(value in choices, f"{place} must be {wanted}, not {shown(value)}")


def optional(check: Check) -> Check:
    """None, or what `check` wants."""
    return lambda value, place: None if value is None else check(value, place)


def items(check: Check, least: int, most: int) -> Check:
    """A list of `least` to `most`, each as `check` wants it."""

    def checked(value: Any, place: str) -> None:
        require(isinstance(value, (list, tuple)), f"{place} must be a list, not {shown(value)}")
        number = f"{least} entries" if least == most else f"{least} to {most:,} entries"
        require(least <= len(value) <= most, f"{place} must have {number}, not {len(value):,}")
        for index, item in enumerate(value):
            check(item, f"{place}[{index}]")

    return checked


def table(fields: dict[str, Check], strict: bool = True) -> Check:
    """An object with these fields, those that end in "?" optional; others are refused where `strict`."""
    wanted = {name.removesuffix("?"): check for name, check in fields.items()}

    def checked(value: Any, place: str) -> None:
        this = place or "the card"
        require(isinstance(value, dict), f"{this} must be an object, not {shown(value)}")
        missing = [name for name in fields if not name.endswith("?") and name not in value]
        require(not missing, f"{this} has no {' and no '.join(missing)}")
        unknown = [name for name in value if name not in wanted]
        require(not (strict and unknown), f"{this} has an unknown field {shown(unknown and unknown[0])}")
        for name, check in wanted.items():
            if name in value:
                check(value[name], inside(place, name))

    return checked


def settings(kind: Any, *required: str) -> Check:
    """The fields of a dataclass of `config`."""
    names = table({name if name in required else f"{name}?": lambda *_: None for name in hints_of(kind)})

    def checked(value: Any, place: str) -> None:
        names(value, place)
        check_fields(kind, value, lambda name: f"{place}.{name}")
        with_overrides(kind(), value)  # settings that exclude each other

    return checked


def information(value: Any, place: str = "", levels: int = 16) -> None:
    """Anything that JSON can hold: finite numbers, Unicode, nested to a depth that no reader stumbles over."""
    require(levels > 0, f"{place[:60]} is nested too deeply")
    if isinstance(value, dict):
        for name, item in value.items():
            text(name, f"a field's name in {place or 'the card'}")
            information(item, inside(place, name), levels - 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            information(item, f"{place}[{index}]", levels - 1)
    elif isinstance(value, str):
        require(not SURROGATE.search(value), f"{place} must be Unicode, not {shown(value)}")
    elif value is not None and not isinstance(value, bool):
        require_in(Range(), value, place)


def inside(place: str, name: str) -> str:
    """A field of what stands at `place`."""
    return f"{place}.{name}" if place else name


SURROGATE = re.compile("[\ud800-\udfff]")
SIZE = number(1, 1_000_000, whole=True)
POINT = number(-100, 100)
SHAPE = {
    "dim": number(1, 65_536, whole=True),
    "depth": number(1, 1_000, whole=True),
    "heads": number(1, 4_096, whole=True),
    "patch": items(SIZE, 2, 2),
    "prefix_tokens": number(0, 10_000, whole=True),
    "input_size": items(SIZE, 2, 2),
}
ANY_ROW = {
    "dial": number(0, 1),
    "gmacs": number(0, 1e9),
    "gmacs_ratio": number(0, 10, above=True),
    "keep": number(0, 1),
    "images": number(1, 1e12, whole=True),
}
ROW = ANY_ROW | {
    "agreement": number(0, 1),
    "kl": number(-1, 1e9),
    "drop_pp": optional(POINT),
    "drop_pp_ci95": optional(items(number(-1e4, 1e4), 2, 2)),  # a normal interval, of earlier versions, may be wide
    "drop_pp_bound95": optional(number(0, 100)),
}
"""of a calibration of class predictions"""
DISTANCE_ROW = ANY_ROW | {"distance": number(0, 1), "distance_bound95": number(0, 1)}
"""of one of embeddings or features"""
SCHEMA = {
    "format": number(FORMAT, FORMAT, whole=True),
    "game_version": number(GAME_VERSION, GAME_VERSION, whole=True),
    "backbone": table({"name": text, "shape": table(SHAPE), "fingerprint": hexadecimal, "weights?": file_name}),
    "game": settings(GameConfig, "stages", "transition"),
    "actor": settings(ActorConfig, "observation", "hidden"),
    "agents": SIZE,
    "keeps?": one_of(get_args(KeepWhat)),
    "preprocessing?": table({}, strict=False),
    "training": table({}, strict=False),
    "finetuning?": table({}, strict=False),
    "calibration": items(table({}, strict=False), 0, 10_000),
    "dial": number(0, 1),
    "licence?": text,
}


def check_card(card: Any) -> None:
    """Compare a card with the schema, and its fields with each other.

    Raises:
        TokenGameError: names the field and what it must be.
    """
    information(card)
    table(SCHEMA, strict=False)(card, "")
    _check_game(card)
    _check_calibration(card)


def keeps(card: dict[str, Any]) -> str:
    """What a policy was made to keep: "logits", "embedding" or "features"; cards of earlier versions do not say."""
    return card.get("keeps", "logits")


def row_of(card: dict[str, Any]) -> dict[str, Check]:
    """The fields of a calibrated dial."""
    return ROW if keeps(card) == "logits" else DISTANCE_ROW


def _check_game(card: dict[str, Any]) -> None:
    shape, stages = card["backbone"]["shape"], card["game"]["stages"]
    require(len(stages) > 0, "game.stages must have one entry at least")
    with_overrides(GameConfig(), card["game"]).blocks(shape["depth"])
    least = most = 1
    for pixels, patch in zip(shape["input_size"], shape["patch"], strict=True):
        least, most = least * (pixels // patch), most * -(-pixels // patch)  # cut off, or padded
    cascade = f"game.cascade_margin must be 0 where {keeps(card)} is kept, which has no probabilities"
    require(keeps(card) == "logits" or not card["game"].get("cascade_margin"), cascade)
    whole = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    require(least <= card["agents"] <= most, f"agents must be {whole}, as input_size and patch have it")


def _check_calibration(card: dict[str, Any]) -> None:
    rows = card["calibration"]
    items(table(row_of(card), strict=False), 0, 10_000)(rows, "calibration")
    for gentler, harder in pairwise(rows):
        require(gentler["dial"] < harder["dial"], "calibration must be sorted by dial, each dial once")
    if keeps(card) != "logits":
        for number, row in enumerate(rows):
            bounded = row["distance"] <= row["distance_bound95"] + 1e-6
            require(bounded, f"calibration[{number}].distance_bound95 must not be less than distance")
        return
    for number, row in enumerate(rows):
        place, labels = f"calibration[{number}]", rows[0]["drop_pp_bound95"] is not None
        known = {row[name] is not None for name in ("drop_pp", "drop_pp_ci95", "drop_pp_bound95")}
        require(known == {labels}, f"{place} must have a drop, its interval and its bound, or no row may have one")
        bounded = not labels or row["drop_pp"] <= row["drop_pp_bound95"] + 1e-6
        require(bounded, f"{place}.drop_pp_bound95 must not be less than drop_pp")


def read_card(header: str) -> dict[str, Any]:
    """The card that a file's header holds, under today's names, checked.

    Raises:
        TokenGameError: it is no JSON, of another format, or not what the schema wants.
    """
    try:
        card = json.loads(header, parse_constant=_no_constant, object_pairs_hook=_no_name_twice)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else shown(str(error))
        raise TokenGameError(f"the card is no JSON document ({why})") from None
    require(isinstance(card, dict), f"the card must be an object, not {shown(card)}")
    found = (card.get("format"), card.get("game_version"))
    require(
        found[0] in READABLE and found[1] == GAME_VERSION,
        f"the card has format {shown(found[0])}, game {shown(found[1])}; this version reads formats "
        f"{' and '.join(map(str, READABLE))}, game {GAME_VERSION}: train it again or install the matching tokengame",
    )
    card = upgraded(card)
    check_card(card)
    return card


def upgraded(card: dict[str, Any]) -> dict[str, Any]:
    """A card of format 4 under today's names; others as they are."""
    if card["format"] != 4 or not isinstance(card.get("game"), dict):
        return card
    game = {{"second_look": "cascade_margin"}.get(name, name): value for name, value in card["game"].items()}
    return card | {"format": FORMAT, "game": game}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it names a field twice")
    return found
