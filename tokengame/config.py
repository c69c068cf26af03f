"""Every setting, as frozen dataclasses; the command line is generated from them. Presets are a table of overrides.

What the presets `rl4evit` and `rl4evit-code` take from where (Lu et al., ICME 2025, arXiv 2503.23459), numbered. Of the
paper, both presets:
 1. Stages before blocks 3, 6, 9 of 12; evenly spaced likewise in other depths.          `GameConfig.stage_count`
 2. Pruned tokens leave for good (`drop`); the class token is never pruned.              `GameConfig.transition`
 3. Observation: the agent's own token and a one-hot agent id.                           `ActorConfig.observation`
 4. Actor shared by all agents, C + N -> 64 -> 256 -> 64 -> 2, tanh, orthogonal.         `ActorConfig.hidden`
 5. Critic on the agent-specific global state [x_i ; x_CLS], same hidden sizes.          `policies.networks.Critic`
 6. PPO clip 0.2, gamma 0.99, entropy 0.01, 4 epochs, gradient norm 10, Adam.            `PPOConfig`
Of the paper, `rl4evit` alone:
 7. Reward `share`: alive * (alpha * [prediction correct] / survivors - beta).           `learning.rewards.share`
 8. GAE with lambda 0.95 and normalised advantages; the critic sees no id.
Of the authors' published code, both presets:
 9. 64 images an update in four minibatches.
10. alpha 24; in `rl4evit` also beta 0.1, from lines of the code that are commented out (beside it 0.106, 0.031 and
    alpha 22). The unit is tokens: in equilibrium about 240 times the share of right predictions are kept, of 196.
Of the code, `rl4evit-code` alone:
11. Reward `target`: the share of alpha, and e^d off for the kept or the pruned tokens.  `learning.rewards.target`
12. Constant step size 5e-6, Adam's epsilon 1e-8.                                        `PPOConfig.sched`, `.eps`
13. The critic sees the one-hot id as well.                                              `PPOConfig.critic_id`
14. GAE is commented out, and so is normalisation: the advantage is one temporal difference, r + gamma V' - V, which is
    GAE with lambda 0. The critic's loss is not halved.                          `PPOConfig.gae_lambda`, `.normalise`
Ours, in `rl4evit`: step size 3e-4 falling to 0, since the paper states none that we know. docs/paper.md has what the
code does otherwise and we do not.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import tyro

from tokengame.errors import TokenGameError
from tokengame.ranges import Range, check_fields, hints_of, require, shown

GAME_VERSION = 5
"""Raised whenever the same policy would decide differently."""


KeepWhat = Literal["logits", "embedding", "features"]
"""What a pruned model is to keep of the native one: class predictions, an embedding, or the features of every patch."""
WHOLE = Range(whole=True)
SHARE = Range(0, 1)
BELOW_ONE = Range(0, 1, below=True)
WEIGHT = Range(0, 1e6)
"""of a part of a sum"""
POSITIVE = Range(0, 1e6, above=True)
STEP = Range(0, 1, above=True)
"""sizes of Adam's steps"""
POINTS = Range(0, 100, above=True)
"""of top-1"""
UPDATES = Range(1, 10**8, whole=True)
BATCH = Range(1, 65_536, whole=True)
WIDTH = Range(1, 4_096, whole=True)
MOST_WEIGHTS = 2**24
"""of the networks of a policy"""


@dataclass(frozen=True)
class GameConfig:
    stages: Annotated[tuple[int, ...], WHOLE] = ()
    """blocks (from 0) at which tokens are pruned; empty: `stage_count` of them, evenly spaced, for merge (which decides
    inside a block) each a block earlier"""
    stage_count: Annotated[int, Range(1, 1_000, whole=True)] = 3
    """how many stages where `stages` is empty; the model's depth or more means every block"""
    transition: Literal["drop", "merge"] = "drop"
    """what becomes of a pruned token. drop: it leaves before the block. merge: the most similar kept token absorbs it
    inside the block's attention, where its key and value still count; the sum gets the greater length of the two"""
    cascade_margin: Annotated[float, Range(0, 100)] = 0.0
    """images whose two likeliest classes are less than this apart in probability fall back to all tokens (see
    `tokengame.runtime.cascade`): this at dial 0.5, 2 (1 - dial) times as much at others; 0: none"""

    def __post_init__(self) -> None:
        check_settings(self, "game.")

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Stages in a model of `depth` blocks.

        Raises:
            TokenGameError: a stage lies outside the model, or stages do not increase.
        """
        stages = self.stages
        if not stages:
            count = min(self.stage_count, depth)
            early = self.transition == "merge"
            evenly = tuple(round(depth * (i + 1) / (count + 1)) - early for i in range(count))
            stages = tuple(range(depth)) if count == depth else evenly
        if not stages or list(stages) != sorted(set(stages)) or stages[0] < 0 or stages[-1] >= depth:
            given = f"stages {shown(list(stages))} (--game.stages, of bench --stages)"
            wanted = f"give increasing numbers from 0 to {depth - 1}"
            raise TokenGameError(f"{given} do not fit a model of {depth} blocks: {wanted}")
        return stages


@dataclass(frozen=True)
class ActorConfig:
    observation: Literal["token_id", "context"] = "token_id"
    """token_id: own token and one-hot agent id (RL4EViT). context: stage, attention paid to the agent, its size, its
    similarity to the others and its place in an ordered dither, through a line; holds at any resolution"""
    hidden: Annotated[tuple[int, ...], WIDTH] = (64, 256, 64)
    """widths of the hidden layers, of the actor (token_id) and of the critic"""
    keep: Annotated[float | None, Range(0, 1, above=True, below=True)] = None
    """share of the tokens kept at each stage when training starts, its square root at the first stage. When training
    ends, biases are calibrated so that thresholds keep as many tokens as sampling did. Context only.
    None: biases start at 0"""
    shares: Annotated[tuple[float, ...] | None, Range(0, 1, above=True), tyro.conf.Fixed, tyro.conf.Suppress] = None
    """of the starting rule without thresholds, never of what is learned: share of each image's tokens that stays at
    each stage, of those before it (see `runtime.rule`)"""

    def __post_init__(self) -> None:
        check_settings(self, "actor.")
        require(1 <= len(self.hidden) <= 8, f"--actor.hidden must be 1 to 8 widths, not {len(self.hidden)}")
        weights = sum(one * other for one, other in pairwise(self.hidden))
        require(
            weights <= MOST_WEIGHTS, f"--actor.hidden makes {weights:,} weights; at most {MOST_WEIGHTS:,} are possible"
        )
        token_id = "--actor.keep is for observation context; with token_id leave it out (--actor.keep None)"
        require(self.keep is None or self.observation == "context", token_id)
        budgets = "--actor.shares is for observation context without --actor.keep"
        require(self.shares is None or (self.observation == "context" and self.keep is None), budgets)


TYPICAL_LOSS = 0.06
"""what the sampled games of an untrained policy lose on average: of class predictions about so many nats"""


@dataclass(frozen=True)
class RewardConfig:
    kind: Literal["share", "target", "fidelity"] = "share"
    """see `tokengame.learning.rewards`"""
    alpha: Annotated[float, WEIGHT] = 100.0
    """share, target: the sum that the tokens kept at a stage share equally where the image is classified correctly"""
    beta: Annotated[float, WEIGHT] = 1.0
    """share: what a kept token pays at each stage"""
    keep_target: Annotated[float, SHARE] = 0.7
    """target: share of the tokens wanted at each stage, of those wanted before it"""
    target_kl: Annotated[float, Range(0, 100, above=True), tyro.conf.arg(aliases=("--target-kl",))] = TYPICAL_LOSS
    """fidelity: mean KL(native || pruned) that the controller steers the sampled game to; of embeddings and features
    the mean 1 - cosine in units of `scale`"""
    target_drop: Annotated[float | None, POINTS, tyro.conf.arg(aliases=("--target-drop",))] = None
    """fidelity: instead of target_kl, points of top-1 that the sampled game may lose against the native model; needs
    labels"""
    kl_weight: Annotated[float, POSITIVE] = 2.4
    """fidelity: price of one nat of KL at the start, where the whole native compute costs 1; the controller moves it.
    A unit of another loss costs 2.5 times as much"""
    credit: Literal["own", "team"] = "own"
    """fidelity: own: an agent pays for the compute of its own row. team: every agent pays for that of the image"""
    kl_clamp: Annotated[float, POSITIVE] = 1.5
    """fidelity: largest KL (loss) one image can be charged for"""
    temperature: Annotated[float, Range(0.01, 100)] = 1.0
    """fidelity: both predictions are softened by it before KL is charged. Above 1 unlikely classes count too, and each
    game carries several times as much signal (docs/LOG.md)"""
    scale: Annotated[float | None, POSITIVE] = None
    """fidelity, embeddings and features: 1 - cosine is divided by this, so that prices and targets mean the same for
    every model. None: measured in the first update, so that the games of the untrained policy lose 0.06 on average"""

    native_every: Annotated[int, Range(1, 10**8, whole=True)] = 1
    """share, target: updates between those whose games are also compared with the native prediction, for the metrics
    alone; those rewards need none, and a native forward takes a third of the time"""

    def __post_init__(self) -> None:
        check_settings(self, "reward.")
        unpaid = "--reward.native-every leaves native predictions out, which --reward.kind fidelity pays for; use 1"
        require(self.native_every == 1 or self.kind != "fidelity", unpaid)
        unsteered = f"--target-drop steers --reward.kind fidelity, not {self.kind}"
        require(self.target_drop is None or self.kind == "fidelity", unsteered)


@dataclass(frozen=True)
class PPOConfig:
    lr: Annotated[float, STEP] = 3e-4
    """Adam step size at the start; see sched"""
    sched: Literal["linear", "constant"] = "linear"
    """linear: step sizes fall to 0 over all updates. constant: they stay"""
    eps: Annotated[float, STEP] = 1e-5
    """Adam's epsilon"""
    critic_lr: Annotated[float | None, STEP] = None
    """the critic's; None: as the actor's"""
    gamma: Annotated[float, SHARE] = 0.99
    """discount through the stages"""
    gae_lambda: Annotated[float, SHARE] = 0.95
    """generalised advantage estimation's lambda; 0: the advantage is one temporal difference"""
    normalise: bool = True
    """advantages get mean 0 and deviation 1 over all decisions of an update"""
    clip: Annotated[float, POSITIVE] = 0.2
    """PPO's clip range"""
    epochs: Annotated[int, Range(1, 1_000, whole=True)] = 4
    """passes over each update's experience"""
    minibatches: Annotated[int, Range(1, 1_000, whole=True)] = 2
    """parts a pass is cut into"""
    entropy: Annotated[float, WEIGHT] = 0.01
    """weight of the entropy bonus"""
    value: Annotated[float, WEIGHT] = 0.5
    """weight of the value loss"""
    max_grad_norm: Annotated[float, POSITIVE] = 10.0
    """gradient norm is clipped to this"""
    critic: Literal["central", "local"] = "central"
    """central: sees the class token as well (MAPPO). local: the agent's own token and features alone (IPPO)"""
    critic_id: bool = False
    """the critic sees the one-hot agent id too, which ties it to one resolution"""
    agents: Literal["tokens", "image"] = "tokens"
    """tokens: every token is an agent, with a probability ratio of its own. image: one agent decides for all tokens of
    an image at once, so that their ratios multiply (single-agent PPO)"""

    def __post_init__(self) -> None:
        check_settings(self, "ppo.")


@dataclass(frozen=True)
class TrainConfig:
    preset: str = "tokengame"
    """name of the preset these settings started from"""
    keep_what: KeepWhat | None = None
    """what the pruned model is to keep: class logits; an embedding, by its cosine with the native one; or features, by
    the cosine at each patch of the full grid. None: logits or an embedding, whichever the model gives"""
    game: GameConfig = field(default_factory=GameConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    updates: Annotated[int, UPDATES] = 400
    """rollout + PPO update, this many times"""
    batch_size: Annotated[int, BATCH] = 32
    """images per update"""
    rollouts: Annotated[int, Range(1, 1_024, whole=True)] = 1
    """games played on each image of an update; two or more serve as each other's baseline"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """the backbone's while training; auto: bfloat16 where the device computes in it, else float32"""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.keep_what in ("embedding", "features"):
            check_without_classes(self, self.keep_what)
        require(self.actor.shares is None, "--actor.shares is of the starting rule, which is not trained; leave it out")

    @staticmethod
    def from_preset(name: str) -> TrainConfig:
        """Settings of preset `name`.

        Raises:
            TokenGameError: there is no such preset.
        """
        if name not in PRESETS:
            raise TokenGameError(f"no preset {name!r}; there are: {', '.join(PRESETS)}")
        return with_overrides(TrainConfig(preset=name), PRESETS[name])


def check_without_classes(config: TrainConfig, keep_what: str) -> None:
    """Refuse settings that need predicted classes, where `keep_what` is "embedding" or "features".

    Raises:
        TokenGameError: names the setting.
    """
    reward, none = config.reward, f"and --keep-what {keep_what} has none"
    fidelity = f"--reward.kind {reward.kind} pays for correct predictions, {none}: use fidelity"
    require(reward.kind == "fidelity", fidelity)
    require(reward.target_drop is None, f"--target-drop counts correct predictions, {none}: use --target-kl")
    cascade = f"--game.cascade-margin compares probabilities of classes, {none}: use 0"
    require(not config.game.cascade_margin, cascade)


@dataclass(frozen=True)
class AugmentConfig:
    mixup: Annotated[float, Range(0, 100)] = 0.0
    """alpha of timm's mixup of two images and their labels; 0: none"""
    cutmix: Annotated[float, Range(0, 100)] = 0.0
    """alpha of timm's cutmix; where there is mixup too, each batch has one of both, by chance"""
    smoothing: Annotated[float, BELOW_ONE] = 0.0
    """of labels: so much of their weight is spread over all classes"""
    drop_path: Annotated[float, BELOW_ONE] = 0.0
    """stochastic depth of the tuned model, rising to this from its first block to its last. It changes what the policy
    observes, and with that what is pruned"""
    remode: Literal["const", "rand", "pixel"] = "const"
    """what random erasing (--reprob) puts into an image: black, one random colour, or one at each pixel"""

    def __post_init__(self) -> None:
        check_settings(self, "augment.")


@dataclass(frozen=True)
class FinetuneConfig:
    recipe: str = "tokengame"
    """tokengame, or paper: labels alone, as RL4EViT's authors tune"""
    updates: Annotated[int, UPDATES] = 500
    """optimiser steps"""
    batch_size: Annotated[int, BATCH] = 32
    """images per update"""
    distill: Annotated[float, WEIGHT] = 1.0
    """weight of KL(native || pruned)"""
    labels: Annotated[float, WEIGHT] = 0.0
    """weight of the cross-entropy with the labels"""
    opt: str = "adamw"
    """timm's name of the optimiser"""
    lr: Annotated[float, Range(0, 10, above=True)] = 2e-5
    """step size at its highest"""
    lr_batch: Annotated[int | None, BATCH, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """of a recipe: lr is for so many images an update, and is scaled to batch_size. None: it is not"""
    weight_decay: Annotated[float, Range(0, 10)] = 0.01
    """of matrices; biases and norms have none"""
    sched: str = "cosine"
    """timm's name of the schedule, which runs over all updates"""
    warmup: Annotated[float, BELOW_ONE] = 0.05
    """share of the updates in which the step size rises"""
    max_grad_norm: Annotated[float | None, POSITIVE] = 1.0
    """gradient norm is clipped to this; None: it is not"""
    ema: Annotated[float | None, BELOW_ONE] = None
    """decay of timm's moving average of weights, which is then kept; e.g. 0.999"""
    aa: str | None = None
    """timm's name of an auto-augmentation, e.g. rand-m9-mstd0.5-inc1"""
    reprob: Annotated[float, BELOW_ONE] = 0.0
    """chance of timm's random erasing"""
    crop: Annotated[float, Range(0, 1, above=True)] = 0.6
    """smallest share of an image that a random crop shows"""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """weights stay float32; auto: bfloat16 where the device computes in it"""

    def __post_init__(self) -> None:
        check_settings(self)
        require(self.distill + self.labels > 0, "give --distill or --labels a weight above 0")
        mixed = self.augment.mixup or self.augment.cutmix or self.augment.smoothing
        unlabelled = "--augment.mixup, cutmix and smoothing change labels: give --labels a weight, or leave them out"
        require(self.labels > 0 or not mixed, unlabelled)

    @property
    def step_size(self) -> float:
        """At its highest."""
        return self.lr if self.lr_batch is None else self.lr * self.batch_size / self.lr_batch

    @staticmethod
    def from_recipe(name: str) -> FinetuneConfig:
        """Settings of recipe `name`.

        Raises:
            TokenGameError: there is no such recipe.
        """
        if name not in RECIPES:
            raise TokenGameError(f"no recipe {name!r}; there are: {', '.join(RECIPES)}")
        return with_overrides(FinetuneConfig(recipe=name), RECIPES[name])


def check_settings(config: Any, section: str = "") -> None:
    """`check_fields` of a config that is being made, under the names of its flags: `--ppo.lr`, `--target-drop`.

    Raises:
        TokenGameError: a value is not allowed.
    """

    kind: Any = type(config)

    def flag(name: str) -> str:
        extras = getattr(hints_of(kind)[name], "__metadata__", ())
        short = [alias for extra in extras for alias in getattr(extra, "aliases", None) or ()]
        return short[0] if short else f"--{section}{name}".replace("_", "-")

    check_fields(kind, vars(config), flag)


def with_overrides(config: Any, overrides: dict[str, Any]) -> Any:
    """`config` with nested `overrides` applied; unknown keys raise TypeError."""
    known = {f.name for f in fields(config)}
    values = {
        k: with_overrides(getattr(config, k), v) if k in known and is_dataclass(getattr(config, k)) else _tuples(v)
        for k, v in overrides.items()
    }
    return replace(config, **values)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


PRESETS: dict[str, dict[str, Any]] = {
    "tokengame": {
        "game": {"stage_count": 3, "transition": "merge"},
        "actor": {"observation": "context", "hidden": (32,), "keep": 0.7},
        "reward": {"kind": "fidelity", "temperature": 3.0, "kl_weight": 0.7, "kl_clamp": 3.0},
        # no entropy bonus: one decision among hundreds has a small advantage, and the bonus would outweigh it
        "ppo": {
            "lr": 1e-2,
            "critic_lr": 2e-3,
            "gamma": 1.0,
            "gae_lambda": 1.0,
            "epochs": 2,
            "max_grad_norm": 0.5,
            "entropy": 0.0,
        },
        "rollouts": 4,
    },
    "rl4evit": {"reward": {"alpha": 24.0, "beta": 0.1}, "ppo": {"minibatches": 4}, "batch_size": 64},
    "rl4evit-code": {
        "reward": {"kind": "target", "alpha": 24.0},
        "ppo": {
            "lr": 5e-6,
            "sched": "constant",
            "eps": 1e-8,
            "gae_lambda": 0.0,
            "normalise": False,
            "minibatches": 4,
            "value": 1.0,
            "critic_id": True,
        },
        "batch_size": 64,
    },
}

RECIPES: dict[str, dict[str, Any]] = {
    "tokengame": {},
    # a log of the authors, and the defaults of their code, which is DeiT's: 300 epochs on 6 GPUs x 64 images
    "paper": {
        "batch_size": 384,
        "distill": 0.0,
        "labels": 1.0,
        "lr": 5e-4,
        "lr_batch": 512,
        "weight_decay": 0.05,
        "warmup": 5 / 300,
        "max_grad_norm": None,
        "aa": "rand-m9-mstd0.5-inc1",
        "reprob": 0.25,
        "augment": {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "drop_path": 0.1, "remode": "pixel"},
        "crop": 0.08,
    },
}
"""of fine-tuning"""
