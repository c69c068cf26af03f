"""Pictures: overlays of kept tokens, calibration and training curves. Data in, image out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

GAP = 6
PAGE = 1060
"""pixels that a picture may be wide before strips stand under one another"""
GONE = (196, 214, 240)


def denormalise(images: Tensor, preprocessing: dict[str, Any]) -> np.ndarray:
    """uint8 [B, height, width, 3] as the model saw it, from normalised [B, 3 or 1, height, width]."""
    mean, std = (torch.tensor(preprocessing[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
    pixels = (images.float().cpu() * std + mean).clamp(0, 1) * 255
    return pixels.round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def overlay(pixels: np.ndarray, alive: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """`pixels` [height, width, 3] with every patch whose token is gone faded to a light blue."""
    height, width = pixels.shape[:2]
    mask = np.kron(alive.reshape(grid), np.ones((height // grid[0], width // grid[1]), bool))
    full = np.zeros((height, width), bool)
    full[: mask.shape[0], : mask.shape[1]] = mask
    faded = (0.2 * pixels + 0.8 * np.array(GONE)).astype(np.uint8)
    return np.where(full[..., None], pixels, faded)


def strip(
    pixels: np.ndarray, alive: np.ndarray, grid: tuple[int, int], captions: list[str], side: int = 224
) -> Image.Image:
    """One image's row: input, then what is left after each stage.

    Args:
        pixels: uint8 [height, width, 3].
        alive: bool [T, N].
        grid: rows and columns of patches.
        captions: T + 1 short texts below the panels.
        side: height of a panel in pixels.
    """
    panels = [pixels, *(overlay(pixels, stage, grid) for stage in alive)]
    text = max(10, min(13, side // 8), side // 13)
    scale = side / pixels.shape[0]
    width = round(pixels.shape[1] * scale)
    canvas = Image.new("RGB", (len(panels) * (width + GAP) - GAP, side + text + 8), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        left = number * (width + GAP)
        resample = Image.Resampling.NEAREST if scale >= 1.5 else Image.Resampling.LANCZOS
        canvas.paste(Image.fromarray(panel).resize((width, side), resample), (left, 0))
        draw.text((left + 2, side + 2), caption, fill="black", font_size=text)
    return canvas


def stack(strips: list[Image.Image]) -> Image.Image:
    """Strips on one page, as many side by side as fit."""
    width, height = max(s.width for s in strips) + 3 * GAP, max(s.height for s in strips) + GAP
    columns = max(1, min(len(strips), PAGE // width))
    canvas = Image.new("RGB", (columns * width - 3 * GAP, -(-len(strips) // columns) * height - GAP), "white")
    for number, image in enumerate(strips):
        canvas.paste(image, (number % columns * width, number // columns * height))
    return canvas


def png(image: Image.Image) -> bytes:
    """Compressed PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def calibration_figure(rows: list[dict[str, Any]], point: dict[str, Any]) -> bytes:
    """SVG: agreement with the native model over compute, the dial's curve and the measured operating point."""
    figure, axes = _figure()
    rows = [row for row in sorted(rows, key=lambda r: r["gmacs_ratio"]) if row["agreement"] > 0.5]
    axes.plot([r["gmacs_ratio"] for r in rows], [r["agreement"] for r in rows], "o-", ms=4, label="dial (calibration)")
    axes.plot([point["gmacs_ratio"]], [point["agreement"]], "*", ms=14, label="this run, fresh images")
    axes.set(xlabel="compute, pruned / native (policy included)", ylabel="same top-1 as the native model")
    axes.legend(frameon=False)
    return _svg(figure)


def training_figure(metrics: list[dict[str, float]]) -> bytes:
    """SVG: KL and compute of the sampled games over updates."""
    figure, axes = _figure()
    steps = [m["update"] for m in metrics]
    right = axes.twinx()
    compared = [m for m in metrics if "game/kl" in m]  # not all are, where `native_every` is above 1
    axes.plot([m["update"] for m in compared], _smooth([m["game/kl"] for m in compared]), color="C3")
    right.plot(steps, _smooth([m["game/gmacs_ratio"] for m in metrics]), color="C0")
    axes.set_xlabel("update")
    axes.set_ylabel("KL(native || pruned), nats", color="C3")
    right.set_ylabel("compute, pruned / native", color="C0")
    right.spines["right"].set_visible(True)
    return _svg(figure)


def _left(line: dict[str, float]) -> float:
    """Share of the tokens that the last stage leaves."""
    stages = [int(name.removeprefix("game/kept_")) for name in line if name.startswith("game/kept_")]
    return line[f"game/kept_{max(stages)}"]


CURVES = {
    "share of the tokens left at the end": _left,
    "compute, pruned / native": lambda line: line["game/gmacs_ratio"],
    "share of right predictions": lambda line: line["game/top1"],
    "KL(native || pruned), nats": lambda line: line["game/kl"],
}
"""panels of `curves_figure`; a line of metrics without the figure is left out"""


def curves_figure(runs: dict[str, tuple[int, list[dict[str, float]]]], points: int = 100) -> bytes:
    """PNG: what sampled games keep, cost and predict while policies are learned, over games played.

    Args:
        runs: name -> games of an update, and the metrics of a run (`RunFolder.metrics`).
        points: of a curve, each the mean of as many updates.
    """
    figure, panels = _panels(len(CURVES))
    for number, (name, (games, lines)) in enumerate(runs.items()):
        for axes, reading in zip(panels, CURVES.values(), strict=True):
            found = []
            for line in lines:
                with suppress(KeyError):
                    found.append((games * line["update"], reading(line)))
            if found:
                parts = np.array_split(np.array(found), min(points, len(found)))
                axes.plot(*np.array([part.mean(0) for part in parts]).T, ".-", ms=3, color=f"C{number}", label=name)
    for axes, title in zip(panels, CURVES, strict=True):
        axes.set(xlabel="games", ylabel=title)
    panels[0].legend(frameon=False)
    return _small_png(figure)


def _panels(count: int):
    """A figure of `count` panels, two in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3 * -(-count // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(-(-count // 2), 2).ravel()[:count]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, panels


def _smooth(values: list[float], width: int = 9) -> np.ndarray:
    padded = np.pad(values, (width // 2, width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, "valid")


def _figure():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _svg(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _small_png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return png(Image.open(buffer).quantize(64))


UPWARD = {
    "agreement": "same top-1 as the native model",
    "kl": "KL(native || pruned), nats",
    "drop_pp": "points of top-1 lost",
    "same_neighbour": "same nearest image as the native model",
    "distance": "mean 1 - cosine",
}
"""what methods are drawn by, of what was measured"""
LOGARITHMIC = ("kl", "distance")


def frontier_figure(rows: list[dict[str, Any]], policies: Sequence[str] = ()) -> bytes:
    """PNG: what is lost (`UPWARD`) over compute and, where that was timed, over measured speed; a line a method.

    Methods of a paper are dashed, those whose names begin with one of `policies` thick.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = {"gmacs_ratio": "compute, pruned / native"}
    if any(row.get("speedup") for row in rows):
        across["speedup"] = "images a second, pruned / native, measured"
    upward = {name: label for name, label in UPWARD.items() if name in rows[0]}
    figure = Figure(figsize=(14, 1 + 3.6 * len(across)), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(across), len(upward), squeeze=False)
    for axes, (x, y) in zip(panels.flat, product(across, upward), strict=True):
        _frontier(axes, rows, x, y, policies)
        axes.set(xlabel=across[x], ylabel=upward[y])
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return _small_png(figure)


def _frontier(axes: Any, rows: list[dict[str, Any]], x: str, y: str, policies: Sequence[str]) -> None:
    """One panel of `frontier_figure`; left empty where nothing was measured."""
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = [row for row in rows if row["method"] == method]
        points = sorted((row[x], row[y]) for row in own if row.get(x) and row[y] is not None)
        points = [(a, max(b, 1e-5) if y in LOGARITHMIC else b) for a, b in points]
        thick = method.startswith(tuple(policies))
        style = {"ls": "--" if own[0]["published"] else "-", "marker": "os^Dv"[number // 10], "ms": 4}
        if points:
            axes.plot(
                *zip(*points, strict=True), label=method, color=f"C{number % 10}", lw=3 if thick else 1.2, **style
            )
    axes.set_visible(bool(axes.lines))
    axes.set_yscale("log" if y in LOGARITHMIC else "linear")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def sweep_figure(rows: list[dict[str, Any]]) -> bytes:
    """PNG: tokens kept, predicted and found, and compute over alpha / beta; tokens kept stage by stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    kept, compute, stages = figure.subplots(1, 3)
    ratios = [row["alpha_over_beta"] for row in rows]
    kept.plot(ratios, [row["keep_predicted"] for row in rows], "--", color="0.4", label="equilibrium, n = αp/β")
    kept.plot(ratios, [row["keep_sampled"] for row in rows], "s-", ms=4, label="sampled games")
    kept.plot(ratios, [row["keep"] for row in rows], "o-", ms=4, label="deterministic")
    kept.set(xlabel="α / β", ylabel="tokens alive at the end", ylim=(0, 1.05))
    compute.plot(ratios, [row["gmacs_ratio"] for row in rows], "o-", ms=4, label="compute, pruned / native")
    if rows[0]["top1_pruned"] is not None:
        compute.plot(ratios, [row["top1_pruned"] for row in rows], "^-", ms=4, label="top-1")
    compute.set(xlabel="α / β", ylim=(0, 1.1))
    for row in rows:
        shares = [1.0, *(n / row["tokens"] for n in row["tokens_kept"])]
        stages.plot(range(len(shares)), shares, "o-", ms=4, label=f"{row['alpha_over_beta']:g}")
    stages.set(xlabel="stage", ylabel="tokens alive after it", ylim=(0, 1.05), xticks=range(len(shares)))
    for axes in (kept, compute, stages):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, title="α / β" if axes is stages else None)
    return _small_png(figure)
