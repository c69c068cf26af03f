"""Attack the package and write results/reliability.json: an hour on one core.

    python runs/reliability.py                                    # all attacks; what is finished is not done again
    python runs/reliability.py --only policies --number 17        # one case, to look at a defect
    python runs/reliability.py --only kills disk --seed 1

The table goes to docs/reliability.md, which says what is tried. The generators are in tests/attacks/.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokengame.files import write_whole
from tokengame.measure.conditions import conditions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from attacks.client import Attacker  # noqa: E402
from attacks.outcome import Outcome  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
ATTACKS = ("policies", "images", "checkpoints", "commands", "kills", "disk", "threads")
SHOWN = 20
"""defects of an attack that are written down"""


@dataclass
class Reliability:
    only: tuple[str, ...] = ATTACKS
    """attacks to run"""
    seed: int = 0
    """of every case"""
    number: int | None = None
    """run this case alone, and write nothing"""
    short: bool = False
    """run the few cases that the tests run, and write nothing"""
    output: Path = ROOT / "results" / "reliability.json"
    """what is finished with this seed and this version lies there and is not done again; delete it to begin anew"""


def main(args: Reliability) -> int:
    """Run, show, write; 1 where there is a defect."""
    kept = args.number is None and not args.short
    rows = _finished(args) if kept else {}
    with TemporaryDirectory() as folder, Attacker(Path(folder)) as attacker:
        for name in args.only:
            if name not in rows:
                numbers = "all" if kept else None if args.number is None else [args.number]
                rows[name] = _row(attacker, name, args, numbers)
                if kept:
                    write_whole(args.output, json.dumps(list(rows.values()), indent=1) + "\n")
    print(table(list(rows.values())))
    if kept:
        text = PAGE.read_text()
        write_whole(PAGE, re.sub(r"^\| attack .*?\n(?!\|)", table(list(rows.values())) + "\n", text, flags=re.M | re.S))
    return int(any(row["defects"] for row in rows.values()))


def _finished(args: Reliability) -> dict[str, dict[str, Any]]:
    """Rows of the results file that this version wrote with this seed."""
    if not args.output.exists():
        return {}
    now = _version(conditions(torch.float32))
    rows = json.loads(args.output.read_text())
    return {row["attack"]: row for row in rows if row["seed"] == args.seed and _version(row) == now}


def _version(row: dict[str, Any]) -> str:
    """The commit, whether or not files have changed since, such as the results file."""
    return str(row["commit"]).removesuffix("+")


def _run(attacker: Attacker, name: str, seed: int, numbers: Any) -> Iterator[Outcome]:
    """Outcomes, with a bar; defects are printed as they come."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bars:
        task = bars.add_task(name, total=None)
        for outcome in attacker.run(name, seed, numbers):
            bars.update(task, total=attacker.total, advance=1)
            if outcome.verdict == "defect" or attacker.total == 1:
                bars.console.print(str(outcome), markup=False, highlight=False, soft_wrap=True)
            yield outcome


def _row(attacker: Attacker, name: str, args: Reliability, numbers: Any) -> dict[str, Any]:
    """What the table and the results file say of an attack."""
    outcomes = list(_run(attacker, name, args.seed, numbers))
    count = Counter(outcome.verdict for outcome in outcomes)
    defects = [str(outcome) for outcome in outcomes if outcome.verdict == "defect"]
    return {
        "attack": name, "seed": args.seed, "cases": len(outcomes), "worked": count["ok"], "refused": count["refused"],
        "defects": count["defect"], "memory_mib": max((outcome.mib for outcome in outcomes), default=0.0),
        "not_run": attacker.missing, "first_defects": defects[:SHOWN], **conditions(torch.float32),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/reliability.md."""
    lines = ["| attack | cases | worked, and right | refused in a sentence | defects | most memory | command |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        lines.append(
            f"| {row['attack']} | {row['cases']:,} | {row['worked']:,} | {row['refused']:,} | {row['defects']:,} "
            f"| {row['memory_mib']:.0f} MiB | `python runs/reliability.py --only {row['attack']}` |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Reliability)))
