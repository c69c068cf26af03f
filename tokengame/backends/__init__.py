"""What computes a forward pass: a registry of backends, tried in order of preference."""

from __future__ import annotations

from torch import Tensor

from tokengame.backbones.base import Backbone
from tokengame.backends.base import Backend
from tokengame.backends.compiled import CompiledBlocks, CompiledDecisions
from tokengame.backends.pytorch import TorchBackend
from tokengame.packed.attention import Kernel, fastest_attention

BACKENDS: tuple[type[TorchBackend], ...] = (CompiledBlocks, CompiledDecisions, TorchBackend)
"""the first whose `ready` returns a backend computes"""

__all__ = ["BACKENDS", "Backend", "CompiledBlocks", "CompiledDecisions", "TorchBackend", "choose"]


def choose(backbone: Backbone, images: Tensor, attention: Kernel = fastest_attention) -> Backend:
    """The backend for a forward pass on `images` [B, channels, height, width].

    Args:
        backbone: what will be run.
        images: of the pass; number format, device and gradients decide.
        attention: inside each image, see `TorchBackend`.

    Raises:
        TokenGameError: the model has changed, and cannot be run exactly any more.
    """
    backbone.refresh()
    for backend in BACKENDS:
        if ready := backend.ready(backbone, images, attention):
            return ready
    raise AssertionError("TorchBackend is always ready")
