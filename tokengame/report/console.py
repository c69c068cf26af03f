"""The terminal: tables on stderr; progress is of `tokengame.progress`."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from tokengame.progress import console, named, progress, steps

__all__ = ["console", "named", "progress", "show_rows", "show_table", "steps"]


def show_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Two columns, label and value."""
    grid = Table(title=title, show_header=False, title_justify="left")
    grid.add_column()
    grid.add_column(justify="right")
    for label, value in rows:
        grid.add_row(label, value)
    console.print(grid)


def show_rows(rows: list[dict[str, Any]], headings: dict[str, str] | None = None) -> None:
    """One line a row, numbers to three digits; all columns of the first row unless some are given headings."""
    headings = {key: key for key in rows[0]} if headings is None else headings
    grid = Table(*headings.values(), box=SIMPLE, padding=(0, 1, 0, 0))
    for row in rows:
        grid.add_row(*(f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in headings))
    console.print(grid)
