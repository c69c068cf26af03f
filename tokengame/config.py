"""Every setting, as frozen dataclasses; the command line is generated from them. Presets are a table of overrides.

What `rl4evit` takes from the paper (Lu et al., ICME 2025, arXiv 2503.23459), numbered:
 1. Stages before blocks 3, 6, 9 of 12; evenly spaced likewise in other depths.          `GameConfig.stage_count`
 2. Pruned tokens leave for good (`drop`); the class token is never pruned.              `GameConfig.transition`
 3. Observation: the agent's own token and a one-hot agent id.                           `ActorConfig.observation`
 4. Actor shared by all agents, C + N -> 64 -> 256 -> 64 -> 2, tanh, orthogonal.         `ActorConfig.hidden`
 5. Critic on the agent-specific global state [x_i ; x_CLS], same hidden sizes.          `policies.networks.Critic`
 6. Reward `share`: alive * (alpha * [prediction correct] / survivors - beta).           `learning.rewards.share`
 7. PPO clip 0.2, gamma 0.99, GAE lambda 0.95, entropy 0.01, 4 epochs, gradient norm 10, Adam.
Ours, since we know no published value: alpha = 100 and beta = 1 (about half of 196 tokens in equilibrium), learning
rate 3e-4, 2 minibatches, 32 images an update. Where their code and paper differ we follow the paper; preset
`rl4evit-code` has the reward that the code runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal

import tyro

from tokengame.errors import TokenGameError

GAME_VERSION = 5
"""Raised whenever the same policy would decide differently."""


@dataclass(frozen=True)
class GameConfig:
    stages: tuple[int, ...] = ()
    """blocks (from 0) at which tokens are pruned; empty: `stage_count` of them, evenly spaced, for merge (which decides
    inside a block) each a block earlier"""
    stage_count: int = 3
    """how many stages where `stages` is empty; the model's depth or more means every block"""
    transition: Literal["drop", "merge"] = "drop"
    """what becomes of a pruned token. drop: it leaves before the block. merge: the most similar kept token absorbs it
    inside the block's attention, where its key and value still count; the sum gets the greater length of the two"""
    cascade_margin: float = 0.0
    """images whose two likeliest classes are less than this apart in probability fall back to all tokens (see
    `tokengame.runtime.cascade`): this at dial 0.5, 2 (1 - dial) times as much at others; 0: none"""

    def __post_init__(self) -> None:
        require(self.cascade_margin >= 0, f"game.cascade_margin must be 0 or more, not {self.cascade_margin:g}")

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
            wanted = f"give increasing numbers from 0 to {depth - 1}"
            raise TokenGameError(f"stages {list(stages)} do not fit a model of {depth} blocks: {wanted}")
        return stages


@dataclass(frozen=True)
class ActorConfig:
    observation: Literal["token_id", "context"] = "token_id"
    """token_id: own token and one-hot agent id (RL4EViT). context: stage, attention paid to the agent, its size, its
    similarity to the others and its place in an ordered dither, through a line; holds at any resolution"""
    hidden: tuple[int, ...] = (64, 256, 64)
    """widths of the hidden layers, of the actor (token_id) and of the critic"""
    keep: float | None = None
    """share of the tokens kept at each stage when training starts, its square root at the first stage. When training
    ends, biases are calibrated so that thresholds keep as many tokens as sampling did. Context only.
    None: biases start at 0"""

    def __post_init__(self) -> None:
        require(
            self.observation in ("token_id", "context"), f"no observation {self.observation!r}; token_id or context"
        )
        require(min(self.hidden, default=0) > 0, f"actor.hidden wants at least one width, not {self.hidden}")
        if self.keep is not None:
            require(0 < self.keep < 1, f"actor.keep must lie between 0 and 1, not {self.keep:g}")
            token_id = "actor.keep is for observation context; with token_id leave it out (--actor.keep None)"
            require(self.observation == "context", token_id)


@dataclass(frozen=True)
class RewardConfig:
    kind: Literal["share", "target", "fidelity"] = "share"
    """see `tokengame.learning.rewards`"""
    alpha: float = 100.0
    """share, target: the sum that all kept tokens of a correctly classified image share equally"""
    beta: float = 1.0
    """share: what a kept token pays at each stage"""
    keep_target: float = 0.7
    """target: share of the tokens kept at each stage, of those alive before it"""
    target_kl: Annotated[float, tyro.conf.arg(aliases=("--target-kl",))] = 0.06
    """fidelity: mean KL(native || pruned) that the controller steers the sampled game to"""
    target_drop: Annotated[float | None, tyro.conf.arg(aliases=("--target-drop",))] = None
    """fidelity: instead of target_kl, points of top-1 that the sampled game may lose against the native model; needs
    labels"""
    kl_weight: float = 2.4
    """fidelity: price of one nat of KL at the start, where the whole native compute costs 1; the controller moves it"""
    credit: Literal["own", "team"] = "own"
    """fidelity: own: an agent pays for the compute of its own row. team: every agent pays for that of the image"""
    kl_clamp: float = 1.5
    """fidelity: largest KL one image can be charged for"""
    temperature: float = 1.0
    """fidelity: both predictions are softened by it before KL is charged. Above 1 unlikely classes count too, and each
    game carries several times as much signal (docs/LOG.md)"""

    def __post_init__(self) -> None:
        above = {name: getattr(self, name) for name in ("target_kl", "kl_weight", "kl_clamp", "temperature")}
        for name, value in above.items():
            require(value > 0, f"reward.{name} must be above 0, not {value:g}")
        if self.target_drop is not None:
            require(self.target_drop > 0, "reward.target_drop must be above 0")
            require(self.kind == "fidelity", f"reward.target_drop steers reward fidelity, not {self.kind!r}")


@dataclass(frozen=True)
class PPOConfig:
    lr: float = 3e-4
    """Adam step size at the start; falls linearly to 0"""
    critic_lr: float | None = None
    """the critic's; None: as the actor's"""
    gamma: float = 0.99
    """discount through the stages"""
    gae_lambda: float = 0.95
    """generalised advantage estimation's lambda"""
    clip: float = 0.2
    """PPO's clip range"""
    epochs: int = 4
    """passes over each update's experience"""
    minibatches: int = 2
    """parts a pass is cut into"""
    entropy: float = 0.01
    """weight of the entropy bonus"""
    value: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 10.0
    """gradient norm is clipped to this"""
    critic: Literal["central", "local"] = "central"
    """central: sees the class token as well (MAPPO). local: the agent's own token and features alone (IPPO)"""
    agents: Literal["tokens", "image"] = "tokens"
    """tokens: every token is an agent, with a probability ratio of its own. image: one agent decides for all tokens of
    an image at once, so that their ratios multiply (single-agent PPO)"""

    def __post_init__(self) -> None:
        require(min(self.epochs, self.minibatches) >= 1, "ppo.epochs and ppo.minibatches must be at least 1")
        require(self.lr > 0 and (self.critic_lr is None or self.critic_lr > 0), "step sizes must be above 0")


@dataclass(frozen=True)
class TrainConfig:
    preset: str = "tokengame"
    """name of the preset these settings started from"""
    game: GameConfig = field(default_factory=GameConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    updates: int = 400
    """rollout + PPO update, this many times"""
    batch_size: int = 32
    """images per update"""
    rollouts: int = 1
    """games played on each image of an update; two or more serve as each other's baseline"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """the backbone's while training; auto: bfloat16 where the device computes in it, else float32"""

    def __post_init__(self) -> None:
        counts = (self.updates, self.batch_size, self.rollouts)
        require(min(counts) >= 1, f"updates, batch_size and rollouts must be at least 1, not {counts}")

    @staticmethod
    def from_preset(name: str) -> TrainConfig:
        """Settings of preset `name`.

        Raises:
            TokenGameError: there is no such preset.
        """
        if name not in PRESETS:
            raise TokenGameError(f"no preset {name!r}; there are: {', '.join(PRESETS)}")
        return with_overrides(TrainConfig(preset=name), PRESETS[name])


@dataclass(frozen=True)
class FinetuneConfig:
    updates: int = 500
    """optimiser steps"""
    batch_size: int = 32
    """images per update"""
    distill: float = 1.0
    """weight of KL(native || pruned)"""
    labels: float = 0.0
    """weight of the cross-entropy with the labels; the paper's fine-tuning has 1, with distill 0"""
    opt: str = "adamw"
    """timm's name of the optimiser"""
    lr: float = 2e-5
    """step size at its highest"""
    weight_decay: float = 0.01
    """of matrices; biases and norms have none"""
    sched: str = "cosine"
    """timm's name of the schedule, which runs over all updates"""
    warmup: float = 0.05
    """share of the updates in which the step size rises"""
    max_grad_norm: float = 1.0
    """gradient norm is clipped to this"""
    ema: float | None = None
    """decay of timm's moving average of the weights, which then is what is kept; e.g. 0.999"""
    aa: str | None = None
    """timm's name of an auto-augmentation, e.g. rand-m9-mstd0.5-inc1"""
    reprob: float = 0.0
    """chance of timm's random erasing"""
    crop: float = 0.6
    """smallest share of an image that a random crop shows"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """what is computed in; weights stay float32; auto: bfloat16 where the device computes in it"""

    def __post_init__(self) -> None:
        require(min(self.updates, self.batch_size) >= 1, "updates and batch_size must be at least 1")
        require(min(self.distill, self.labels) >= 0 < self.distill + self.labels, "give distill or labels a weight")
        require(min(self.lr, self.max_grad_norm) > 0, "lr and max_grad_norm must be above 0")
        shares = {"warmup": self.warmup, "reprob": self.reprob, "ema": self.ema or 0.0, "1 - crop": 1 - self.crop}
        for name, share in shares.items():
            require(0 <= share < 1, f"{name} must be at least 0 and below 1, not {share:g}")


def require(holds: bool, sentence: str) -> None:
    """Raise TokenGameError with `sentence` unless `holds`."""
    if not holds:
        raise TokenGameError(sentence)


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
    "rl4evit": {},
    "rl4evit-code": {"reward": {"kind": "target", "alpha": 24.0}},
}
