"""Runs cases in forks of one process that has imported everything: `python -m attacks.serve FOLDER`.

Requests are lines of JSON on stdin, {"attack", "seed", "numbers"}, numbers None for the short form; answers are lines
of JSON on stdout: outcomes as they come, and {"end": reason or null}. A fork that dies or hangs is its case's defect.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import tokengame.cli.main  # so that forks need not import it  # noqa: F401
from attacks.outcome import Outcome, judged
from attacks.registry import ATTACKS, Attack, short_numbers
from attacks.world import World, die_with_parent, resident_mib

LIMIT_MIB = 1024
"""memory that a case may take"""
STOP_MIB = 8192
"""address space beyond which allocation fails, so that the machine survives a defect"""
HANG = 300
"""seconds without an answer after which a fork is killed; no verdict but "hang" depends on time"""


def main() -> None:
    """Serve until stdin ends."""
    torch.set_num_threads(1)
    world = World(Path(sys.argv[1])).build()
    for line in sys.stdin:
        request = json.loads(line)
        attack = ATTACKS[request["attack"]]
        reason = attack.missing()
        if reason is None:
            numbers = request["numbers"]
            if numbers is None:
                numbers = short_numbers(attack, world)
            elif numbers == "all":
                numbers = list(range(attack.cases(world)))
            answer({"total": len(numbers)})
            for outcome in run(request["attack"], attack, world, request["seed"], numbers):
                answer(asdict(outcome))
        answer({"end": reason})


def answer(document: dict[str, Any]) -> None:
    """One line."""
    print(json.dumps(document), flush=True)


def run(name: str, attack: Attack, world: World, seed: int, numbers: list[int]) -> Iterator[Outcome]:
    """Outcomes of all cases, each chunk in a fork; where one dies, another begins with the case after."""
    left = deque(numbers)
    while left:
        chunk = [left[i] for i in range(min(attack.chunk, len(left)))]
        reader, child = _fork(name, attack, world, seed, chunk)
        with reader:
            for line in _lines(reader, child):
                left.popleft()
                yield Outcome(**json.loads(line))
        _, status = os.waitpid(child, 0)
        if len(left) and left[0] in chunk:
            code = os.waitstatus_to_exitcode(status)
            what = "hang" if code == -signal.SIGKILL else f"the process died, exit {code}"
            yield Outcome(name, seed, left.popleft(), "defect", what)


def _fork(name: str, attack: Attack, world: World, seed: int, numbers: list[int]) -> tuple[Any, int]:
    receive, send = os.pipe()
    child = os.fork()
    if child:
        os.close(send)
        return os.fdopen(receive, "rb", buffering=0), child
    code = 1
    try:
        os.setpgid(0, 0)
        die_with_parent()
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        for stream in (1, 2):  # where the first is open, answers go
            os.dup2(0, stream)
        with os.fdopen(send, "w", buffering=1) as answers:
            for outcome in _cases(name, attack, world, seed, numbers):
                answers.write(json.dumps(asdict(outcome)) + "\n")
        code = 0
    finally:
        os._exit(code)


def _cases(name: str, attack: Attack, world: World, seed: int, numbers: list[int]) -> Iterator[Outcome]:
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + STOP_MIB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    before = resident_mib()
    for number in numbers:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        verdict, what = judged(lambda number=number: attack.case(world, seed, number))
        most = peak_mib() - before
        if most > LIMIT_MIB:
            verdict, what = "defect", f"{most:.0f} MiB: {what}"
        yield Outcome(name, seed, number, verdict, what[:300], round(max(0.0, most), 1))


def peak_mib() -> float:
    """Most memory of this process since its peak was last cleared."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _lines(reader: Any, child: int) -> Iterator[bytes]:
    """Lines until the fork closes its end; it is killed, with its own forks, when it says nothing for long."""
    buffer = b""
    while True:
        ready, _, _ = select.select([reader], [], [], HANG)
        if not ready:
            os.killpg(child, signal.SIGKILL)
            return
        data = reader.read(65536)
        if not data:
            return
        *lines, buffer = (buffer + data).split(b"\n")
        yield from lines


if __name__ == "__main__":
    main()
