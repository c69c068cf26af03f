"""What is measured of each image, natively and pruned, and the figures that sum it up: one class for each kind."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, mode
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from tokengame.data.batches import Batch
from tokengame.errors import TokenGameError
from tokengame.measure.fidelity import cosines, fidelity_loss, neighbour_ranks
from tokengame.measure.risk import interval, mean_bound, upper_bound
from tokengame.runtime.method import Method

RECALLED = (1, 5, 10)
"""numbers of neighbours within which the native model's nearest one is looked for"""


@dataclass
class Measured(ABC):
    """Compute and time; one entry per image where nothing else is said, in the loader's order."""

    calibrated: ClassVar[tuple[str, ...]]
    """figures of `summary` that calibration writes to the card"""
    index: list[int] = field(default_factory=list)
    macs: list[float] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    """tokens left after each stage"""
    positions: list[Tensor] = field(default_factory=list)
    """grid positions of the tokens left at the end"""
    macs_native: float = 0.0
    tokens: int = 0
    fallback: list[int] = field(default_factory=list)
    """how many images of each batch fell back to all tokens"""
    seconds: list[tuple[int, float, float]] = field(default_factory=list)
    """of each batch: size, native, pruned"""
    seconds_pytorch: list[float] = field(default_factory=list)
    """of each batch, pruned on PyTorch's kernels, where these were timed too"""

    @staticmethod
    def joined(parts: list[Any]) -> Any:
        """The scores of several processes in one."""
        whole = copy.copy(parts[0])
        for part in parts[1:]:
            for name, value in vars(part).items():
                if isinstance(value, list):
                    setattr(whole, name, getattr(whole, name) + value)
            whole.macs_native, whole.tokens = part.macs_native or whole.macs_native, part.tokens or whole.tokens
        return whole

    def add(self, method: Method, batch: Batch, native: Tensor, output: Any) -> None:
        """Add a batch: what the native model gives, and the output of `method`.

        Raises:
            TokenGameError: what the native model gives is not finite.
        """
        if not native.isfinite().all():
            raise TokenGameError("the native model's prediction is not finite; check its weights")
        self.index += batch.index.tolist()
        self.compare(native, output.logits.float(), batch.labels)
        self.macs_native, macs = method.macs(output)
        self.tokens = output.total
        self.fallback.append(len(getattr(output, "fallback", ())))
        self.macs += macs.tolist()
        self.kept += torch.stack(output.kept, 1).tolist() if output.kept else [[] for _ in macs]

    @abstractmethod
    def compare(self, native: Tensor, pruned: Tensor, labels: Tensor | None) -> None:
        """Add what B images lose: `native` and `pruned` as the kind has them, labels [B] where there are any."""

    @abstractmethod
    def fidelity(self) -> dict[str, Any]:
        """How far the pruned model is from the native one."""

    @abstractmethod
    def guarantee(self) -> dict[str, Any]:
        """The bound, at 95 % confidence, of what is lost over all images, under its name on the card."""

    def adaptivity(self) -> dict[str, Any]:
        """How compute follows the image."""
        return {}

    def summary(self) -> dict[str, Any]:
        """The JSON keys of `eval`.

        Raises:
            TokenGameError: there is no image.
        """
        count, macs = len(self.macs), np.asarray(self.macs)
        if not count:
            raise TokenGameError("no readable image to measure on")
        return {
            "images": count,
            **self.fidelity(),
            "gmacs_native": self.macs_native / 1e9,
            "gmacs_pruned": float(macs.mean()) / 1e9,
            "gmacs_ratio": float(macs.mean()) / self.macs_native,
            "gmacs_ratio_std": float(macs.std()) / self.macs_native,
            **self.adaptivity(),
            "fallback_share": sum(self.fallback) / count,
            "tokens_kept": [float(n) for n in np.mean(self.kept, 0)],
            "tokens": self.tokens,
            **self._speed(),
        }

    def row(self) -> dict[str, Any]:
        """The figures of a calibrated dial."""
        summary = self.summary()
        row = {name: summary[name] for name in ("gmacs_ratio", *self.calibrated, "images")}
        row |= {"gmacs": summary["gmacs_pruned"], "keep": summary["tokens_kept"][-1] / self.tokens}
        return row | self.guarantee()

    def _speed(self) -> dict[str, Any]:
        """Medians over the batches of the most frequent size; a short last batch would not be comparable."""
        if not self.seconds:
            return {}
        size = mode(size for size, _, _ in self.seconds)
        native = median(native for batch, native, _ in self.seconds if batch == size)
        pruned = median(pruned for batch, _, pruned in self.seconds if batch == size)
        found = {
            "batch_size": size,
            "images_per_second_native": size / native,
            "images_per_second_pruned": size / pruned,
            "speedup": native / pruned,
        }
        if self.seconds_pytorch:
            pairs = zip(self.seconds, self.seconds_pytorch, strict=True)
            found["speedup_pytorch"] = native / median(plain for (batch, _, _), plain in pairs if batch == size)
        return found


@dataclass
class Scores(Measured):
    """Predicted classes."""

    calibrated = ("agreement", "kl", "drop_pp", "drop_pp_ci95")
    correct_native: list[bool] = field(default_factory=list)
    correct_pruned: list[bool] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    """the native model's probability of its own prediction"""

    def compare(self, native: Tensor, pruned: Tensor, labels: Tensor | None) -> None:
        """Logits [B, classes]."""
        if labels is not None:
            labels = labels.to(native.device)
            self.correct_native += (native.argmax(1) == labels).tolist()
            self.correct_pruned += (pruned.argmax(1) == labels).tolist()
        self.agree += (native.argmax(1) == pruned.argmax(1)).tolist()
        self.kl += fidelity_loss(native, pruned).tolist()
        self.confidence += native.softmax(1).amax(1).tolist()

    def fidelity(self) -> dict[str, Any]:
        """Top-1 where images are labelled, agreement and KL(native || pruned)."""
        return {**self._labelled(), "agreement": float(np.mean(self.agree)), "kl": float(np.mean(self.kl))}

    def adaptivity(self) -> dict[str, Any]:
        """Spearman's rank correlation over images of compute and native uncertainty; None where one is flat."""
        macs, uncertainty = np.asarray(self.macs), -np.asarray(self.confidence)
        flat = np.ptp(macs) == 0 or np.ptp(uncertainty) == 0
        return {"compute_vs_uncertainty": None if flat else float(spearmanr(macs, uncertainty).statistic)}

    def _labelled(self) -> dict[str, Any]:
        if not self.correct_native:
            return dict.fromkeys(("top1_native", "top1_pruned", "drop_pp", "drop_pp_ci95"))
        lost, gained = self.lost_and_gained()
        images = len(self.correct_native)
        return {
            "top1_native": float(np.mean(self.correct_native)),
            "top1_pruned": float(np.mean(self.correct_pruned)),
            "drop_pp": 100 * (lost - gained) / images,
            "drop_pp_ci95": [100 * end for end in interval(lost, gained, images)],
        }

    def lost_and_gained(self) -> tuple[int, int]:
        """How many images the native model alone got right, and the pruned one alone: each is its own control."""
        native, pruned = np.asarray(self.correct_native), np.asarray(self.correct_pruned)
        return int((native & ~pruned).sum()), int((pruned & ~native).sum())

    def guarantee(self) -> dict[str, Any]:
        """Points of top-1 lost at most; None without labels."""
        bound = None
        if self.correct_native:
            bound = 100 * upper_bound(*self.lost_and_gained(), len(self.correct_native))
        return {"drop_pp_bound95": bound}


@dataclass
class Distances(Measured):
    """What is compared by cosines."""

    cosine: list[float] = field(default_factory=list)

    @property
    def distances(self) -> np.ndarray:
        """1 - cosine, where a cosine below 0 is as bad as 0: a loss between 0 and 1."""
        return (1 - np.asarray(self.cosine)).clip(0, 1)

    def fidelity(self) -> dict[str, Any]:
        """Mean distance."""
        return {"distance": float(self.distances.mean())}

    def guarantee(self) -> dict[str, Any]:
        """Mean distance at most."""
        return {"distance_bound95": mean_bound(self.distances)}


@dataclass
class EmbeddingScores(Distances):
    """Embeddings [D] of all images, native and pruned."""

    calibrated = ("cosine", "distance", "same_neighbour")
    native: list[Tensor] = field(default_factory=list)
    pruned: list[Tensor] = field(default_factory=list)
    bank: Tensor | None = None
    """[n, D] embeddings of classes or texts, of which each image has a nearest one"""

    def compare(self, native: Tensor, pruned: Tensor, _labels: Tensor | None) -> None:
        """Embeddings [B, D]."""
        self.cosine += cosines(native, pruned).tolist()
        self.native += native.cpu().unbind()
        self.pruned += pruned.cpu().unbind()

    def fidelity(self) -> dict[str, Any]:
        """Cosine with the native embedding, and how far it leads to the same neighbours."""
        native, pruned = (F.normalize(torch.stack(rows), dim=1) for rows in (self.native, self.pruned))
        found = {"cosine": float(np.mean(self.cosine)), **super().fidelity(), **_neighbours(native, pruned)}
        if self.bank is not None:
            bank = F.normalize(self.bank.float(), dim=1)
            nearest, answer = ((rows @ bank.T).argmax(1) for rows in (native, pruned))
            found["zero_shot_agreement"] = float((nearest == answer).float().mean())
        return found


def _neighbours(native: Tensor, pruned: Tensor) -> dict[str, float | None]:
    """How often the nearest other image is the native model's, from normed embeddings [n, D].

    Returns:
        same_neighbour, all images pruned; same_neighbour_native_gallery, where pruned queries meet native embeddings;
        recall_at_k, the native model's nearest image is among the k nearest, all images pruned. None for one image.
    """
    names = ["same_neighbour", "same_neighbour_native_gallery", *(f"recall_at_{k}" for k in RECALLED)]
    if len(native) < 2:
        return dict.fromkeys(names)
    within, across = neighbour_ranks(native, pruned, pruned), neighbour_ranks(native, pruned, native)
    shares = [within < 1, across < 1, *(within < k for k in RECALLED)]
    return dict(zip(names, (float(share.float().mean()) for share in shares), strict=True))


@dataclass
class FeatureScores(Distances):
    """Features of all places of the grid."""

    calibrated = ("feature_cosine", "feature_cosine_q05", "distance")
    places: list[Tensor] = field(default_factory=list)
    """[N] cosine at each place of an image"""
    decoded: list[float] = field(default_factory=list)
    """relative distance of what `decoder` makes of both"""
    prefix: int = 0
    """rows before those of patches"""
    decoder: Callable[[Tensor], Tensor] | None = None
    """[B, prefix + N, C] features -> [B, ...]"""

    def compare(self, native: Tensor, pruned: Tensor, _labels: Tensor | None) -> None:
        """Features [B, prefix + N, C], normed."""
        found = cosines(native[:, self.prefix :], pruned[:, self.prefix :])
        self.cosine += found.mean(1).tolist()
        self.places += found.cpu().unbind()
        if self.decoder is not None:
            wanted, other = (self.decoder(features).float().flatten(1) for features in (native, pruned))
            self.decoded += ((other - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-12)).tolist()

    def fidelity(self) -> dict[str, Any]:
        """Cosine at each place: mean, and the 5 % quantile over the places of all images."""
        found = {"feature_cosine": float(np.mean(self.cosine))}
        found |= {"feature_cosine_q05": float(np.quantile(torch.cat(self.places).numpy(), 0.05)), **super().fidelity()}
        return found | ({"decoded_distance": float(np.mean(self.decoded))} if self.decoded else {})
