"""The starting rule at several ratios of compute: what a policy does before it has learned anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from tokengame.backbones import wrap
from tokengame.baselines.reducer import Baseline
from tokengame.config import GameConfig
from tokengame.files import Progress, silent
from tokengame.policies import Policy
from tokengame.runtime import prune
from tokengame.runtime.method import Method
from tokengame.runtime.rule import Rule

RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
"""of the compute; those that the rule cannot reach on a model are left out"""


def budgets(model: nn.Module) -> list[tuple[str, Method]]:
    """With a budget for each image; what `prune(model, gmacs_ratio=...)` does."""
    rule = Rule(wrap(model))
    return _settings(model, rule, lambda ratio: rule.with_budgets(rule.shares_for(gmacs_ratio=ratio)))


def thresholds(
    model: nn.Module, images: Sequence[Tensor], game: GameConfig | None = None, progress: Progress = silent
) -> list[tuple[str, Method]]:
    """With thresholds that are set on batches of images [B, channels, height, width], which may not measure it."""
    rule = Rule(wrap(model), game=game)

    def policy(ratio: float) -> Policy:
        return rule.with_thresholds(images, len(images), progress, gmacs_ratio=ratio)

    return _settings(model, rule, policy)


def _settings(model: nn.Module, rule: Rule, policy: Callable[[float], Policy]) -> list[tuple[str, Method]]:
    reached = [ratio for ratio in RATIOS if ratio >= rule.least]
    return [(f"compute {ratio:g}", prune(model, policy(ratio))) for ratio in reached]


BASELINES = (Baseline("rule", budgets, published=False),)
