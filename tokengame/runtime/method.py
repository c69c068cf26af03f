"""What every method that predicts with fewer tokens offers to measurement: the pruned model and all baselines."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Output(Protocol):
    """The prediction for B images."""

    @property
    def logits(self) -> Tensor:
        """[B, classes]"""

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """[B] patch tokens left after each reduction"""

    @property
    def total(self) -> int:
        """patch tokens of an image at the start"""


class Method(Protocol):
    """A model with fewer tokens."""

    def predict(self, images: Tensor) -> Any:
        """Run [B, channels, height, width] images; returns an `Output`, which may have `fallback` indices."""

    def macs(self, output: Any) -> tuple[float, Tensor]:
        """Multiply-accumulates of an image natively, and of each image [B] of an output."""
