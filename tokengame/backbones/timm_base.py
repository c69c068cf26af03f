"""What timm's families of plain Vision Transformers share: blocks in parts, pooling, costs, preprocessing."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from timm.layers import AttentionPoolLatent, HybridEmbed, PatchDropout, PatchDropoutWithIndices, PatchEmbed
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from tokengame.backbones.base import Backbone, BlockCosts, KeyValueWeights
from tokengame.backbones.calls import Interface
from tokengame.backbones.changes import check_changes
from tokengame.backbones.parts import dropped_patches, linear_macs, masked_pool
from tokengame.backbones.preprocessing import timm_preprocessing
from tokengame.backbones.timm_blocks import block_parts
from tokengame.errors import TokenGameError
from tokengame.packed.layout import RaggedLayout

INTERFACE = Interface(
    attributes=frozenset({
        "pretrained_cfg", "default_cfg", "num_features", "head_hidden_size", "embed_dim", "num_classes", "global_pool",
        "num_prefix_tokens", "num_reg_tokens", "has_class_token", "feature_info", "dynamic_img_size", "patch_embed",
        "embeds", "get_classifier", "forward_head", "pool",
    }),
    changes=frozenset({"reset_classifier", "set_grad_checkpointing", "set_distilled_training"}),
    refused={
        "set_input_size": "set the input size of the model, then prune it",
        "prune_intermediate_layers": "remove layers of the model, then prune it",
        "load_pretrained": "load weights into the model, then prune it",
        "init_weights": "initialise the model, then prune it",
    },
)  # fmt: skip
"""of timm's Vision Transformers"""
DROPOUTS = (nn.Identity, PatchDropout, PatchDropoutWithIndices, type(None))
"""what `patch_drop` may be"""


class TimmBackbone(Backbone):
    """A timm model of blocks that can be split at their attention; a family says how it embeds and where it pools."""

    interface = INTERFACE
    kinds: ClassVar[tuple[type[nn.Module], ...]]
    """classes of models, by exact type"""

    def __init__(self, model: Any):
        name = type(model).__name__
        check_pooling(model)
        if not len(model.blocks):
            raise TokenGameError(f"{name} has no blocks, so there is nothing to prune in")
        self.model = model
        self.parts = [block_parts(f"{name} block {index}", block) for index, block in enumerate(model.blocks)]
        check_changes(model, self._bypassed(), ["blocks", "norm"])
        self.depth, self.dim = len(model.blocks), model.embed_dim
        self.heads, self.head_dim, self.scale = self.parts[0].heads, self.parts[0].head_dim, self.parts[0].scale
        self.prefix, self.has_class_token = model.num_prefix_tokens, has_class_token(model)
        self.classes = _classes(model)
        self._read_stem()

    def _read_stem(self) -> None:
        """Sizes of images and patches, and what embedding a patch costs."""
        stem = self.model.patch_embed
        if not isinstance(stem, PatchEmbed | HybridEmbed):
            raise TokenGameError(
                f"{type(self.model).__name__} embeds patches with {type(stem).__name__}; only timm's PatchEmbed and "
                "HybridEmbed say which grid of patches they give"
            )
        self.patch_size, self.patches = stem.feat_ratio(as_scalar=False), stem.num_patches
        self.input_size = tuple(stem.img_size or (0, 0))
        self.patch_macs = _patch_macs(self.model, stem)

    def _bypassed(self) -> list[str]:
        """Parts of the model that are never called, because packed rows take another way."""
        names = [f"blocks.{index}.{part}" for index, parts in enumerate(self.parts) for part in parts.bypassed]
        return ["", "blocks", *(name.rstrip(".") for name in names)]

    @classmethod
    def accepts(cls, model: Any) -> bool:
        return type(model) in cls.kinds

    @property
    def blocks(self) -> list[Any]:
        return list(self.model.blocks)

    @property
    def reads_prefix_only(self) -> bool:
        return self.model.global_pool == "token" and self._attention_pool is None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.model.patch_embed.dynamic_feat_size((height, width))

    # Embedding

    def drop_patches(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.drops_patches:
            return x, None
        drop = self.model.patch_drop
        if isinstance(drop, PatchDropoutWithIndices):
            left, kept = drop(x)
            none = kept.new_full((len(kept), self.prefix), -1)
            return left, torch.cat([none, kept], 1)
        return dropped_patches(drop, x, self.prefix)

    @property
    def drops_patches(self) -> bool:
        drop = getattr(self.model, "patch_drop", None)
        return isinstance(drop, PatchDropout | PatchDropoutWithIndices) and drop.training and drop.prob > 0

    # Blocks

    def norm_attention(self, block: int, x: Tensor) -> Tensor:
        return self.parts[block].norm_attention(x)

    def project(self, block: int, normed: Tensor, layout: RaggedLayout, first: int = 0, last: int = 3) -> Tensor:
        return self.parts[block].project(normed, first, last, self.angles(block, layout, normed.shape[0]))

    def angles(self, _block: int, _layout: RaggedLayout, _rows: int) -> Tensor | None:
        """Sines and cosines [rows, 1 or H, 2 D] by which queries and keys of `block` are rotated; None: not at all."""
        return None

    def add_attention(self, block: int, x: Tensor, attended: Tensor, layout: RaggedLayout) -> Tensor:
        return self.parts[block].add_attention(x, attended, layout)

    def feed_forward(self, block: int, x: Tensor, layout: RaggedLayout) -> Tensor:
        return self.parts[block].feed_forward(x, layout)

    def attention_dropout(self, block: int) -> float:
        return self.parts[block].dropout()

    @property
    def checkpoints(self) -> bool:
        return self.model.grad_checkpointing

    def key_value_weights(self, block: int) -> KeyValueWeights | None:
        return None if self.positional else self.parts[block].key_value_weights()

    # Head

    def final_norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x)

    def head(self, x: Tensor, layout: RaggedLayout, size: Tensor | None = None) -> Tensor:
        model, x = self.model, self.model.norm(x)
        if self._attention_pool is not None:
            return self._pool_by_attention(x, layout, size)
        if model.global_pool == "token":
            return model.forward_head(layout.firsts(x, self.prefix))
        rows, mask = layout.pad(x), layout.mask.clone()
        mask[:, : self.pooled_from] = False
        pooled = masked_pool(model.global_pool, rows, mask, None if size is None else layout.pad(size))
        return model.head(model.head_drop(model.fc_norm(pooled)))

    @property
    def _attention_pool(self) -> Any:
        return getattr(self.model, "attn_pool", None)

    @property
    def pooled_from(self) -> int:
        """The first row of an image that pooling reads."""
        return 0 if getattr(self.model, "pool_include_prefix", False) else self.prefix

    def _pool_by_attention(self, x: Tensor, layout: RaggedLayout, size: Tensor | None) -> Tensor:
        rows = x.new_zeros(layout.rows) if size is None else size.log().to(x.dtype)
        bias = layout.pad(rows, float("-inf"))[:, None, None, self.pooled_from :]
        pooled = self._attention_pool(layout.pad(x)[:, self.pooled_from :], attn_mask=bias)
        return self.model.head(self.model.head_drop(self.model.fc_norm(pooled)))

    # Costs

    def costs(self, block: int) -> BlockCosts:
        return self.parts[block].costs()

    def embed_macs(self) -> int:
        return self.patch_macs

    def head_macs(self, rows: Tensor) -> Tensor:
        rows, pool = rows - self.pooled_from, self._attention_pool
        heads = linear_macs(self.model.head) + linear_macs(getattr(self.model, "head_dist", None))
        if not isinstance(pool, AttentionPoolLatent):
            return rows * 0 + heads
        latent = pool.latent_len
        fixed = latent * (linear_macs(pool.q) + linear_macs(pool.proj) + linear_macs(pool.mlp))
        return rows * (linear_macs(pool.kv) + 2 * latent * pool.num_heads * pool.head_dim) + fixed + heads

    # The model as a whole

    def preprocessing(self) -> dict[str, Any]:
        return timm_preprocessing(self.model, self.input_size)

    def unfused(self) -> nn.Module:
        twin = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        for part in twin.blocks.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = False
        return twin


def has_class_token(model: Any) -> bool:
    return getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None)


def check_pooling(model: Any) -> None:
    """Refuse a model whose output needs tokens that a game may remove.

    Raises:
        TokenGameError: names the part.
    """
    name, pool = type(model).__name__, getattr(model, "attn_pool", None)
    if model.num_prefix_tokens and not has_class_token(model) and model.global_pool == "token":
        raise TokenGameError(f"{name} pools a class token it does not have")
    if model.global_pool not in ("token", "avg", "avgmax", "max", "map"):
        raise TokenGameError(f"{name} pools by {model.global_pool!r}: its output depends on every token of the grid")
    if pool is not None and pool.pos_embed is not None:
        raise TokenGameError(f"{name} adds positions in its pooling, which needs the whole grid")
    drop = getattr(model, "patch_drop", None)
    if type(drop) not in DROPOUTS:
        raise TokenGameError(f"{name} drops patches with {type(drop).__name__}; only PatchDropout is known")


def _classes(model: Any) -> int:
    """Logits of the head that the model has now, which users replace; 0 for embeddings."""
    if isinstance(model.head, nn.Identity):
        return 0
    return getattr(model.head, "out_features", model.num_classes)


def _patch_macs(model: Any, stem: Any) -> int:
    """Multiply-accumulates of embedding one patch: counted where a network of its own does it."""
    if isinstance(stem, PatchEmbed):
        return sum(m.weight.numel() for m in stem.proj.modules() if isinstance(m, nn.Conv2d))
    tensors = dict(stem.named_parameters()) | dict(stem.named_buffers())
    image = torch.empty(1, model.in_chans, *stem.img_size, dtype=next(stem.parameters()).dtype, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(stem, {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}, (image,))
    return counter.get_total_flops() // (2 * stem.num_patches)
