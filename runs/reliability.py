"""Attack the package and write results/reliability.json: 40 minutes on two quiet cores.

    python runs/reliability.py                                    # all attacks; what is finished is not done again
    python runs/reliability.py --only policies --number 17        # one case, to look at a defect
    python runs/reliability.py --only kills disk --seed 1

`docs/reliability.md` has the table that is printed. The generators are in tests/attacks/.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
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

ATTACKS = ("policies", "images", "checkpoints", "commands", "kills", "disk", "threads")
SHOWN = 20
"""defects of an attack that are printed and written down"""


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
                rows[name] = _row(*_run(attacker, name, args.seed, numbers), args.seed, verbose=not kept)
                if kept:
                    write_whole(args.output, json.dumps(list(rows.values()), indent=1) + "\n")
    print(table(list(rows.values())))
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


def _run(attacker: Attacker, name: str, seed: int, numbers: Any) -> tuple[str, list[Outcome], str | None]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bars:
        task = bars.add_task(name, total=None)

        def step(total: int) -> None:
            bars.update(task, total=total) if total else bars.advance(task)

        return name, *attacker.run(name, seed, numbers, step)


def _row(name: str, outcomes: list[Outcome], missing: str | None, seed: int, verbose: bool) -> dict[str, Any]:
    """What the table and the results file say of an attack."""
    defects = [str(outcome) for outcome in outcomes if outcome.verdict == "defect"]
    for line in map(str, outcomes[:SHOWN]) if verbose else defects[:SHOWN]:
        print(line)
    count = Counter(outcome.verdict for outcome in outcomes)
    return {
        "attack": name, "seed": seed, "cases": len(outcomes), "worked": count["ok"], "refused": count["refused"],
        "defects": count["defect"], "memory_mib": max((outcome.mib for outcome in outcomes), default=0.0),
        "not_run": missing, "first_defects": defects[:SHOWN], **conditions(torch.float32),
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
