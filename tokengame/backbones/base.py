"""What the game and its runtime need of a Vision Transformer: the protocol that every model family implements.

A block is two halves: attention with its residual, then MLP with its residual. A family gives both halves in parts, so
that a backend can put attention inside each image of a packed batch between `project` and `add_attention`. Everything
else runs through the model's own submodules. A family is one file with one subclass, and one line in
`backbones.FAMILIES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from tokengame.backbones.calls import Call, Interface, Intermediates, check_masks
from tokengame.errors import TokenGameError
from tokengame.kernels.plain import ModelWeights
from tokengame.modules import Watch
from tokengame.packed.heads import Heads
from tokengame.packed.layout import Places, RaggedLayout
from tokengame.packed.rows import segment_mean


class BlockCosts(NamedTuple):
    """Multiply-accumulates of one row in the linear layers of a block."""

    query: int
    keys_values: int
    output: int
    """of the attention, after its heads"""
    mlp: int


class KeyValueWeights(NamedTuple):
    """Linear maps from a normed row to its key and value; a key's bias cancels in the softmax and is left out."""

    key: Tensor
    """[H, D, C]"""
    value: Tensor
    """[H, D, C]"""
    value_bias: Tensor | None
    """[H, D]"""


class Backbone(ABC):
    """View of a model that can run on packed rows; the model itself is never changed.

    Args:
        model: of the family.

    Raises:
        TokenGameError: the model cannot be run exactly; the sentence names the part and why.
    """

    model: Any
    depth: int
    """blocks"""
    dim: int
    """width of a row (C)"""
    heads: int
    head_dim: int
    scale: float
    """factor on q.k"""
    prefix: int
    """prefix tokens (class, distillation, registers), first in each image; they are never pruned"""
    patch_size: tuple[int, int]
    input_size: tuple[int, int]
    """height and width that the model was made for"""
    patches: int
    """patch tokens of an image of that size"""
    has_class_token: bool
    classes: int
    """logits of a prediction; 0 for models without a classifier"""

    @abstractmethod
    def __init__(self, model: Any): ...

    @staticmethod
    @abstractmethod
    def accepts(model: Any) -> bool:
        """Whether `model` is of this family; its constructor may still refuse it with a reason."""

    @property
    @abstractmethod
    def blocks(self) -> list[Any]:
        """The model's blocks, in order."""

    @property
    @abstractmethod
    def reads_prefix_only(self) -> bool:
        """Whether the prediction depends on prefix rows alone, so that patches may leave in the last attention."""

    @abstractmethod
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of [height, width] pixels."""

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, prefix + N, C], position embedding added."""

    @abstractmethod
    def norm_attention(self, block: int, x: Tensor) -> Tensor:
        """The norm before the attention of `block`: [M, C] -> [M, C]."""

    @abstractmethod
    def project(self, block: int, normed: Tensor, layout: RaggedLayout, first: int = 0, last: int = 3) -> Tensor:
        """Queries (0), keys (1) and values (2) from `first` to `last` - 1: [M, C] -> [M, last - first, H, D].

        Rotary positions are applied where `layout.places` says that rows come from; rows past the layout are padding.
        """

    @abstractmethod
    def add_attention(self, block: int, x: Tensor, attended: Tensor, layout: RaggedLayout) -> Tensor:
        """Output projection and residual: rows x [M, C] and attention output [M, H * D] -> [M, C].

        `layout` says which image a row is of; rows past it are padding.
        """

    @abstractmethod
    def feed_forward(self, block: int, x: Tensor, layout: RaggedLayout) -> Tensor:
        """The MLP of `block` with its norm and residual: [M, C] -> [M, C]; `layout` as in `add_attention`."""

    @abstractmethod
    def final_norm(self, x: Tensor) -> Tensor:
        """The norm after the last block: [..., C] -> [..., C]."""

    @abstractmethod
    def head(self, x: Tensor, layout: RaggedLayout, size: Tensor | None = None) -> Tensor:
        """Final norm, pooling over the rows that are left, classifier: [M, C] -> [B, classes].

        A merged row of `size` s stands for s patches and weighs as much in average and attention pooling.
        """

    @abstractmethod
    def costs(self, block: int) -> BlockCosts:
        """Multiply-accumulates of one row in the linear layers of `block`."""

    @abstractmethod
    def embed_macs(self) -> int:
        """Multiply-accumulates of embedding one patch."""

    @abstractmethod
    def head_macs(self, rows: Tensor) -> Tensor:
        """[...] multiply-accumulates of pooling `rows` [...] rows (prefix included) and of the classifier."""

    @abstractmethod
    def preprocessing(self) -> dict[str, Any]:
        """How images become the model's input, ready for JSON: input_size, interpolation, mean, std, crop."""

    interface: Interface = Interface()
    """what a pruned model has of the model beside its call"""
    positional: bool = False
    """whether attention depends on where rows come from, so that every layout must have `places`"""

    def pair_bias(self, _block: int, _grid: tuple[int, int]) -> Tensor | None:
        """[H, prefix + N, prefix + N] added to the attention logits of `block` for each pair of query and key, as
        relative positions are; None where nothing is."""
        return None

    def key_value_weights(self, _block: int) -> KeyValueWeights | None:
        """Key and value maps of `block`; None where they are more than linear maps."""
        return None

    def rotary_table(self, _places: Places) -> Tensor | None:
        """[1 or depth, N, 1 or H, 2, D] float32, contiguous: cosines and sines of the places of the grid.

        Numbers of a head are in the order of `plain_weights`, where d turns with d +- D / 2. None: nothing is turned.
        """
        return None

    def plain_weights(self) -> ModelWeights | None:
        """The model's weights for the compiled kernels; None where it does what they do not."""
        return None

    def constant_tokens(self, _images: Tensor) -> Tensor | None:
        """[prefix + N, C] what embedding adds to the patches of such images; None where that is not all it does."""
        return None

    def read_call(self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Call:
        """What a call of the model with these arguments is to return.

        Raises:
            TokenGameError: an argument that a pruned model cannot honour.
        """
        check_masks(images, attn_mask, is_causal)
        return Call(images)

    def read_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, return_prefix_tokens: bool = False,
        norm: bool = False, stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False,
        output_dict: bool = False, attn_mask: Tensor | None = None, is_causal: bool = False,
    ) -> Call:  # fmt: skip
        """What a call of `forward_intermediates` with these arguments is to return; they are timm's.

        Raises:
            TokenGameError: an argument that a pruned model cannot honour; unknown format.
        """
        check_masks(x, attn_mask, is_causal)
        blocks, last = feature_take_indices(self.depth, indices)
        taken, last = sorted(set(blocks)), last if stop_early else self.depth - 1
        wanted, grid = tuple(sorted({*taken, last})), self.grid(*x.shape[2:])

        def answer(_output: Tensor, features: list[Tensor]) -> Any:
            found = dict(zip(wanted, features, strict=True))
            some = [self.final_norm(found[block]) if norm else found[block] for block in taken]
            shaped = Intermediates(some, self.prefix, grid, output_fmt, return_prefix_tokens)
            final = None if intermediates_only else self.final_norm(found[last])
            return shaped.as_dict(final) if output_dict else shaped.as_list(final)

        return Call(x, wanted, answer)

    def native(self, images: Tensor) -> Tensor:
        """[B, ...] what the native model predicts for images, as `head` does."""
        return self.model(images)

    def native_features(self, images: Tensor) -> Tensor:
        """[B, prefix + N, C] the native model's last features, normed as by `final_norm`."""
        return self.model.forward_features(images)

    def after_embedding(self, x: Tensor) -> Tensor:
        """What the model does with embedded tokens [B, prefix + N, C] before its first block."""
        return x

    def drop_patches(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patch dropout in training: embedded tokens [B, prefix + N, C] -> those left, and the place of each.

        Places are [B, rows]: -1 for prefix tokens, else the position in the grid; None where nothing is dropped.
        """
        return x, None

    @property
    def drops_patches(self) -> bool:
        """Whether `drop_patches` drops any now."""
        return False

    def attention_dropout(self, _block: int) -> float:
        """The share of attention weights that `block` drops now, in training."""
        return 0.0

    @property
    def checkpoints(self) -> bool:
        """Whether blocks are computed again for the gradient instead of kept (gradient checkpointing)."""
        return False

    @property
    def embeds_plainly(self) -> bool:
        """Whether `after_embedding` changes nothing."""
        return True

    def unfused(self) -> nn.Module:
        """The native model with attention as two products and a softmax, sharing weights; the model itself where it
        has no such form."""
        return self.model

    @cached_property
    def watch(self) -> Watch:
        """Notices that the model has changed since it was read."""
        return Watch(self.model)

    def refresh(self) -> None:
        """Read the model again where it has changed.

        Raises:
            TokenGameError: it cannot be run exactly any more, or is of another shape now.
        """
        if self.watch.unchanged:
            return
        now = type(self)(self.model)
        before, after = self.shape(), now.shape()
        if after != before:
            changed = ", ".join(
                f"{key} {before[key]} is now {after[key]}" for key in before if before[key] != after[key]
            )
            raise TokenGameError(f"the model has changed since it was pruned ({changed}): prune it again")
        vars(self).update(vars(now), watch=Watch(self.model))

    def fingerprint_parameters(self, block: int) -> Iterator[nn.Parameter]:
        """Parameters of a block in timm's order, so that the same weights are known again in another library."""
        return self.blocks[block].parameters()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def heads_of(self, qkv: Tensor, layout: RaggedLayout) -> Heads:
        """Heads of an attention whose queries, keys and values are known: qkv [M, 3, H, D]."""
        q, k, v = qkv.unbind(1)
        query = layout.first(q)
        if not self.has_class_token:
            query = segment_mean(q.flatten(1), layout).view_as(query)
        return Heads(query, k, v, self.scale)

    def next_heads(self, block: int, x: Tensor, layout: RaggedLayout, keys_values: Tensor) -> Heads:
        """Heads of the attention of `block` before it has run on rows x [M, C]; keys_values [M, 2, H, D]."""
        keys, values = keys_values.unbind(1)
        if self.has_class_token:
            query = self.project(block, self.norm_attention(block, layout.first(x)), layout.prefixes(1), 0, 1)[:, 0]
        elif self.positional:  # the mean of rows comes from no place: the mean of their queries does
            queries = self.project(block, self.norm_attention(block, x), layout, 0, 1)[: layout.rows, 0]
            query = segment_mean(queries.flatten(1), layout).view(-1, *queries.shape[1:])
        else:
            mean = segment_mean(self.norm_attention(block, x), layout)
            query = self.project(block, mean, layout.prefixes(1), 0, 1)[:, 0]
        return Heads(query, keys, values, self.scale)

    def whole_layout(self, tokens: Tensor, grid: tuple[int, int]) -> RaggedLayout:
        """Layout of embedded tokens [B, prefix + N, C], none of them removed, of images with a `grid` of patches."""
        batch, rows, _ = tokens.shape
        places = None
        if self.positional:
            own = torch.arange(-self.prefix, rows - self.prefix, device=tokens.device).clamp(min=-1)
            places = Places(own.repeat(batch), grid)
        return RaggedLayout([rows] * batch, tokens.device, places)

    def last_half(self, after: int) -> int:
        """The half-block up to which patches are needed, where a game needs them up to half `after`."""
        return max(2 * self.depth - 2, after) if self.reads_prefix_only else 2 * self.depth

    def shape(self) -> dict[str, int | list[int]]:
        """What a policy must agree with."""
        return {
            "dim": self.dim,
            "depth": self.depth,
            "heads": self.heads,
            "patch": list(self.patch_size),
            "prefix_tokens": self.prefix,
            "input_size": list(self.input_size),
        }
