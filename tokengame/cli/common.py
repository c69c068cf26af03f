"""What commands have in common. Each is a dataclass of its flags with a `run` that returns the JSON document.

PyTorch takes seconds to import and `--help` needs none of it: whatever needs it is imported where it is used.
"""

from __future__ import annotations

import ast
import copy
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from tokengame.config import KeepWhat, TrainConfig, require
from tokengame.errors import TokenGameError, first_line
from tokengame.ranges import Range, check_fields, hints_of
from tokengame.report.console import console, progress, show_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tokengame.backbones.sources import Settings
    from tokengame.data.batches import BadImages
    from tokengame.data.datasets import ImageSource
    from tokengame.data.hub import HuggingFaceStream
    from tokengame.distributed import Processes
    from tokengame.measure.against import RivalRun
    from tokengame.measure.kinds import Kind
    from tokengame.policies import Policy
    from tokengame.runtime import PrunedViT


SHARE, PART = Range(0, 1), Range(0, 1, above=True, below=True)
"""with both ends, and without"""
COMPUTE = Range(0, 1, above=True)
"""pruned / native"""
BATCH, UPDATES = Range(1, 65_536, whole=True), Range(1, 10**8, whole=True)


@dataclass(kw_only=True)
class Common:
    """Flags of every command."""

    name: ClassVar[str]
    """as it is typed"""
    examples: ClassVar[str]
    """command lines for --help, one a line"""
    first: ClassVar[tuple[str, ...]] = ()
    """flags that --help shows first, after those that are required"""
    distributed: ClassVar[bool] = False
    """whether several processes can run it together"""
    takes_preset: ClassVar[bool] = False
    """whether a flag, --preset, sets defaults of its training settings, the field `config`"""
    preset_flag: ClassVar[str] = "preset"
    """that flag's name"""
    json: bool = False
    """print one JSON document on stdout, everything else on stderr"""
    seed: Annotated[int, Range(0, 2**32 - 1, whole=True)] = 0
    """of everything random"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU where there is one"""

    @classmethod
    def with_preset(cls, preset: str) -> Any:
        """The command with the training settings of `preset`."""
        settings: Any = {"backbone": tyro.MISSING, "images": tyro.MISSING, "config": TrainConfig.from_preset(preset)}
        return cls(**settings)

    def check(self) -> None:
        """Find mistakes in the flags alone, before anything is imported or loaded.

        Raises:
            TokenGameError: a number is out of range, or flags do not go together.
        """
        kind: Any = type(self)
        numbers = {name: getattr(self, name) for name, hint in hints_of(kind).items() if _has_range(hint)}
        check_fields(kind, numbers, flag)
        for name, value in numbers.items():
            require(value != () or getattr(kind, name) == (), f"{flag(name)} takes at least one number")
        named = re.fullmatch(r"[a-z]+(:[0-9]{1,3})?", self.device)
        require(named is not None, f"--device must be auto, cpu, cuda, cuda:1, ..., not {self.device!r}")

    def require_device(self) -> None:
        """Raise TokenGameError where this machine has no such device."""
        import torch

        try:
            torch.zeros(1, device=self.torch_device).item()
        except (RuntimeError, AssertionError, ImportError) as error:
            raise TokenGameError(f"no device {self.device!r} here ({first_line(error)}); see --device") from None

    def rehearsed(self, batch_size: int) -> int:
        """Images of an update of a dry run: 32 a process, or fewer where the run has fewer."""
        return min(batch_size, 32 * self.processes.size)

    def place(self, model: nn.Module) -> nn.Module:
        """`model` on the chosen device."""
        return model.to(self.torch_device)

    @cached_property
    def processes(self) -> Processes:
        """Those that run this command together; one where no launcher started several."""
        from tokengame.distributed import join_processes

        return join_processes(self._kind)

    @property
    def torch_device(self) -> str:
        """The device of this process."""
        from tokengame.distributed import device_of

        return device_of(self.processes, self._kind)

    @property
    def _kind(self) -> str:
        import torch

        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device


@dataclass(kw_only=True)
class WithModel(Common):
    """Flags of commands that take a model."""

    model_kwargs: tuple[str, ...] = ()
    """KEY=VALUE settings of timm.create_model (img_size=518 num_classes=10 in_chans=1 ...) and of preprocessing
    (mean=0.5 std=0.5 crop_pct=1 ...), or of a configuration of transformers"""

    @property
    def settings(self) -> Settings:
        """What --model-kwargs sets.

        Raises:
            TokenGameError: one is no KEY=VALUE, is there twice, or is a number that no model has.
        """
        found: dict[str, Any] = {}
        for pair in self.model_kwargs:
            key, equals, value = pair.partition("=")
            form = f"--model-kwargs takes KEY=VALUE pairs, e.g. img_size=518 num_classes=0, not {pair!r}"
            require(bool(equals) and key.isidentifier() and value != "", form)
            require(key not in found, f"--model-kwargs sets {key} twice")
            found[key] = _value(value)
            numbers = found[key] if isinstance(found[key], tuple | list) else (found[key],)
            for number in (number for number in numbers if isinstance(number, int | float)):
                large = f"--model-kwargs {key} is {number}, and no model is that large"
                require(abs(number) <= 2**20, large)  # NaN neither
        return found

    def check(self) -> None:
        """Also: --model-kwargs can be read."""
        super().check()
        assert isinstance(self.settings, dict)

    def note(self, sentence: str) -> None:
        """Say what was found in the user's files."""
        if self.processes.main:
            console.print(sentence, markup=False, soft_wrap=True)


@dataclass(kw_only=True)
class OnImages(WithModel):
    """Flags of commands that run a backbone on images."""

    backbone: str
    """timm model name, e.g. vit_small_patch16_224; Hugging Face folder or ORG/NAME; open_clip:NAME/TAG;
    torchvision:NAME; or "fashion" for the embedded one"""
    images: str
    """folder of images, in class folders if labelled, .tar of the same, shards ("train-{0000..0127}.tar"), one image
    or a pattern ("photos/*.jpg"), Hugging Face data set ("stream:NAME": while it arrives), or embedded scenes:
    "fashion" (1,000), "fashion-val" (5,000 of the same photos), "fashion-train" (20,000 of others); with ":FOLDER", of
    the Fashion-MNIST there. EXIF orientation is ignored, as by timm and torchvision"""
    weights: str | None = None
    """local checkpoint of PyTorch, timm, Lightning or Accelerate; without one the library downloads its own"""
    class_map: str | None = None
    """text file, one class name a line in the model's order, for folders that hold only some of the classes"""
    split: str = "validation"
    """of a Hugging Face data set"""
    workers: Annotated[int, Range(0, 256, whole=True)] = 1
    """processes that decode images; none while a CPU is timed"""

    @property
    def outputs(self) -> tuple[Path, ...]:
        """Files and folders that are written."""
        return (self.output,) if hasattr(self, "output") else ()

    @property
    def inputs(self) -> dict[str, str | None]:
        """Files and folders that are read, by flag, and may not be written over."""
        policy = getattr(self, "policy", None)
        return {"--images": self.images, "--weights": self.weights, "--class-map": self.class_map, "--policy": policy}

    def check(self) -> None:
        """Also: what is read is not written over."""
        super().check()
        for flag, path in self.inputs.items():
            for written in self.outputs:
                same = path and os.path.exists(path) and os.path.exists(written) and os.path.samefile(path, written)
                require(not same, f"--output would write over {path}, which {flag} reads; choose another place")

    def load(self) -> tuple[nn.Module, ImageSource]:
        """Model and images to measure on, labelled."""
        from tokengame.data.datasets import STREAM
        from tokengame.data.hub import HuggingFaceStream

        streamed = self.images.startswith(STREAM)
        require(not streamed, f"{self.images} can be learned from, not measured on: leave out {STREAM}")
        model, source = self.load_to_learn()
        assert not isinstance(source, HuggingFaceStream)
        return model, source

    def load_to_learn(self) -> tuple[nn.Module, ImageSource | HuggingFaceStream]:
        """Model and images or stream, labelled; mistakes that are cheap to find are found first."""
        from tokengame.backbones import load_model
        from tokengame.data.datasets import open_images

        source = open_images(self.images, self.split, progress)
        model = self.place(load_model(self.backbone, self.weights, self.settings, self.note))
        self.require_output(model)
        self.prepare(source, model)
        return model, source

    def require_output(self, model: nn.Module) -> None:
        """Raise TokenGameError where the model does not give what this command compares: here predicted classes."""
        from tokengame.backbones import wrap
        from tokengame.backbones.classes import require_classes

        require_classes(wrap(model))

    def prepare(self, source: ImageSource | HuggingFaceStream, model: nn.Module) -> None:
        """Label images with the model's classes, say how, and refuse them where too many cannot be read."""
        from tokengame.backbones import wrap
        from tokengame.backbones.classes import classes_of
        from tokengame.data.batches import require_readable
        from tokengame.data.datasets import label_images

        how = label_images(source, self.class_map, classes_of(wrap(model)))
        if self.processes.main:
            console.print(how, markup=False, soft_wrap=True)
        require_readable(source)

    def for_thresholds(self, model: nn.Module, source: ImageSource) -> list[Tensor]:
        """Batches of some images of `source`, on which thresholds of the starting rule are set."""
        from tokengame.backbones import wrap
        from tokengame.data.given import some_of
        from tokengame.runtime.rule import most_images

        backbone = wrap(model)
        batches, _ = some_of(source, backbone.preprocessing(), most_images(backbone), self.seed)
        return [batch.images for batch in batches]

    def measure(
        self, fast: PrunedViT, source: ImageSource, batch_size: int, preprocessing: dict[str, Any],
        reference: nn.Module | None = None, kind: Kind | None = None, rivals: RivalRun | None = None,
    ) -> Any:  # fmt: skip
        """Native beside pruned on all images of `source`, each process on its part."""
        from tokengame.data.batches import BadImages, checked, plain_views
        from tokengame.measure.evaluate import evaluate, keep_freed_memory

        own = range(self.processes.rank, len(source.names), self.processes.size)
        tally, views = BadImages(len(source.names)), plain_views(source, preprocessing, own)
        keep_freed_memory()
        # on a CPU, decoding in other processes would take the cores from what is timed
        loader = views.loader(batch_size, self.workers if self.torch_device.startswith("cuda") else 0)
        scores = evaluate(fast, progress(checked(loader, tally), "measuring", len(loader)), reference, kind, rivals)
        if self.processes.size > 1:
            scores.positions = []  # large, and not needed then
        parts = self.processes.gather((scores, list(tally.reasons.items())))
        for _, bad in parts[1:]:
            tally.add(bad)
        report_bad(tally)
        return scores.joined([part for part, _ in parts])


@dataclass(kw_only=True)
class OnAnyOutput(OnImages):
    """Flags of commands that compare whatever a model gives."""

    keep_what: KeepWhat | None = None
    """what is compared: class logits; an embedding; or features of every patch on the full grid. None: what the policy
    was made for if that is features, else logits or an embedding, whichever the model gives"""
    bank: str | None = None
    """.safetensors of one tensor [n, width]: embeddings of classes or texts, by which zero-shot answers are compared"""

    @property
    def inputs(self) -> dict[str, str | None]:
        """Also the bank."""
        return super().inputs | {"--bank": self.bank}

    def require_output(self, model: nn.Module) -> None:
        """Raise TokenGameError where the model does not give what is to be compared, or the bank does not fit it."""
        self.kind_of(model)

    def kind_of(self, model: nn.Module, card: dict[str, Any] | None = None) -> Kind:
        """What is compared of `model`, pruned by the policy with this card."""
        from tokengame.backbones import wrap
        from tokengame.measure.kinds import kind_of, read_bank

        on_grid: KeepWhat | None = "features" if (card or {}).get("keeps") == "features" else None
        bank = None if self.bank is None else read_bank(self.bank)
        return kind_of(wrap(model), self.keep_what or on_grid, bank=bank)


def flag(name: str) -> str:
    """How the field `name` is typed."""
    return "--" + name.replace("_", "-")


def _value(text: str) -> Any:
    """A value as Python writes it, e.g. 518, True, (224, 160), None; any other text is itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def _has_range(hint: Any) -> bool:
    return any(isinstance(extra, Range) for extra in getattr(hint, "__metadata__", ()))


def tuned_weights(policy: Policy, path: Path, model: nn.Module) -> nn.Module:
    """The weights that a policy was made for: `model`, or those that `finetune` wrote beside the policy file."""
    from tokengame.backbones import wrap
    from tokengame.backbones.checkpoint import load_into, read_state
    from tokengame.policies.policy import fingerprint

    beside = policy.card["backbone"].get("weights")
    if beside is None or policy.card["backbone"]["fingerprint"] == fingerprint(wrap(model)):
        return model
    weights = str(path.parent / beside)
    return load_into(copy.deepcopy(model), read_state(weights), weights).requires_grad_(False)


def prune_by_name(
    model: nn.Module, policy: str, dial: float | None = None, *, keep_what: KeepWhat | None = None,
    **targets: Any,
) -> PrunedViT:  # fmt: skip
    """`model` pruned by a policy file, a shipped policy, one on the hub, or "rule", the starting rule."""
    from tokengame.policies import Policy
    from tokengame.policies.policy import find_policy
    from tokengame.runtime import prune
    from tokengame.runtime.rule import RULE

    if policy == RULE:
        return prune(model, dial=dial, keep_what=keep_what, **targets)
    path = find_policy(policy)
    found = Policy.load(path)
    own = tuned_weights(found, path, model)
    return prune(own, found, dial, **targets)


def report_bad(tally: BadImages) -> None:
    """Say which images were skipped."""
    if tally.reasons:
        name, reason = next(iter(tally.reasons.items()))
        skipped = f"skipped {len(tally.reasons)} unreadable of {tally.total} images"
        console.print(f"{skipped}, the first is {name}: {reason}", markup=False, soft_wrap=True)


def show_rivals(rows: list[dict[str, Any]]) -> None:
    """A table of those that ran, and a sentence for each that did not; rows may begin with other columns."""
    labels = {"milliseconds": "ms", "images_per_second": "img/s", "agreement": "agree-\nment"}
    columns = {key: labels.get(key, key) for key in rows[0] if key != "refused"}
    ran = [row | {"fastest": "yes" if row["fastest"] else ""} for row in rows if row["refused"] is None]
    if ran:
        show_rows(ran, columns)
    sentences = dict.fromkeys(f"{row['rival']}{_where(row)}: {row['refused']}" for row in rows if row["refused"])
    for sentence in sentences:
        console.print(f"not timed: {sentence}", markup=False, soft_wrap=True)


def _where(row: dict[str, Any]) -> str:
    return f" ({row['format']}, batch {row['batch']})" if "format" in row else ""


def ratio_headings(row: dict[str, Any]) -> dict[str, str]:
    """Columns of what is lost at each compute ratio, of those that `row` has."""
    from tokengame.measure.evaluate import RATIOS

    labels = {"agreement": "agree", "kl": "KL", "same_neighbour": "same\nneighbour", "distance": "1 - cosine"}
    columns = {f"{name}_{ratio}": f"{label}\nat {ratio}" for ratio in RATIOS for name, label in labels.items()}
    return {name: label for name, label in columns.items() if name in row}
