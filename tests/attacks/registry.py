"""The attacks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attacks import checkpoints, commands, disk, images, kills, policies, threads
from attacks.world import World, faults

Case = Callable[[World, int, int], str]
"""(world, seed, number) -> what the case was; raises `Defect` or TokenGameError"""


@dataclass(frozen=True)
class Attack:
    """One kind of attack."""

    what: str
    """for the table of docs/reliability.md"""
    case: Case
    cases: Callable[[World], int]
    """of the long form"""
    short: int
    """cases of the short form, spread over all"""
    chunk: int = 1
    """cases that share a forked process"""
    needs_faults: bool = False
    """whether it works only with the library of faults.c"""

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        return "no C compiler, or not Linux" if self.needs_faults and faults() is None else None


ATTACKS = {
    "policies": Attack("mutated policy files: bytes, cards, tensors", policies.case, lambda _: 10_000, 80, 50),
    "images": Attack("mutated images, archives and class maps", images.case, lambda _: 8_000, 80, 50),
    "checkpoints": Attack("damaged or foreign checkpoints and logs", checkpoints.case, lambda _: 7_000, 28, 50),
    "commands": Attack("wrong command lines", commands.case, commands.count, 30),
    "kills": Attack("training killed, then resumed", kills.case, lambda _: 120, 6),
    "disk": Attack("disk full at every write, output folder deleted", disk.case, disk.count, 9, needs_faults=True),
    "threads": Attack(f"calls from eight threads, {threads.CALLS} a case", threads.case, lambda _: 64, 2),
}


def short_numbers(attack: Attack, world: World) -> list[int]:
    """Cases of the short form, evenly spread."""
    total = attack.cases(world)
    count = min(attack.short, total)
    return [number * total // count for number in range(count)]
