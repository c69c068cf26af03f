"""`quickstart`: learn and measure a policy on the embedded model and images, in minutes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from tokengame.cli.common import COMPUTE, Common
from tokengame.config import TrainConfig, with_overrides
from tokengame.files import require_writable
from tokengame.ranges import Range
from tokengame.report.console import console, progress, show_table

if TYPE_CHECKING:
    from tokengame.data.datasets import ImageSource
    from tokengame.data.scenes import FashionScenes
    from tokengame.learning.run import TrainingRun
    from tokengame.measure.scores import Scores
    from tokengame.runtime import PrunedViT


def short(preset: str) -> TrainConfig:
    """Settings of `preset` for a few minutes on 2 cores.

    The default preset gets two stages: in 8 narrow blocks a third takes more time than it saves (docs/LOG.md).
    """
    fewer = {"game": {"stages": (1, 4)}, "reward": {"target_kl": 0.03}} if preset == "tokengame" else {}
    return with_overrides(TrainConfig.from_preset(preset), {"updates": 150, **fewer})


@dataclass(kw_only=True)
class Quickstart(Common):
    """Learn and measure a policy on the embedded backbone and images; write it with an HTML report."""

    name: ClassVar[str] = "quickstart"
    first: ClassVar[tuple[str, ...]] = ("output", "gmacs_ratio", "eval_images", "updates", "preset")
    takes_preset: ClassVar[bool] = True
    examples: ClassVar[str] = "tokengame quickstart\ntokengame quickstart --updates 300 --json > result.json"

    output: Path = Path("quickstart")
    """folder for policy.safetensors and report.html; a run found there is continued"""
    eval_images: Annotated[int, Range(1, 1_000_000, whole=True)] = 1000
    """fresh scenes to measure on"""
    gmacs_ratio: Annotated[float, COMPUTE] = 0.42
    """compute the policy is to recommend, pruned / native"""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: short("tokengame"))

    @classmethod
    def with_preset(cls, preset: str) -> Quickstart:
        """The command with the training settings of `preset`, shortened."""
        return cls(config=short(preset))

    def run(self) -> dict[str, Any]:
        """Train on scenes of training photos, measure on fresh scenes of test photos."""
        from tokengame.backbones import load_model
        from tokengame.backbones.load import EMBEDDED
        from tokengame.data.batches import BadImages, checked, plain_views
        from tokengame.data.datasets import SceneImages
        from tokengame.data.scenes import FashionScenes
        from tokengame.learning.run import TrainingRun
        from tokengame.measure.conditions import conditions
        from tokengame.measure.evaluate import evaluate, keep_freed_memory
        from tokengame.report.html import table, verdict

        start = time.perf_counter()
        console.print(
            "quickstart: learn to prune a small ViT on fashion scenes (photos of clothing in clutter), calibrate the "
            f"dial, measure on {self.eval_images} fresh scenes. Three to five minutes on two cores.",
            soft_wrap=True,
        )
        policy, page = self.output / "policy.safetensors", self.output / "report.html"
        require_writable(policy, page)
        model = self.place(load_model(EMBEDDED))
        learn = SceneImages(FashionScenes("train", self.config.updates * self.config.batch_size, seed=self.seed))
        training = TrainingRun(
            model, EMBEDDED, self.config, learn, policy, seed=self.seed, device=self.torch_device, resume=None
        )
        if training.trainer.updates:
            console.print(f"continues the run in {self.output} after update {training.trainer.updates}", markup=False)
        training.run(progress)
        held = SceneImages(
            FashionScenes("test", min(512, self.eval_images), seed=self.seed + 2)
        )  # other scenes than those measured on
        fast = training.finish(held, progress, self.gmacs_ratio)
        fresh = FashionScenes("test", self.eval_images, seed=self.seed + 1)
        source = SceneImages(fresh)
        views = plain_views(source, training.preprocessing)
        loader = views.loader(32, 0)
        keep_freed_memory()
        scores = evaluate(fast, progress(checked(loader, BadImages(len(fresh))), "measuring", len(loader)))
        result = (
            training.result()
            | scores.summary()
            | item_recall(scores, fresh, fast)
            | {"dial": fast.dial}
            | conditions(fast.game.backbone.dtype, self.torch_device)
        )
        self._report(page, fast, result, training, source)
        result |= {"report": str(page), "seconds": time.perf_counter() - start}
        show_table(f"{self.eval_images} fresh scenes", table(result))
        console.print(
            f"{verdict(result)}\npolicy: {policy}\nreport: {page}\nnext: tokengame eval --backbone {EMBEDDED} "
            f"--images fashion-val --policy {policy}; with your own model and images: tokengame train --help",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return result

    def _report(
        self, page: Path, fast: PrunedViT, result: dict[str, Any], training: TrainingRun, source: ImageSource
    ) -> None:
        from tokengame.data.batches import plain_views
        from tokengame.data.datasets import Subset
        from tokengame.report.figures import calibration_figure, png, stack, training_figure
        from tokengame.report.gallery import draw
        from tokengame.report.html import write_report

        some = Subset(source, range(min(8, len(source.names))))
        views = plain_views(some, training.preprocessing)
        strips = [drawing.picture for drawing in draw(fast, next(iter(views.loader(8, 0))), side=112)]
        figures = {
            "One policy, one dial": calibration_figure(fast.card["calibration"], result),
            "Learning: compute falls, a controller steers the sampled games' KL to its target": training_figure(
                training.log.metrics()
            ),
        }
        write_report(page, "tokengame quickstart: fashion scenes", result, png(stack(strips)), figures)


def item_recall(scores: Scores, scenes: FashionScenes, fast: PrunedViT) -> dict[str, float]:
    """Share of the tokens on the item (patch centre inside its box), and of all others, that are kept to the end."""
    import numpy as np

    patch = fast.game.backbone.patch_size[0]
    side = scenes.size // patch
    centres = (np.arange(side) + 0.5) * patch
    kept, counts = np.zeros(2), np.zeros(2)
    for index, alive in zip(scores.index, scores.positions, strict=True):
        left, top, right, bottom = scenes[index].box
        inside = np.outer((centres > top) & (centres < bottom), (centres > left) & (centres < right)).ravel()
        kept_here = np.isin(np.arange(side * side), alive.numpy())
        kept += [kept_here[inside].sum(), kept_here[~inside].sum()]
        counts += [inside.sum(), (~inside).sum()]
    item, background = (float(share) for share in kept / counts)
    ratio = item / background if background else float("inf")
    return {"item_tokens_kept": item, "background_tokens_kept": background, "item_to_background": ratio}
