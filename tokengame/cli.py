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
from typing import Annotated, Any, Union

import tyro
from rich.markup import escape

from tokengame.commands import Calibrate, Eval, Train
from tokengame.config import TrainConfig, require
from tokengame.console import console
from tokengame.contests import Ablate, Bench, Compare
from tokengame.errors import TokenGameError
from tokengame.paper import Finetune, Sweep
from tokengame.pictures import Show
from tokengame.quickstart import Quickstart, short

EXAMPLES: dict[type, tuple[str, str]] = {
    Quickstart: ("quickstart", "tokengame quickstart\ntokengame quickstart --updates 300 --json > result.json"),
    Train: (
        "train",
        "tokengame train --backbone vit_small_patch16_224 --images train/ --output policy.safetensors\n"
        "tokengame train --backbone vit_tiny_patch16_224 --weights vit.safetensors --images images.tar "
        "--class-map classes.txt --gmacs-ratio 0.68\n"
        "tokengame train --backbone vit_small_patch16_224 --images train/ --target-drop 0.5\n"
        "tokengame train --preset rl4evit --backbone deit_base_patch16_224 --images train/",
    ),
    Eval: (
        "eval",
        "tokengame eval --backbone vit_small_patch16_224 --images val/ --policy policy.safetensors\n"
        "tokengame eval --backbone vit_tiny_patch16_224 --images val.tar --policy calibrated.safetensors --max-drop 1",
    ),
    Calibrate: (
        "calibrate",
        "tokengame calibrate --backbone vit_small_patch16_224 --images val/ --policy policy.safetensors "
        "--output calibrated.safetensors\n"
        "tokengame calibrate --backbone vit_tiny_patch16_224 --images val.tar --class-map classes.txt "
        "--policy vit_tiny_patch16_224 --output mine.safetensors",
    ),
    Show: (
        "show",
        "tokengame show --backbone vit_small_patch16_224 --images val/ --policy policy.safetensors --count 6\n"
        "tokengame show --backbone vit_small_patch16_224 --images val/ --policy policy.safetensors --pick extremes "
        "--dynamicvit-updates 200 --output gallery.html",
    ),
    Sweep: (
        "sweep",
        "tokengame sweep --backbone fashion --images fashion\n"
        "tokengame sweep --backbone deit_small_patch16_224 --images train/ --ratios 40 80 120 160 --updates 1000",
    ),
    Finetune: (
        "finetune",
        "tokengame finetune --backbone vit_small_patch16_224 --images train/ --policy policy.safetensors "
        "--output tuned --gmacs-ratio 0.55\n"
        "tokengame finetune --backbone fashion --images fashion-train --validate fashion-val "
        "--policy quickstart/policy.safetensors --gmacs-ratio 0.32 --opt muon --lr 3e-4\n"
        "tokengame finetune --backbone deit_base_patch16_224 --images train/ --policy policy.safetensors "
        "--labels 1 --distill 0 --aa rand-m9-mstd0.5-inc1 --ema 0.999",
    ),
    Bench: (
        "bench",
        "tokengame bench --backbone deit_small_patch16_224 --keep 0.7 0.49 0.34 --batch-sizes 1 32\n"
        "tokengame bench --backbone vit_tiny_patch16_224 --transition merge --dtypes bfloat16 --tome --json",
    ),
    Ablate: (
        "ablate",
        "tokengame ablate --backbone vit_tiny_patch16_224 --images train/ --updates 100 --seeds 3 --output ablations",
    ),
    Compare: (
        "compare",
        "tokengame compare --backbone vit_small_patch16_224 --images val/ --policies policy.safetensors\n"
        "tokengame compare --backbone vit_tiny_patch16_224 --images images.tar --class-map classes.txt --holdout 0.3 "
        "--policies mine.safetensors rl4evit.safetensors --dynamicvit-updates 200 --dtype bfloat16",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when it did its work, 2 after a sentence on bad input, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with warnings.catch_warnings(), terminable():
            warnings.showwarning = _warn
            command = parse(arguments)
            console.quiet = not command.ranks.main
            require(command.shared or command.ranks.size == 1, "this command runs in one process, without a launcher")
            result = command.run()
    except TokenGameError as error:
        console.quiet = False  # whichever process it is
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; what was finished is on disk")
        return 130
    command.ranks.leave()
    if command.json and command.ranks.main:
        print(json.dumps(finite(result), allow_nan=False))
    return 0


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM interrupts as Ctrl-C does: what is finished is saved."""
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
    except BrokenPipeError:  # the reader has seen enough: `tokengame --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def parse(arguments: list[str]) -> Any:
    """The command that `arguments` ask for; exits with 2 and a sentence on unknown ones."""
    defaults: dict[type, Any] = {}
    named = [value for flag, value in zip(arguments, [*arguments[1:], ""], strict=True) if flag == "--preset"]
    named += [flag.removeprefix("--preset=") for flag in arguments if flag.startswith("--preset=")]
    if named:
        preset = TrainConfig.from_preset(named[-1])
        defaults = {
            Train: Train(backbone=tyro.MISSING, images=tyro.MISSING, config=preset),
            Quickstart: Quickstart(config=short(named[-1])),
            Ablate: Ablate(backbone=tyro.MISSING, images=tyro.MISSING, config=preset),
            Sweep: Sweep(backbone=tyro.MISSING, images=tyro.MISSING, config=preset),
        }
    subcommands = tuple(
        Annotated[
            command,
            tyro.conf.subcommand(
                name,
                description=f"{command.__doc__}\n\nExamples:\n\n" + examples.replace("\n", "\n\n"),
                **({"default": defaults[command]} if command in defaults else {}),
            ),
        ]
        for command, (name, examples) in EXAMPLES.items()
    )
    choice: Any = Union[subcommands]  # noqa: UP007 - the members are made at run time
    return tyro.cli(
        choice,
        prog="tokengame",
        description="Make a trained Vision Transformer faster: its tokens play a game for who may stay.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    console.print(f"[yellow]warning:[/yellow] {escape(str(message))}", highlight=False, soft_wrap=True)
