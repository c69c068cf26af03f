"""The table of runs/compare_checkouts.sh: medians of each figure before and after, and whether decisions agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

from tokengame.report.console import console, show_rows

QUALITY = ("images", "top1_native", "top1_pruned", "agreement", "kl", "gmacs_ratio", "gmacs_ratio_std", "tokens_kept")
"""what must be the same to the last digit"""


def read(folder: Path, command: str, which: str) -> list:
    """The JSON documents of all rounds."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{command}_{which}_*.json"))]


def row(name: str, before: list[float], after: list[float]) -> dict[str, object]:
    """Medians, and the ratio of them."""
    return {"figure": name, "before": median(before), "after": median(after), "ratio": median(after) / median(before)}


def main(folder: Path) -> None:
    """Show the table; exit with 1 where decisions differ."""
    found = {(c, w): read(folder, c, w) for c in ("eval", "train", "bench") for w in ("before", "after")}
    rows = []
    for name in ("images_per_second_native", "images_per_second_pruned", "speedup"):
        rows.append(row(f"eval {name}", *([r[name] for r in found["eval", w]] for w in ("before", "after"))))
    for name in ("images_per_second", "throughput_vs_native"):
        rows.append(row(f"train {name}", *([r[name] for r in found["train", w]] for w in ("before", "after"))))
    for number, line in enumerate(found["bench", "after"][0]):
        for name in ("images_per_second_native", "images_per_second_pruned", "speedup"):
            values = ([r[number][name] for r in found["bench", w]] for w in ("before", "after"))
            rows.append(row(f"bench batch {line['batch_size']} {name}", *values))
    show_rows(rows)
    first, second = (found["eval", w][0] for w in ("before", "after"))
    different = [name for name in QUALITY if first[name] != second[name]]
    console.print(f"different: {', '.join(different)}" if different else "eval: the same quality to the last digit")
    (folder / "table.json").write_text(json.dumps(rows, indent=1))
    sys.exit(bool(different))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
