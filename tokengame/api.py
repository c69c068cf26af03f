"""What the commands do, as functions: `train`, `evaluate` and `calibrate` a policy on whatever gives images.

Images are a tensor [images, channels, height, width], or a data set or loader of PyTorch; tensors are taken as they
are. Or a list of PIL images, a folder, a tar or any other place that `--images` takes: these get the transform of the
model. Items may be (image, label), or dictionaries with "image" or "pixel_values", and "label".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

import tokengame.measure.evaluate as measuring
from tokengame.backbones import Backbone, unwrapped, wrap
from tokengame.backbones.classes import classes_of
from tokengame.config import KeepWhat, TrainConfig
from tokengame.data.batches import Batch
from tokengame.data.datasets import label_images, split_images
from tokengame.data.given import batches_of, opened
from tokengame.data.samples import BatchStream, Samples
from tokengame.errors import TokenGameError, warn
from tokengame.files import Progress, silent
from tokengame.learning.learner import check_labels
from tokengame.learning.run import TrainingRun
from tokengame.measure.against import RivalRun
from tokengame.measure.conditions import conditions, engines
from tokengame.measure.kinds import Kind, kind_of
from tokengame.packed.attention import deterministic_attention
from tokengame.policies import Policy
from tokengame.policies.policy import check_target, dial_for
from tokengame.progress import progress as bar
from tokengame.ranges import require
from tokengame.runtime import PrunedViT
from tokengame.runtime.calls import check_size
from tokengame.runtime.rule import name_of


def train(
    model: nn.Module,
    images: Any,
    *,
    gmacs_ratio: float | None = None,
    keep_what: KeepWhat | None = None,
    updates: int | None = None,
    batch_size: int | None = None,
    config: TrainConfig | None = None,
    output: str | Path | None = None,
    seed: int = 0,
    resume: bool | None = False,
    overwrite: bool = False,
    holdout: float = 0.2,
    workers: int = 0,
    progress: bool = True,
) -> Policy:
    """Learn a policy for a model.

    Args:
        model: of a supported family, on the device to train on; it is not changed.
        images: to learn from (see `tokengame.api`); they need no labels.
        gmacs_ratio: pruned / native compute that the policy is to recommend, by calibration; without it, dial 0.5.
        keep_what: "logits", "embedding" or "features"; by default what the model gives, class logits or an embedding.
        updates, batch_size: instead of those of `config`.
        config: settings; by default those of the preset "tokengame".
        output: the policy file; metrics and checkpoints go beside it, into NAME_log. Without it nothing is kept.
        seed: of everything random.
        resume: continue from the checkpoint of `output`; None: if there is one.
        overwrite: replace what an earlier run left at `output`; without it, that is refused.
        holdout: share of the images held back, on which the dials are calibrated.
        workers: processes that decode images.
        progress: whether progress bars are shown.

    Returns:
        The policy, calibrated; `tokengame.prune(model, policy)` applies it.

    Raises:
        TokenGameError: the model is not supported, these are no images of its size, or a run is there that is neither
            to be continued nor replaced.
    """
    if gmacs_ratio is not None:
        check_target("gmacs_ratio", gmacs_ratio)
    require(output is not None or not resume, "resume= continues the run of output=; give that")
    model, shown = unwrapped(model), bar if progress else silent
    backbone = wrap(model)
    learn, held = split_images(_source(images, backbone), holdout, seed)
    with ExitStack() as stack:
        place = Path(stack.enter_context(TemporaryDirectory())) / "policy.safetensors" if output is None else output
        run = TrainingRun(
            model, name_of(model), _settings(config, keep_what, updates, batch_size), learn, Path(place), seed=seed,
            device=str(backbone.device), resume=resume, overwrite=overwrite, workers=workers,
        )  # fmt: skip
        run.run(shown)
        run.finish(held, shown)
        policy = Policy.load(place)
        if gmacs_ratio is not None:
            policy.card["dial"] = _dial(policy.card, gmacs_ratio)
            policy.save(place)
    return policy


def _settings(
    config: TrainConfig | None, keep_what: KeepWhat | None, updates: int | None, batch_size: int | None
) -> TrainConfig:
    given = {"keep_what": keep_what, "updates": updates, "batch_size": batch_size}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(config or TrainConfig.from_preset("tokengame"), **changes)


def _dial(card: dict[str, Any], gmacs_ratio: float) -> float:
    """The dial that takes this compute; the nearest one calibrated, with a warning, where none does."""
    try:
        return dial_for(card, gmacs_ratio=gmacs_ratio)
    except TokenGameError as error:
        row = min(card["calibration"], key=lambda row: abs(row["gmacs_ratio"] - gmacs_ratio))
        warn(f"{error}; the policy recommends {row['gmacs_ratio']:.2f}")
        return row["dial"]


def evaluate(
    fast: PrunedViT,
    images: Any,
    *,
    keep_what: KeepWhat | None = None,
    bank: Tensor | None = None,
    decoder: Callable[[Tensor], Tensor] | None = None,
    rivals: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a pruned model beside the native one on the same images.

    Args:
        fast: the pruned model.
        images: to measure on (see `tokengame.api`), with labels for what is lost of top-1; none that it learned from.
        keep_what: what is compared, as in `train`; by default what the policy was made for.
        bank: of an embedding: [n, D] those of classes or texts, by which zero-shot answers are compared.
        decoder: of features: [B, prefix + N, C] -> [B, ...], whose results are compared.
        rivals: whether the native model is also timed compiled, in ONNX Runtime and OpenVINO, and in int8, on batches
            as large as the first; `speedup` is then over the fastest of the same precision (`speedup_over`).
        workers: processes that decode images.
        progress: whether a progress bar is shown.

    Returns:
        The keys of `tokengame eval --json`: images, gmacs_ratio, speedup, ...; of logits top1_native, drop_pp,
        agreement, kl; of an embedding cosine, same_neighbour, recall_at_1; of features feature_cosine.

    Raises:
        TokenGameError: the model does not give what is to be compared, these are no images of its size, or labels are
            no classes of it.
    """
    batches = _batches(fast.game.backbone, images, workers, "measuring", progress)
    kind = _kind(fast, keep_what, bank=bank, decoder=decoder)
    run = RivalRun() if rivals else None
    result = measuring.evaluate(fast, batches, kind=kind, rivals=run).summary()
    if run is not None:
        result |= run.summary() | engines()
    dtype = fast.game.backbone.dtype
    about = {"dial": fast.dial, "dtype": str(dtype).removeprefix("torch.")}
    return result | about | conditions(dtype, fast.game.backbone.device)


def _kind(fast: PrunedViT, keep_what: KeepWhat | None, **given: Any) -> Kind:
    """What is compared: what the caller says, or features where the policy was made for them, or the model's output."""
    on_grid: KeepWhat | None = "features" if fast.card.get("keeps") == "features" else None
    return kind_of(fast.game.backbone, keep_what or on_grid, **given)


def calibrate(
    fast: PrunedViT, images: Any, *, keep_what: KeepWhat | None = None, workers: int = 0, progress: bool = True
) -> Policy:
    """Measure every dial of a pruned model's policy, so that `prune` meets targets: a compute, a guaranteed loss.

    Args:
        fast: the pruned model; its dial does not matter.
        images: to measure on (see `tokengame.api`), labelled for a guaranteed drop; none that the policy learned from.
        keep_what: as in `evaluate`.
        workers: processes that decode images.
        progress: whether a progress bar is shown.

    Returns:
        The policy with its calibration; `save` writes it.

    Raises:
        TokenGameError: as `evaluate`, and where the model was not pruned by a policy.
    """
    require("calibration" in fast.card, "calibrate takes a model that is pruned by a policy: tokengame.prune(...)")
    batches = _batches(fast.game.backbone, images, workers, "calibrating dials", progress)
    kind = _kind(fast, keep_what)
    attention, fast.game.attention = fast.game.attention, deterministic_attention  # no figure depends on the speed
    try:
        rows = measuring.calibrate(fast, batches, kind=kind)
    finally:
        fast.game.attention = attention
    return Policy(deepcopy(fast.actor), deepcopy(fast.card) | {"calibration": rows, "keeps": kind.name})


def _source(images: Any, backbone: Backbone) -> Any:
    """A source or a stream to learn from; what is taken as it is must be of the model's size."""
    source = opened(images)
    if isinstance(source, (Samples, BatchStream)):
        image = source.open(0) if isinstance(source, Samples) else source.first.open(0)
        if isinstance(image, Tensor):
            check_size(backbone, image[None])
    elif source is not images:
        label_images(source, None, classes_of(backbone))
    return source


def _batches(backbone: Backbone, images: Any, workers: int, what: str, progress: bool) -> Iterator[Batch]:
    """All batches of what a caller brings, checked, behind a progress bar."""
    if isinstance(images, (str, Path)):
        images = _source(images, backbone)
    show: Progress = bar if progress else silent
    batches, number = batches_of(images, backbone.preprocessing(), workers)
    for batch in show(batches, what, number):
        check_size(backbone, batch.images)
        if classes_of(backbone):
            check_labels(batch.labels, len(batch.images), classes_of(backbone))
        yield batch
