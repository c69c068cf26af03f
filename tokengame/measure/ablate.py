"""Ablations: the same training without one of its parts, or a walk from one preset to another, over several seeds.

All are measured on the same images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from tokengame.backbones import wrap
from tokengame.baselines.heuristics import AtBudgets, Random, Score, attention
from tokengame.baselines.rule import thresholds
from tokengame.config import GameConfig, TrainConfig, with_overrides
from tokengame.data.batches import Batch
from tokengame.measure.evaluate import at_ratios, calibrate
from tokengame.measure.scores import Scores
from tokengame.policies import Policy
from tokengame.runtime import PrunedViT, prune

AS_IT_IS = "as it is"
ABLATIONS: dict[str, dict[str, Any]] = {
    AS_IT_IS: {},
    "no Markov game (gamma 0)": {"ppo": {"gamma": 0.0}},
    "local critic (IPPO)": {"ppo": {"critic": "local"}},
    "one agent an image (PPO)": {"ppo": {"agents": "image"}},
    "team reward, no credit of one's own": {"reward": {"credit": "team"}},
    "one game an image, no leave-one-out": {"rollouts": 1},
}
WALK: dict[str, dict[str, Any]] = {
    "rl4evit-code": {},
    "reward fidelity, of a team": {"reward": {"kind": "fidelity", "alpha": 100.0, "credit": "team"}},
    "credit of one's own": {"reward": {"credit": "own"}},
    "step sizes 1e-2 and 2e-3, falling": {"ppo": {"lr": 1e-2, "critic_lr": 2e-3, "sched": "linear", "eps": 1e-5}},
    "gamma, lambda 1, normalised, no entropy": {
        "ppo": {
            "gamma": 1.0, "gae_lambda": 1.0, "normalise": True, "entropy": 0.0, "value": 0.5, "max_grad_norm": 0.5
        }
    },
    "32 images, 2 minibatches, 2 epochs": {"batch_size": 32, "ppo": {"minibatches": 2, "epochs": 2}},
    "observation context": {"actor": {"observation": "context", "hidden": (32,)}, "ppo": {"critic_id": False}},
    "biases of the starting rule": {"actor": {"keep": 0.7}},
    "transition merge": {"game": {"transition": "merge"}},
    "temperature 3": {"reward": {"temperature": 3.0, "kl_weight": 0.7, "kl_clamp": 3.0}},
    "four games an image: tokengame": {"rollouts": 4},
}  # fmt: skip
"""What is changed from preset rl4evit-code to preset tokengame, each row beside all rows before it."""
RULES: dict[str, Callable[[], Score]] = {
    "attention at its budgets": lambda: attention,
    "random at its budgets": Random,
}


def variants(config: TrainConfig) -> dict[str, TrainConfig]:
    """Settings of each ablation. One game an image plays as many games in all, on more images."""
    settings = {name: with_overrides(config, changes) for name, changes in ABLATIONS.items()}
    games = config.batch_size * config.rollouts
    single = "one game an image, no leave-one-out"
    settings[single] = with_overrides(settings[single], {"batch_size": games})
    return settings


def walk(config: TrainConfig) -> dict[str, TrainConfig]:
    """Settings of each row of `WALK`, from `config` on. All rows play as many games, so updates differ.

    Args:
        config: preset rl4evit-code; its `updates` are those of the first row.
    """
    games, found = config.updates * config.batch_size * config.rollouts, {}
    for name, changes in WALK.items():
        config = with_overrides(config, changes)
        found[name] = with_overrides(config, {"updates": max(1, games // (config.batch_size * config.rollouts))})
    return found


def quality(model: nn.Module, policy: Policy, batches: Callable[[], Iterable[Batch]]) -> dict[str, float]:
    """KL and agreement where a policy's dial gives each of `evaluate.RATIOS`."""
    rows = calibrate(prune(model, policy), batches())
    return at_ratios(rows)


@torch.inference_mode()
def by_rules(
    fast: PrunedViT, batches: Callable[[], Iterable[Batch]], dials: Iterable[float]
) -> dict[str, dict[str, float]]:
    """As `quality`, of rules that choose as many tokens in each image as the policy did at each dial."""
    weight, found = next(fast.model.parameters()), {}
    for name, rule in RULES.items():
        rows = []
        for dial in dials:
            fast.dial, scores, at_budgets = dial, Scores(), AtBudgets(fast, rule())
            for batch in batches():
                images = batch.images.to(weight.device, weight.dtype)
                scores.add(at_budgets, batch, fast.game.backbone.native(images).float(), at_budgets.predict(images))
            rows.append(scores.summary())
        found[name] = at_ratios(rows)
    return found


@torch.inference_mode()
def by_starting_rule(
    model: nn.Module, game: GameConfig, images: Sequence[Tensor], batches: Callable[[], Iterable[Batch]]
) -> dict[str, float]:
    """As `quality`, of the starting rule with thresholds that are set on batches of `images`, which measure nothing."""
    weight, rows = next(model.parameters()), []
    for _, method in thresholds(model, images, game):
        scores = Scores()
        for batch in batches():
            own = batch.images.to(weight.device, weight.dtype)
            scores.add(method, batch, wrap(model).native(own).float(), method.predict(own))
        rows.append(scores.summary())
    return at_ratios(rows)


def across_seeds(results: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure over the seeds that reach it, their standard deviation as NAME_std, number as NAME_seeds."""
    row: dict[str, float] = {}
    for name in results[0]:
        values = [result[name] for result in results if not math.isnan(result[name])]
        row[name] = fmean(values) if values else math.nan
        row[f"{name}_std"] = stdev(values) if len(values) > 1 else 0.0
        row[f"{name}_seeds"] = len(values)
    return row
