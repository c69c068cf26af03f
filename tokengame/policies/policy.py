"""The policy file: an actor's weights and a card, in one safetensors file; and the dial, chosen by its calibration."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tokengame.backbones.base import Backbone
from tokengame.backbones.classes import output_of
from tokengame.config import MOST_WEIGHTS, SHARE, ActorConfig, GameConfig, with_overrides
from tokengame.errors import TokenGameError, first_line, warn
from tokengame.files import require_file, require_writable, write_whole
from tokengame.policies.card import FORMAT as FORMAT
from tokengame.policies.card import check_card, keeps, read_card, row_of
from tokengame.policies.hub import FILE, PREFIX, download, upload
from tokengame.policies.model_card import PICTURE, calibration_picture, model_card
from tokengame.policies.networks import Actor, ContextActor, build_actor, weight_shapes
from tokengame.ranges import Range, require, require_in, shown

SHIPPED = Path(__file__).parent
"""folder of the policies that ship with the package"""
MOST_BYTES = 4 * MOST_WEIGHTS + 2**20
"""of a policy file: float32 weights and a card"""
LARGEST = 1e4
"""Largest size of a weight, as learned and as features meet it. Training ends below 100. A logit adds up at most some
thousand products, so that it is finite in float32 whatever the features, up to 1e30; the weights are so in float16."""


@dataclass
class Policy:
    """An actor and all that is needed to use it.

    The card is a JSON document: `format`, `game_version`, `backbone` (name, shape, fingerprint), `game`, `actor`,
    `agents`, `keeps`, `preprocessing`, `training`, `calibration` (rows: dial -> compute, agreement, drop, or distance),
    `dial` (recommended), `licence`; `policies.card` has its schema.
    """

    actor: Actor
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def game(self) -> GameConfig:
        return with_overrides(GameConfig(), self.card["game"])

    @property
    def keeps(self) -> str:
        """What it was made to keep: "logits", "embedding" or "features"."""
        return keeps(self.card)

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all.

        Raises:
            TokenGameError: `load` would refuse it, or it cannot be written; an old file stays.
        """
        check_card(self.card)
        check_weights(self.actor)
        weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.actor.state_dict().items()}
        write_whole(Path(path), save(weights, metadata={"tokengame": json.dumps(self.card)}))

    @staticmethod
    def load(path: str | Path) -> Policy:
        """Read a policy file; nothing in it is ever executed, and nothing allocated before its card is checked.

        Raises:
            TokenGameError: missing, damaged, not a policy of this format, or one that contradicts itself.
        """
        size = require_file(path, "policy file")
        require(size <= MOST_BYTES, f"{path} has {size:,} bytes; a policy file has at most {MOST_BYTES:,}")
        try:
            with safe_open(path, framework="pt") as file:
                card = _card(file, path)
                actor = build_actor(with_overrides(ActorConfig(), card["actor"]), card_shape(card))
                actor.load_state_dict({today(name): file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise TokenGameError(
                f"policy file {path} is damaged or not safetensors ({first_line(error)}); make it again with `train`"
            ) from None
        try:
            check_weights(actor)
        except TokenGameError as error:
            raise TokenGameError(f"policy file {path}: {error}") from None
        return Policy(actor.eval(), card)

    @staticmethod
    def from_pretrained(name: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Policy:
        """Read a policy from the Hugging Face hub, or from a folder that `save_pretrained` wrote.

        Args:
            name: "user/name" on the hub, a folder, or a policy file.
            revision: branch, tag or commit on the hub; default is its main branch.
            token: for a private repository; default is that of `hf auth login`.

        Raises:
            TokenGameError: as `load`; and no connection and no copy here, or no such repository or revision.
        """
        if os.path.isdir(name):
            return Policy.load(Path(name) / FILE)
        on_hub = not os.path.isfile(name)
        return Policy.load(download(str(name), revision, token) if on_hub else name)

    def save_pretrained(self, folder: str | Path, repo_id: str | None = None) -> None:
        """Write what a repository on the hub holds: policy.safetensors, a model card as README.md, and its picture.

        Args:
            folder: is made where there is none.
            repo_id: "user/name", by which README.md says that the policy is loaded; default is user/ and the
                folder's name.

        Raises:
            TokenGameError: as `save`.
        """
        place = Path(folder)
        require_writable(place / FILE)
        self.save(place / FILE)
        picture = calibration_picture(self.card)
        if picture is not None:
            write_whole(place / PICTURE, picture)
        name = repo_id or f"user/{place.resolve().name}"
        write_whole(place / "README.md", model_card(self.card, name, picture is not None))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | bool | None = None,
        commit_message: str = "Upload policy",
    ) -> str:
        """Put the policy on the Hugging Face hub, with a model card and a picture; these replace earlier ones.

        Args:
            repo_id: "user/name"; the repository is made where there is none.
            private: whether a new one is hidden from others.
            token: default is that of `hf auth login`.
            commit_message: of the commit.

        Returns:
            The address of the commit; `tokengame.prune(model, "hf:user/name")` uses the policy.

        Raises:
            TokenGameError: `load` would refuse the policy, no connection, not logged in, or no such rights.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, repo_id)
            return upload(repo_id, Path(folder), private, token, commit_message)


def _card(file: Any, path: str | Path) -> dict[str, Any]:
    """The card of an open safetensors file; the shapes of the file's tensors are those that it implies."""
    header = (file.metadata() or {}).get("tokengame")
    if header is None:
        raise TokenGameError(f"{path} is a safetensors file but holds no tokengame policy; pass one made by `train`")
    try:
        card = read_card(header)
    except TokenGameError as error:
        raise TokenGameError(f"policy file {path}: {error}") from None
    shapes = weight_shapes(with_overrides(ActorConfig(), card["actor"]), card_shape(card))
    wanted = {name: f"F32 {list(shape)}" for name, shape in shapes.items()}
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    found = {today(name): f"{part.get_dtype()} {part.get_shape()}" for name, part in slices.items()}
    for name in sorted(wanted.keys() | found.keys()):
        differs = f"{shown(name)} is {found.get(name, 'missing')}, and must be {wanted.get(name, 'absent')}"
        require(wanted.get(name) == found.get(name), f"policy file {path} contradicts its own card: {differs}")
    return card


def today(name: str) -> str:
    """Today's name of a weight; in format 4 that of the context actor was called line."""
    return {"line": "weight"}.get(name, name)


def check_weights(actor: nn.Module) -> None:
    """Raise TokenGameError unless all weights, in float32 and as features meet them, are finite and at most LARGEST."""
    weights = {name: tensor.detach().float() for name, tensor in actor.state_dict().items()}
    if isinstance(actor, ContextActor):
        weights |= {"weight": actor.line.detach().float()}
    for name, tensor in weights.items():
        require(bool(tensor.isfinite().all()), f"the actor's weights are not finite in {name}; train it again")
        largest = float(tensor.abs().max())
        large = f"the actor's weights reach {largest:.3g} in {name}, {LARGEST:g} at most are sound"
        require(largest <= LARGEST, f"{large}; train it again, with a smaller --ppo.lr")


def find_policy(name: str | Path) -> Path:
    """Path of a policy file, of the shipped policy called `name`, or of this machine's copy of "hf:user/name".

    Raises:
        TokenGameError: `name` looks like none of these, or it cannot be downloaded.
    """
    if str(name).startswith(PREFIX) and not os.path.lexists(name):
        return download(str(name))
    shipped = SHIPPED / f"{name}.safetensors"
    if os.path.isfile(name) or not os.path.isfile(shipped):
        if not os.path.lexists(name) and "/" not in str(name) and not str(name).endswith(".safetensors"):
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
    dial = _plain(dial)
    wanted = "dial must lie between 0 (keep all tokens) and 1 (prune most)"
    require(dial in SHARE, f"{wanted}, not {shown(dial)}")
    if dial in (0, 1):
        return math.inf if dial else -math.inf
    return math.log(dial / (1 - dial))


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's; anything else as it is."""
    return float(value) if isinstance(value, Real) and not isinstance(value, int) else value


class Target(NamedTuple):
    """What may be wanted instead of a dial."""

    name: str
    """as it is typed"""
    meaning: str
    allowed: Range


TARGETS = {
    "max_drop": Target("--max-drop", "points of top-1 that may be lost", Range(0, 100)),
    "max_distance": Target("--max-distance", "mean 1 - cosine", Range(0, 1)),
    "gmacs_ratio": Target("--gmacs-ratio", "pruned / native compute", Range(0, 2, above=True)),
    "gmacs": Target("gmacs", "GMACs an image", Range(0, 1e6, above=True)),
    "keep": Target("keep", "share of tokens kept", SHARE),
}


BOUNDS = {"max_drop": "drop_pp_bound95", "max_distance": "distance_bound95"}
"""targets that are guaranteed, and the figure of the card that does so"""
BEST = {"max_drop": "a drop of {:.2f} points", "max_distance": "a mean 1 - cosine of {:.4f}"}


def check_target(name: str, value: Any) -> None:
    """Raise TokenGameError unless `value` is a number that the target `name`, one of `TARGETS`, can be."""
    require(name in TARGETS, f"no target {shown(name)}; give one of {', '.join(TARGETS)}")
    require_in(TARGETS[name].allowed, _plain(value), TARGETS[name].name)


def dial_for(card: dict[str, Any], **target: float | None) -> float:
    """The dial at which, by the card's calibration, the policy meets a target.

    Args:
        card: of a policy.
        target: one of max_drop, max_distance, gmacs_ratio, gmacs, keep. max_drop is points of top-1 that may be lost,
            max_distance the mean 1 - cosine of embeddings or features: the hardest dial for which this is guaranteed at
            95 % confidence, and for all gentler ones (see `measure.risk`). Where it is for none, 0, with a warning: the
            native prediction. The others are interpolated between the calibrated dials.

    Raises:
        TokenGameError: not exactly one target, one that is no such number, no calibration, or the target lies outside
            what was calibrated.
    """
    targets = {name: value for name, value in target.items() if value is not None}
    require(len(targets) == 1, f"give one of {', '.join(TARGETS)}")
    ((name, value),) = targets.items()
    check_target(name, value)
    _check_kept(card, name)
    figure = BOUNDS.get(name, name)
    for number, row in enumerate(card["calibration"]):
        for key in ("dial", figure):
            row_of(card)[key](row.get(key), f"calibration[{number}].{key}")
    rows = sorted(card["calibration"], key=lambda row: row["dial"])
    require(bool(rows), "the policy's card holds no calibration; choose the operating point with --dial")
    return _guaranteed(rows, name, value) if name in BOUNDS else _interpolated(rows, name, value)


def _check_kept(card: dict[str, Any], name: str) -> None:
    """Raise TokenGameError where a guarantee `name` is of another measure than the policy keeps."""
    classes = keeps(card) == "logits"
    if name == "max_drop" and not classes:
        raise TokenGameError(
            f"--max-drop is points of top-1, and this policy keeps {keeps(card)}, which has no classes: use "
            "--max-distance, the mean 1 - cosine that may be lost"
        )
    if name == "max_distance" and classes:
        raise TokenGameError(
            "--max-distance is of embeddings and features, and this policy was made for class logits: use --max-drop, "
            "or train one with --keep-what embedding"
        )


def _interpolated(rows: list[dict[str, Any]], name: str, value: float) -> float:
    found = [row[name] for row in rows]
    if not min(found) <= value <= max(found):
        what = f"{TARGETS[name].name} {value:g} ({TARGETS[name].meaning})"
        raise TokenGameError(f"{what} lies outside the calibrated {min(found):.2f} to {max(found):.2f}")
    falling = np.minimum.accumulate(found)  # a cascade's compute may rise between two dials
    return float(np.interp(-value, -falling, [row["dial"] for row in rows]))


def _guaranteed(rows: list[dict[str, Any]], name: str, wanted: float) -> float:
    bounds = [row[BOUNDS[name]] for row in rows]
    if None in bounds:
        raise TokenGameError(
            "the policy was calibrated without labels and guarantees no drop: run `tokengame calibrate` on labelled "
            "images, or use --dial or --gmacs-ratio"
        )
    number = certified(bounds, wanted, name)
    if number:
        return rows[number - 1]["dial"]
    images = rows[0].get("images", "so few")
    warnings.warn(
        f"{images} calibration images can guarantee {BEST[name].format(bounds[0])} at best, not {wanted:g}: all tokens "
        "are kept; calibrate on more images (see `tokengame calibrate --help`)",
        stacklevel=3,
    )
    return 0.0


def certified(bounds: Sequence[float], wanted: float, name: str = "max_drop") -> int:
    """How many dials, from the gentlest, are guaranteed to lose at most `wanted`, given each one's bound in that order.

    Walking from the gentlest and stopping at the first that fails costs no confidence: fixed-sequence testing.
    """
    allowed = TARGETS[name].allowed
    require_in(allowed, _plain(wanted), TARGETS[name].name)
    for number, bound in enumerate(bounds):
        if _plain(bound) not in allowed or bound > wanted:  # what is no bound guarantees nothing
            return number
    return len(bounds)


def fingerprint(backbone: Backbone) -> str:
    """Hash of the signs of all parameters in blocks: equal in any floating-point type, different for other weights."""
    digest = hashlib.sha256()
    for block in range(backbone.depth):
        for parameter in backbone.fingerprint_parameters(block):
            numbers: Any = parameter.detach()
            numbers = numbers if type(parameter) is nn.Parameter and type(numbers) is Tensor else numbers.dequantize()
            digest.update(torch.signbit(numbers).cpu().numpy().tobytes())
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
    if policy.card["actor"].get("shares") is not None:
        return None  # budgets of the starting rule, of which nothing was learned, hold for any weights
    if policy.card["backbone"]["fingerprint"] != fingerprint(backbone):
        return (
            f"this policy was trained for other weights of {policy.card['backbone']['name']}; "
            "run `tokengame eval` before relying on it"
        )
    return None


def check_keeps(policy: Policy, backbone: Backbone, max_drop: float | None) -> None:
    """Warn where a policy made for class logits prunes a model that embeds.

    Raises:
        TokenGameError: such a model is to lose at most so many points of top-1.
    """
    if policy.keeps != "logits" or backbone.classes == 1 or output_of(backbone) == "logits":
        return
    if max_drop is not None:
        raise TokenGameError(
            "--max-drop is points of top-1, and the model's output is an embedding, which has none: use --max-distance "
            "with a policy trained for it"
        )
    warn(
        "this policy was made for class logits, and the model's output is an embedding: measure it with `tokengame "
        "eval`, or train one for it"
    )
