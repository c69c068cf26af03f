"""The starting rule: pruning without a policy. It is what learning starts from, and nothing of it is learned.

Tokens are scored by the weights `policies.networks.START`. Without images each image has a budget: at each stage the
best-scored share of its tokens stays, the root of k at the first and k at each later one, since all later blocks miss
what the first stage prunes. With images thresholds on the scores are set, so that counts adapt to the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tokengame.backbones.base import Backbone
from tokengame.backbones.classes import classes_of
from tokengame.config import GAME_VERSION, ActorConfig, GameConfig, KeepWhat
from tokengame.distributed import Processes
from tokengame.errors import TokenGameError, warn
from tokengame.files import Progress, silent
from tokengame.game import State, TokenGame
from tokengame.game.transition import remove
from tokengame.policies.networks import actor_shape, build_actor
from tokengame.policies.policy import FORMAT, TARGETS, Policy, check_target, fingerprint
from tokengame.ranges import require
from tokengame.runtime.calls import check_size
from tokengame.runtime.macs import native_macs, pruned_macs

RULE = "rule"
"""its name wherever a policy is named"""
RATIO = 0.7
"""pruned / native compute where none is given"""
IMAGES = 256
"""on which thresholds are set, at most"""
FEWEST = 32
"""on which the compute of other images can be met; fewer warn"""
MEMORY = 2**30
"""bytes that games before their first decision may take while thresholds are set"""
ROUNDS = 2
"""of setting thresholds: the second corrects the compute by what the first one measures"""
CLOSE = 0.002
"""to the compute that is wanted, on the images on which thresholds are set"""
LEAST = 1e-6
"""smallest share of the tokens"""


class Rule:
    """The starting rule on one backbone.

    Args:
        backbone: of any family, with or without a class token or classes.
        keep_what: what the model is pruned for, by default its output; "features" computes patches to the last block.
        game: stages and transition.
    """

    def __init__(self, backbone: Backbone, keep_what: KeepWhat | None = None, game: GameConfig | None = None):
        self.backbone = backbone
        self.keep_what = keep_what or ("embedding" if classes_of(backbone) < 2 else "logits")
        on_grid = self.keep_what == "features"
        self.game = TokenGame(backbone, game or GameConfig(transition="merge"), keep_patches=on_grid)

    def with_budgets(self, shares: Sequence[float]) -> Policy:
        """The rule with a budget for each image; no image is needed.

        Args:
            shares: of the tokens that stay at each stage, of those before it; see `shares_for`.
        """
        return self._policy(self._actor(shares), ActorConfig("context", (32,), shares=tuple(shares)), {})

    def with_thresholds(
        self, batches: Iterable[Tensor], number: int = 0, progress: Progress = silent, **target: float | None
    ) -> Policy:
        """The rule with thresholds that keep as many tokens in all, more in one image and fewer in another.

        Args:
            batches: [B, channels, height, width] as the model takes them; of `IMAGES` images in all, or fewer.
            number: of batches, for the progress bar.
            progress: shows it.
            target: as in `shares_for`.
        """
        policies: list[Policy] = []
        steps = self._set_thresholds(batches, policies, **target)
        for _ in progress(steps, "setting thresholds", number + ROUNDS):
            pass
        return policies[-1]

    @torch.no_grad()
    def _set_thresholds(
        self, batches: Iterable[Tensor], policies: list[Policy], **target: float | None
    ) -> Iterator[None]:
        """Add one policy after each round to `policies`; yields after each step."""
        states = []
        for batch in batches:
            check_size(self.backbone, batch)
            states.append(self.game.reset(batch.to(self.backbone.device, self.backbone.dtype)))
            yield
        images = sum(state.layout.images for state in states)
        require(images > 0, "images= holds no image that can be read, on which thresholds could be set")
        if images < FEWEST:
            warn(f"thresholds are set on {images} images, so that others may take another compute; give {FEWEST}")
        wanted = goal = self.ratio_for(**target)
        for _ in range(ROUNDS):
            shares = self.shares_for(whole=False, **(target if goal is None else {"gmacs_ratio": goal}))
            actor: Any = build_actor(ActorConfig("context", (32,)), self._shape).eval().to(self.backbone.device)
            thresholds, kept = thresholds_for(self.game, actor, states, shares)
            actor.weight.data[:, -1] -= thresholds
            policies.append(self._policy(actor, ActorConfig("context", (32,)), {"images": images}))
            yield
            if wanted is None or goal is None:
                break
            found = float(pruned_macs(self.game, actor, kept, states[0].total).mean())
            off = wanted - found / native_macs(self.backbone, states[0].total)
            if abs(off) < CLOSE:
                break
            goal = max(goal + off, self.least)

    def ratio_for(self, **target: float | None) -> float | None:
        """The pruned / native compute that a target means; None where it is the tokens kept.

        Raises:
            TokenGameError: more than one target, one that is no such number, or max_drop.
        """
        given = {name: value for name, value in target.items() if value is not None} or {"gmacs_ratio": RATIO}
        require(len(given) == 1, f"give one of {', '.join(TARGETS)}")
        ((name, value),) = given.items()
        check_target(name, value)
        if name in ("max_drop", "max_distance"):
            raise TokenGameError(
                "the starting rule is not calibrated and guarantees no drop: run `tokengame calibrate --policy rule` "
                "on labelled images and prune by its --output, or give --gmacs-ratio"
            )
        if name == "keep":
            return None
        return value if name == "gmacs_ratio" else 1e9 * value / native_macs(self.backbone, self.backbone.patches)

    def shares_for(self, *, whole: bool = True, **target: float | None) -> tuple[float, ...]:
        """The shares that stay at each stage so that a target is met, at the model's input size.

        Args:
            whole: whether they are of whole tokens, for budgets; otherwise of the mean over many images.
            target: one of gmacs_ratio (without one, `RATIO`), gmacs, keep.

        Raises:
            TokenGameError: more than one target, one out of reach, or max_drop.
        """
        wanted = self.ratio_for(**target)
        if wanted is None:
            keep = target["keep"] or 0.0
            return self._shares(max(keep, LEAST) ** (1 / (len(self.game.stages) - 0.5)), whole)
        least = self.least
        reach = (
            f"{TARGETS['gmacs_ratio'].name} {wanted:.3g} is out of reach of the starting rule: with one token left "
            f"after block {self.game.stages[0]} this model takes {least:.3g}"
        )
        require(wanted >= least, reach)
        return self._shares(nearest(lambda k: self.ratio(self._shares(k, whole)), wanted), whole)

    @property
    def least(self) -> float:
        """The least pruned / native compute that it can reach, with one token left after the first stage."""
        return self.ratio(self._shares(LEAST, whole=True))

    def ratio(self, shares: Sequence[float]) -> float:
        """Pruned / native compute of an image of the model's input size."""
        total = self.backbone.patches
        kept = total * torch.tensor(shares, dtype=torch.double).cumprod(0)[:, None]
        return float(pruned_macs(self.game, self._actor(shares), kept, total)) / native_macs(self.backbone, total)

    def _shares(self, k: float, whole: bool) -> tuple[float, ...]:
        """The root of k at the first stage and k at the others, or the nearest shares of whole tokens."""
        shares, counts = (k**0.5, *[k] * (len(self.game.stages) - 1)), [self.backbone.patches]
        for share in shares:
            counts.append(max(1, round(counts[-1] * share)))
        return tuple(after / before for before, after in pairwise(counts)) if whole else shares

    @property
    def _shape(self) -> dict[str, Any]:
        return actor_shape(self.backbone, self.game.config)

    def _actor(self, shares: Sequence[float]) -> Any:
        return build_actor(ActorConfig("context", (32,), shares=tuple(shares)), self._shape).eval()

    def _policy(self, actor: Any, config: ActorConfig, about: dict[str, Any]) -> Policy:
        """With a card that says what it is: the rule, of which nothing was learned."""
        backbone = self.backbone
        return Policy(
            actor,
            {
                "format": FORMAT,
                "game_version": GAME_VERSION,
                "backbone": {
                    "name": name_of(backbone.model),
                    "shape": backbone.shape(),
                    "fingerprint": fingerprint(backbone),
                },
                "game": asdict(replace(self.game.config, stages=self.game.stages)),
                "actor": asdict(config),
                "agents": backbone.patches,
                "keeps": self.keep_what,
                "preprocessing": backbone.preprocessing(),
                "training": {"rule": "the starting rule, nothing was learned"} | about,
                "calibration": [],
                "dial": 0.5,
                "licence": "Apache-2.0",
            },
        )


def thresholds_for(
    game: TokenGame, actor: nn.Module, states: Sequence[State], shares: Sequence[float],
    processes: Processes | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keep logits above which these shares of the agents are kept, with those of earlier stages in force.

    Args:
        game: the rules.
        actor: observation -> keep logits.
        states: this process's batches before the first decision.
        shares: [T] of the agents before each decision, of all images and processes together.
        processes: those that work together.

    Returns:
        [T] thresholds; [T, B] agents of this process's images that are left after each decision.
    """
    found: list[Tensor] = []
    for stage, share in enumerate(shares):
        logits = [actor(game.observe(state)) for state in states]
        gathered = torch.cat((processes or Processes()).gather(torch.cat(logits).cpu()))
        found.append(gathered.quantile(1 - share).to(logits[0]))
        last = stage == len(shares) - 1  # after which no block needs to run
        step = partial(remove, merge=game.merge) if last else game.step
        states = [step(s, own > found[-1], own - found[-1]) for s, own in zip(states, logits, strict=True)]
    return torch.stack(found), torch.cat([torch.stack(state.kept) for state in states], 1).cpu()


def nearest(cost: Callable[[float], float], wanted: float) -> float:
    """The share in (0, 1] at which a cost that rises with it in steps comes nearest to what is wanted; bisection."""
    low, high = LEAST, 1.0
    if cost(high) <= wanted:
        return high
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) > wanted else (middle, high)
    return min((low, high), key=lambda share: abs(cost(share) - wanted))


def name_of(model: Any) -> str:
    """The name of a model's architecture, or its class."""
    config = getattr(model, "pretrained_cfg", None)
    return str((config.get("architecture") if isinstance(config, dict) else None) or type(model).__name__)


def most_images(backbone: Backbone) -> int:
    """On how many images thresholds are set: `IMAGES`, or as many as fit in `MEMORY`."""
    each = 4 * backbone.patches * (3 * backbone.dim + backbone.patches)  # rows, keys, values; similarities
    return max(FEWEST, min(IMAGES, MEMORY // each))
