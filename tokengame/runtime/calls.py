"""Ways to call a model that cannot work where the number of tokens depends on the pixels; each is refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor

from tokengame.backbones.calls import not_traced
from tokengame.errors import TokenGameError


def check_call(images: Any, parameter: Tensor) -> None:
    """Refuse what would trace, export or vectorise one image's tokens as if they were every image's.

    Args:
        images: [B, channels, height, width], or what a tracer passes in its place.
        parameter: one of the model's.

    Raises:
        TokenGameError: says how the model was called and what to do instead.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        raise TokenGameError(not_traced("exported or traced"))
    if not isinstance(images, Tensor) or isinstance(images, FakeTensor) or images.is_meta:
        raise TokenGameError(not_traced(f"run on a {type(images).__name__} without pixels"))
    if any(map(_functorch.is_functorch_wrapped_tensor, (images, parameter))):
        raise TokenGameError(
            "a pruned model cannot be transformed by torch.func (vmap, grad, jacrev): every image has its own number "
            "of tokens; pass whole batches, and take gradients by torch.autograd after fast.train()"
        )
    if images.ndim != 4:
        raise TokenGameError(f"images must be [batch, channels, height, width], not {list(images.shape)}")
