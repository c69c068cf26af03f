"""Mean ± standard deviation over several `compare` runs: python runs/mean_of.py build/seeds/*/qualities.csv

Runs in which a method does not reach a compute are left out of its mean there; "-" where none does.
"""

import csv
import sys
from pathlib import Path

from tokengame.measure.ablate import across_seeds
from tokengame.report.console import show_rows

tables = [list(csv.DictReader(Path(path).read_text().splitlines())) for path in sys.argv[1:]]
rows = []
if not tables or len({tuple(row["method"] for row in table) for table in tables}) != 1:
    sys.exit("give the qualities.csv of several `compare` runs with the same methods")
for same in zip(*tables, strict=True):
    figures = [{key: float(value) for key, value in row.items() if key != "method"} for row in same]
    found = across_seeds(figures)
    cells = {}
    for key in figures[0]:
        cells[key] = f"{found[key]:.3f} ± {found[f'{key}_std']:.3f}" if found[f"{key}_seeds"] else "-"
    rows.append({"method": same[0]["method"]} | cells)
show_rows(rows)
