"""Mutated policy files. What loads must run: finite predictions, dial 0 native, a dial that its card supports."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from attacks.bytes import damaged
from attacks.outcome import accepted, generator, judged, require
from attacks.world import World, native_model
from tokengame import Policy, prune

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 10**9, 10**30, -(10**18), 0.5, -0.5, 1.0, 1e308, math.nan, math.inf, -math.inf,
    "", "0", "1", "nan", "mErge", "drop", "context ", "../../etc/passwd", "/etc/passwd", "a\0b", "Ω\u202e",
    "x" * 100_000, [], [0], [1.0, 2.0], ["1", "2"], [True], [[]], [None], [-1], [2, 1], [1, 1], [99],
    list(range(5000)), {}, {"a": 1}, {"dial": 0.5}, [{}], [{"dial": math.nan}],
)  # fmt: skip
TARGETS = {"max_drop": (0.5, 30.0, 100.0), "gmacs_ratio": (0.5, 0.8), "gmacs": (0.003,), "keep": (0.3, 0.6)}


def case(world: World, seed: int, number: int) -> str:
    """One mutated file, loaded and run."""
    rng = generator("policies", seed, number)
    base = rng.choice(world.policies)
    data, what = mutated(base.read_bytes(), rng)
    with tempfile.TemporaryDirectory(dir=world.root) as folder:
        path = Path(folder) / "policy.safetensors"
        path.write_bytes(data)
        with accepted("the policy", what == "unchanged"):
            judge(world, path, rng)
    return f"{base.stem}, {what}"


def mutated(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A policy file with one fault, and its name."""
    kind = rng.choices(("bytes", "length", "card", "text", "tensor", "none"), (40, 6, 34, 6, 13, 1))[0]
    return {"bytes": _bytes, "length": _length, "card": _card, "text": _text, "tensor": _tensor, "none": _none}[kind](
        data, rng
    )


def _none(data: bytes, _rng: random.Random) -> tuple[bytes, str]:
    return data, "unchanged"


def _bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    changed, what = damaged(data, rng, head=8 + struct.unpack("<Q", data[:8])[0])
    return changed, f"bytes: {what}"


def _length(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The header's length, which comes first, is another."""
    length = struct.unpack("<Q", data[:8])[0]
    wrong = rng.choice((0, 1, length - 1, length + 1, length // 2, 2 * length, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", wrong) + data[8:], f"header of {wrong} bytes"


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Card and weights of a policy file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["tokengame"]), load(data)


def _card(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A value anywhere in the card is replaced, removed, or gets a neighbour."""
    card, weights = parts(data)
    holder, key = rng.choice([place for top in card for place in places(card, top)])
    where, act = f"card {key!r}", rng.choice(("replace",) * 8 + ("remove", "add", "nest"))
    value = rng.choice(HOSTILE)
    if act == "replace":
        holder[key] = value
    elif act == "remove":
        del holder[key]
    elif act == "nest":
        for _ in range(rng.choice((1, 50, 900))):
            value = [value]
        holder[key] = value
    else:
        (holder.append(value) if isinstance(holder, list) else holder.update({rng.choice(("weights", "new")): value}))
        if rng.random() < 0.5:
            card["backbone"]["weights"] = rng.choice(("/etc/passwd", "../w.safetensors", "a\0b", 7, None, ""))
            where = "card weights"
    return save(weights, {"tokengame": json.dumps(card)}), f"{where} {act} {str(value)[:40]!r}"


def places(holder: Any, key: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below one."""
    value = holder[key]
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(holder, key), *(place for inner in keys for place in places(value, inner))]


def _text(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The card is no card: broken, doubled, or nested JSON."""
    card, weights = parts(data)
    text = json.dumps(card)
    deep = rng.choice((200, 20_000, 200_000))
    at = rng.randrange(len(text))
    choices = {
        "cut": text[:at], "byte": text[:at] + chr(rng.randrange(1, 0x3000)) + text[at + 1 :], "empty": "",
        "null": "null", "list": "[]", "number": "7", "deep": "[" * deep + "]" * deep,
        "deep object": '{"a":' * deep + "1" + "}" * deep, "digits": text.replace('": 0.', '": 0.' + "1" * 5000, 1),
        "doubled": text[:-1] + ", " + text[1:],
        "huge": text[:-1] + ', "x": "' + "y" * 2_000_000 + '"}', "surrogate": text.replace("tokengame", "\\ud800", 1),
    }  # fmt: skip
    name = rng.choice(list(choices))
    return save(weights, {"tokengame": choices[name]}), f"card is {name}"


def _tensor(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A tensor renamed, missing, of another shape, type or value; or a card that wants an enormous one."""
    card, weights = parts(data)
    name = rng.choice(list(weights))
    tensor = weights[name]
    act = rng.choice(("rename", "remove", "extra", "shape", "type", "value", "wanted"))
    if act == "rename":
        weights[rng.choice(("", "line", "weight2", "../weight"))] = weights.pop(name)
    elif act == "remove":
        del weights[name]
    elif act == "extra":
        weights["extra"] = torch.zeros(3)
    elif act == "shape":
        weights[name] = rng.choice(
            (tensor.T.contiguous(), tensor.flatten(), tensor[:0], tensor[None], torch.tensor(1.0))
        )
    elif act == "type":
        weights[name] = tensor.to(rng.choice((torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool)))
    elif act == "value":
        weights[name] = _worst(tensor, rng)
    else:
        holder, key = rng.choice(
            [(card["backbone"]["shape"], "heads"), (card["backbone"]["shape"], "dim"), (card["actor"], "hidden"),
             (card, "agents"), (card["game"], "stages")]
        )  # fmt: skip
        size = rng.choice((30_000, 10**8, 10**12))
        holder[key] = [size] * 3 if isinstance(holder[key], list) else size
        act = f"card wants {key} {size}"
    return save(weights, {"tokengame": json.dumps(card)}), f"tensor {name}: {act}"


def _worst(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """One value or all of them at the edges of the number format."""
    value = rng.choice((math.nan, math.inf, -math.inf, 3e38, -3e38, 1e30, 1e-45, 0.0))
    changed = tensor.clone()
    if rng.random() < 0.5:
        changed.fill_(value)
    else:
        changed.view(-1)[rng.randrange(changed.numel())] = value
    return changed


def judge(world: World, path: Path, rng: random.Random) -> None:
    """Raise `Defect` unless the policy at `path` is refused, or loads and does what a policy may do."""
    policy = Policy.load(path)
    try:
        sound = well_typed(policy.card)
    except (KeyError, TypeError, AttributeError, IndexError):
        sound = False
    require(sound, "loaded a card that lacks values or has some of wrong types")
    model, images = natives(world.weights)
    half = rng.random() < 0.3
    if half:
        model, images = copy.deepcopy(model).bfloat16(), images.bfloat16()
    fast = prune(model, path)
    with torch.no_grad():
        expected = model(images).float()
        for dial in (fast.dial, 0.0, 1.0):
            fast.dial = dial
            found = fast.predict(images)
            require(bool(found.logits.isfinite().all()), f"logits are not finite at dial {dial}")
            require(found.logits.shape == expected.shape, "logits of another shape")
            if dial == 0:
                require(all(bool((kept == 16).all()) for kept in found.kept), "tokens are left at dial 0")
                close = torch.allclose(found.logits.float(), expected, *((0.1, 0.1) if half else (1e-4, 1e-4)))
                require(close, "dial 0 is not native")
        fast.macs(found)
    for name, values in TARGETS.items():
        for value in values:
            _judge_target(model, path, policy.card, name, value)
    _judge_saving(policy, path)


def _judge_target(model: Any, path: Path, card: dict[str, Any], name: str, value: float) -> None:
    """A target is refused or gives a dial; a guaranteed drop only one whose bound the card states."""
    dial = 0.0

    def chosen() -> str:
        nonlocal dial
        dial = prune(model, path, **{name: value}).dial
        return ""

    verdict, what = judged(chosen)
    require(verdict != "defect", f"{name}={value}: {what}")
    require(isinstance(dial, float | int) and 0 <= dial <= 1, f"{name}={value} gives dial {dial}")
    if name == "max_drop" and dial:
        bounds = [row["drop_pp_bound95"] for row in card["calibration"] if row["dial"] <= dial]
        proven = all(number(bound) and bound <= value for bound in bounds)
        require(bounds and proven, f"{name}={value} gives dial {dial}, which the card does not guarantee")


def _judge_saving(policy: Policy, path: Path) -> None:
    """What loads can be written and read again."""
    copied = path.with_name("copy.safetensors")
    policy.save(copied)
    loaded = Policy.load(copied)
    state, other = policy.actor.state_dict(), loaded.actor.state_dict()
    require(all(torch.equal(state[name], other[name]) for name in state), "weights change by saving")


@lru_cache
def natives(weights: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    """The native model and a batch."""
    return native_model(weights), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def number(value: Any) -> bool:
    """Whether a value is a finite number, which True is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(value: Any, least: int = 0) -> bool:
    """Whether a value is an integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def well_typed(card: dict[str, Any]) -> bool:
    """Whether all that a card's readers rely on is there, of the right type and in range."""
    backbone, game, actor = card["backbone"], card["game"], card["actor"]
    weights = backbone.get("weights", "plain")
    rows = card["calibration"]
    return (
        isinstance(backbone["name"], str)
        and isinstance(backbone["fingerprint"], str)
        and (weights is None or (isinstance(weights, str) and weights != "" and not set(weights) & set("/\\\0")))
        and all(whole(backbone["shape"][name], 1) for name in ("dim", "heads", "depth"))
        and isinstance(game["stages"], list)
        and all(map(whole, game["stages"]))
        and game["transition"] in ("drop", "merge")
        and number(game.get("cascade_margin", 0.0))
        and actor["observation"] in ("token_id", "context")
        and all(whole(width, 1) for width in actor["hidden"])
        and whole(card["agents"], 1)
        and number(card["dial"])
        and 0 <= card["dial"] <= 1
        and isinstance(rows, list)
        and all(number(row[name]) for row in rows for name in ("dial", "gmacs_ratio", "gmacs", "keep"))
        and all(row["drop_pp_bound95"] is None or number(row["drop_pp_bound95"]) for row in rows)
    )
