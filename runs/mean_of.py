"""Mean and standard deviation over several `compare` runs: python runs/mean_of.py build/seeds/*/qualities.csv"""

import csv
import sys
from pathlib import Path

from tokengame.ablate import across_seeds
from tokengame.console import show_rows

tables = [list(csv.DictReader(Path(path).read_text().splitlines())) for path in sys.argv[1:]]
rows = []
for same in zip(*tables, strict=True):
    assert len({row["method"] for row in same}) == 1, "these files compare other methods"
    figures = [{key: float(value) for key, value in row.items() if key != "method"} for row in same]
    rows.append({"method": same[0]["method"]} | across_seeds(figures))
show_rows(rows)
