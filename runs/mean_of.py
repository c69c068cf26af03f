"""Mean and standard deviation over several `compare` runs: python runs/mean_of.py build/seeds/*/qualities.csv"""

import csv
import sys
from pathlib import Path
from statistics import fmean, stdev

from tokengame.console import show_rows

tables = [list(csv.DictReader(Path(path).read_text().splitlines())) for path in sys.argv[1:]]
rows = []
for same in zip(*tables, strict=True):
    assert len({row["method"] for row in same}) == 1, "these files compare other methods"
    row = {"method": same[0]["method"]}
    for key in list(same[0])[1:]:
        values = [float(other[key]) for other in same]
        row[key] = f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
    rows.append(row)
show_rows(rows)
