"""The command line: one dataclass a command, its flags and help generated from the fields."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Annotated, Any, Union

import tyro
from rich.markup import escape

from tokengame.cli.ablate import Ablate
from tokengame.cli.bench import Bench
from tokengame.cli.calibrate import Calibrate
from tokengame.cli.common import Common
from tokengame.cli.compare import Compare
from tokengame.cli.eval import Eval
from tokengame.cli.finetune import Finetune
from tokengame.cli.quickstart import Quickstart
from tokengame.cli.show import Show
from tokengame.cli.sweep import Sweep
from tokengame.cli.train import Train
from tokengame.config import require
from tokengame.errors import TokenGameError
from tokengame.report.console import console

COMMANDS: tuple[type[Common], ...] = (
    Quickstart,
    Train,
    Eval,
    Calibrate,
    Show,
    Sweep,
    Finetune,
    Bench,
    Ablate,
    Compare,
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when it did its work, 2 after a sentence on bad input, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with warnings.catch_warnings(), terminable():
            warnings.showwarning = _warn
            command = parse(arguments)
            console.quiet = not command.processes.main
            require(
                command.distributed or command.processes.size == 1,
                "this command runs in one process, without a launcher",
            )
            result = command.run()
    except TokenGameError as error:
        console.quiet = False  # in any process
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; what was finished is on disk")
        return 130
    command.processes.shutdown()
    if command.json and command.processes.main:
        print(json.dumps(finite(result), allow_nan=False))
    return 0


@contextmanager
def terminable() -> Iterator[None]:
    """In this context SIGTERM interrupts as Ctrl-C does: what is finished is saved."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def finite(value: Any) -> Any:
    """`value` with every number that JSON cannot hold replaced by null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def entry() -> None:
    """The console script."""
    try:
        try:
            code = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe: `tokengame --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def parse(arguments: list[str]) -> Any:
    """The command that `arguments` name; exits with 2 and a sentence on unknown ones."""
    named = [value for flag, value in pairwise(arguments) if flag == "--preset"]
    named += [flag.removeprefix("--preset=") for flag in arguments if flag.startswith("--preset=")]
    defaults = {command: command.with_preset(named[-1]) for command in COMMANDS if named and command.takes_preset}
    subcommands = tuple(
        Annotated[
            command,
            tyro.conf.subcommand(
                command.name,
                description=f"{command.__doc__}\n\nExamples:\n\n" + command.examples.replace("\n", "\n\n"),
                **({"default": defaults[command]} if command in defaults else {}),
            ),
        ]
        for command in COMMANDS
    )
    choice: Any = Union[subcommands]  # noqa: UP007 - the members are made at run time
    return tyro.cli(
        choice,
        prog="tokengame",
        description="Make a trained Vision Transformer faster by removing tokens; which ones, a small policy learns.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    console.print(f"[yellow]warning:[/yellow] {escape(str(message))}", highlight=False, soft_wrap=True)
