"""`show`: pictures of the tokens kept, beside DynamicViT's on request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tokengame.cli.common import SHARE, OnImages, prune_by_name, report_bad
from tokengame.config import require
from tokengame.errors import TokenGameError
from tokengame.files import require_writable, write_whole
from tokengame.ranges import Range
from tokengame.report.console import console, progress

if TYPE_CHECKING:
    from torch import nn

    from tokengame.data.datasets import ImageSource
    from tokengame.report.gallery import Drawing
    from tokengame.runtime import PrunedViT


@dataclass(kw_only=True)
class Show(OnImages):
    """Pictures of the tokens kept, stage by stage."""

    name: ClassVar[str] = "show"
    first: ClassVar[tuple[str, ...]] = ("output", "weights", "class_map", "count", "pick", "dial")
    examples: ClassVar[str] = (
        "tokengame show --backbone vit_small_patch16_224 --images val/ --policy policy.safetensors --count 6\n"
        "tokengame show --backbone vit_small_patch16_224 --images val/ --policy policy.safetensors --pick extremes "
        "--dynamicvit-updates 200 --output gallery.html"
    )

    policy: str
    """policy file, the name of a shipped one, hf:USER/NAME on the Hugging Face hub, or "rule": the starting rule, of
    which nothing is learned"""
    output: Path = Path("tokens.png")
    """PNG of one strip per image; or .html: a gallery with counts and predictions before and after"""
    count: Annotated[int, Range(1, 1_000, whole=True)] = 8
    """how many images"""
    pick: Literal["random", "extremes"] = "random"
    """random: by the seed. extremes: the images that kept the least compute, then those that kept the most"""
    dial: Annotated[float | None, SHARE] = None
    """between 0 and 1; default is the policy's recommendation"""
    side: Annotated[int, Range(16, 2_048, whole=True)] = 160
    """height of a panel in pixels"""
    dynamicvit_updates: Annotated[int, Range(0, 10**8, whole=True)] = 0
    """also train DynamicViT's predictor for so many updates, on the other images, and show what it keeps at the same
    mean compute; 0 leaves it out"""

    def check(self) -> None:
        """Also: the file has a format that can be written."""
        super().check()
        require(self.output.suffix in (".png", ".html"), f"--output must end in .png or .html, not {self.output.name}")

    def run(self) -> dict[str, Any]:
        """Pick images, draw them, write the file."""
        import numpy as np

        from tokengame.backbones import preprocessing_of
        from tokengame.data.datasets import Subset
        from tokengame.report.figures import png, stack
        from tokengame.report.gallery import together, write_gallery

        require_writable(self.output)
        model, source = self.load()
        fast = prune_by_name(model, self.policy, self.dial)
        picked = self._picked(fast, source, preprocessing_of(model))
        methods = {"tokengame": self._draw(fast, Subset(source, picked))}
        if self.dynamicvit_updates:
            others = sorted(set(range(len(source.names))) - set(picked))
            require(
                bool(others), "DynamicViT is trained on the images that are not shown; give more, or a lower --count"
            )
            mean = float(np.mean([drawing.compute for drawing in methods["tokengame"]]))
            dynamic = self._dynamicvit(model, Subset(source, others), mean)
            methods["DynamicViT, frozen"] = self._draw(dynamic, Subset(source, picked))
        if self.output.suffix == ".html":
            classes = [] if self.class_map is None else Path(self.class_map).read_text().split("\n")
            names = [source.names[index] for index in picked]
            write_gallery(self.output, f"{self.backbone}: tokens kept", names, methods, classes)
        else:
            write_whole(self.output, png(stack(together(methods))))
        console.print(f"wrote {self.output}", markup=False, soft_wrap=True)
        return {"files": [str(self.output)]}

    def _draw(self, fast: PrunedViT, chosen: ImageSource) -> list[Drawing]:
        from tokengame.backbones import preprocessing_of
        from tokengame.data.batches import BadImages, checked, plain_views
        from tokengame.report.gallery import draw

        tally, drawings = BadImages(10**9), []
        loader = plain_views(chosen, preprocessing_of(fast.model)).loader(16, self.workers)
        for batch in progress(checked(loader, tally), "drawing", len(loader)):
            drawings += draw(fast, batch, self.side)
        report_bad(tally)
        if not drawings:
            raise TokenGameError(f"none of the {len(chosen.names)} images picked can be read; see the reasons above")
        return drawings

    def _picked(self, fast: PrunedViT, source: ImageSource, preprocessing: dict[str, Any]) -> list[int]:
        import torch

        if self.pick == "random":
            order = torch.randperm(len(source.names), generator=torch.Generator().manual_seed(self.seed)).tolist()
            return order[: self.count]
        scores = self.measure(fast, source, 32, preprocessing)
        order = [scores.index[place] for place in torch.tensor(scores.macs).argsort().tolist()]
        count = min(self.count, len(order))
        return order[: count - count // 2] + order[len(order) - count // 2 :]

    def _dynamicvit(self, model: nn.Module, learn: ImageSource, compute: float) -> PrunedViT:
        """Trained on `learn`; it keeps the share of tokens that comes closest to `compute`."""
        import numpy as np
        import torch

        from tokengame.backbones import preprocessing_of
        from tokengame.baselines.dynamicvit import pruned_by, train_dynamicvit
        from tokengame.data.batches import BadImages, checked
        from tokengame.data.loader import TrainingLoader
        from tokengame.data.transforms import transform_for
        from tokengame.runtime.macs import native_macs, pruned_macs

        updates = self.dynamicvit_updates
        loader = TrainingLoader(learn, transform_for(preprocessing_of(model), train=True), self.seed, 32, updates)
        batches = checked(loader.loader(workers=self.workers), BadImages(loader.total))
        model.requires_grad_(False)
        shown = progress(batches, "training DynamicViT", updates)
        dynamic = train_dynamicvit(model, shown, updates, seed=self.seed)
        fast = pruned_by(model, dynamic)
        total, stages = fast.game.backbone.patches, len(fast.game.stages)
        keeps = np.linspace(0.3, 0.99, 70)
        kept = torch.tensor([[max(1, int(total * keep ** (t + 1))) for keep in keeps] for t in range(stages)])
        ratio = pruned_macs(fast.game, fast.actor, kept, total) / native_macs(fast.game.backbone, total)
        dynamic.keep = float(keeps[int((ratio - compute).abs().argmin())])
        return fast
