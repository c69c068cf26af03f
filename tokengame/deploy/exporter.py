"""Exporting a pruned model: write the graph, compare it with PyTorch, time it beside the native model."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tokengame
from tokengame.deploy.fixed import with_fixed_counts
from tokengame.deploy.formats import FORMATS, Format
from tokengame.deploy.graph import FixedGraph, PrunedGraph, check_exportable
from tokengame.deploy.parity import Likeness, Parity, Run, compare, compare_int8
from tokengame.errors import TokenGameError
from tokengame.files import Note, Progress, require_writable, silent, unsaid
from tokengame.measure.in_turn import REST, interleave
from tokengame.measure.kinds import kind_of
from tokengame.measure.rivals import RIVALS, Native
from tokengame.modules import in_int8
from tokengame.policies import Policy
from tokengame.runtime import PrunedViT

BATCHES = (1, 8)
"""images that graphs whose batch size is an input are compared and timed with"""
ENGINES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
"""formats that are timed, by the rival that runs the native model in the same engine"""


def export(
    fast: PrunedViT, output: str | Path, images: Tensor, *, format: str | None = None, batch_size: int | None = None,
    fixed_counts: bool = False, int8: bool = False, seconds: float = 0.0, progress: Progress = silent,
    note: Note = unsaid,
) -> dict[str, Any]:  # fmt: skip
    """Write a pruned model as one graph, and check on images that it decides and predicts as PyTorch does.

    The graph takes `images` [B, channels, height, width] and `dial` [B], and returns the fields of
    `tokengame.deploy.GraphOutput`. With one image tokens are really gone; with more, every image keeps its own number,
    and the batch is as long as the longest of them.

    Args:
        fast: the pruned model; it is not changed.
        output: the file to write; its suffix is the format: .onnx, .xml (OpenVINO) or .pt2 (torch.export).
        images: [B, channels, height, width] of the size that the graph is for, to check it on.
        format: "onnx", "openvino", "torch" or "aotinductor" instead; the last is for fixed counts.
        batch_size: images of a batch, which engines run faster when they know it; None: any.
        fixed_counts: whether every image keeps the same number of tokens after each decision, the mean of the images at
            the model's dial: then all sizes in the graph are known, and `dial` is no input of it.
        int8: whether linear layers are in int8: .onnx by ONNX Runtime's dynamic quantisation, .xml by NNCF with ranges
            from the first half of the images; the other half is then compared. Tokens and outputs may differ from
            PyTorch's: how like they are is returned.
        seconds: to time it beside the native model in the same engine, for each batch size; 0: not at all.
        progress: shows the batches.
        note: is told what is done now.

    Returns:
        file, format, fixed_counts, int8, bytes, batch_size, dial, images, max_abs_difference, tokens_kept, and
        `timing`: a list of rows batch_size, milliseconds_native, milliseconds_pruned, speedup, verdict ("faster" or
        "slower"). In int8 the fields of `tokengame.deploy.parity.Likeness` instead of max_abs_difference, and native is
        the engine's int8. These fields too where the model itself was quantised before.

    Raises:
        TokenGameError: the model or policy cannot be exported, a package is missing, or the check fails: then there is
            no file.
    """
    path, kind = Path(output), format_of(output, format)
    _check(path, images)
    check_exportable(fast)
    if int8 and kind.name not in ENGINES:
        kind.quantise(path, [])  # says why not, before the work
    images, own = images.float().cpu(), _in_float32(fast)
    if fixed_counts:
        own = with_fixed_counts(own, images, progress)
    graph = (FixedGraph if fixed_counts else PrunedGraph)(own, images.shape[2:])  # type: ignore[arg-type]
    sizes = (batch_size,) if batch_size else BATCHES
    with TemporaryDirectory(
        prefix=".export", dir=path.parent
    ) as folder:  # an earlier file stays until this one is right
        draft = Path(folder) / path.name
        note(f"exporting to {kind.name}")
        kind.write(graph.program(images, batch_size), draft, _about(own, images) | {"int8": int8})
        if int8:
            note("quantising")
            images = _quantised(kind, draft, images, batch_size or 1, None if fixed_counts else own.dial)
        run = kind.open(draft)
        loosely = int8 or in_int8(own.model)  # rounding flips whole steps of int8
        checks = [_compared(loosely, run, own, _whole(images, size), size, progress) for size in sizes]
        for file in _files(draft):
            file.replace(path.with_name(file.name))
    note("timing")
    timing = [_timed(kind, run, own, images, size, seconds, int8) for size in sizes] if seconds else []
    worst = max(
        checks, key=lambda check: check.max_abs_difference if isinstance(check, Parity) else -check.like_float32
    )
    return {
        "file": str(path), "format": kind.name, "fixed_counts": fixed_counts, "int8": int8,
        "bytes": sum(file.stat().st_size for file in _files(path)), "batch_size": batch_size,
        "dial": fast.dial, **asdict(worst), "timing": timing,
    }  # fmt: skip


def format_of(output: str | Path, name: str | None = None) -> Format:
    """The format of a file, by its name or its suffix.

    Raises:
        TokenGameError: there is none, or the two do not agree.
    """
    suffix, names = Path(output).suffix, [kind.name for kind in FORMATS]
    for kind in FORMATS:
        if kind.name == name or (name is None and kind.suffix == suffix):
            if kind.suffix != suffix:
                raise TokenGameError(f"a file of format {kind.name} ends in {kind.suffix}, not {suffix!r}: {output}")
            return kind
    if name is None:
        raise TokenGameError(f"{output} names no format: end it in .onnx, .xml or .pt2, or give the format")
    raise TokenGameError(f"there is no format {name!r}; formats are {', '.join(names)}")


def _quantised(kind: Format, draft: Path, images: Tensor, size: int, dial: float | None) -> Tensor:
    """Quantise a file; its ranges come from half of the images, and the others are left to compare."""
    half = max(1, len(images) // 2)
    batches = _whole(images[:half], size).split(size)
    dials = {} if dial is None else {"dial": np.full(size, dial, np.float32)}
    kind.quantise(draft, [{"images": batch.numpy()} | dials for batch in batches])
    return images[half:] if len(images) > 1 else images


def _compared(
    loosely: bool, run: Run, own: PrunedViT, images: Tensor, size: int, progress: Progress
) -> Parity | Likeness:
    return compare_int8(run, own, images, size, progress) if loosely else compare(run, own, images, size, progress)


def _check(path: Path, images: Tensor) -> None:
    require_writable(path)
    if images.ndim != 4 or not len(images):
        raise TokenGameError(
            f"images to check the graph on must be [B, channels, height, width], not {list(images.shape)}"
        )


def _files(path: Path) -> list[Path]:
    """A file and what lies beside it: weights of OpenVINO, or of ONNX where they are larger than a file can be."""
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else [path.with_name(path.name + ".data")]
    return [file for file in (path, *beside) if file.exists()]


def _in_float32(fast: PrunedViT) -> PrunedViT:
    """A pruned model of its own in float32 on the CPU."""
    model = copy.deepcopy(fast.model).float().cpu().eval()
    actor = copy.deepcopy(fast.actor).float().cpu().eval()
    return PrunedViT(model, Policy(actor, fast.card), fast.dial)


def _whole(images: Tensor, size: int) -> Tensor:
    """As many images as fill batches of `size`; the first are repeated where there are fewer."""
    if len(images) < size:
        images = images.repeat(-(-size // len(images)), 1, 1, 1)
    return images[: len(images) // size * size]


def _about(fast: PrunedViT, images: Tensor) -> dict[str, Any]:
    backbone = fast.game.backbone
    about = {"tokengame": tokengame.__version__, "torch": torch.__version__, "card": fast.card, "dial": fast.dial}
    return about | {"preprocessing": backbone.preprocessing(), "size": list(images.shape[2:])}


def _timed(
    kind: Format, run: Run, fast: PrunedViT, images: Tensor, size: int, seconds: float, int8: bool
) -> dict[str, Any]:
    """The graph and the native model in the same engine and number format, in turn, on the same batches."""
    if kind.name not in ENGINES:
        raise TokenGameError(f"only {' and '.join(ENGINES)} are timed, not {kind.name}: leave out the seconds")
    batches = [batch.numpy() for batch in _whole(images, size).split(size)]
    dial = torch.full((size,), float(fast.dial)).numpy()
    (rival,) = (rival for rival in RIVALS if rival.name == ENGINES[kind.name] + " int8" * int8)
    with TemporaryDirectory(prefix="tokengame", ignore_cleanup_errors=True) as folder:
        native = rival.build(
            Native(fast.model, torch.from_numpy(batches[0]), kind_of(fast.game.backbone), Path(folder))
        )
        tensors = [torch.from_numpy(batch) for batch in batches]
        calls = {
            "native": lambda: [native.run(batch) for batch in tensors],
            "pruned": lambda: [run(batch, dial) for batch in batches],
        }
        times = interleave(calls, torch.device("cpu"), seconds, rest=REST)
    speedup = float((torch.tensor(times["native"]) / torch.tensor(times["pruned"])).median())
    of_batch = {name: 1e3 * float(torch.tensor(taken).median()) / len(batches) for name, taken in times.items()}
    return {
        "batch_size": size, "milliseconds_native": of_batch["native"], "milliseconds_pruned": of_batch["pruned"],
        "speedup": speedup, "verdict": "faster" if speedup > 1 else "slower",
    }  # fmt: skip
