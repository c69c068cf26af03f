"""What a pruned model is to keep of the native one: what is compared, by what loss, and what is reported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tokengame.backbones import Backbone
from tokengame.backbones.classes import output_of, require_logits
from tokengame.config import TYPICAL_LOSS, KeepWhat
from tokengame.errors import TokenGameError, first_line
from tokengame.files import require_file
from tokengame.measure.fidelity import cosines, fidelity_loss
from tokengame.measure.scores import EmbeddingScores, FeatureScores, Measured, Scores
from tokengame.runtime.features import GridMethod
from tokengame.runtime.method import Method
from tokengame.runtime.pruned import PrunedViT


class Kind(ABC):
    """One of `KINDS`.

    Args:
        backbone: the model.
        bank: of embeddings: [n, D] those of classes or texts, to measure zero-shot answers by.
        decoder: of features: [B, prefix + N, C] -> [B, ...], to measure what is made of them.

    Raises:
        TokenGameError: the model does not give it.
    """

    name: ClassVar[KeepWhat]
    on_grid: ClassVar[bool] = False
    """whether features of all places are compared, so that games must be restored onto the grid"""
    scaled: ClassVar[bool] = True
    """whether the loss has no unit of its own, so that training divides it by a scale"""
    price: ClassVar[float] = 2.5
    """of a unit of loss, where a nat at the preset's temperature costs 1: that at which the untrained policy of
    DINOv2-S would prune neither more nor less"""
    figure: ClassVar[str] = "loss"
    """name of the loss among the metrics of training"""

    def __init__(
        self, backbone: Backbone, bank: Tensor | None = None, decoder: Callable[[Tensor], Tensor] | None = None
    ):
        self.prefix, self.bank, self.decoder = backbone.prefix, bank, decoder
        self.check(backbone)

    @abstractmethod
    def check(self, backbone: Backbone) -> None:
        """Raise TokenGameError where the model does not give it."""

    def native(self, backbone: Backbone, images: Tensor) -> Tensor:
        """What the native model gives for [B, channels, height, width] images."""
        return backbone.native(images)

    def measures(self, _method: Method) -> bool:
        """Whether `method` gives what is compared."""
        return True

    def method(self, method: Method) -> Method:
        """`method` with what is compared as the `logits` of its output."""
        return method

    @abstractmethod
    def loss(self, native: Tensor, pruned: Tensor) -> Tensor:
        """[G] of G games, as many on each of B images, played one after the other.

        Args:
            native: [B, ...].
            pruned: [G, ...].
        """

    def charge(self, _native: Tensor, _pruned: Tensor, loss: Tensor, _temperature: float) -> Tensor:
        """[G] what agents pay for losses [G], scaled; a price that says more about a decision than the loss.

        Here 2 sqrt(TYPICAL_LOSS loss), in proportion to the length of the difference of normed vectors. Beside the loss
        itself, which a few bad games dominate, it has a third more signal about the policy's weights, and four times
        that of the KL of similarities to other embeddings (docs/LOG.md). A typical loss has the same slope in both.
        """
        return 2 * (TYPICAL_LOSS * loss.clamp(min=0)).sqrt()

    def metrics(self, native: Tensor, pruned: Tensor) -> dict[str, float]:
        """What else training records, by the arguments of `loss`."""
        return {"game/distance": float(self.loss(native, pruned).mean())}

    @abstractmethod
    def scores(self) -> Measured:
        """An empty record of what is measured."""


class Logits(Kind):
    """Predicted classes: KL(native || pruned)."""

    name, scaled, price, figure = "logits", False, 1.0, "kl"

    def check(self, backbone: Backbone) -> None:
        require_logits(backbone)

    def loss(self, native: Tensor, pruned: Tensor) -> Tensor:
        return fidelity_loss(_for_games(native, pruned), pruned)

    def charge(self, native: Tensor, pruned: Tensor, _loss: Tensor, temperature: float) -> Tensor:
        return fidelity_loss(_for_games(native, pruned), pruned, temperature)

    def metrics(self, native: Tensor, pruned: Tensor) -> dict[str, float]:
        same = pruned.argmax(1) == _for_games(native, pruned).argmax(1)
        return {"game/agreement": float(same.float().mean())}

    def scores(self) -> Measured:
        return Scores()


class Embedding(Kind):
    """An embedding: 1 - cosine."""

    name = "embedding"

    def check(self, backbone: Backbone) -> None:
        output_of(backbone)
        if self.bank is None:
            return
        width = _width(backbone)
        if self.bank.ndim != 2 or self.bank.shape[1] != width:
            raise TokenGameError(
                f"the bank is {list(self.bank.shape)} and must be [n, {width}]: one row for each class or text, as "
                "wide as the model's embedding"
            )

    def loss(self, native: Tensor, pruned: Tensor) -> Tensor:
        return 1 - cosines(_for_games(native, pruned), pruned)

    def scores(self) -> Measured:
        return EmbeddingScores(bank=self.bank)


class Features(Kind):
    """Features of every patch on the full grid: 1 - cosine at each place, mean over places."""

    name, on_grid = "features", True

    def check(self, backbone: Backbone) -> None:
        pass

    def native(self, backbone: Backbone, images: Tensor) -> Tensor:
        return backbone.native_features(images)

    def measures(self, method: Method) -> bool:
        return isinstance(method, PrunedViT) or hasattr(method, "on_grid")

    def method(self, method: Any) -> Method:
        return GridMethod(method) if isinstance(method, PrunedViT) else method.on_grid()

    def loss(self, native: Tensor, pruned: Tensor) -> Tensor:
        patches = (features[:, self.prefix :] for features in (_for_games(native, pruned), pruned))
        return 1 - cosines(*patches).mean(1)

    def scores(self) -> Measured:
        return FeatureScores(prefix=self.prefix, decoder=self.decoder)


KINDS: dict[KeepWhat, type[Kind]] = {"logits": Logits, "embedding": Embedding, "features": Features}


@torch.inference_mode()
def _width(backbone: Backbone) -> int:
    """Of an embedding, found by embedding a black image."""
    size = backbone.preprocessing()["input_size"]
    return backbone.native(torch.zeros(1, *size, device=backbone.device, dtype=backbone.dtype)).shape[1]


def _for_games(native: Tensor, pruned: Tensor) -> Tensor:
    """[B, ...] -> [G, ...] for as many games on each image."""
    return native.repeat_interleave(len(pruned) // max(len(native), 1), 0)


def kind_of(backbone: Backbone, keep_what: KeepWhat | None = None, **given: Any) -> Kind:
    """The kind that is named, or that the model gives: logits, or an embedding.

    Args:
        backbone: the model.
        keep_what: one of `KINDS`.
        given: `bank` of an embedding, `decoder` of features; see `Kind`.

    Raises:
        TokenGameError: the model does not give what is named, or has one output; or something is given that belongs to
            another kind.
    """
    name = keep_what or output_of(backbone)
    if name not in KINDS:
        raise TokenGameError(f"--keep-what must be one of {', '.join(KINDS)}, not {keep_what!r}")
    for what, kind in (("bank", "embedding"), ("decoder", "features")):
        if given.get(what) is not None and name != kind:
            raise TokenGameError(f"a {what} is to measure {kind} with, and {name} are kept; see --keep-what")
    return KINDS[name](backbone, **given)


def read_bank(path: str | Path) -> Tensor:
    """The one tensor [n, D] of a safetensors file.

    Raises:
        TokenGameError: it cannot be read, or holds another number of tensors, or numbers that are not finite.
    """
    require_file(path, "bank of embeddings")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise TokenGameError(f"--bank {path} is damaged or not safetensors ({first_line(error)})") from None
    if len(tensors) != 1:
        raise TokenGameError(f"--bank {path} holds {len(tensors)} tensors, and must hold one, [n, width]")
    (bank,) = tensors.values()
    if bank.ndim != 2 or not len(bank) or not bank.is_floating_point() or not bank.isfinite().all():
        raise TokenGameError(f"--bank {path} must hold one tensor of finite numbers [n, width], not {list(bank.shape)}")
    return bank.float()
