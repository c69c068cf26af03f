"""Any plain timm VisionTransformer as embed / run / head on packed rows. The model itself is never changed.

Blocks are run through their own submodules (norm1, attn.qkv, ls1, mlp, ...). The one thing done here instead of by timm
is the attention between q, k, v and proj, because it must not cross the borders of the packed images. Whatever this
could get wrong is refused by exact type, so an unknown block never runs approximately.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, GluMlp, Mlp, PatchEmbed, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tokengame import kernels
from tokengame.attention import Kernel, asked_attention, fastest_attention, ruled_attention
from tokengame.blocks import Heads, Ran, feed_forward, folded_attention, folds, join, lengthen, project
from tokengame.errors import TokenGameError
from tokengame.ops import Layout, Look, Memory, Seen, segment_mean, spare_rows
from tokengame.weights import Weights, weights_of

ROWWISE_MLPS = (Mlp, GluMlp, SwiGLU)


class Backbone:
    """View of a timm `model` that can run on packed rows.

    Args:
        model: a timm VisionTransformer.
        attend: attention within images. `ruled_attention` is bitwise repeatable, `fastest_attention` measures first.

    Raises:
        TokenGameError: the model cannot be run exactly; the sentence names the part and why.
    """

    def __init__(self, model: Any, attend: Kernel = ruled_attention):
        check_supported(model)
        self.model, self.attend = model, attend
        self.blocks: list[Any] = list(self.model.blocks)
        self.depth: int = len(self.blocks)
        self.dim: int = self.model.embed_dim
        self.heads: int = self.blocks[0].attn.num_heads
        self.prefix: int = self.model.num_prefix_tokens
        self.patch_size: tuple[int, int] = self.model.patch_embed.patch_size
        self.patches: int = self.model.patch_embed.num_patches
        """patch tokens of an image of the model's own input size"""
        self._weights: Weights | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles pack their weights anew."""
        return self.__dict__ | {"_weights": None}

    def tiled(self, x: Tensor) -> Weights | None:
        """Packed weights where our own kernels (see `kernels`) run the blocks on rows x [M, C]."""
        return self._weights if kernels.take(x) else None

    @property
    def dtype(self) -> torch.dtype:
        return self.model.patch_embed.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.patch_embed.proj.weight.device

    def embed(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, prefix + N, C], position embedding added."""
        own = self.renew(images)
        start = self.start(images, own)
        if own is None or own.patches is None or start is None:
            x = self.model._pos_embed(self.model.patch_embed(images))
        else:
            x = kernels.embed(images, own.patches, self.patch_size[0], start, self.prefix)
        return self.model.norm_pre(self.model.patch_drop(x))

    def renew(self, images: Tensor) -> Weights | None:
        """Look whether the weights are still those that our own kernels know; them, where these run such images.

        Every forward pass begins here.
        """
        measured = self.attend in (fastest_attention, ruled_attention)
        self._weights = weights_of(self.model) if measured and kernels.take(images) else None
        return self._weights

    def start(self, images: Tensor, own: Weights | None) -> Tensor | None:
        """[prefix + N, C] what tokens are before their patches are added to them, where our own kernels embed.

        None where timm does it: without such kernels, or for images of another size than the model's own.
        """
        model, patches = self.model, self.model.patch_embed
        usual = (patches.proj.in_channels, *(patches.img_size or ()))
        if own is None or own.patches is None or images.shape[1:] != usual:
            return None
        grid = patches.grid_size if model.dynamic_img_size else (patches.num_patches,)
        return model._pos_embed(images.new_zeros(1, *grid, self.dim))[0]  # what timm makes of patches that are zero

    def run(
        self, first: int, last: int, x: Tensor, layout: Layout, bias: Tensor | None = None,
        memory: Memory | None = None, look: Look | None = None,
    ) -> Ran:  # fmt: skip
        """Half-blocks `first` to `last` - 1 on packed rows; 2 i is the attention of block i, 2 i + 1 its MLP.

        Args:
            first, last: half-blocks.
            x: [M, C].
            layout: of the M rows.
            bias: [M] added to the attention logits of each key, or None.
            memory: what the first half, an attention, looks at in place of the rows themselves.
            look: what is wanted of half `last`, an attention that nobody has asked yet.
        """
        if own := self.tiled(x):
            query = look is not None and self.model.has_class_token
            found = kernels.stretch(own.blocks, first, last, x, layout, bias, memory, look, query)
            heads = None
            if found.next is not None:
                heads = self._looked(last // 2, found.x, layout, found.next, found.query, found.seen)
            return Ran(found.x, found.qkv, heads)
        rows, qkv = len(x), None
        spare = spare_rows(x) if layout.images > 1 else 0
        x = lengthen(x, spare)
        for half in range(first, last):
            block = self.blocks[half // 2]
            if half % 2:
                x = feed_forward(block, x)
            elif half == first and memory is not None:
                query = project(block.attn, block.norm1(x), 0, 1)[:rows, 0]
                x = join(block, x, lengthen(self.answer(query, memory, layout).flatten(1), spare))
            else:
                qkv = project(block.attn, block.norm1(x))[:rows]
                x = join(block, x, lengthen(self.attend(qkv, layout, bias), spare))
        heads = self._look(last // 2, x, layout) if look is not None else None
        return Ran(x[:rows], qkv, heads)

    def _look(self, block: int, x: Tensor, layout: Layout) -> Heads:
        """Keys and values of rows x [M + spare, C] in an attention."""
        module = self.blocks[block]
        rows = module.norm1(x)
        return self._looked(block, x[: layout.rows], layout, project(module.attn, rows, 1, 3)[: layout.rows])

    def _looked(
        self, block: int, x: Tensor, layout: Layout, keys_values: Tensor, query: Tensor | None = None,
        seen: Seen | None = None,
    ) -> Heads:  # fmt: skip
        module = self.blocks[block]
        if query is None:
            if self.model.has_class_token:
                asking = module.norm1(layout.first(x))
            else:
                asking = segment_mean(module.norm1(x), layout)
            query = project(module.attn, asking, 0, 1)[:, 0]
        keys, values = keys_values.unbind(1)
        return Heads(query, keys, values, module.attn.scale, seen)

    def answer(self, query: Tensor, memory: Memory, asking: Layout) -> Tensor:
        """[Q, H, D] what queries [Q, H, D] of the images of `asking` hear from `memory`."""
        return asked_attention(query, memory.keys, memory.values, asking, memory.layout, memory.bias)

    @property
    def reads_prefix_only(self) -> bool:
        """Whether the prediction is made of prefix rows alone, so that patches may leave in the last attention."""
        return self.model.global_pool == "token" and self.model.attn_pool is None

    def close(self, half: int, x: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
        """The last block from `half` on, for prefix rows only: x [M, C] -> [B * prefix, C].

        Exact where `reads_prefix_only`: nobody looks at what the last block makes of the patches.
        """
        tiles = self.tiled(x)
        if tiles and half % 2 == 0:
            qkv = self.blocks[-1].attn.qkv.weight
            return kernels.close(tiles.blocks[self.depth - 1], qkv, x, layout, self.prefix, bias)
        block, own = self.blocks[-1], x.index_select(0, layout.first_rows(self.prefix))
        if half % 2 == 0:
            rows, asking = block.norm1(x), Layout([self.prefix] * layout.images, x.device)
            query = project(block.attn, rows.index_select(0, layout.first_rows(self.prefix)), 0, 1)[:, 0]
            if folds(block.attn):
                out = folded_attention(block.attn, query, rows, asking, layout, bias)
            else:
                keys, values = project(block.attn, rows, 1, 3).unbind(1)
                out = self.answer(query, Memory(keys, values, layout, bias), asking)
            own = join(block, own, out.flatten(1))
        return feed_forward(block, own)

    def end(self, last: int) -> int:
        """The half-block up to which patches are needed, if `last` is the first one that may not be left out."""
        return max(2 * self.depth - 2, last) if self.reads_prefix_only else 2 * self.depth

    def predict(self, half: int, x: Tensor, layout: Layout, size: Tensor | None = None) -> Tensor:
        """[B, classes] from rows [M, C] that have come to half-block `half` = `end`, each of `size` patches.

        A network that reads its class token alone does nothing with the patches in its last block but look at them:
        they leave, the prediction is the same, and all but a little of a block is saved.
        """
        if self.reads_prefix_only:
            x = self.close(half, x, layout, None if size is None else size.log())
            layout, size = Layout([self.prefix] * layout.images, x.device), None
        return self.head(x, layout, size)

    def read_heads(self, qkv: Tensor, layout: Layout) -> Heads:
        """What an attention offers to observations and matching."""
        q, k, v = qkv.unbind(1)
        if self.model.has_class_token:
            query = layout.first(q)
        else:
            query = segment_mean(q.flatten(1), layout).view(-1, *q.shape[1:])
        return Heads(query, k, v, self.blocks[0].attn.scale)

    def head(self, x: Tensor, layout: Layout, size: Tensor | None = None) -> Tensor:
        """Final norm, pooling over the rows that are left, classifier: [M, C] -> [B, classes].

        A row of `size` s stands for s patches (merging) and weighs as much in average and attention pooling.
        """
        tiles = self.tiled(x)
        if tiles and tiles.head:
            return kernels.normed_linear(layout.first(x), *tiles.head)
        model, x = self.model, self.model.norm(x)
        if model.attn_pool is not None:
            return self._attention_pool(x, layout, size)
        if model.global_pool == "token":
            return model.forward_head(x[layout.first_rows(self.prefix)].unflatten(0, (layout.images, self.prefix)))
        rows = layout.pad(x)
        first = 0 if model.pool_include_prefix else self.prefix
        mask = layout.mask.clone()
        mask[:, :first] = False
        pooled = self._pool(model.global_pool, rows, mask, None if size is None else layout.pad(size))
        return model.head(model.head_drop(model.fc_norm(pooled)))

    @staticmethod
    def _pool(kind: str, rows: Tensor, mask: Tensor, size: Tensor | None) -> Tensor:
        weight = mask.to(rows.dtype) if size is None else (size * mask).to(rows.dtype)
        mean = torch.einsum("blc,bl->bc", rows, weight) / weight.sum(1, keepdim=True)
        if kind == "avg":
            return mean
        top = rows.masked_fill(~mask[..., None], float("-inf")).amax(1)
        return top if kind == "max" else 0.5 * (top + mean)

    def _attention_pool(self, x: Tensor, layout: Layout, size: Tensor | None) -> Tensor:
        rows = x.new_zeros(layout.rows) if size is None else size.log().to(x.dtype)
        first = 0 if self.model.pool_include_prefix else self.prefix
        bias = layout.pad(rows, float("-inf"))[:, None, None, first:]
        pooled = self.model.attn_pool(layout.pad(x)[:, first:], attn_mask=bias)
        return self.model.head(self.model.head_drop(self.model.fc_norm(pooled)))

    def shape(self) -> dict[str, int | list[int]]:
        """What a policy must agree with."""
        size = self.model.patch_embed.img_size or (0, 0)
        return {
            "dim": self.dim,
            "depth": self.depth,
            "heads": self.heads,
            "patch": list(self.patch_size),
            "prefix_tokens": self.prefix,
            "input_size": list(size),
        }


def check_supported(model: Any) -> None:
    """Raise TokenGameError, naming the part, unless `model` can be run exactly on packed rows."""
    name = type(model).__name__
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise TokenGameError(
            f"{name} is not a plain timm VisionTransformer: windows, pooled grids, rotary positions or other blocks "
            "tie a token to its neighbours, so removing it would not be exact"
        )
    if type(model.patch_embed) is not PatchEmbed:
        raise TokenGameError(f"{name} embeds patches with {type(model.patch_embed).__name__}; only PatchEmbed is plain")
    if model.num_prefix_tokens and not model.has_class_token and model.global_pool == "token":
        raise TokenGameError(f"{name} pools a class token it does not have")
    if model.global_pool not in ("token", "avg", "avgmax", "max", "map"):
        raise TokenGameError(f"{name} pools by {model.global_pool!r}: its output depends on every token of the grid")
    if model.attn_pool is not None and model.attn_pool.pos_embed is not None:
        raise TokenGameError(f"{name} adds positions in its pooling, which needs the whole grid")
    for index, block in enumerate(model.blocks):
        _check_block(f"{name} block {index}", block)


def _check_block(where: str, block: Any) -> None:
    if type(block) is not Block:
        raise TokenGameError(f"{where} is a {type(block).__name__}; only the pre-norm Block can be split exactly")
    if type(block.attn) is not Attention:
        raise TokenGameError(f"{where} attends with {type(block.attn).__name__}; only plain Attention is exact")
    if not isinstance(block.mlp, ROWWISE_MLPS) or getattr(block.mlp, "use_conv", False):
        raise TokenGameError(f"{where} has the MLP {type(block.mlp).__name__}, which may mix tokens")
    mixing = [m for m in block.modules() if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm))]
    if mixing:
        raise TokenGameError(
            f"{where} normalises with {type(mixing[0]).__name__}, whose result depends on other tokens"
        )
