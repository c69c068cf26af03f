"""Speed-up at the same agreement, with agreement averaged over several `compare` runs and speed from a timed one:
python runs/speed_at_agreement.py results/compare_*.csv build/seeds/*/compare.csv

The first file is the timed run. At each compute a method has the mean agreement of the other runs and the speed of the
first, linear between settings; of all computes at which the agreement is reached the fastest counts. Speed-ups are over
native beside the method, call by call; images a second are those of the machine at that moment. The last row is the
policy, without or with the cascade, over the fastest method of a paper.
"""

import csv
import sys
from pathlib import Path

import numpy as np

from tokengame.baselines import BASELINES
from tokengame.measure.compare import LEVELS
from tokengame.report.console import show_rows

KEYS = {
    "method": "speedup", "on PyTorch's kernels": "speedup_pytorch", "images a second": "images_per_second_pruned"
}  # fmt: skip
COMPUTE = np.linspace(0.4, 1.0, 601)
PUBLISHED = {baseline.name for baseline in BASELINES if baseline.published} | {"DynamicViT, frozen"}


def curve(rows: list[dict[str, str]], method: str, name: str) -> np.ndarray:
    """Values of `name` at `COMPUTE`; nan outside of what the method's settings reach."""
    points = sorted((float(r["gmacs_ratio"]), float(r[name])) for r in rows if r["method"] == method and r.get(name))
    if not points:
        return np.full_like(COMPUTE, np.nan)
    return np.interp(COMPUTE, *np.transpose(points), left=np.nan, right=np.nan)


timed, *others = [list(csv.DictReader(Path(path).read_text().splitlines())) for path in sys.argv[1:]]
policies = {r["method"] for r in timed if r["setting"].startswith("dial ") and " at the budgets of " not in r["method"]}
for (title, key), form in zip(KEYS.items(), (".2f", ".2f", ".0f"), strict=True):
    table, best = [], {"policy": {}, "published": {}}
    for method in dict.fromkeys(row["method"] for row in timed):
        speed = curve(timed, method, key)
        agreement = np.mean([curve(rows, method, "agreement") for rows in others], 0)
        found = {level: speed[(agreement >= level) & ~np.isnan(speed)] for level in LEVELS}
        if any(len(speeds) for speeds in found.values()):
            cells = {str(level): f"{speeds.max():{form}}" if len(speeds) else "-" for level, speeds in found.items()}
            table.append({title: method} | cells)
        side = "published" if method in PUBLISHED else "policy" if method in policies else None
        for level, speeds in found.items():
            if side and len(speeds):
                best[side][level] = max(best[side].get(level, 0.0), speeds.max())
    both = {
        str(level): ours / best["published"][level]
        for level, ours in best["policy"].items()
        if level in best["published"]
    }
    if both:
        ratios = {level: f"{ratio:.2f}" for level, ratio in both.items()}
        table.append({title: "policy over the fastest published"} | dict.fromkeys(map(str, LEVELS), "-") | ratios)
    if table:
        show_rows(table)
