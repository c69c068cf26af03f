"""The commands: each a dataclass of its flags with a `run` that returns the JSON document."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro
from torch import nn

from tokengame.attention import ruled_attention
from tokengame.backbone import Backbone
from tokengame.config import TrainConfig, require
from tokengame.console import console, progress, show_rows, show_table
from tokengame.data import BadImages, checked, plain_views
from tokengame.errors import TokenGameError, first_line
from tokengame.evaluate import Scores, calibrate, evaluate, keep_heap
from tokengame.hub import HuggingFaceStream
from tokengame.images import STREAM, ImageSet, ImageSource, label_images, open_images, split_images
from tokengame.loop import projection
from tokengame.models import load_model, preprocessing_of
from tokengame.policy import Policy, fingerprint
from tokengame.ranks import Ranks, join, place_of
from tokengame.report import table, verdict
from tokengame.rundir import require_writable
from tokengame.runtime import PrunedViT, find_policy, prune
from tokengame.session import Session


@dataclass(kw_only=True)
class Common:
    """Flags of every command."""

    shared: ClassVar[bool] = False
    """whether several processes can run it together"""
    json: bool = False
    """print one JSON document on stdout, everything else on stderr"""
    seed: int = 0
    """of everything random"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU where there is one"""

    def rehearsed(self, batch_size: int) -> int:
        """Images of an update of a dry run: 32 a process, or fewer where the run has fewer."""
        return min(batch_size, 32 * self.ranks.size)

    def place(self, model: nn.Module) -> nn.Module:
        """`model` on the chosen device."""
        try:
            return model.to(self.torch_device)
        except (RuntimeError, AssertionError) as error:
            raise TokenGameError(f"no device {self.device!r} here ({first_line(error)})") from None

    @cached_property
    def ranks(self) -> Ranks:
        """The processes that run this command together, one where no launcher started them."""
        return join(self._kind)

    @property
    def torch_device(self) -> str:
        return place_of(self.ranks, self._kind)

    @property
    def _kind(self) -> str:
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device


@dataclass(kw_only=True)
class OnImages(Common):
    """Flags of commands that run a backbone on images."""

    backbone: str
    """timm model name, e.g. vit_small_patch16_224, or "fashion" for the embedded one"""
    images: str
    """folder of class folders, .tar of the same, tar shards ("train-{0000..0127}.tar", "shards/*.tar"), Hugging Face
    data set (to learn from it while it arrives, "stream:NAME"), or the embedded scenes: "fashion" (1,000),
    "fashion-val" (5,000 of the same photos) and, of other photos, "fashion-train" (20,000); "fashion-train:FOLDER" for
    all photos of the Fashion-MNIST there"""
    weights: str | None = None
    """local checkpoint; without one timm downloads its own"""
    class_map: str | None = None
    """text file, one class name a line in the model's order, for folders that hold only some of the classes"""
    split: str = "validation"
    """of a Hugging Face data set"""
    workers: int = 1
    """processes that decode images; none while a CPU is timed"""

    def load(self) -> tuple[nn.Module, ImageSource]:
        """Model and images to measure on, labelled."""
        streamed = self.images.startswith(STREAM)
        require(not streamed, f"{self.images} can be learned from, not measured on: leave out {STREAM}")
        model, source = self.load_to_learn()
        assert not isinstance(source, HuggingFaceStream)
        return model, source

    def load_to_learn(self) -> tuple[nn.Module, ImageSource | HuggingFaceStream]:
        """Model and images or stream, labelled; the cheaper mistakes are found first."""
        require(self.workers >= 0, f"--workers must be 0 or more, not {self.workers}")
        source = open_images(self.images, self.split, progress)
        model = self.place(load_model(self.backbone, self.weights))
        label_images(source, self.class_map, Backbone(model).model.num_classes)
        return model, source

    def measure(
        self, fast: PrunedViT, source: ImageSource, batch_size: int, preprocessing: dict[str, Any],
        reference: nn.Module | None = None,
    ) -> Scores:  # fmt: skip
        """Native beside pruned on all images of `source`, each process on its part."""
        own = range(self.ranks.rank, len(source.names), self.ranks.size)
        tally, views = BadImages(len(source.names)), plain_views(source, preprocessing, own)
        keep_heap()
        # on a CPU, decoding in other processes would take the cores from what is timed
        loader = views.loader(batch_size, self.workers if self.torch_device.startswith("cuda") else 0)
        scores = evaluate(fast, progress(checked(loader, tally), "measuring", len(loader)), reference)
        if self.ranks.size > 1:
            scores.positions = []  # large, and nobody asks for them then
        parts = self.ranks.gather((scores, list(tally.reasons.items())))
        for _, bad in parts[1:]:
            tally.add(bad)
        report_bad(tally)
        return Scores.joined([part for part, _ in parts])


def weights_of(policy: Policy, path: Path, model: nn.Module, name: str) -> nn.Module:
    """The weights a policy was made for: `model`, or those that `finetune` wrote beside the policy file."""
    beside = policy.card["backbone"].get("weights")
    if beside is None or policy.card["backbone"]["fingerprint"] == fingerprint(Backbone(model)):
        return model
    first = next(model.parameters())
    return load_model(name, str(path.parent / beside)).to(first.device, first.dtype).requires_grad_(False)


CALIBRATION_HEADINGS = {
    "dial": "dial",
    "gmacs_ratio": "compute",
    "keep": "tokens\nkept",
    "agreement": "agree-\nment",
    "kl": "KL",
    "drop_pp": "points\nlost",
    "drop_pp_bound95": "at most\n(95 %)",
}


def report_bad(tally: BadImages) -> None:
    """Say which images were skipped."""
    if tally.reasons:
        name, reason = next(iter(tally.reasons.items()))
        skipped = f"skipped {len(tally.reasons)} unreadable of {tally.total} images"
        console.print(f"{skipped}, the first is {name}: {reason}", markup=False, soft_wrap=True)


@dataclass(kw_only=True)
class Train(OnImages):
    """Learn a policy for a backbone and images."""

    shared = True
    output: Path = Path("policy.safetensors")
    """the policy file; metrics and checkpoints go beside it, into NAME_log"""
    holdout: float = 0.2
    """share of the images held back and measured on at the end; of a stream its first 1,024"""
    gmacs_ratio: float | None = None
    """pruned / native compute that the policy is to recommend, found by calibration; without it, dial 0.5"""
    resume: bool = False
    """go on from the checkpoint in NAME_log"""
    checkpoint_every: int = 50
    """updates between checkpoints"""
    dry_run: bool = False
    """load everything, do two updates of 32 images a process, say how long all would take and how much
    memory; keep nothing"""
    split: str = "train"
    """of a Hugging Face data set"""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig.from_preset("tokengame")
    )

    def run(self) -> dict[str, Any]:
        """Train, calibrate, validate."""
        if not self.dry_run:
            require_writable(self.output)
        model, source = self.load_to_learn()
        learn, validate = split_images(source, self.holdout, self.seed)
        if self.dry_run:
            return self._rehearse(model, learn)
        session = self._session(model, learn, self.config, self.output)
        session.run(progress, self.checkpoint_every)
        if self.ranks.main:
            session.finish(validate, progress, self.gmacs_ratio)
            report_bad(session.loop.tally)
        self.ranks.wait()
        fast = prune(model, Policy.load(self.output))
        scores = self.measure(fast, validate, 32, session.preprocessing)
        result = {**session.result(), **scores.summary(), "dial": fast.dial}
        show_table(f"{self.backbone} on {len(validate.names)} held-back images", table(result))
        console.print(verdict(result))
        return result

    def _session(self, model: nn.Module, learn: ImageSet, config: TrainConfig, output: Path) -> Session:
        return Session(
            model, self.backbone, config, learn, output, seed=self.seed, device=self.torch_device, resume=self.resume,
            workers=self.workers, ranks=self.ranks,
        )  # fmt: skip

    def _rehearse(self, model: nn.Module, learn: ImageSet) -> dict[str, Any]:
        with TemporaryDirectory() as folder:
            config = replace(self.config, updates=2, batch_size=self.rehearsed(self.config.batch_size))
            session = self._session(model, learn, config, Path(folder) / "policy.safetensors")
            session.loop.run(progress)
            result = projection(session.loop, self.config.updates * self.config.batch_size)
        show_rows([result])
        return result


@dataclass(kw_only=True)
class Eval(OnImages):
    """Native beside pruned on the same images."""

    shared = True
    policy: str
    """policy file, or the name of a shipped one"""
    dial: float | None = None
    """operating point: 0 keeps all tokens, 0.5 is the policy's own choice, 1 prunes most"""
    gmacs_ratio: float | None = None
    """operating point: pruned / native compute, by the policy's calibration"""
    max_drop: float | None = None
    """operating point: the hardest for which calibration can promise, at 95 %, that at most so many points are lost"""
    batch_size: int = 32
    """images a batch, in the timing too"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """what both models compute in"""
    holdout: float | None = None
    """measure only on the share that `train` held back with the same --holdout and --seed"""

    def run(self) -> dict[str, Any]:
        """Measure."""
        points = (self.dial, self.gmacs_ratio, self.max_drop)
        require(sum(point is not None for point in points) <= 1, "give one of --dial, --gmacs-ratio and --max-drop")
        wishes = {"gmacs_ratio": self.gmacs_ratio, "max_drop": self.max_drop}
        require(self.batch_size >= 1, f"--batch-size must be at least 1, not {self.batch_size}")
        model, source = self.load()
        if self.holdout is not None:
            source = split_images(source, self.holdout, self.seed)[1]
        path, model = find_policy(self.policy), model.to(getattr(torch, self.dtype))
        policy = Policy.load(path)
        fast = prune(weights_of(policy, path, model, self.backbone), policy, self.dial, **wishes)
        result = self.measure(fast, source, self.batch_size, preprocessing_of(model), reference=model).summary()
        result |= {"dial": fast.dial, "dtype": self.dtype}
        show_table(f"{self.backbone}, dial {fast.dial:.3f}", table(result))
        console.print(verdict(result))
        return result


@dataclass(kw_only=True)
class Calibrate(OnImages):
    """Measure every dial of a policy and write it to its card, so that a drop can be promised.

    The images must be labelled for that, and none the policy has learned from. A promise of half a point takes a
    thousand images at the very least, usually several; of two points, hundreds. It holds for a drop that was wished for
    before looking at the table.
    """

    policy: str
    """policy file, or the name of a shipped one"""
    output: Path
    """the policy file to write; may be the same"""
    batch_size: int = 32
    """images a batch"""
    holdout: float | None = None
    """calibrate only on the share that `train` held back with the same --holdout and --seed"""
    second_look: float | None = None
    """for the card, instead of the policy's own; 0.15: images whose prediction is in doubt are run with all tokens"""

    def run(self) -> list[dict[str, Any]]:
        """Measure, write."""
        require_writable(self.output)
        model, source = self.load()
        if self.holdout is not None:
            source = split_images(source, self.holdout, self.seed)[1]
        path = find_policy(self.policy)
        policy = Policy.load(path)
        if self.second_look is not None:
            policy.card["game"] |= {"second_look": self.second_look}
        fast = prune(weights_of(policy, path, model, self.backbone), policy)
        fast.game.backbone.attend = ruled_attention  # the card's figures must not depend on the machine's speed
        tally = BadImages(len(source.names))
        views = plain_views(source, preprocessing_of(model))
        loader = views.loader(self.batch_size, self.workers)
        batches = progress(checked(loader, tally), "calibrating", len(loader))
        policy.card["calibration"] = calibrate(fast, batches, reference=model)
        report_bad(tally)
        policy.card["backbone"]["fingerprint"] = fingerprint(fast.game.backbone)  # these weights, and no others
        policy.save(self.output)
        show_rows(policy.card["calibration"], CALIBRATION_HEADINGS)
        console.print(f"wrote {self.output}", markup=False, soft_wrap=True)
        return policy.card["calibration"]
