"""Whether an exported graph decides and predicts what PyTorch does, image by image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokengame import kernels
from tokengame.deploy.graph import GraphOutput
from tokengame.errors import TokenGameError
from tokengame.files import Progress, silent
from tokengame.measure.against import alike
from tokengame.measure.fidelity import fidelity_loss
from tokengame.measure.kinds import kind_of
from tokengame.runtime import PrunedViT

Run = Callable[[np.ndarray, np.ndarray], list[np.ndarray]]
"""images [B, channels, height, width], dials [B] -> the arrays of `GraphOutput`"""
TOLERANCE = 1e-4
"""of outputs, times the greatest absolute one where that exceeds 1"""

LEAST = 0.5
"""agreement with float32, or cosine, below which a graph in int8 is refused"""


@dataclass(frozen=True)
class Parity:
    """How far a graph is from PyTorch."""

    images: int
    max_abs_difference: float
    """of outputs"""
    tokens_kept: list[float]
    """share of patch tokens left after each decision, on average"""


@dataclass(frozen=True)
class Likeness:
    """How like PyTorch in float32 a graph in int8 is: like the pruned model, and like the native one."""

    images: int
    likeness: str
    """what figures are: "agreement" (the share of images with the same class) or "cosine" (of embeddings, the mean)"""
    like_float32: float
    like_native: float
    kl_native: float | None
    """KL divergence from the native model's classes to the graph's, the mean; None of embeddings"""
    tokens_kept: list[float]
    """share of patch tokens left after each decision, on average"""
    tokens_kept_float32: list[float]


def compare_int8(run: Run, fast: PrunedViT, images: Tensor, batch_size: int, progress: Progress = silent) -> Likeness:
    """Run a graph in int8 and PyTorch in float32 on the same images, at the pruned model's dial.

    Args:
        run: the graph.
        fast: the pruned model in float32 on the CPU.
        images: [B, channels, height, width].
        batch_size: images that are run at once.
        progress: shows the batches.

    Raises:
        TokenGameError: outputs are not finite, or less than `LEAST` like those of float32.
    """
    found: list[tuple[Tensor, ...]] = []
    kind, batches = kind_of(fast.game.backbone), images.split(batch_size)
    for batch in progress(batches, "comparing with PyTorch", len(batches)):
        dial = torch.full((len(batch),), float(fast.dial))
        got = GraphOutput(*(torch.from_numpy(np.array(array)) for array in run(batch.numpy(), dial.numpy())))
        with torch.no_grad():
            want, native = _predicted(fast, batch), kind.native(fast.game.backbone, batch)
        found.append((got.output, want.output, native, got.tokens_kept, want.tokens_kept))
    output, pruned, native, kept, kept_float32 = (torch.cat(part) for part in zip(*found, strict=True))
    like, like_native = (sum(alike(kind.name, of, output)) / len(output) for of in (pruned, native))
    if not output.isfinite().all() or like < LEAST:
        raise TokenGameError(
            f"in int8 the graph is only {like:.2f} like float32, less than {LEAST}, so it is not usable: export "
            "without int8, or give more images"
        )
    classes, patches = kind.name == "logits", got.alive.shape[1]
    return Likeness(
        images=len(images),
        likeness="agreement" if classes else "cosine",
        like_float32=like,
        like_native=like_native,
        kl_native=float(fidelity_loss(native, output).mean()) if classes else None,
        tokens_kept=(kept.double() / patches).mean(0).tolist(),
        tokens_kept_float32=(kept_float32.double() / patches).mean(0).tolist(),
    )


def compare(run: Run, fast: PrunedViT, images: Tensor, batch_size: int, progress: Progress = silent) -> Parity:
    """Run a graph and PyTorch on the same images, at the pruned model's dial.

    Where tokens are exactly alike, as in an even background, rounding says which one absorbs another: an image agrees
    with PyTorch in this batch, or with PyTorch on the image alone.

    Args:
        run: the graph.
        fast: the pruned model in float32 on the CPU.
        images: [B, channels, height, width].
        batch_size: images that are run at once.
        progress: shows the batches.

    Raises:
        TokenGameError: an image is decided otherwise, or its output is too far off.
    """
    found, worst, largest = [], 0.0, 1.0
    batches = images.split(batch_size)
    for number, batch in enumerate(progress(batches, "comparing with PyTorch", len(batches))):
        dial = torch.full((len(batch),), float(fast.dial))
        got = GraphOutput(*(torch.from_numpy(np.array(array)) for array in run(batch.numpy(), dial.numpy())))
        wanted = _wanted(fast, batch)
        for image in range(len(batch)):
            off = [_off(got, want, image) for want in wanted if torch.equal(got.alive[image], want.alive[image])]
            if not off:
                raise TokenGameError(
                    f"the graph keeps other tokens of image {number * batch_size + image} than PyTorch, so it is not "
                    "usable: export with other versions of torch and of the engine, and report it"
                )
            worst = max(worst, min(off))
        largest = max(largest, float(wanted[0].output.abs().max()))
        found.append(got.tokens_kept.double() / got.alive.shape[1])
    if worst > TOLERANCE * largest:
        raise TokenGameError(
            f"outputs of the graph are up to {worst:.2g} from PyTorch's, more than {TOLERANCE * largest:.2g}: the "
            "engine may compute in another number format than float32"
        )
    return Parity(len(images), worst, torch.cat(found).mean(0).tolist())


def _wanted(fast: PrunedViT, images: Tensor) -> list[GraphOutput]:
    """Of the batch, and of its images one by one."""
    with kernels.disabled(), torch.no_grad():
        alone = [_predicted(fast, image[None]) for image in images] if len(images) > 1 else []
        together = [GraphOutput(*map(torch.cat, zip(*alone, strict=True)))] if alone else []
        return [_predicted(fast, images), *together]


def _predicted(fast: PrunedViT, images: Tensor) -> GraphOutput:
    output = fast.predict(images)
    return GraphOutput(output.logits, torch.stack(output.kept, 1), output.alive)


def _off(got: GraphOutput, want: GraphOutput, image: int) -> float:
    return float((got.output[image] - want.output[image]).abs().max())
