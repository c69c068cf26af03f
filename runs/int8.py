"""The table of docs/int8.md: native, int8, pruned and both, in PyTorch, ONNX Runtime and OpenVINO.

    python runs/int8.py --images flickr_sample.tar --calibration imagenet_sample.tar \\
        --weights vit_tiny_patch16_224.safetensors

Quality is measured on all images at batch 8, against the native model in float32. Speed is measured in one process:
every round runs all rows in random order on the same images; medians. The policy and its dial are those of float32:
nothing of it is chosen again for int8.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from tokengame.backbones import load_model, preprocessing_of, wrap
from tokengame.data.batches import plain_views
from tokengame.data.datasets import open_images
from tokengame.deploy import PrunedGraph
from tokengame.deploy.formats import Onnx, engine_of_openvino, session_of_onnx
from tokengame.deploy.int8 import onnx_int8, openvino_int8, openvino_int8_weights, torchao_int8
from tokengame.files import write_csv
from tokengame.measure.conditions import conditions, engines
from tokengame.measure.evaluate import keep_freed_memory
from tokengame.measure.fidelity import fidelity_loss
from tokengame.measure.in_turn import REST, interleave
from tokengame.measure.kinds import kind_of
from tokengame.measure.rivals import Native, openvino_core
from tokengame.report.console import console, progress, show_rows
from tokengame.runtime import PrunedViT, prune

BATCHES = (1, 8)
Call = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""[B, 3, height, width] -> logits [B, classes], and tokens left after each decision [B, T] where it prunes"""
SHOWN = {
    "engine": "engine", "int8": "int8", "model": "model", "agreement": "agree-\nment", "kl": "KL",
    "images_per_second_1": "images/s\nbatch 1", "images_per_second_8": "images/s\nbatch 8",
    "by_pruning_1": "by\npruning 1", "by_pruning_8": "by\npruning 8",
}  # fmt: skip


@dataclass
class Int8:
    images: Path
    """folder or archive of images to measure on"""
    calibration: Path
    """other images, by which NNCF chooses ranges"""
    policy: str = "vit_tiny_patch16_224"
    backbone: str = "vit_tiny_patch16_224"
    weights: Path | None = None
    """local checkpoint"""
    gmacs_ratio: float = 0.65
    """operating point, by the policy's calibration in float32"""
    count: int = 10_000
    """images to measure on at most"""
    samples: int = 64
    """images that calibrate"""
    timed: int = 32
    """images that are timed"""
    seconds: float = 60.0
    """to time each batch size"""
    engines: tuple[Literal["pytorch", "onnxruntime", "openvino"], ...] = ("pytorch", "onnxruntime", "openvino")
    compiled: bool = False
    """also torchao's model in torch.compile, which takes minutes to compile"""
    threads: int = 2
    output: Path = Path("build/int8.csv")


@dataclass(frozen=True)
class Row:
    """One line of the table: a call for each batch size."""

    engine: str
    int8: str
    pruned: bool
    calls: dict[int, Call]

    @property
    def model(self) -> str:
        return {(0, 0): "native", (0, 1): "pruned", (1, 0): "int8", (1, 1): "both"}[bool(self.int8), self.pruned]


# Engines


def in_pytorch(native: nn.Module, args: Int8) -> list[Row]:
    """The model as it is, by torchao and by PyTorch's own deprecated quantiser; pruned on what `prune` chooses."""
    legacy = torch.ao.quantization.quantize_dynamic(native, {nn.Linear}, torch.qint8)
    dynamic = torchao_int8(native)
    kinds = {
        "": native, "torchao, dynamic": dynamic, "torchao, weights": torchao_int8(native, weights_only=True),
        "torch.ao, dynamic": legacy,
    }  # fmt: skip
    rows = []
    for kind, model in kinds.items():
        fast = prune(model, args.policy, gmacs_ratio=args.gmacs_ratio)
        rows.append(
            Row("PyTorch", kind, False, dict.fromkeys(BATCHES, lambda images, model=model: (model(images), None)))
        )
        rows.append(
            Row("PyTorch", kind, True, dict.fromkeys(BATCHES, lambda images, fast=fast: _predicted(fast, images)))
        )
    if args.compiled:
        fast = prune(dynamic, args.policy, gmacs_ratio=args.gmacs_ratio)
        model, small = torch.compile(dynamic), torch.compile(fast, dynamic=True)
        kind = "torchao, torch.compile"
        rows.append(Row("PyTorch", kind, False, dict.fromkeys(BATCHES, lambda images: (model(images), None))))
        rows.append(Row("PyTorch", kind, True, dict.fromkeys(BATCHES, lambda images: (small(images), None))))
    return rows


def _predicted(fast: PrunedViT, images: Tensor) -> tuple[Tensor, Tensor]:
    output = fast.predict(images)
    return output.logits, torch.stack(output.kept, 1)


def graphs(native: nn.Module, images: Tensor, args: Int8, folder: Path) -> dict[tuple[int, bool], Path]:
    """ONNX files by batch size and whether they prune."""
    files = {}
    graph = PrunedGraph(prune(native, args.policy, gmacs_ratio=args.gmacs_ratio), images.shape[2:])  # type: ignore[arg-type]
    for size in BATCHES:
        (folder / str(size)).mkdir()
        files[size, False] = Native(native, images[:size], kind_of(wrap(native)), folder / str(size)).onnx
        files[size, True] = folder / str(size) / "pruned.onnx"
        Onnx().write(graph.program(images, size), files[size, True], {})
    return files


def in_onnx_runtime(files: dict[tuple[int, bool], Path], dial: float) -> list[Row]:
    """Graphs in float32, and with layers quantised as they come."""
    rows = []
    for kind in ("", "dynamic"):
        for pruned in (False, True):
            calls = {}
            for size in BATCHES:
                path = files[size, pruned]
                if kind:
                    onnx_int8(path, path := path.with_name(f"int8_{path.name}"))
                calls[size] = _of_session(session_of_onnx(path), dial)
            rows.append(Row("ONNX Runtime", kind, pruned, calls))
    return rows


def in_openvino(files: dict[tuple[int, bool], Path], samples: Tensor, dial: float) -> list[Row]:
    """Graphs in float32, quantised with NNCF after training, and with NNCF's weights in int8."""
    rows, core = [], openvino_core()
    for kind in ("", "NNCF, calibrated", "NNCF, weights"):
        for pruned in (False, True):
            calls = {}
            for size in BATCHES:
                model = core.read_model(files[size, pruned])
                if kind == "NNCF, calibrated":
                    names = [value.get_any_name() for value in model.inputs]
                    model = openvino_int8(model, [_inputs(names, batch, dial) for batch in samples.split(size)])
                elif kind:
                    model = openvino_int8_weights(model)
                calls[size] = _of_request(engine_of_openvino(core, model), model, dial)
            rows.append(Row("OpenVINO", kind, pruned, calls))
    return rows


def _inputs(names: list[str], images: Tensor, dial: float) -> dict[str, np.ndarray]:
    dials = np.full(len(images), dial, np.float32)
    return {name: dials if name == "dial" else images.numpy() for name in names}


def _of_session(session: Any, dial: float) -> Call:
    names = [value.name for value in session.get_inputs()]
    return lambda images: _outputs(session.run(None, _inputs(names, images, dial)))


def _of_request(request: Any, model: Any, dial: float) -> Call:
    names = [value.get_any_name() for value in model.inputs]
    return lambda images: _outputs(list(request.infer(_inputs(names, images, dial), share_inputs=True).values()))


def _outputs(arrays: list[np.ndarray]) -> tuple[Tensor, Tensor | None]:
    found = [torch.from_numpy(np.array(array)) for array in arrays]
    return found[0], found[1] if len(found) > 1 else None


# Measuring


def quality(row: Row, pool: Tensor, native: Tensor, patches: int) -> dict[str, Any]:
    """Agreement with the native model in float32, KL(native || row), and the share of tokens left at the end."""
    size = BATCHES[-1]
    padded = torch.cat([pool, pool[: -len(pool) % size]])  # graphs are for one batch size
    found = [row.calls[size](batch) for batch in padded.split(size)]
    logits = torch.cat([output for output, _ in found])[: len(pool)]
    left = [kept for _, kept in found if kept is not None]
    return {
        "agreement": float((logits.argmax(1) == native.argmax(1)).float().mean()),
        "kl": float(fidelity_loss(native, logits).mean()),
        "tokens_left": float(torch.cat(left)[: len(pool), -1].double().mean()) / patches if left else 1.0,
    }


def speeds(rows: list[Row], pool: Tensor, args: Int8) -> list[dict[str, float]]:
    """Images a second of each row at each batch size."""
    found: list[dict[str, float]] = [{} for _ in rows]
    for size in BATCHES:
        batches = [batch.clone() for batch in pool[: args.timed].split(size)]
        calls = {number: _all_of(row.calls[size], batches) for number, row in enumerate(rows)}
        times = interleave(calls, torch.device("cpu"), args.seconds, rest=REST)
        for number, taken in times.items():
            found[number][f"images_per_second_{size}"] = args.timed / median(taken)
    return found


def _all_of(call: Call, batches: list[Tensor]) -> Callable[[], Any]:
    return lambda: [call(batch) for batch in batches]


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With what pruning multiplies: speed over the same engine and number format with all tokens."""
    for row in rows:
        (whole,) = (
            r
            for r in rows
            if (r["engine"], r["int8"]) == (row["engine"], row["int8"]) and r["model"] in ("native", "int8")
        )
        for size in BATCHES:
            key = f"images_per_second_{size}"
            row[f"by_pruning_{size}"] = row[key] / whole[key]
    return rows


def read(path: Path, count: int, model: nn.Module) -> Tensor:
    """[count or fewer, 3, height, width]"""
    loader = plain_views(open_images(str(path), "validation"), preprocessing_of(model)).loader(16, 1)
    found: list[Tensor] = []
    for batch in loader:
        found.append(batch.images)
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]


@torch.inference_mode()
def main(args: Int8) -> None:
    """Build all rows, measure quality, then speed; show and write."""
    warnings.simplefilter("ignore")  # of quantisers
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    model = load_model(args.backbone, args.weights and str(args.weights))
    pool, samples = read(args.images, args.count, model), read(args.calibration, args.samples, model)
    dial = prune(model, args.policy, gmacs_ratio=args.gmacs_ratio).dial
    with TemporaryDirectory(prefix="tokengame", ignore_cleanup_errors=True) as folder:
        rows = in_pytorch(model, args) if "pytorch" in args.engines else []
        if set(args.engines) - {"pytorch"}:
            with torch.inference_mode(False), torch.no_grad():
                files = graphs(model, pool.clone(), args, Path(folder))
        if "onnxruntime" in args.engines:
            rows += in_onnx_runtime(files, dial)
        if "openvino" in args.engines:
            rows += in_openvino(files, samples, dial)
        native = torch.cat([model(batch) for batch in pool.split(BATCHES[-1])])
        scores = [quality(row, pool, native, wrap(model).patches) for row in progress(rows, "scoring", len(rows))]
        console.print("timing", markup=False)
        found = speeds(rows, pool, args)
    table = with_ratios([
        {"engine": row.engine, "int8": row.int8, "model": row.model} | score | speed
        for row, score, speed in zip(rows, scores, found, strict=True)
    ])  # fmt: skip
    about = conditions(torch.float32) | engines() | {"images": len(pool), "images_timed": args.timed, "dial": dial}
    show_rows(table, SHOWN)
    write_csv([row | about for row in table], args.output)
    console.print(f"wrote {args.output}", markup=False)


if __name__ == "__main__":
    main(tyro.cli(Int8))
