"""The command line: one dataclass a command, its flags and help generated from the fields."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from itertools import pairwise, takewhile
from typing import Any, NoReturn

import tyro
from rich.markup import escape

import tokengame
from tokengame.cli.ablate import Ablate
from tokengame.cli.bench import Bench
from tokengame.cli.calibrate import Calibrate
from tokengame.cli.common import Common
from tokengame.cli.compare import Compare
from tokengame.cli.demo import Demo
from tokengame.cli.doctor import Doctor
from tokengame.cli.eval import Eval
from tokengame.cli.export import Export
from tokengame.cli.finetune import Finetune
from tokengame.cli.help import help_of, overview
from tokengame.cli.quickstart import Quickstart
from tokengame.cli.show import Show
from tokengame.cli.sweep import Sweep
from tokengame.cli.train import Train
from tokengame.config import require
from tokengame.errors import Interrupted, TokenGameError
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
    Export,
    Demo,
    Doctor,
)
PLAIN = {
    r"invalid literal for int\(\) with base 10: (\S+)": r"\1 is not a whole number",
    r"could not convert string to float: (\S+)": r"\1 is not a number",
}
"""Python's words, and what they mean"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when it did its work, 1 where its document could not be written, 2 after a sentence on bad input, 130 after
        Ctrl-C, 143 after SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with warnings.catch_warnings(), terminable():
            warnings.showwarning = _warn
            command = parse(arguments)
            require(not command.json or sys.stdout is not None, "--json prints on stdout, which is closed")
            console.quiet = not command.processes.main
            require(
                command.distributed or command.processes.size == 1,
                "this command runs in one process, without a launcher",
            )
            command.require_device()
            result = command.run()
    except TokenGameError as error:
        console.quiet = False  # in any process
        _say("[red]error:[/red]", error)
        return 2
    except KeyboardInterrupt as stopped:
        _say("", str(stopped) or "interrupted")
        return 128 + (stopped.number if isinstance(stopped, Interrupted) else signal.SIGINT)
    command.processes.shutdown()
    if command.json and command.processes.main:
        return write_out(json.dumps(finite(result), allow_nan=False))
    return 0


@contextmanager
def terminable() -> Iterator[None]:
    """In this context SIGTERM interrupts as Ctrl-C does: what is finished is saved."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def stop(number: int, _frame: Any) -> NoReturn:
        raise Interrupted("terminated", number)

    before = signal.signal(signal.SIGTERM, stop)
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


def write_out(text: str) -> int:
    """Print on stdout; 0, or 1 where that fails: with a sentence, unless a reader has closed the pipe."""
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno != errno.EPIPE:
            _say("[red]error:[/red]", f"cannot write to stdout ({error.strerror})")
        # what is left in the buffer must not fail again when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def entry() -> None:
    """The console script."""
    for number in range(3):  # a stream that is closed: no file that is opened later may take its place
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the end of the process
    sys.exit(main())


def parse(arguments: list[str]) -> Any:
    """The command that `arguments` name, its numbers in range; exits after `--help` and `--version`.

    Raises:
        TokenGameError: no such command, flag or value.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name == "--version":
        require(not rest, f"--version takes nothing, but {' '.join(rest)} follows")
        sys.exit(write_out(f"tokengame {tokengame.__version__}"))
    if not arguments or name in ("-h", "--help", "--help-all"):
        sys.exit(write_out(overview(COMMANDS)) or (0 if arguments else 2))
    known = {command.name: command for command in COMMANDS}
    if name not in known:
        close = get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise TokenGameError(f"no command {name!r} ({hint}); see tokengame --help")
    command = known[name]
    default = _preset(command, rest)
    if not {"-h", "--help", "--help-all"}.isdisjoint(rest):
        sys.exit(write_out(help_of(command, default, everything="--help-all" in rest)))
    parsed = _parsed(command, default, rest)
    parsed.check()
    return parsed


def _preset(command: type[Common], arguments: list[str]) -> Common | None:
    """The command with the defaults of the preset that is named last."""
    typed = f"--{command.preset_flag}"
    named = [value for flag, value in pairwise(arguments) if flag == typed]
    named += [flag.removeprefix(f"{typed}=") for flag in arguments if flag.startswith(f"{typed}=")]
    return command.with_preset(named[-1]) if named and command.takes_preset else None


def _parsed(command: type[Common], default: Common | None, arguments: list[str]) -> Any:
    prog, shown = f"tokengame {command.name}", io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with redirect_stderr(shown):
            return tyro.cli(command, prog=prog, args=arguments, config=(tyro.conf.FlagCreatePairsOff,), **given)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise TokenGameError(f"{_sentence(shown.getvalue())}{_unquoted(arguments)}; see {prog} --help")


def _unquoted(arguments: list[str]) -> str:
    """What to do about a pattern of images that the shell has made into many words."""
    after = arguments[arguments.index("--images") + 1 :] if "--images" in arguments else []
    words = list(takewhile(lambda word: not word.startswith("-"), after))
    return "; --images takes one place: quote a pattern, --images 'photos/*.jpg'" if len(words) > 1 else ""


def _sentence(box: str) -> str:
    """What tyro draws as a box, in a line: without title, frame, colours and each flag's help (indented by 8)."""
    rows = re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]
    text = " ".join(row.strip("│| ") for row in rows if not row[1:].startswith(" " * 9))
    parts = [part.strip(" .╰╯+") for part in re.split(r"[─-]{8,}", text)]  # rules are drawn between them
    sentence = "; ".join(part for part in parts if part and not part.startswith(("Argument help", "For full help")))
    for said, plain in PLAIN.items():
        sentence = re.sub(said, plain, sentence)
    return sentence


def _say(label: str, sentence: object) -> None:
    console.print(f"{label} {escape(str(sentence))}".strip(), highlight=False, soft_wrap=True)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    _say("[yellow]warning:[/yellow]", message)
