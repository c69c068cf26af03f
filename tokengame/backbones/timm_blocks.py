"""timm's transformer blocks on packed rows: what each kind does before, in and after its attention.

A kind of block is known by its exact type, so that an unknown one never runs approximately. Blocks run through their
own submodules (norm1, attn.qkv, ls1, mlp, ...), which are looked up at every call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, GluMlp, Mlp, SwiGLU, apply_rot_embed_cat
from timm.models import beit
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from tokengame.backbones.base import BlockCosts, KeyValueWeights
from tokengame.backbones.parts import check_rowwise, drop_paths, is_int8_linear, is_plain_linear, linear_macs
from tokengame.errors import TokenGameError
from tokengame.packed.layout import RaggedLayout
from tokengame.packed.rows import add_in_pieces

ROWWISE_MLPS = (Mlp, GluMlp, SwiGLU, GeGluMlp)
ATTENTIONS = (Attention, AttentionRope, EvaAttention, RelPosAttention, beit.Attention)
REASONS = {
    "DiffAttention": "values are twice as wide as keys there",
    "DiffParallelScalingBlock": "values are twice as wide as keys there",
}
"""why a part is not run"""


def block_parts(where: str, block: Any) -> BlockParts:
    """The parts of `block`, which is called `where` in error messages.

    Raises:
        TokenGameError: names the part that cannot be run exactly on packed rows.
    """
    kind = KINDS.get(type(block))
    if kind is None:
        name = type(block).__name__
        raise TokenGameError(f"{where} is a {name}: {REASONS.get(name, 'where its attention ends is not known')}")
    parts: BlockParts = kind(block)
    for attn in parts.attentions:
        if attn is not block and type(attn) not in ATTENTIONS:
            name = type(attn).__name__
            raise TokenGameError(f"{where} attends with {name}: {REASONS.get(name, 'what it computes is not known')}")
    for mlp in parts.mlps:
        if not isinstance(mlp, ROWWISE_MLPS) or getattr(mlp, "use_conv", False):
            raise TokenGameError(f"{where} has the MLP {type(mlp).__name__}, which may mix tokens")
    check_rowwise(where, block)
    return parts


# Attention modules


def project(attn: Any, normed: Tensor, first: int, last: int, angles: Tensor | None) -> Tensor:
    """Queries (0), keys (1) and values (2) of `attn` from `first` to `last` - 1: [M, C] -> [M, last - first, H, D].

    Args:
        attn: one of `ATTENTIONS`.
        normed: rows.
        first, last: which of the three.
        angles: sines and cosines [M, 1 or H, 2 D] by which queries and keys are rotated; None: not at all.
    """
    if getattr(attn, "qkv", None) is None:
        return torch.stack(_project_apart(attn, normed, first, last, angles), 1)
    heads = _project_fused(attn, normed, first, last)
    norms = _norms(attn)[first:last]
    if not all(isinstance(norm, nn.Identity) for norm in norms):
        normalised = [norm(part) for norm, part in zip(norms, heads.unbind(1), strict=False)]
        heads = torch.stack([*normalised, *heads.unbind(1)[len(norms) :]], 1)
    turned = max(min(last, 2) - first, 0)
    if angles is None or not turned:
        return heads
    rotated = _rotate(attn, heads[:, :turned], angles[:, None])
    return torch.cat([rotated, heads[:, turned:]], 1)


def _project_fused(attn: Any, normed: Tensor, first: int, last: int) -> Tensor:
    """[M, last - first, H, D] by one layer, of whose outputs only those parts are computed where that is possible."""
    width = attn.num_heads * head_dim(attn)
    some = slice(first * width, last * width)
    if getattr(attn, "q_bias", None) is not None:  # biases of the attention's own, none of the layer's
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])[some]
        separate = attn.qkv_bias_separate
        found = attn.qkv(normed)[:, some] + bias if separate else F.linear(normed, attn.qkv.weight[some], bias)
    else:
        found = linear_part(attn.qkv, normed, some) if last - first < 3 else attn.qkv(normed)
    return found.unflatten(1, (last - first, attn.num_heads, -1))


def linear_part(layer: Any, rows: Tensor, some: slice) -> Tensor:
    """Some outputs of a layer; of a plain linear layer, or one in int8 by torchao, only these are computed."""
    if not is_plain_linear(layer) and not is_int8_linear(layer):
        return layer(rows)[:, some]
    return F.linear(rows, layer.weight[some], None if layer.bias is None else layer.bias[some])


def _project_apart(attn: Any, normed: Tensor, first: int, last: int, angles: Tensor | None) -> list[Tensor]:
    """For each part [M, H, D], by a layer of its own; heads that share a key and value (grouped queries) get copies."""
    found, norms = [], (*_norms(attn), nn.Identity())
    for index in range(first, last):
        layer = (attn.q_proj, attn.k_proj, attn.v_proj)[index]
        heads = norms[index](layer(normed).unflatten(1, (-1, attn.head_dim)))
        if index < 2 and angles is not None:
            heads = _rotate(attn, heads, angles)
        found.append(heads.repeat_interleave(attn.num_heads // heads.shape[1], 1) if index else heads)
    return found


def _norms(attn: Any) -> tuple[nn.Module, ...]:
    """Norms of queries and keys."""
    return (attn.q_norm, attn.k_norm) if hasattr(attn, "q_norm") else (nn.Identity(), nn.Identity())


def _rotate(attn: Any, heads: Tensor, angles: Tensor) -> Tensor:
    return apply_rot_embed_cat(heads, angles, half=getattr(attn, "rotate_half", False))


def output(attn: Any, attended: Tensor, normed: Tensor | None) -> Tensor:
    """Output of `attn` for its heads' output [M, H * D]; `normed` [M, C] are its input rows, where it has a gate."""
    out = attn.norm(attended) if hasattr(attn, "norm") else attended
    if normed is not None:
        out = out * attn.gate(normed).sigmoid()
    return attn.proj_drop(attn.proj(out))


def gated(attn: Any) -> bool:
    return getattr(attn, "gate", None) is not None


def head_dim(attn: Any) -> int:
    """Width of a head; `attn` is an attention module or a block that is its own."""
    return getattr(attn, "head_dim", 0) or attn.qkv.out_features // (3 * attn.num_heads)


def _attention_costs(attn: Any) -> tuple[int, int, int]:
    """Multiply-accumulates of one row for query, key and value, output."""
    if getattr(attn, "qkv", None) is None:
        query, keys_values = linear_macs(attn.q_proj), linear_macs(attn.k_proj) + linear_macs(attn.v_proj)
    else:
        query = linear_macs(attn.qkv) // 3
        keys_values = 2 * query
    return query, keys_values, linear_macs(attn.proj) + linear_macs(getattr(attn, "gate", None))


def _folded(layer: Any, first: int, attn: Any, value_bias: Tensor | None) -> KeyValueWeights | None:
    """Key and value maps of a fused layer whose outputs from `first` on are queries, keys and values."""
    heads, width = attn.num_heads, head_dim(attn)
    if not is_plain_linear(layer) or not isinstance(_norms(attn)[1], nn.Identity):
        return None
    _, key, value = layer.weight[first:].unflatten(0, (3, heads, width))
    if value_bias is None and layer.bias is not None:
        value_bias = layer.bias[first + 2 * heads * width :]
    return KeyValueWeights(key, value, None if value_bias is None else value_bias.view(heads, width))


# Blocks


class BlockParts(ABC):
    """One block in parts, as `Backbone` has them: attention half and MLP half.

    Args:
        block: of a type in `KINDS`.
    """

    bypassed: tuple[str, ...] = ("", "attn", "attn.attn_drop")
    """names of its parts that are never called; "" is the block itself"""

    def __init__(self, block: Any):
        self.block = block

    @property
    @abstractmethod
    def attentions(self) -> list[Any]:
        """Attention modules, whose heads are counted together."""

    @property
    @abstractmethod
    def mlps(self) -> list[Any]:
        """MLP modules."""

    @property
    def heads(self) -> int:
        return sum(attn.num_heads for attn in self.attentions)

    @property
    def head_dim(self) -> int:
        return head_dim(self.attentions[0])

    @property
    def scale(self) -> float:
        return self.attentions[0].scale

    def norm_attention(self, x: Tensor) -> Tensor:
        """As `Backbone.norm_attention`."""
        return self.block.norm1(x)

    def project(self, normed: Tensor, first: int, last: int, angles: Tensor | None) -> Tensor:
        """As `Backbone.project`, with the sines and cosines of the rows."""
        return project(self.block.attn, normed, first, last, angles)

    @abstractmethod
    def add_attention(self, x: Tensor, attended: Tensor, layout: RaggedLayout) -> Tensor:
        """As `Backbone.add_attention`."""

    @abstractmethod
    def feed_forward(self, x: Tensor, layout: RaggedLayout) -> Tensor:
        """As `Backbone.feed_forward`."""

    def dropout(self) -> float:
        """The share of attention weights that is dropped now."""
        drop = self.attentions[0].attn_drop
        return drop.p if drop.training and isinstance(drop, nn.Dropout) else 0.0

    def key_value_weights(self) -> KeyValueWeights | None:
        """As `Backbone.key_value_weights`."""
        attn = self.block.attn
        if getattr(attn, "qkv", None) is None or self.dropout():
            return None
        return _folded(attn.qkv, 0, attn, getattr(attn, "v_bias", None))

    def costs(self) -> BlockCosts:
        """As `Backbone.costs`."""
        query, keys_values, out = _attention_costs(self.block.attn)
        return BlockCosts(query, keys_values, out, linear_macs(self.block.mlp))

    def _add(self, drop: nn.Module, update: Any, x: Tensor, layout: RaggedLayout) -> Tensor:
        """x + update(x) with stochastic depth; in pieces where nothing is dropped."""
        if self.block.training:
            return x + drop_paths(drop, update(x), layout)
        return add_in_pieces(lambda rows: drop(update(rows)), x)


class _OneAttention(BlockParts):
    @property
    def attentions(self) -> list[Any]:
        return [self.block.attn]

    @property
    def mlps(self) -> list[Any]:
        return [self.block.mlp]


class PreNorm(_OneAttention):
    """x + scale1 * attn(norm1(x)), then x + scale2 * mlp(norm2(x))."""

    def add_attention(self, x: Tensor, attended: Tensor, layout: RaggedLayout) -> Tensor:
        block = self.block
        normed = block.norm1(x) if gated(block.attn) else None
        update = self._scaled(1, output(block.attn, attended, normed))
        return x + drop_paths(block.drop_path1, update, layout)

    def feed_forward(self, x: Tensor, layout: RaggedLayout) -> Tensor:
        block = self.block
        return self._add(block.drop_path2, lambda rows: self._scaled(2, block.mlp(block.norm2(rows))), x, layout)

    def _scaled(self, half: int, update: Tensor) -> Tensor:
        """LayerScale of a half: a module `ls1` or `ls2`, or a parameter `gamma_1` or `gamma_2` that may be None."""
        module = getattr(self.block, f"ls{half}", None)
        if module is not None:
            return module(update)
        gamma = getattr(self.block, f"gamma_{half}")
        return update if gamma is None else gamma * update


class PostNorm(_OneAttention):
    """x + norm1(attn(x)), then x + norm2(mlp(x))."""

    def norm_attention(self, x: Tensor) -> Tensor:
        return x

    def add_attention(self, x: Tensor, attended: Tensor, layout: RaggedLayout) -> Tensor:
        block = self.block
        update = block.norm1(output(block.attn, attended, x if gated(block.attn) else None))
        return x + drop_paths(block.drop_path1, update, layout)

    def feed_forward(self, x: Tensor, layout: RaggedLayout) -> Tensor:
        block = self.block
        return self._add(block.drop_path2, lambda rows: block.norm2(block.mlp(rows)), x, layout)


class ParallelScaling(BlockParts):
    """Attention and MLP of the same normed rows, added at once (Dehghani et al. 2023): all is in the attention half."""

    bypassed = ("", "attn_drop")

    @property
    def attentions(self) -> list[Any]:
        return [self.block]

    @property
    def mlps(self) -> list[Any]:
        return []

    def norm_attention(self, x: Tensor) -> Tensor:
        return self.block.in_norm(x)

    def project(self, normed: Tensor, first: int, last: int, _angles: Tensor | None) -> Tensor:
        block, width = self.block, self.heads * self.head_dim
        start = block.in_split[0]
        some = slice(start + first * width, start + last * width)
        heads = linear_part(block.in_proj, normed, some).unflatten(1, (last - first, self.heads, self.head_dim))
        norms = (block.q_norm, block.k_norm, nn.Identity())[first:last]
        return torch.stack([norm(part) for norm, part in zip(norms, heads.unbind(1), strict=True)], 1)

    def add_attention(self, x: Tensor, attended: Tensor, layout: RaggedLayout) -> Tensor:
        block = self.block
        hidden = linear_part(block.in_proj, block.in_norm(x), slice(block.in_split[0]))
        if block.mlp_bias is not None:
            hidden = hidden + block.mlp_bias
        hidden = block.mlp_drop(block.mlp_act(hidden))
        if block.out_proj is not None:
            update = block.out_proj(torch.cat([attended, hidden], 1))
        else:
            update = block.attn_out_proj(attended) + block.mlp_out_proj(hidden)
        return x + drop_paths(block.drop_path, block.ls(update), layout)

    def feed_forward(self, x: Tensor, _layout: RaggedLayout) -> Tensor:
        return x

    def key_value_weights(self) -> KeyValueWeights | None:
        block = self.block
        return None if self.dropout() else _folded(block.in_proj, block.in_split[0], block, None)

    def costs(self) -> BlockCosts:
        inner = self.heads * self.head_dim * self.block.in_proj.in_features
        return BlockCosts(inner, 2 * inner, linear_macs(self.block) - 3 * inner, 0)


class ParallelThings(BlockParts):
    """Several attentions of the same rows, then several MLPs of the same rows (Touvron et al. 2022).

    The heads of all attentions are seen as those of one. Each has a norm of its own, so rows are normed in `project`.
    """

    @property
    def bypassed(self) -> tuple[str, ...]:  # type: ignore[override]
        numbers = range(len(self.block.attns))
        pairs = [(f"attns.{i}", f"attns.{i}.attn", f"attns.{i}.attn.attn_drop", f"ffns.{i}") for i in numbers]
        return ("", "attns", "ffns", *sum(pairs, ()))

    @property
    def attentions(self) -> list[Any]:
        return [part.attn for part in self.block.attns]

    @property
    def mlps(self) -> list[Any]:
        return [part.mlp for part in self.block.ffns]

    def norm_attention(self, x: Tensor) -> Tensor:
        return x

    def project(self, normed: Tensor, first: int, last: int, angles: Tensor | None) -> Tensor:
        return torch.cat([project(part.attn, part.norm(normed), first, last, angles) for part in self.block.attns], 2)

    def add_attention(self, x: Tensor, attended: Tensor, layout: RaggedLayout) -> Tensor:
        updates = []
        for part, heads in zip(self.block.attns, attended.chunk(len(self.block.attns), 1), strict=True):
            normed = part.norm(x) if gated(part.attn) else None
            updates.append(drop_paths(part.drop_path, part.ls(output(part.attn, heads, normed)), layout))
        return x + torch.stack(updates).sum(0)

    def feed_forward(self, x: Tensor, layout: RaggedLayout) -> Tensor:
        parts = self.block.ffns
        updates = [drop_paths(part.drop_path, part.ls(part.mlp(part.norm(x))), layout) for part in parts]
        return x + torch.stack(updates).sum(0)

    def key_value_weights(self) -> KeyValueWeights | None:
        return None

    def costs(self) -> BlockCosts:
        query, keys_values, out = map(sum, zip(*map(_attention_costs, self.attentions), strict=True))
        return BlockCosts(query, keys_values, out, sum(map(linear_macs, self.mlps)))


KINDS: dict[type[nn.Module], type[BlockParts]] = {
    Block: PreNorm,
    EvaBlock: PreNorm,
    RelPosBlock: PreNorm,
    beit.Block: PreNorm,
    ResPostBlock: PostNorm,
    EvaBlockPostNorm: PostNorm,
    ResPostRelPosBlock: PostNorm,
    ParallelScalingBlock: ParallelScaling,
    ParallelThingsBlock: ParallelThings,
}
"""blocks that can be split exactly at their attention, by exact type"""
