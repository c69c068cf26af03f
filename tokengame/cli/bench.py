"""`bench`: speed of any model on random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tokengame.cli.common import BATCH, COMPUTE, WithModel, show_rivals
from tokengame.config import GameConfig, require
from tokengame.files import require_writable, write_csv
from tokengame.ranges import Range
from tokengame.report.console import console, show_rows, steps

BENCH_HEADINGS = {
    "dtype": "format",
    "batch_size": "batch",
    "native": "native\nis",
    "images_per_second_native": "native\nimg/s",
    "images_per_second_pruned": "pruned\nimg/s",
    "speedup": "speed-\nup",
    "gmacs_speedup": "by\nGMACs",
    "efficiency": "effi-\nciency",
    "verdict": "verdict",
}


@dataclass(kw_only=True)
class Bench(WithModel):
    """Speed of the native and the pruned model, interleaved in one run; random weights will do."""

    name: ClassVar[str] = "bench"
    first: ClassVar[tuple[str, ...]] = ("weights", "keep", "batch_sizes", "dtypes", "output")
    examples: ClassVar[str] = (
        "tokengame bench --backbone deit_small_patch16_224 --keep 0.7 0.49 0.34 --batch-sizes 1 32\n"
        "tokengame bench --backbone vit_tiny_patch16_224 --transition merge --dtypes bfloat16 --tome --json\n"
        "tokengame bench --backbone vit_tiny_patch16_224 --transition merge --dtypes float32 --neighbours 4"
    )

    backbone: str
    """a model's name or folder, as for train; weights are random unless --weights is given"""
    weights: str | None = None
    """local checkpoint"""
    policy: Literal["rule"] | None = None
    """rule: the starting rule decides and keeps the shares --keep of every image; otherwise decisions are synthetic"""
    keep: Annotated[tuple[float, ...], COMPUTE] = (0.7, 0.49, 0.34)
    """share of tokens left after each stage, spread over images where decisions are synthetic"""
    stages: Annotated[tuple[int, ...], Range(0, 1_000, whole=True)] = ()
    """blocks at which tokens are pruned; empty: evenly spaced"""
    transition: Literal["drop", "merge"] = "drop"
    """what becomes of pruned tokens"""
    batch_sizes: Annotated[tuple[int, ...], BATCH] = (1, 8, 32)
    """images a batch"""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32", "bfloat16")
    """what both models compute in"""
    seconds: Annotated[float, Range(0, 86_400, above=True)] = 20.0
    """time spent on each row, after warm-up"""
    compiled: bool = True
    """also time what torch.compile makes of both models; of each the fastest counts"""
    tome: bool = False
    """also time ToMe at equal GMACs: with fused attention, with the game's kernels, and compiled"""
    rivals: bool = False
    """also time the native model in torch.compile's max-autotune, ONNX Runtime and OpenVINO, and in int8; the speed-up
    is over the fastest of the same precision (pip install 'tokengame[engines]')"""
    neighbours: Annotated[int, Range(0, 1_024, whole=True)] = 0
    """busy processes beside what is timed, each of which wants a core: how both models fare on a shared machine"""
    output: Path = Path("results")
    """folder for the CSV, whose name holds the conditions"""

    def check(self) -> None:
        """Also: something is timed."""
        super().check()
        require(bool(self.dtypes), "--dtypes must name at least one")

    def run(self) -> list[dict[str, Any]]:
        """Time every number format at every batch size; one row each."""
        import torch

        from tokengame.backbones import load_model, wrap
        from tokengame.backbones.load import EMBEDDED, untrained
        from tokengame.measure.bench import Plan, bench, csv_path
        from tokengame.measure.evaluate import keep_freed_memory

        embedded = self.weights is not None or self.backbone == EMBEDDED
        given = (self.backbone, self.weights, self.settings, self.note)
        model = load_model(*given) if embedded else untrained(self.backbone, self.settings)
        plan = Plan(
            GameConfig(stages=self.stages, stage_count=len(self.keep), transition=self.transition), self.keep,
            self.batch_sizes, tuple(getattr(torch, d) for d in self.dtypes), self.seconds, self.seed, self.compiled,
            self.tome, keep_freed_memory(), self.policy, self.rivals, self.neighbours,
        )  # fmt: skip
        model = self.place(model)
        backbone = wrap(model)
        path = csv_path(self.output, self.backbone, plan, plan.game.blocks(backbone.depth), backbone.device)
        require_writable(path)
        rows: list[dict[str, Any]] = []
        number = len(self.dtypes) * len(self.batch_sizes) * (2 if self.rivals else 1)
        with steps("timing", number) as next_step:
            for row in bench(model, self.backbone, plan, next_step):
                rows.append(row)
                write_csv(rows, path)  # keep what is measured, whatever happens later
        own = {"own_kernels_speedup": "kernels\nalone"} if self.rivals else {}
        show_rows(rows, BENCH_HEADINGS | own | ({"speedup_over_tome": "over\nToMe"} if self.tome else {}))
        if self.rivals:
            about = [{"format": row["dtype"], "batch": row["batch_size"]} for row in rows]
            show_rivals([which | rival for which, row in zip(about, rows, strict=True) for rival in row["rivals"]])
        show_rows([{"format": row["dtype"], "batch": row["batch_size"]} | row["time_shares"] for row in rows])
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
        return rows
