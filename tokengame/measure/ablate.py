"""Ablations: the same training without one of its parts, over several seeds, on the same images."""

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

ABLATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no Markov game (gamma 0)": {"ppo": {"gamma": 0.0}},
    "local critic (IPPO)": {"ppo": {"critic": "local"}},
    "one agent an image (PPO)": {"ppo": {"agents": "image"}},
    "team reward, no credit of one's own": {"reward": {"credit": "team"}},
    "one game an image, no leave-one-out": {"rollouts": 1},
}
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
