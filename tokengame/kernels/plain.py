"""A model's weights as the kernels understand them, before they are packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Activation = Literal["gelu", "quick_gelu", "tanh_gelu", "silu"]
"""in the order of csrc/interface.h: GELU; x sigmoid(1.702 x); the approximation of GELU by tanh; x sigmoid(x)"""


@dataclass(frozen=True)
class NormWeights:
    """A LayerNorm or RMSNorm over the last dimension: weight and bias [C], which may be None for zeros."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    rms: bool = False
    """whether it is an RMSNorm, which does not take the mean away"""
    counted: Tensor | None = None
    """[C] 0 for numbers by which rows were filled up and which do not count, else 1; None where all count"""


@dataclass(frozen=True)
class LinearWeights:
    """A linear layer: weight [outputs, inputs], bias [outputs] or None, and a LayerScale [outputs] that follows."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None


@dataclass(frozen=True)
class BlockWeights:
    """A pre-norm block: norm, attention of `heads` heads, norm, MLP."""

    norm1: NormWeights
    qkv: LinearWeights
    proj: LinearWeights
    norm2: NormWeights
    fc1: LinearWeights
    fc2: LinearWeights
    heads: int
    head_dim: int
    scale: float
    """factor on q.k"""
    activation: Activation = "gelu"
    """of the MLP"""
    gated: bool = False
    """whether `fc1` gives gates, then as many values; the hidden layer is activation(gate) * value"""
    proj_norm: NormWeights | None = None
    """before `proj`"""
    fc1_norm: NormWeights | None = None
    """before `fc1`, after `norm2`"""
    fc2_norm: NormWeights | None = None
    """before `fc2`"""


@dataclass(frozen=True)
class ModelWeights:
    """What a backbone family exports of a model for the kernels (see `Backbone.plain_weights`)."""

    blocks: list[BlockWeights]
    patches: LinearWeights | None
    """patch embedding [C, channels * patch^2]; None where the family must embed itself"""
    head: tuple[NormWeights, LinearWeights] | None
    """final norm and classifier of the class token; None where the head is more than that"""


@dataclass(frozen=True)
class ActorWeights:
    """RL4EViT's actor: layers with tanh between them, from a token [C] to (prune, keep), in float32."""

    layers: tuple[LinearWeights, ...]
    identity: Tensor
    """[N, outputs of the first layer] what an agent's id adds to the first layer"""
