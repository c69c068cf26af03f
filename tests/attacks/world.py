"""What attacks attack: a model too small to wait for, its images and policies, and the command line in a fork."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import resource
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import register_model

NAME = "attacked_vit"
UPDATES = 4
SMALL = ["--batch-size", "4", "--rollouts", "2", "--dtype", "float32"]
FAILED = 97
"""exit code of a fork that could not run the command at all"""


def register() -> None:
    """Make the small model one of timm's, so that --backbone finds it."""

    def attacked_vit(pretrained: bool = False, **settings):
        own = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}
        settings = {key: value for key, value in settings.items() if key in ("num_classes", "depth", "img_size")}
        model = timm.create_model("vit_tiny_patch16_224", pretrained=pretrained, **(own | settings))
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32), "crop_pct": 1.0}
        return model

    attacked_vit.__module__ = __name__
    if not timm.is_model(NAME):
        register_model(attacked_vit)


def native_model(weights: Path) -> torch.nn.Module:
    """The small model as the command line loads it."""
    model = timm.create_model(NAME, num_classes=5).eval()
    model.load_state_dict(load_file(weights))
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """exit status; minus the number of the signal that ended it"""
    stderr: str
    stdout: str
    mib: float
    """memory beyond that of the process it was forked from"""
    number: int
    """what was counted"""

    @property
    def sentence(self) -> str:
        """What was printed, without the frames and line breaks of boxes."""
        return " ".join(self.stderr.replace("│", " ").split())


@dataclass(frozen=True)
class World:
    """A folder with weights, images and policies, made once."""

    root: Path

    @property
    def weights(self) -> Path:
        return self.root / "weights.safetensors"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def policies(self) -> list[Path]:
        return sorted((self.root / "policies").glob("*.safetensors"))

    def policy(self, name: str) -> Path:
        return self.root / "policies" / f"{name}.safetensors"

    @property
    def flags(self) -> list[str]:
        """Of every command that runs the small model on its images."""
        own = ["--backbone", NAME, "--weights", str(self.weights), "--images", str(self.images)]
        return [*own, "--workers", "0", "--device", "cpu"]

    def train(self, output: Path, *more: str, updates: int = UPDATES) -> list[str]:
        """A short training run."""
        every = ["--updates", str(updates), "--checkpoint-every", "2"]
        return ["train", *self.flags, *SMALL, *every, "--output", str(output), *more]

    @cached_property
    def overwrite(self) -> list[str]:
        """The flag that permits a second run over an existing one, where there is one."""
        return ["--overwrite"] if "--overwrite" in command(["train", "--help"]).stdout else []

    def build(self) -> World:
        """Make what is missing."""
        register()
        if not (self.root / "ready").exists():
            self._images()
            torch.manual_seed(0)
            model = timm.create_model(NAME, num_classes=5)
            for parameter in model.parameters():
                parameter.data.add_(0.15 * torch.randn_like(parameter))
            save_file(model.state_dict(), self.weights)
            self._policies()
            (self.root / "ready").touch()
        return self

    def _images(self) -> None:
        for label, name in enumerate("abcde"):
            (self.images / name).mkdir(parents=True, exist_ok=True)
            for number in range(5):
                pixels = np.random.default_rng((label, number)).integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(self.images / name / f"{number}.png")

    def _policies(self) -> None:
        """Calibrated ones of both kinds of actor, one that falls back, one of the oldest format that is read."""
        (self.root / "policies").mkdir(exist_ok=True)
        first = self.policy("merge")
        succeed(command(self.train(first)))
        succeed(command(self.train(self.policy("drop"), "--preset", "rl4evit")))
        margin = ["--policy", str(first), "--output", str(self.policy("cascade")), "--cascade-margin", "0.15"]
        succeed(command(["calibrate", *self.flags, *margin]))
        self._old_format(self.policy("cascade"), self.policy("format4"))

    @staticmethod
    def _old_format(new: Path, old: Path) -> None:
        with safe_open(new, framework="pt") as file:
            card = file.metadata()["tokengame"]
        card = card.replace('"format": 5', '"format": 4').replace('"cascade_margin"', '"second_look"')
        save_file({"line": load_file(new)["weight"]}, old, metadata={"tokengame": card})


def succeed(ended: Ended) -> Ended:
    """Raise unless a command that must work did."""
    if ended.code:
        raise RuntimeError(f"exit {ended.code}: {ended.stderr[-2000:]}")
    return ended


def command(
    arguments: list[str], before: Callable[[], None] = lambda: None, after: Callable[[], int] = lambda: 0,
    stdout: str | None = None,
) -> Ended:  # fmt: skip
    """Run `python -m tokengame` with `arguments` in a fork of this process.

    Args:
        arguments: of the command line.
        before: called in the fork, e.g. to arm a fault.
        after: called there when the command has ended; counts something.
        stdout: a file to write to, in place of what is returned.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as number:
        child = os.fork()
        if not child:
            code = FAILED
            try:
                die_with_parent()
                target = os.open(stdout, os.O_WRONLY) if stdout else out.fileno()
                os.dup2(target, 1)
                os.dup2(err.fileno(), 2)
                code = _run(arguments, before)
                os.write(number.fileno(), str(after()).encode())
            finally:
                os._exit(code)
        started = resident_mib(child)
        _, status, usage = os.wait4(child, 0)
        texts = []
        for file in (err, out, number):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    memory = max(0.0, usage.ru_maxrss / 1024 - started)
    return Ended(os.waitstatus_to_exitcode(status), *texts[:2], memory, int(texts[2] or 0))


def _run(arguments: list[str], before: Callable[[], None]) -> int:
    """What the interpreter does with `-m tokengame`, as far as a fork can; the exit code."""
    sys.argv = ["tokengame", *arguments]
    try:
        before()
        runpy.run_module("tokengame", run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        sys.setprofile(None)
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.write(2, b"Traceback: a stream could not be flushed at exit\n")
            code = 120
    return code


def die_with_parent() -> None:
    """Let this fork be killed when the process ends that it was forked from."""
    set_signal_of_parent = 1
    ctypes.CDLL(None).prctl(set_signal_of_parent, int(signal.SIGKILL))


def resident_mib(process: int | str = "self") -> float:
    """Memory of a process now."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def sha(path: Path) -> str:
    """Of a file's bytes; empty where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


COUNT, ONCE, FULL, BEFORE, AFTER = range(5)
"""actions of faults.c"""


def faults() -> ctypes.CDLL | None:
    """The library of faults.c where this process was started with it."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "faults_arm") else None


def arm(folder: Path, at: int, action: int, signal_number: int = 0) -> None:
    """Let call number `at` that changes a file below `folder` fail, or send a signal."""
    library = faults()
    assert library is not None
    library.faults_arm(str(folder).encode(), ctypes.c_long(at), action, signal_number)


class Calls:
    """Counts the Python functions that are called from `start` on, and does something at call number `at`."""

    def __init__(self, at: int = 0, act: Callable[[], None] = lambda: None):
        self.at, self.act, self.seen = at, act, 0

    def start(self) -> None:
        sys.setprofile(self._count)

    def _count(self, _frame: object, event: str, _argument: object) -> None:
        self.seen += event == "call"
        if event == "call" and self.seen == self.at:
            sys.setprofile(None)
            self.act()
