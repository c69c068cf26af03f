"""The HTML report of a run: one file, pictures inside."""

from __future__ import annotations

import base64
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, select_autoescape

ROWS = [
    ("images", "fresh images", "{:,.0f}"),
    ("top1_native", "top-1, native", "{:.1%}"),
    ("top1_pruned", "top-1, pruned", "{:.1%}"),
    ("drop_pp", "drop, points", "{:+.2f}"),
    ("agreement", "same prediction as native", "{:.1%}"),
    ("kl", "KL(native || pruned), nats", "{:.4f}"),
    ("gmacs_native", "GMACs an image, native", "{:.3f}"),
    ("gmacs_pruned", "GMACs an image, pruned, policy included", "{:.3f}"),
    ("gmacs_ratio", "compute, pruned / native", "{:.3f}"),
    ("gmacs_ratio_std", "its spread over images", "{:.3f}"),
    ("compute_vs_uncertainty", "rank correlation of compute with the native model's doubt", "{:+.2f}"),
    ("images_per_second_native", "images per second, native", "{:.0f}"),
    ("images_per_second_pruned", "images per second, pruned", "{:.0f}"),
    ("speedup", "measured speed-up", "{:.2f}x"),
    ("item_tokens_kept", "item tokens kept to the end", "{:.1%}"),
    ("background_tokens_kept", "background tokens kept to the end", "{:.1%}"),
]


def table(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of what `result` holds, for people."""
    rows = [(label, form.format(result[key])) for key, label, form in ROWS if result.get(key) is not None]
    if result.get("drop_pp_ci95"):
        low, high = result["drop_pp_ci95"]
        place = next(i for i, (label, _) in enumerate(rows) if label.startswith("drop"))
        rows.insert(place + 1, ("95 % interval of the drop", f"{low:+.2f} to {high:+.2f}"))
    if result.get("tokens_kept"):
        shares = [f"{kept / result['tokens']:.0%}" for kept in result["tokens_kept"]]
        rows.append(("tokens kept after each stage", " → ".join(shares)))
    return rows


def verdict(result: dict[str, Any]) -> str:
    """The result in one sentence, "slower" when slower."""
    speed = result["speedup"]
    pace = f"{speed:.2f} times as fast" if speed >= 1 else f"slower ({speed:.2f} times the native speed)"
    drop = result.get("drop_pp")
    price = f"{result['agreement']:.1%} of the predictions unchanged"
    if drop is not None:
        price = f"{abs(drop):.2f} points of top-1 {'lost' if drop >= 0 else 'gained'}, {price}"
    return f"{pace} with {result['gmacs_ratio']:.0%} of the compute, {price}"


def write_report(path: Path, title: str, result: dict[str, Any], strips: bytes, figures: dict[str, bytes]) -> None:
    """Write the page.

    Args:
        strips: PNG of overlays.
        figures: caption -> SVG.
    """
    source = (files("tokengame") / "assets" / "report.html").read_text()
    page = Environment(autoescape=select_autoescape(default_for_string=True)).from_string(source)
    path.write_text(
        page.render(
            title=title,
            verdict=verdict(result),
            rows=table(result),
            strips=base64.b64encode(strips).decode(),
            figures={caption: base64.b64encode(svg).decode() for caption, svg in figures.items()},
        )
    )
