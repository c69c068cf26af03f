"""`quickstart`: the whole story on the embedded backbone and scenes, in minutes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from tokengame.commands import Common
from tokengame.config import TrainConfig, merge, require
from tokengame.console import console, progress, show_table
from tokengame.data import BadImages, checked, plain_views
from tokengame.evaluate import Scores, evaluate, keep_heap
from tokengame.figures import calibration_figure, png, stack, training_figure
from tokengame.gallery import draw
from tokengame.images import SceneImages, Subset
from tokengame.models import EMBEDDED, load_model
from tokengame.report import table, verdict, write_report
from tokengame.rundir import require_writable
from tokengame.runtime import PrunedViT
from tokengame.scenes import FashionScenes
from tokengame.session import Session


def short(preset: str) -> TrainConfig:
    """Settings of `preset` for a few minutes on 2 cores.

    The default preset gets two stages: in 8 narrow blocks a third costs the clock more than it saves (docs/LOG.md).
    """
    fewer = {"game": {"stages": (1, 4)}, "reward": {"target_kl": 0.03}} if preset == "tokengame" else {}
    return merge(TrainConfig.from_preset(preset), {"updates": 150, **fewer})


@dataclass(kw_only=True)
class Quickstart(Common):
    """Learn and measure a policy on the embedded backbone and images; write it with an HTML report."""

    output: Path = Path("quickstart")
    """folder for policy.safetensors and report.html"""
    eval_images: int = 1000
    """fresh scenes to measure on"""
    gmacs_ratio: float = 0.42
    """compute the policy is to recommend, pruned / native"""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: short("tokengame"))

    def run(self) -> dict[str, Any]:
        """Train on scenes of training photos, measure on fresh scenes of test photos."""
        require(self.eval_images >= 1, "--eval-images must be at least 1")
        start = time.perf_counter()
        policy, page = self.output / "policy.safetensors", self.output / "report.html"
        require_writable(page)
        model = self.place(load_model(EMBEDDED))
        learn = SceneImages(FashionScenes("train", self.config.updates * self.config.batch_size, seed=self.seed))
        session = Session(model, EMBEDDED, self.config, learn, policy, seed=self.seed, device=self.torch_device)
        session.run(progress)
        held = SceneImages(
            FashionScenes("test", min(512, self.eval_images), seed=self.seed + 2)
        )  # other scenes than those measured on
        fast = session.finish(held, progress, self.gmacs_ratio)
        fresh = FashionScenes("test", self.eval_images, seed=self.seed + 1)
        source = SceneImages(fresh)
        views = plain_views(source, session.preprocessing)
        loader = views.loader(32, 0)
        keep_heap()
        scores = evaluate(fast, progress(checked(loader, BadImages(len(fresh))), "measuring", len(loader)))
        result = session.result() | scores.summary() | item_recall(scores, fresh, fast) | {"dial": fast.dial}
        self._report(page, fast, result, session, source)
        result |= {"report": str(page), "seconds": time.perf_counter() - start}
        show_table(f"{self.eval_images} fresh scenes", table(result))
        console.print(
            f"{verdict(result)}\npolicy: {policy}\nreport: {page}", highlight=False, markup=False, soft_wrap=True
        )
        return result

    def _report(
        self, page: Path, fast: PrunedViT, result: dict[str, Any], session: Session, source: SceneImages
    ) -> None:
        some = Subset(source, range(min(8, len(source.names))))
        views = plain_views(some, session.preprocessing)
        strips = [drawing.picture for drawing in draw(fast, next(iter(views.loader(8, 0))), side=112)]
        figures = {
            "One policy, one dial": calibration_figure(fast.card["calibration"], result),
            "Learning: compute falls, a controller steers the sampled games' KL to its target": training_figure(
                session.log.metrics()
            ),
        }
        write_report(page, "tokengame quickstart: fashion scenes", result, png(stack(strips)), figures)


def item_recall(scores: Scores, scenes: FashionScenes, fast: PrunedViT) -> dict[str, float]:
    """Share of the tokens on the item (patch centre inside its box), and of all others, that stay to the end."""
    patch = fast.game.backbone.patch_size[0]
    side = scenes.size // patch
    centres = (np.arange(side) + 0.5) * patch
    kept, counts = np.zeros(2), np.zeros(2)
    for index, alive in zip(scores.index, scores.positions, strict=True):
        left, top, right, bottom = scenes[index].box
        inside = np.outer((centres > top) & (centres < bottom), (centres > left) & (centres < right)).ravel()
        stays = np.isin(np.arange(side * side), alive.numpy())
        kept += [stays[inside].sum(), stays[~inside].sum()]
        counts += [inside.sum(), (~inside).sum()]
    item, background = (float(share) for share in kept / counts)
    ratio = item / background if background else float("inf")
    return {"item_tokens_kept": item, "background_tokens_kept": background, "item_to_background": ratio}
