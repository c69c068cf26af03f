"""Other methods, each written from its paper in one file: a registry for `compare`.

They run on the game's backends and skip what is exact to skip, as the game does, so that a difference is in the method.
"""

from __future__ import annotations

from tokengame.baselines import ats, evit, heuristics, rule, tome
from tokengame.baselines.reducer import Baseline

BASELINES: tuple[Baseline, ...] = (
    *heuristics.BASELINES, *evit.BASELINES, *tome.BASELINES, *ats.BASELINES, *rule.BASELINES,
)  # fmt: skip
"""the methods that need no training, in the order in which tables show them"""

__all__ = ["BASELINES", "Baseline"]
