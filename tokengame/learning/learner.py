"""What the learners, `Trainer` and `Tuner`, have in common: labels that are checked, states that fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokengame.errors import TokenGameError, first_line


def check_labels(labels: Tensor | None, images: int, classes: int) -> None:
    """Refuse labels [B] that are not classes of the model; none are fine.

    Raises:
        TokenGameError: not as many as images, no integers, or outside 0 to `classes` - 1.
    """
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.shape != (images,):
        found = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise TokenGameError(f"labels must be a tensor of one class for each of {images} images, not {found}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TokenGameError(f"labels must be integers, not {labels.dtype}")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise TokenGameError(
            f"label {int(wrong[0])} is no class of the model, whose classes are 0 to {classes - 1}; leave out images "
            "without a label, or learn without labels"
        )


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """In this context what a state lacks, or has in another shape, is one sentence."""
    try:
        yield
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[1] if len(lines) > 1 else first_line(error)  # torch names the tensor in the second line
        raise TokenGameError(f"the saved state does not fit this {what}: {reason}") from None


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state whose moments have the shapes of the parameters, which PyTorch does not check.

    Raises:
        ValueError: they have not.
    """
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            moment = moments.get(name)
            if isinstance(moment, Tensor) and moment.shape != parameter.shape:
                raise ValueError(f"{name} of the optimiser is {list(moment.shape)}, not {list(parameter.shape)}")
