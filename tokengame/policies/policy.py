"""The policy file: an actor's weights and a card, in one safetensors file; and the dial, chosen by its calibration."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokengame.backbones.base import Backbone
from tokengame.config import GAME_VERSION, ActorConfig, GameConfig, with_overrides
from tokengame.errors import TokenGameError, first_line
from tokengame.files import whole
from tokengame.policies.networks import Actor, build_actor

FORMAT = 5
READABLE = (4, 5)
"""formats that `Policy.load` reads"""
SHIPPED = Path(__file__).parent
"""folder of the policies that ship with the package"""


@dataclass
class Policy:
    """An actor and all that is needed to use it.

    The card is a JSON document: `format`, `game_version`, `backbone` (name, shape, fingerprint), `game`, `actor`,
    `agents`, `preprocessing`, `training`, `calibration` (rows: dial -> compute, agreement, drop), `dial` (recommended),
    `licence`.
    """

    actor: Actor
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def game(self) -> GameConfig:
        return with_overrides(GameConfig(), self.card["game"])

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all."""
        weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.actor.state_dict().items()}
        with whole(path) as part:
            save_file(weights, part, metadata={"tokengame": json.dumps(self.card)})

    @staticmethod
    def load(path: str | Path) -> Policy:
        """Read a policy file; nothing in it is ever executed.

        Raises:
            TokenGameError: missing, damaged, or not a policy of this format.
        """
        if not Path(path).is_file():
            raise TokenGameError(f"no policy file at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get("tokengame")
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise TokenGameError(f"policy file {path} is damaged or not safetensors ({error})") from None
        if header is None:
            raise TokenGameError(
                f"{path} is a safetensors file but holds no tokengame policy; pass one made by `train`"
            )
        try:
            return Policy._build(*_upgraded(json.loads(header), weights), path)
        except (KeyError, TypeError, RuntimeError, ValueError, AttributeError, IndexError) as error:
            raise TokenGameError(f"policy file {path} contradicts its own card: {first_line(error)}") from None

    @staticmethod
    def _build(card: dict[str, Any], weights: dict[str, Tensor], path: str | Path) -> Policy:
        found = (card["format"], card["game_version"])
        if found != (FORMAT, GAME_VERSION):
            raise TokenGameError(
                f"{path} has format {found[0]}, game {found[1]}; this version reads formats "
                f"{' and '.join(map(str, READABLE))}, game {GAME_VERSION}: "
                "train it again or install the matching tokengame"
            )
        with_overrides(GameConfig(), card["game"])
        threshold(card["dial"])
        card["backbone"]["name"], card["backbone"]["fingerprint"], card["calibration"]  # required
        actor = build_actor(with_overrides(ActorConfig(), card["actor"]), card_shape(card))
        actor.load_state_dict(weights)
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise TokenGameError(f"policy file {path} holds weights that are not finite; train it again")
        return Policy(actor.eval(), card)


def _upgraded(card: dict[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A card and weights of format 4 under today's names; others as they are."""
    if card["format"] != 4:
        return card, weights
    game = {{"second_look": "cascade_margin"}.get(name, name): value for name, value in card["game"].items()}
    return card | {"format": FORMAT, "game": game}, {
        {"line": "weight"}.get(name, name): tensor for name, tensor in weights.items()
    }


def find_policy(name: str | Path) -> Path:
    """Path of a policy file, or of the shipped policy called `name`.

    Raises:
        TokenGameError: `name` looks like neither.
    """
    shipped = SHIPPED / f"{name}.safetensors"
    if Path(name).is_file() or not shipped.is_file():
        if not Path(name).is_file() and "/" not in str(name) and not str(name).endswith(".safetensors"):
            names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.safetensors"))) or "none"
            raise TokenGameError(f"no policy file {name}, and none of that name is shipped (shipped: {names})")
        return Path(name)
    return shipped


def card_shape(card: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `build_actor` from a card."""
    shape = card["backbone"]["shape"]
    return {
        "dim": shape["dim"],
        "heads": shape["heads"],
        "agents": card["agents"],
        "stages": len(card["game"]["stages"]),
        "transition": card["game"]["transition"],
    }


def threshold(dial: float) -> float:
    """Keep logit above which a token is kept: dial 0 keeps all, 0.5 is the policy's own choice, 1 prunes most.

    Raises:
        TokenGameError: `dial` is outside [0, 1].
    """
    if not 0 <= dial <= 1:
        raise TokenGameError(f"dial must lie between 0 (keep all tokens) and 1 (prune most), not {dial}")
    if dial in (0, 1):
        return math.inf if dial else -math.inf
    return math.log(dial / (1 - dial))


TARGETS = {"gmacs_ratio": "pruned / native compute", "gmacs": "GMACs an image", "keep": "share of tokens kept"}


def dial_for(card: dict[str, Any], max_drop: float | None = None, **target: float | None) -> float:
    """The dial at which, by the card's calibration, the policy meets a target.

    Args:
        card: of a policy.
        max_drop: points of top-1 that may be lost: the hardest dial for which this is guaranteed at 95 % confidence,
            and for all gentler ones (see `measure.risk`). Where it is for none, 0, with a warning: the native
            prediction.
        target: one of gmacs_ratio, gmacs, keep: interpolated between the calibrated dials.

    Raises:
        TokenGameError: not exactly one target, no calibration, or the target lies outside what was calibrated.
    """
    targets = {name: value for name, value in target.items() if value is not None}
    if len(targets) + (max_drop is not None) != 1:
        raise TokenGameError(f"give one of max_drop, {', '.join(TARGETS)}")
    rows = sorted(card["calibration"], key=lambda row: row["dial"])
    if not rows:
        raise TokenGameError("the policy's card holds no calibration; choose the operating point with --dial")
    if max_drop is not None:
        return _guaranteed(rows, max_drop)
    ((name, value),) = targets.items()
    found = [row[name] for row in rows]
    if not min(found) <= value <= max(found):
        what = f"{name.replace('_', ' ')} {value:g} ({TARGETS[name]})"
        raise TokenGameError(f"{what} lies outside the calibrated {min(found):.2f} to {max(found):.2f}")
    return float(np.interp(-value, [-f for f in found], [row["dial"] for row in rows]))


def _guaranteed(rows: list[dict[str, Any]], max_drop: float) -> float:
    bounds = [row["drop_pp_bound95"] for row in rows]
    if bounds[0] is None:
        raise TokenGameError(
            "the policy was calibrated without labels and guarantees no drop: run `tokengame calibrate` on labelled "
            "images, or use --dial or --gmacs-ratio"
        )
    number = certified(bounds, max_drop)
    if number:
        return rows[number - 1]["dial"]
    warnings.warn(
        f"{rows[0]['images']} calibration images can guarantee a drop of {bounds[0]:.2f} points at best, not "
        f"{max_drop:g}: all tokens are kept; calibrate on more images (see `tokengame calibrate --help`)",
        stacklevel=3,
    )
    return 0.0


def certified(bounds: Sequence[float], wanted: float) -> int:
    """How many dials, from the gentlest, are guaranteed to lose at most `wanted`, given each one's bound in that order.

    Walking from the gentlest and stopping at the first that fails costs no confidence: fixed-sequence testing.
    """
    for number, bound in enumerate(bounds):
        if not bound <= wanted:  # NaN guarantees nothing
            return number
    return len(bounds)


def fingerprint(backbone: Backbone) -> str:
    """Hash of the signs of all parameters in blocks: equal in any floating-point type, different for other weights."""
    digest = hashlib.sha256()
    for block in backbone.blocks:
        for parameter in block.parameters():
            digest.update(torch.signbit(parameter.detach()).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_fits(policy: Policy, backbone: Backbone) -> str | None:
    """None, or a warning where the architecture is the policy's but the weights are not.

    Raises:
        TokenGameError: the policy belongs to another architecture.
    """
    wanted, found = policy.card["backbone"]["shape"], backbone.shape()
    anywhere = policy.card["actor"]["observation"] == "context"
    wrong = [key for key in found if wanted.get(key) != found[key] and not (key == "input_size" and anywhere)]
    if wrong:
        differences = ", ".join(f"{key} {wanted.get(key)} but the model's is {found[key]}" for key in wrong)
        raise TokenGameError(
            f"this policy belongs to {policy.card['backbone']['name']} and does not fit: its {differences}"
        )
    if policy.card["backbone"]["fingerprint"] != fingerprint(backbone):
        return (
            f"this policy was trained for other weights of {policy.card['backbone']['name']}; "
            "run `tokengame eval` before relying on it"
        )
    return None
