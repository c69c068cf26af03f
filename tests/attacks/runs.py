"""Short training runs that end early, and what an undisturbed one leaves: shared by attacks on runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from attacks.outcome import require
from attacks.world import COUNT, UPDATES, Calls, Ended, World, arm, command, faults, sha, succeed


@dataclass(frozen=True)
class Undisturbed:
    """What a run that nothing disturbs leaves, and how much there is to disturb."""

    policy: str
    """digest"""
    metrics: str
    """digest"""
    calls: int
    """of Python functions"""
    operations: int
    """that change files; 0 where they cannot be counted"""


def undisturbed(world: World, updates: int = UPDATES) -> Undisturbed:
    """Measured once."""
    noted = world.root / f"undisturbed{updates}.json"
    if not noted.exists():
        folder, calls = world.root / f"undisturbed{updates}", Calls()
        output, other = folder / "policy.safetensors", world.root / f"counted{updates}"
        counted = succeed(command(world.train(output, updates=updates), calls.start, lambda: calls.seen))
        operations = operations_of(world.train(other / output.name, updates=updates), other)
        found = Undisturbed(sha(output), sha(metrics(output)), counted.number, operations)
        noted.write_text(json.dumps(asdict(found)))
    return Undisturbed(**json.loads(noted.read_text()))


def operations_of(arguments: list[str], folder: Path) -> int:
    """How many calls of a command change files below a folder; 0 where they cannot be counted."""
    library = faults()
    if library is None:
        return 0
    return succeed(command(arguments, lambda: arm(folder, 0, COUNT), library.faults_seen)).number


def log(output: Path) -> Path:
    """The folder of a run's log."""
    return output.with_name(output.stem + "_log")


def metrics(output: Path) -> Path:
    """The log of a run's metrics."""
    return log(output) / "metrics.jsonl"


def resumed(world: World, output: Path, updates: int = UPDATES) -> Ended:
    """The run taken up again, or started anew where nothing was saved."""
    ended = command(world.train(output, "--resume", updates=updates))
    if ended.code == 2 and not (log(output) / "checkpoint.pt").exists():
        return command(world.train(output, *world.overwrite, updates=updates))
    return ended


def require_as_undisturbed(world: World, output: Path, ended: Ended, updates: int = UPDATES) -> None:
    """Raise `Defect` unless a resumed run ended with the bytes of an undisturbed one."""
    require(ended.code == 0, f"not resumed, exit {ended.code}: {ended.sentence[-200:]}")
    wanted = undisturbed(world, updates)
    require(sha(output) == wanted.policy, "the resumed run wrote another policy")
    require(sha(metrics(output)) == wanted.metrics, "the resumed run wrote other metrics")


def require_sentence(ended: Ended, codes: tuple[int, ...]) -> None:
    """Raise `Defect` unless a command ended with one of `codes`, with words where that is 2, without a traceback."""
    require("Traceback" not in ended.stderr, f"traceback: {ended.sentence[-200:]}")
    require(ended.code in codes, f"exit {ended.code}: {ended.sentence[-200:]}")
    require(ended.code != 2 or ended.sentence, "exit 2 without a word")


def parts_left(folder: Path) -> list[str]:
    """Unfinished files below a folder."""
    return sorted(path.name for path in folder.rglob("*") if path.suffix in (".part", ".probe", ".tmp"))
