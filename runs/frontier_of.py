"""frontier.png of a `compare` from its CSV, policies thick:
python runs/frontier_of.py results/compare_*_float32_*.csv docs/frontier.png vit_tiny_patch16_224
"""

import csv
import sys
from pathlib import Path

from tokengame.figures import frontier_figure

table, picture, *policies = sys.argv[1:]
numbers = ("gmacs_ratio", "agreement", "kl", "drop_pp", "speedup")
rows = [
    {"method": row["method"], "published": row["published"] == "True"}
    | {name: float(row[name]) if row.get(name) else None for name in numbers}
    for row in csv.DictReader(Path(table).read_text().splitlines())
]
Path(picture).write_bytes(frontier_figure(rows, policies))
