"""`train`: learn a policy for a backbone and images."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from tokengame.cli.common import COMPUTE, PART, UPDATES, OnImages, report_bad
from tokengame.cli.hints import about, held_back, next_command
from tokengame.config import TrainConfig, require
from tokengame.files import require_writable
from tokengame.report.console import console, progress, show_rows, show_table

if TYPE_CHECKING:
    from torch import nn

    from tokengame.data.datasets import ImageSet
    from tokengame.learning.run import TrainingRun
    from tokengame.measure.kinds import Kind


@dataclass(kw_only=True)
class Train(OnImages):
    """Learn a policy for a backbone and images."""

    name: ClassVar[str] = "train"
    first: ClassVar[tuple[str, ...]] = (
        "output", "weights", "class_map", "gmacs_ratio", "target_drop", "keep_what", "updates", "resume", "preset",
    )  # fmt: skip
    takes_preset: ClassVar[bool] = True
    examples: ClassVar[str] = (
        "tokengame train --backbone vit_small_patch16_224 --images train/ --output policy.safetensors\n"
        "tokengame train --backbone vit_tiny_patch16_224 --weights vit.safetensors --images images.tar "
        "--class-map classes.txt --gmacs-ratio 0.68\n"
        "tokengame train --backbone vit_small_patch14_dinov2 --images photos/ --keep-what features\n"
        "tokengame train --preset rl4evit --backbone deit_base_patch16_224 --images train/\n"
        "tokengame train --backbone vit_base_patch16_224 --weights last.ckpt --model-kwargs img_size=384 "
        "--images photos/"
    )

    distributed = True
    output: Path = Path("policy.safetensors")
    """the policy file; metrics and checkpoints go beside it, into NAME_log"""
    holdout: Annotated[float, PART] = 0.2
    """share of the images held back and measured on at the end; of a stream its first 1,024"""
    gmacs_ratio: Annotated[float | None, COMPUTE] = None
    """pruned / native compute that the policy is to recommend, found by calibration; without it, dial 0.5"""
    resume: bool = False
    """continue from the checkpoint in NAME_log. With more --updates a finished run goes on: the step size then falls
    as in a run of that many"""
    overwrite: bool = False
    """replace what an earlier run left at --output; without it, that is refused"""
    checkpoint_every: Annotated[int, UPDATES] = 50
    """updates between checkpoints"""
    dry_run: bool = False
    """load everything, do two updates of 32 images a process, say how long all would take and how much
    memory; keep nothing"""
    split: str = "train"
    """of a Hugging Face data set"""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig.from_preset("tokengame")
    )

    def check(self) -> None:
        """Also: a run is continued or replaced."""
        super().check()
        require(not (self.resume and self.overwrite), "give one of --resume and --overwrite")

    def run(self) -> dict[str, Any]:
        """Train on a part of the images, calibrate and measure on the rest."""
        from tokengame.data.datasets import split_images
        from tokengame.learning.checkpoint import require_new
        from tokengame.learning.run import log_of
        from tokengame.policies import Policy
        from tokengame.report.html import table, verdict
        from tokengame.runtime import prune

        if not self.dry_run:
            require_writable(self.output)
            if self.processes.main and not (self.resume or self.overwrite):
                require_new(log_of(self.output), self.output)  # before models and images are loaded
        model, source = self.load_to_learn()
        learn, validate = split_images(source, self.holdout, self.seed)
        if self.dry_run:
            return self._rehearse(model, learn)
        training = self._training(model, learn, self.config, self.output, self.resume)
        training.run(progress, self.checkpoint_every)
        if self.processes.main:
            training.finish(validate, progress, self.gmacs_ratio)
            report_bad(training.loop.tally)
        self.processes.wait()
        fast = prune(model, Policy.load(self.output))
        scores = self.measure(fast, validate, 32, training.preprocessing, kind=self.kept(model))
        result = {**training.result(), **scores.summary(), "dial": fast.dial}
        show_table(f"{self.backbone} on {len(validate.names)} held-back images", table(result))
        console.print(verdict(result))
        command = next_command(self, self.output, self.images, **held_back(self, source))
        console.print(f"policy: {self.output}\nnext: {command}", highlight=False, markup=False, soft_wrap=True)
        return result

    def require_output(self, model: nn.Module) -> None:
        """Raise TokenGameError where the model does not give what is to be kept."""
        self.kept(model)

    def kept(self, model: nn.Module) -> Kind:
        """What is to be kept of `model`."""
        from tokengame.backbones import wrap
        from tokengame.measure.kinds import kind_of

        return kind_of(wrap(model), self.config.keep_what)

    def _training(
        self, model: nn.Module, learn: ImageSet, config: TrainConfig, output: Path, resume: bool = False
    ) -> TrainingRun:
        from tokengame.learning.run import TrainingRun

        return TrainingRun(
            model, self.backbone, config, learn, output, seed=self.seed, device=self.torch_device, resume=resume,
            overwrite=self.overwrite, workers=self.workers, processes=self.processes, about=about(self),
        )  # fmt: skip

    def _rehearse(self, model: nn.Module, learn: ImageSet) -> dict[str, Any]:
        from tokengame.learning.loop import projection

        with TemporaryDirectory() as folder:
            config = replace(self.config, updates=2, batch_size=self.rehearsed(self.config.batch_size))
            training = self._training(model, learn, config, Path(folder) / "policy.safetensors")
            training.loop.run(progress)
            result = projection(training.loop, self.config.updates * self.config.batch_size)
        show_rows([result])
        return result
