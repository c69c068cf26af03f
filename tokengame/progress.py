"""Progress on the terminal: bars with an ETA, on stderr; stdout belongs to --json."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokengame.files import Description

console = Console(stderr=True)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def steps(description: str, total: int) -> Iterator[Callable[[str, float], None]]:
    """A progress bar over a few long steps.

    Yields:
        A function that is told the name of the step under way and the share of it that is done.
    """
    with _bar() as bar:
        task, names = bar.add_task(description, total=100 * total), dict[str, None]()

        def update(name: str, share: float) -> None:
            names[name] = None
            done = 100 * (len(names) - 1 + share)
            bar.update(task, completed=round(done), description=f"{description} {name}")

        yield update
        bar.update(task, completed=100 * total)


def progress(iterable: Iterable, description: Description, total: int) -> Iterable:
    """`iterable` behind a progress bar with count and ETA; where there is no terminal, a line at every tenth.

    A total of 0 is one that is not known.
    """
    shown = _in_bar if console.is_interactive or console.is_jupyter else _in_lines
    return shown(iterable, description if callable(description) else lambda: description, total)


def _in_bar(iterable: Iterable, description: Callable[[], str], total: int) -> Iterable:
    with _bar() as bar:
        task = bar.add_task(description(), total=total or None)
        for item in iterable:
            yield item
            bar.update(task, advance=1, description=description())


def _in_lines(iterable: Iterable, description: Callable[[], str], total: int) -> Iterable:
    start, tenths = time.perf_counter(), 0
    for number, item in enumerate(iterable, 1):
        yield item
        if not total and number & (number - 1) == 0:  # powers of two
            console.print(f"{description()}: {number}", highlight=False, markup=False, soft_wrap=True)
        elif total and 10 * number // total > tenths:
            tenths = 10 * number // total
            left = timedelta(seconds=round((time.perf_counter() - start) / number * max(0, total - number)))
            text = f"{description()}: {number} of {total}, {left} left"
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def named(name: str, iterable: Iterable, description: Description, total: int) -> Iterable:
    """`progress` of one of several similar tasks."""
    say = description if callable(description) else lambda: description
    return progress(iterable, lambda: f"{name}: {say()}", total)
