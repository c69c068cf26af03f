"""A disk that is full at one write or from one on, standard output that is full, and an output folder that is deleted.

A command ends with a sentence, the old file is whole, nothing unfinished is left, and a training run can be resumed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from attacks.outcome import Defect, Refused, accepted, generator, require
from attacks.runs import log, operations_of, parts_left, require_as_undisturbed, require_sentence, resumed, undisturbed
from attacks.world import FULL, ONCE, Calls, Ended, World, arm, command, faults, sha
from tokengame import Policy

COMMANDS = ("train", "calibrate", "finetune", "sweep", "show", "compare")
UPDATES = 2
DELETED = 40
"""cases in which the folder is deleted"""


def arguments(world: World, name: str, folder: Path) -> list[str]:
    """A short command that writes into a folder."""
    output, policy = str(folder / "policy.safetensors"), ["--policy", str(world.policy("merge"))]
    few = ["--updates", "1", "--batch-size", "4"]
    return {
        "train": world.train(folder / "policy.safetensors", updates=UPDATES),
        "calibrate": ["calibrate", *world.flags, *policy, "--output", output],
        "finetune": ["finetune", *world.flags, *policy, *few, "--output", str(folder)],
        "sweep": ["sweep", *world.flags, "--ratios", "20", *few, "--output", str(folder)],
        "show": ["show", *world.flags, *policy, "--count", "1", "--output", str(folder / "tokens.png")],
        "compare": ["compare", *world.flags, "--policies", str(world.policy("merge")), "--dials", "0.5",
                    "--no-timing", "--output", str(folder)],
    }[name]  # fmt: skip


def plan(world: World) -> list[tuple[str, str, int]]:
    """(command, fault, at which change) of every case."""
    noted = world.root / "disk.json"
    if not noted.exists():
        cases: list[tuple[str, str, int]] = []
        for name in COMMANDS:
            folder = world.root / "disk" / name
            folder.mkdir(parents=True)
            count = operations_of(arguments(world, name, folder), folder)
            cases += [(name, fault, at) for at in range(1, count + 1) for fault in ("once", "full")]
        cases += [("eval", "stdout", 0), ("train", "stdout", 0), *[("train", "deleted", at) for at in range(DELETED)]]
        noted.write_text(json.dumps(cases))
    return [tuple(case) for case in json.loads(noted.read_text())]


def count(world: World) -> int:
    """Cases."""
    return len(plan(world))


def case(world: World, seed: int, number: int) -> str:
    """One command, one fault."""
    name, fault, at = plan(world)[number]
    with tempfile.TemporaryDirectory(dir=world.root) as folder:
        act = {"once": _full, "full": _full, "stdout": _stdout, "deleted": _deleted}[fault]
        what = f"{name}, {fault} at {at}"
        try:
            act(world, Path(folder), name, at, ONCE if fault == "once" else FULL, seed)
        except Defect as error:
            raise Defect(f"{what}: {error}") from None
        except Refused as refusal:
            raise Refused(f"{what}: {refusal}") from None
    return what


def _full(world: World, folder: Path, name: str, at: int, action: int, _seed: int) -> None:
    output = folder / "policy.safetensors"
    old = None
    if name == "calibrate":  # written where an older one lies
        shutil.copyfile(world.policy("cascade"), output)
        old = sha(output)
    library = faults()
    assert library is not None
    ended = command(arguments(world, name, folder), lambda: arm(folder, at, action), library.faults_seen)
    require(ended.number >= at or ended.code == 0, "the command ended before the fault")
    require_sentence(ended, (0, 2))
    require(not parts_left(folder), f"{parts_left(folder)} left")
    if name == "calibrate":
        wanted = sha(world.root / "disk" / "calibrate" / "policy.safetensors")
        require(sha(output) == (old if ended.code else wanted), f"exit {ended.code}, and the policy is another")
    if output.exists():
        with accepted("the policy that was left"):
            Policy.load(output)
    if name == "train":
        last = resumed(world, output, UPDATES) if ended.code else ended
        require_as_undisturbed(world, output, last, UPDATES)
    _report(ended)


def _report(ended: Ended) -> None:
    """A run that ended with a sentence is refused."""
    if ended.code:
        raise Refused(ended.sentence[-150:])


def _stdout(world: World, folder: Path, name: str, *_: int) -> None:
    """The JSON document cannot be written."""
    own = ["eval", *world.flags, "--policy", str(world.policy("merge"))]
    line = own if name == "eval" else arguments(world, name, folder)
    ended = command([*line, "--json"], stdout="/dev/full")
    require_sentence(ended, (1, 2))
    require(ended.sentence, "ended without a word")
    _report(ended)


def _deleted(world: World, folder: Path, name: str, at: int, _action: int, seed: int) -> None:
    """The output's folder vanishes during the run: a sentence, or a policy in a folder made anew."""
    output = folder / "run" / "policy.safetensors"
    rng = generator("deleted", seed, at)
    vanish: Callable[[], None] = lambda: shutil.rmtree(output.parent, ignore_errors=True)  # noqa: E731
    ended = command(
        world.train(output, updates=UPDATES), Calls(rng.randint(1, undisturbed(world, UPDATES).calls), vanish).start
    )
    require_sentence(ended, (0, 2))
    require(ended.code or output.exists() or not log(output).exists(), f"{name} says it worked and left no policy")
    _report(ended)
