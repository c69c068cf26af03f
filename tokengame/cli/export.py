"""`export`: a pruned model as a file for inference engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tokengame.cli.common import BATCH, COMPUTE, SHARE, OnAnyOutput, prune_by_name
from tokengame.config import require
from tokengame.files import require_writable
from tokengame.ranges import Range
from tokengame.report.console import console, progress, show_rows


@dataclass(kw_only=True)
class Export(OnAnyOutput):
    """Write a pruned model as one graph for ONNX Runtime, OpenVINO or torch.export, the dial an input.

    The graph is run on the images and compared with PyTorch: the same tokens, and outputs within 1e-4 (of the greatest
    one where it exceeds 1), or there is no file; with --int8 how like they are is shown. Then ONNX Runtime and OpenVINO
    time it beside the native model in the same engine.
    """

    name: ClassVar[str] = "export"
    first: ClassVar[tuple[str, ...]] = (
        "weights",
        "format",
        "batch_size",
        "fixed_counts",
        "int8",
        "dial",
        "gmacs_ratio",
        "seconds",
    )
    examples: ClassVar[str] = (
        "tokengame export --backbone vit_tiny_patch16_224 --images val/ --policy vit_tiny_patch16_224 "
        "--gmacs-ratio 0.65 --output pruned.onnx\n"
        "tokengame export --backbone fashion --images fashion --policy rule --output pruned.xml --batch-size 1\n"
        "tokengame export --backbone vit_small_patch14_dinov2 --images photos/ --policy rule --output pruned.pt2"
    )

    policy: str
    """policy file, the name of a shipped one, or "rule": the starting rule, of which nothing is learned"""
    output: Path
    """the file to write: .onnx, .xml (OpenVINO) or .pt2 (torch.export)"""
    format: Literal["onnx", "openvino", "torch", "aotinductor"] | None = None
    """instead of what the file's suffix says; aotinductor compiles a .pt2 for this processor, with fixed counts"""
    batch_size: Annotated[int | None, BATCH] = None
    """images of a batch, which engines run faster when they know it; None: any number"""
    fixed_counts: bool = False
    """the same number of tokens in every image, the mean of these images: all sizes are known, and there is no dial"""
    int8: bool = False
    """linear layers in int8: .onnx quantises as it runs, .xml by NNCF with ranges from half of the images"""
    dial: Annotated[float | None, SHARE] = None
    """operating point that is checked and timed; the graph takes any"""
    gmacs_ratio: Annotated[float | None, COMPUTE] = None
    """instead of a dial: pruned / native compute, by the policy's calibration; the rule needs none (0.7)"""
    count: Annotated[int, Range(1, 100_000, whole=True)] = 64
    """images to check it on"""
    seconds: Annotated[float, Range(0, 3600)] = 10.0
    """to time each batch size; 0: not at all"""

    def check(self) -> None:
        """Also: there is one operating point."""
        super().check()
        require(self.dial is None or self.gmacs_ratio is None, "give one of --dial and --gmacs-ratio")

    @property
    def inputs(self) -> dict[str, str | None]:
        """Also the policy."""
        return super().inputs | {"--policy": None}

    def run(self) -> dict[str, Any]:
        """Export, check and time."""
        import torch

        from tokengame.backbones import wrap
        from tokengame.data.given import some_of
        from tokengame.deploy.exporter import ENGINES, export, format_of
        from tokengame.measure.conditions import conditions, engines

        require_writable(self.output)
        kind = format_of(self.output, self.format)
        model, source = self.load()
        fast = prune_by_name(model, self.policy, self.dial, keep_what=self.keep_what, gmacs_ratio=self.gmacs_ratio)
        batches, _ = some_of(source, wrap(model).preprocessing(), self.count, self.seed)
        images = torch.cat([batch.images for batch in batches])
        seconds = self.seconds if kind.name in ENGINES else 0.0
        found = export(
            fast, self.output, images, format=self.format, batch_size=self.batch_size,
            fixed_counts=self.fixed_counts, int8=self.int8, seconds=seconds, progress=progress, note=self.note,
        )  # fmt: skip
        self._show(found)
        return found | conditions(torch.float32, "cpu") | engines()

    def _show(self, found: dict[str, Any]) -> None:
        left = " ".join(f"{share:.2f}" for share in found["tokens_kept"])
        said = (
            f"{found['likeness']} {found['like_float32']:.3f} with float32, {found['like_native']:.3f} with native "
            f"(tokens left after each decision: {left})" if self.int8 else
            f"the same tokens as in PyTorch (left after each decision: {left}), outputs within "
            f"{found['max_abs_difference']:.1g}"
        )  # fmt: skip
        console.print(
            f"wrote {found['file']}: {found['bytes'] / 1e6:.1f} MB; on {found['images']} images {said}",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        if found["timing"]:
            show_rows(found["timing"], {
                "batch_size": "batch", "milliseconds_native": "native\nms", "milliseconds_pruned": "pruned\nms",
                "speedup": "speed-\nup", "verdict": "",
            })  # fmt: skip
