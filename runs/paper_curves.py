"""Learning curves of training runs: python runs/paper_curves.py curves.png one_log two_log ...

Each folder is that of a policy's log. Writes the picture, and prints for each run the means of its first and its last
tenth of updates.
"""

import json
import sys
from pathlib import Path

import numpy as np

from tokengame.report.console import show_rows
from tokengame.report.figures import CURVES, curves_figure

output, *folders = sys.argv[1:]
runs, rows = {}, []
for folder in map(Path, folders):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    settings = json.loads((folder / "config.json").read_text())["settings"]
    games = settings["batch_size"] * settings["rollouts"]
    runs[folder.name.removesuffix("_log")] = games, lines
    tenth = max(1, len(lines) // 10)
    for when, part in (("first tenth", lines[:tenth]), ("last tenth", lines[-tenth:])):
        row = {"run": folder.name.removesuffix("_log"), "games": games * len(lines), "of": when}
        for title, reading in CURVES.items():
            found = [reading(line) for line in part if title[:2] != "KL" or "game/kl" in line]
            row[title] = round(float(np.mean(found)), 4) if found else None
        rows.append(row)
if not runs:
    sys.exit("give a file to write and the log folders of one or more runs")
Path(output).write_bytes(curves_figure(runs))
show_rows(rows)
