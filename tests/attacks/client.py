"""Starts the process that runs cases, with the library of faults where it can be compiled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from attacks.outcome import Outcome

HERE = Path(__file__).parent


def compiled_faults(folder: Path) -> Path | None:
    """The library of faults.c, compiled into `folder`; None where there is no C compiler or this is not Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "faults.c", "-ldl"], check=True)
    return library


class Attacker(AbstractContextManager):
    """A process in which cases run.

    Args:
        folder: for what is attacked, made there once.
    """

    total = 0
    """cases of the attack under way"""
    missing: str | None = None
    """why the last attack could not run"""

    def __init__(self, folder: Path):
        library = compiled_faults(folder)
        paths = [str(HERE.parent), str(HERE.parents[1])]
        inherited = os.environ.get("PYTHONPATH")
        own = {"PYTHONPATH": os.pathsep.join([*paths, *([inherited] if inherited else [])]), "OMP_NUM_THREADS": "1"}
        if library is not None:
            own["LD_PRELOAD"] = str(library)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "attacks.serve", str(folder.resolve())], env=os.environ | own, cwd=HERE, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, attack: str, seed: int = 0, numbers: Iterable[int] | str | None = None) -> Iterator[Outcome]:
        """Outcomes of an attack as they come; afterwards `missing` says why it cannot run here, or None.

        Args:
            attack: its name.
            seed: of its cases.
            numbers: of the cases; "all", or None for the short form.
        """
        self._ask({"attack": attack, "seed": seed, "numbers": numbers if numbers in (None, "all") else list(numbers)})
        while "end" not in (found := self._answer()):
            if "total" in found:
                self.total = found["total"]
            else:
                yield Outcome(**found)
        self.missing = found["end"]

    def _ask(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that runs attacks ended with {self.process.wait()}")
        return json.loads(line)

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
