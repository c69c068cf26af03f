"""`finetune`: tune a backbone through a frozen policy (the paper's Figure 4)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import tyro

from tokengame.cli.common import COMPUTE, PART, SHARE, UPDATES, OnImages, report_bad
from tokengame.cli.hints import about, held_back, next_command
from tokengame.config import GAME_VERSION, FinetuneConfig, require
from tokengame.files import require_writable, whole
from tokengame.report.console import console, progress, show_rows, show_table

if TYPE_CHECKING:
    from torch import nn

    from tokengame.data.datasets import ImageSet, ImageSource
    from tokengame.data.hub import HuggingFaceStream
    from tokengame.learning.finetune import Tuner
    from tokengame.learning.loop import Loop
    from tokengame.policies import Policy
    from tokengame.runtime import PrunedViT


@dataclass(kw_only=True)
class Finetune(OnImages):
    """Tune a backbone through a frozen policy; measure it before and after."""

    name: ClassVar[str] = "finetune"
    first: ClassVar[tuple[str, ...]] = (
        "output", "weights", "class_map", "dial", "gmacs_ratio", "validate", "updates", "lr", "resume", "recipe",
    )  # fmt: skip
    preset_flag: ClassVar[str] = "recipe"
    takes_preset: ClassVar[bool] = True
    examples: ClassVar[str] = (
        "tokengame finetune --backbone vit_small_patch16_224 --images train/ --policy policy.safetensors "
        "--output tuned --gmacs-ratio 0.55\n"
        "tokengame finetune --backbone fashion --images fashion-train --validate fashion-val "
        "--policy quickstart/policy.safetensors --gmacs-ratio 0.32 --opt muon --lr 3e-4\n"
        "tokengame finetune --backbone deit_base_patch16_224 --images train/ --policy policy.safetensors "
        "--recipe paper --ema 0.999"
    )

    distributed = True
    policy: str
    """policy file, the name of a shipped one, or hf:USER/NAME"""
    output: Path = Path("tuned")
    """folder for model.safetensors, policy.safetensors (the same policy, its card calibrated anew for the tuned
    weights) and the log"""
    dial: Annotated[float | None, SHARE] = None
    """operating point to tune for; default is the policy's recommendation"""
    gmacs_ratio: Annotated[float | None, COMPUTE] = None
    """operating point by compute, pruned / native, as the policy's card has it"""
    holdout: Annotated[float, PART] = 0.2
    """share held back and measured on; of a stream its first 1,024"""
    validate: str | None = None
    """other images to measure on, in place of a share held back"""
    split: str = "train"
    """of a Hugging Face data set"""
    resume: bool = False
    """continue from the checkpoint in the log. With more --updates a finished run goes on: the step size then falls
    as in a run of that many"""
    overwrite: bool = False
    """replace what an earlier run left at --output; without it, that is refused"""
    checkpoint_every: Annotated[int, UPDATES] = 50
    """updates between checkpoints"""
    dry_run: bool = False
    """load everything, do two updates of 32 images a process, say how long all would take and how much
    memory; keep nothing"""
    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)

    @classmethod
    def with_preset(cls, preset: str) -> Finetune:
        """The command with the settings of recipe `preset`."""
        missing: Any = tyro.MISSING
        return cls(backbone=missing, images=missing, policy=missing, config=FinetuneConfig.from_recipe(preset))

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The folder and the files in it that others may read."""
        return self.output, self._weights, self._card_file

    def check(self) -> None:
        """Also: there is one operating point, and a run is continued or replaced."""
        super().check()
        require(not (self.resume and self.overwrite), "give one of --resume and --overwrite")
        require(self.dial is None or self.gmacs_ratio is None, "give one of --dial and --gmacs-ratio")
        require(not (self.resume and self.overwrite), "give one of --resume and --overwrite")

    def run(self) -> dict[str, Any]:
        """Measure the pruned model, tune it, calibrate the policy for the tuned weights, measure again."""
        from tokengame.learning.checkpoint import require_new
        from tokengame.learning.finetune import Tuner
        from tokengame.learning.recipe import check_recipe
        from tokengame.policies import Policy
        from tokengame.policies.policy import find_policy
        from tokengame.runtime import prune

        check_recipe(self.config)
        self.processes.local_batch(self.config.batch_size)
        if not self.dry_run:
            require_writable(self._weights, self._card_file)
            if self.processes.main and not (self.resume or self.overwrite):
                require_new(self.output / "log", self._weights, self._card_file)
        model, source = self.load_to_learn()
        require(not self.config.labels or source.labels is not None, "--labels needs labelled images: see --class-map")
        learn, held = self._split(model, source)
        policy = Policy.load(find_policy(self.policy))
        dial = prune(model, policy, self.dial, gmacs_ratio=self.gmacs_ratio).dial
        if self.dry_run:
            return self._rehearse(model, policy, dial, learn)
        require(0 < dial < 1, f"tuning wants a dial between 0 and 1, not {dial:g}")
        before = self._measured(prune(model, policy, dial), held, model, "before")
        tuner = Tuner(model, policy, dial, self.config, before["gmacs_ratio"], self.processes, self.seed)
        loop = self._loop(tuner, dial, self.config, learn, self.output, self.resume)
        loop.run(progress, "tuning", self.checkpoint_every)
        report_bad(loop.tally)
        if self.processes.main:
            self._write(policy, tuner.tuned(), held, model, before["gmacs_ratio"])
        self.processes.wait()
        after = self._measured(prune(tuner.tuned(), Policy.load(self._card_file)), held, model, "after")
        self._say_next(source)
        lost = before["drop_pp"]
        return {
            "before": before,
            "after": after,
            "recovered": 1 - after["drop_pp"] / lost if lost is not None and lost > 0 else None,
            "model": str(self._weights),
            "policy": str(self._card_file),
            "images_seen": tuner.images_seen,
            "seconds": loop.seconds,
            "waited_for_images": loop.waited(),
        }

    def _say_next(self, source: ImageSource | HuggingFaceStream) -> None:
        held = held_back(self, source) if self.validate is None else {}
        command = next_command(self, self._card_file, self.validate or self.images, **held)
        text = f"weights: {self._weights}\npolicy: {self._card_file}\nnext: {command}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _split(self, model: nn.Module, source: ImageSource | HuggingFaceStream) -> tuple[ImageSet, ImageSource]:
        from tokengame.data.datasets import STREAM, open_images, split_images

        if self.validate is None:
            return split_images(source, self.holdout, self.seed)
        require(not self.validate.startswith(STREAM), f"--validate {self.validate} is a stream: leave out {STREAM}")
        held = cast("ImageSource", open_images(self.validate, "validation", progress))
        self.prepare(held, model)
        return source, held

    @property
    def _weights(self) -> Path:
        return self.output / "model.safetensors"

    @property
    def _card_file(self) -> Path:
        return self.output / "policy.safetensors"

    def _loop(
        self, tuner: Tuner, dial: float, config: FinetuneConfig, learn: ImageSet, folder: Path, resume: bool = False
    ) -> Loop:
        from safetensors.torch import save

        from tokengame.backbones import preprocessing_of
        from tokengame.data.transforms import transform_for
        from tokengame.learning.checkpoint import RunFolder
        from tokengame.learning.loop import Loop, names_hash
        from tokengame.learning.run import description_of, lasting
        from tokengame.policies.policy import fingerprint

        augment: dict[str, Any] = {"scale": (config.crop, 1.0), "auto_augment": config.aa}
        augment |= {"re_prob": config.reprob, "re_mode": config.augment.remode}
        transform = transform_for(preprocessing_of(tuner.teacher), train=True, augment=augment)
        actor = sha256(save(tuner.fast.actor.state_dict())).hexdigest()
        marks = [fingerprint(tuner.fast.game.backbone), actor, dial]
        identity = json.dumps([GAME_VERSION, lasting(config), self.seed, marks, names_hash(learn)])
        log = RunFolder(folder / "log", identity, self.processes.main)
        known = about(self) | {"policy": self.policy, "dial": dial}
        description = description_of(self.backbone, config, self.seed, self.torch_device, known)
        return Loop(
            tuner, learn, transform, log, description, updates=config.updates, batch_size=config.batch_size,
            seed=self.seed, resume=resume, workers=self.workers, processes=self.processes,
        )  # fmt: skip

    def _measured(self, fast: PrunedViT, held: ImageSource, native: nn.Module, when: str) -> dict[str, Any]:
        from tokengame.backbones import preprocessing_of
        from tokengame.measure.conditions import conditions
        from tokengame.report.html import table, verdict

        result = self.measure(fast, held, 32, preprocessing_of(native), reference=native).summary()
        result |= {"dial": fast.dial} | conditions(fast.game.backbone.dtype, self.torch_device)
        show_table(f"{self.backbone} {when} fine-tuning, dial {fast.dial:.3f}", table(result))
        console.print(verdict(result))
        return result

    def _write(self, policy: Policy, tuned: nn.Module, held: ImageSource, native: nn.Module, compute: float) -> None:
        """Write the weights, and the policy with a card for them, calibrated against the native model.

        The card recommends the dial that gives the tuned model the `compute` (pruned / native) of the untuned one.
        """
        from safetensors.torch import save_file

        from tokengame.backbones import preprocessing_of, wrap
        from tokengame.learning.run import calibration_batches
        from tokengame.measure.evaluate import calibrate
        from tokengame.packed.attention import deterministic_attention
        from tokengame.policies.policy import dial_for, fingerprint
        from tokengame.runtime import prune

        with whole(self._weights) as part:
            save_file({name: weight.cpu().contiguous() for name, weight in tuned.state_dict().items()}, part)
        names = {"fingerprint": fingerprint(wrap(tuned)), "weights": self._weights.name}
        backbone = policy.card["backbone"] | names
        finetuning = {"config": asdict(self.config), "seed": self.seed, "gmacs_ratio": compute}
        policy = replace(policy, card=policy.card | {"backbone": backbone, "finetuning": finetuning, "keeps": "logits"})
        fast = prune(tuned, policy)
        fast.game.attention = deterministic_attention  # the card's figures must not depend on the machine's speed
        batches = calibration_batches(held, preprocessing_of(native), self.seed, self.workers, progress)
        rows = policy.card["calibration"] = calibrate(fast, batches, reference=native)
        ratios = [row["gmacs_ratio"] for row in rows]
        policy.card["dial"] = dial_for(policy.card, gmacs_ratio=min(max(compute, min(ratios)), max(ratios)))
        policy.save(self._card_file)

    def _rehearse(self, model: nn.Module, policy: Policy, dial: float, learn: ImageSet) -> dict[str, Any]:
        from tokengame.learning.finetune import Tuner
        from tokengame.learning.loop import projection

        with TemporaryDirectory() as folder:
            config = replace(self.config, updates=2, batch_size=self.rehearsed(self.config.batch_size))
            loop = self._loop(
                Tuner(model, policy, dial, config, processes=self.processes), dial, config, learn, Path(folder)
            )
            loop.run(progress, "rehearsing")
            result = projection(loop, self.config.updates * self.config.batch_size)
        show_rows([result])
        return result
