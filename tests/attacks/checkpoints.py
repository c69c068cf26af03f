"""Damaged, partial and foreign checkpoints and logs: a run goes on from exactly what was saved, or refuses."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import shutil
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attacks.bytes import damaged
from attacks.outcome import Defect, Refused, accepted, generator, require
from attacks.policies import natives
from attacks.runs import log, metrics, require_as_undisturbed, undisturbed
from attacks.world import NAME, SMALL, UPDATES, Calls, World, command
from tokengame.config import TrainConfig, with_overrides
from tokengame.data.datasets import label_images, open_images, split_images
from tokengame.learning.run import TrainingRun

FILES = ("checkpoint.pt",) * 12 + ("metrics.jsonl",) * 4 + ("timings.jsonl",) * 3 + ("config.json",)
EVERY = 40
"""of so many cases one is resumed by the command and runs to its end"""


def case(world: World, seed: int, number: int) -> str:
    """One damaged run folder."""
    rng = generator("checkpoints", seed, number)
    with tempfile.TemporaryDirectory(dir=world.root) as folder:
        output = Path(folder) / "policy.safetensors"
        shutil.copytree(log(stopped(world)), log(output))
        victim = log(output) / rng.choice(FILES)
        what = f"{victim.name}: {spoil(victim, rng)}"
        try:
            with accepted("the run", what.endswith(": as it was")):
                if number % EVERY:
                    require(resume(world, output) == undamaged(world), "resumed from other bytes")
                else:
                    _to_the_end(world, output)
        except Defect as defect:
            raise Defect(f"{what}: {defect}") from None
        require(not (Path(folder) / "ran").exists(), f"{what}: code of the file was run")
    return what


def _to_the_end(world: World, output: Path) -> None:
    ended = command(world.train(output, "--resume"))
    require("Traceback" not in ended.stderr, f"traceback: {ended.sentence[-200:]}")
    if ended.code == 2:
        require(ended.sentence, "exit 2 without a word")
        raise Refused(ended.sentence[-200:])
    require_as_undisturbed(world, output, ended)


def stopped(world: World) -> Path:
    """The policy file that a run would have written which was killed after a checkpoint."""
    output = world.root / "stopped" / "policy.safetensors"
    calls = undisturbed(world).calls // 2
    while not (log(output) / "checkpoint.pt").exists():
        shutil.rmtree(output.parent, ignore_errors=True)
        command(world.train(output), Calls(calls, lambda: os._exit(1)).start)
        calls += calls // 8
    return output


@lru_cache
def undamaged(world: World) -> tuple[str, str, str]:
    """What is resumed from the folder as it was left."""
    with tempfile.TemporaryDirectory(dir=world.root) as folder:
        output = Path(folder) / "policy.safetensors"
        shutil.copytree(log(stopped(world)), log(output))
        return resume(world, output)


def resume(world: World, output: Path) -> tuple[str, str, str]:
    """Digests of the state that a run continues from, and of its logs."""
    source = open_images(str(world.images))
    label_images(source, None, 5)
    learn, _ = split_images(source, 0.2, 0)
    settings = {"updates": UPDATES, "batch_size": int(SMALL[1]), "rollouts": int(SMALL[3]), "dtype": SMALL[5]}
    config = with_overrides(TrainConfig.from_preset("tokengame"), settings)
    run = TrainingRun(natives(world.weights)[0], NAME, config, learn, output, seed=0, resume=True, workers=0)
    state = digest(run.trainer.state_dict())
    logs = [path.read_bytes().split(b"\n") for path in (metrics(output), log(output) / "timings.jsonl")]
    first, second = (digest(repr(lines[: run.trainer.updates])) for lines in logs)  # later ones are cut off
    return state, first, second


def digest(state: Any) -> str:
    """Of every number of a nested state, bit by bit."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                found.update(repr(key).encode())
                add(item)
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    add(state)
    return found.hexdigest()


def spoil(path: Path, rng: random.Random) -> str:
    """Damage a file; what was done."""
    kind = rng.choices(("bytes", "tensor", "foreign", "missing", "folder", "lines", "none"), (60, 10, 10, 2, 1, 15, 2))[
        0
    ]
    if kind == "bytes" or (kind == "lines" and path.suffix == ".pt") or (kind == "tensor" and path.suffix != ".pt"):
        changed, what = damaged(path.read_bytes(), rng)
        path.write_bytes(changed)
        return what
    if kind == "tensor":
        return _other_state(path, rng)
    if kind == "foreign":
        return _foreign(path, rng)
    if kind == "lines":
        return _other_lines(path, rng)
    if kind in ("missing", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        return kind
    return "as it was"


def _other_lines(path: Path, rng: random.Random) -> str:
    """A log whose lines are not those that were written."""
    lines = path.read_text().splitlines(keepends=True)
    act, at = rng.choice(("shuffled", "doubled", "removed", "garbage", "unfinished")), rng.randrange(len(lines))
    strange = rng.choice(("{}\n", "[]\n", "x\n", "7\n"))
    changed = {
        "shuffled": rng.sample(lines, len(lines)),
        "doubled": [*lines[:at], lines[at], *lines[at:]],
        "removed": [*lines[:at], *lines[at + 1 :]],
        "garbage": [*lines[:at], strange, *lines[at + 1 :]],
        "unfinished": [*lines, '{"update": 99, "ti'],
    }
    path.write_text("".join(changed[act]))
    return f"lines {act}"


def _other_state(path: Path, rng: random.Random) -> str:
    """A readable checkpoint of which a value is another, or missing."""
    state = torch.load(path, weights_only=True)
    places: list[tuple[Any, Any]] = []

    def collect(holder: Any) -> None:
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                collect(holder[key])

    collect(state)
    holder, key = rng.choice(places)
    value = holder[key]
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        holder[key] = rng.choice((value.flatten()[:0], value.double(), value * 0 - 1, value[None]))
    elif isinstance(holder, dict) and rng.random() < 0.5:
        del holder[key]
    else:
        holder[key] = rng.choice((None, -1, 10**20, "x", [], {}, float("nan"), torch.zeros(2)))
    torch.save(state, path)
    return f"{key} is another"


class Runs:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


def _foreign(path: Path, rng: random.Random) -> str:
    """Another program's file."""
    ran = path.parents[1] / "ran"
    kinds = ("pickle", "code", "torch code", "tensor", "list", "number", "dict", "numpy", "zip", "text", "legacy")
    kind = rng.choice(kinds)
    file = io.BytesIO()
    if kind == "pickle":
        pickle.dump({"step": 3}, file)
    elif kind == "code":
        pickle.dump(Runs(ran), file)
    elif kind == "torch code":
        torch.save({"step": 2, "learner": Runs(ran)}, file)
    elif kind == "numpy":
        np.savez(file, a=np.zeros(3))
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("../data.pkl", b"x")
    elif kind == "text":
        file.write(b"update,loss\n1,2\n")
    elif kind == "legacy":
        torch.save({"step": 2}, file, _use_new_zipfile_serialization=False)
    else:
        value = {"tensor": torch.zeros(3), "list": [1], "number": 7, "dict": {"run": "other", "step": 2}}[kind]
        torch.save(value, file)
    path.write_bytes(file.getvalue())
    return f"foreign {kind}"
