"""What each part of learning is worth: the same training without it, over several seeds, on the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import nn

from tokengame.config import TrainConfig, merge
from tokengame.data import Batch
from tokengame.evaluate import Scores, calibrate, run, score
from tokengame.heuristics import AtBudgets, Random, attention
from tokengame.policy import Policy
from tokengame.runtime import PrunedViT, prune

ABLATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no Markov game (gamma 0)": {"ppo": {"gamma": 0.0}},
    "local critic (IPPO)": {"ppo": {"critic": "local"}},
    "one agent an image (PPO)": {"ppo": {"agents": "image"}},
    "team reward, no credit of one's own": {"reward": {"credit": "team"}},
    "one game an image, no leave-one-out": {"rollouts": 1},
}
RULES: dict[str, Callable] = {"attention at its budgets": attention, "random at its budgets": Random()}
RATIOS = (0.8, 0.7, 0.6)


def variants(config: TrainConfig) -> dict[str, TrainConfig]:
    """Settings of each ablation. One game an image plays as many games in all, on more images."""
    settings = {name: merge(config, changes) for name, changes in ABLATIONS.items()}
    games = config.batch_size * config.rollouts
    single = "one game an image, no leave-one-out"
    settings[single] = merge(settings[single], {"batch_size": games})
    return settings


def quality(model: nn.Module, policy: Policy, batches: Callable[[], Iterable[Batch]]) -> dict[str, float]:
    """KL and agreement where a policy's dial gives each of `RATIOS`, interpolated; nan where it does not reach it."""
    rows = calibrate(prune(model, policy), batches())
    return at_ratios(rows)


def at_ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Between calibrated dials: agreement linear in compute, KL in its logarithm."""
    rows = sorted(rows, key=lambda row: row["gmacs_ratio"])
    ratios = [row["gmacs_ratio"] for row in rows]
    found = {}
    for ratio in RATIOS:
        inside = ratios[0] <= ratio <= ratios[-1]
        logs = [np.log(row["kl"] + 1e-9) for row in rows]
        found[f"agreement_{ratio}"] = (
            float(np.interp(ratio, ratios, [r["agreement"] for r in rows])) if inside else np.nan
        )
        found[f"kl_{ratio}"] = float(np.exp(np.interp(ratio, ratios, logs))) if inside else np.nan
    return found


@torch.inference_mode()
def by_rules(
    fast: PrunedViT, batches: Callable[[], Iterable[Batch]], dials: Iterable[float]
) -> dict[str, dict[str, float]]:
    """As `quality`, of rules that choose as many tokens in each image as the policy did at each dial."""
    weight, found = next(fast.model.parameters()), {}
    for name, rule in RULES.items():
        rows = []
        for dial in dials:
            fast.dial, scores, ruled = dial, Scores(), AtBudgets(fast, rule)
            for batch in batches():
                images = batch.images.to(weight.device, weight.dtype)
                end, logits = run(ruled, images)
                score(scores, ruled, batch, fast.model(images).float(), logits.float(), end)
            rows.append(scores.summary())
        found[name] = at_ratios(rows)
    return found


def across_seeds(results: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure over seeds, and its standard deviation as NAME_std."""
    row: dict[str, float] = {}
    for name in results[0]:
        values = [result[name] for result in results]
        row[name] = fmean(values)
        row[f"{name}_std"] = stdev(values) if len(values) > 1 else 0.0
    return row
