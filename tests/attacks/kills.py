"""Training that is killed or interrupted at any point, up to twice, and resumed: it must end as if nothing happened."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from pathlib import Path

from attacks.outcome import Defect, generator, require
from attacks.runs import parts_left, require_as_undisturbed, require_sentence, resumed, undisturbed
from attacks.world import AFTER, BEFORE, Calls, Ended, World, arm, command

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}


def case(world: World, seed: int, number: int) -> str:
    """One run."""
    rng = generator("kills", seed, number)
    wanted = undisturbed(world)
    with tempfile.TemporaryDirectory(dir=world.root) as folder:
        output, what = Path(folder) / "policy.safetensors", []
        which = SIGNALS[number % 3]
        ended, where = _killed(world.train(output), Path(folder), which, rng, wanted.operations, wanted.calls)
        what.append(where)
        if rng.random() < 0.3 and ended.code != 0 and (Path(folder) / "policy_log" / "checkpoint.pt").exists():
            again = world.train(output, "--resume")
            ended, where = _killed(again, Path(folder), rng.choice(SIGNALS), rng, 40, wanted.calls // 2)
            what.append(where)
        if ended.code != 0:  # a signal may come too late
            ended = resumed(world, output)
        require_as_undisturbed(world, output, ended)
        require(not parts_left(Path(folder)), f"{parts_left(Path(folder))} left after {what}")
    return ", then ".join(what)


def _killed(
    arguments: list[str], folder: Path, which: signal.Signals, rng: random.Random, operations: int, calls: int
) -> tuple[Ended, str]:
    """A command to which a signal was sent at either side of a change to a file, or between calls of functions."""
    if operations and rng.random() < 0.6:
        at, side = rng.randint(1, operations), rng.choice((BEFORE, AFTER))
        before, where = lambda: arm(folder, at, side, which), f"{'before' if side == BEFORE else 'after'} change {at}"
    else:
        at = rng.randint(1, calls)
        before, where = Calls(at, lambda: os.kill(os.getpid(), which)).start, f"at call {at}"
    ended, where = command(arguments, before), f"{which.name} {where}"
    try:
        require_sentence(ended, (0, *CODES[which]))
    except Defect as error:
        raise Defect(f"{where}: {error}") from None
    if which != signal.SIGKILL:
        require(not parts_left(folder), f"{where}: {parts_left(folder)} left")
    return ended, where
