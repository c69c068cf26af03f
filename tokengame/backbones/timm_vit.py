"""timm's plain VisionTransformer (ViT, DeiT, DINOv2, SigLIP, CLIP, ...) on packed rows.

Blocks run through their own submodules (norm1, attn.qkv, ls1, mlp, ...). Whatever this could get wrong is refused by
exact type, so that an unknown block never runs approximately.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    GluMlp,
    LayerScale,
    Mlp,
    PatchDropout,
    PatchEmbed,
    SwiGLU,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tokengame.backbones.base import Backbone, BlockCosts, KeyValueWeights
from tokengame.backbones.calls import Interface
from tokengame.backbones.changes import check_changes
from tokengame.backbones.parts import (
    INACTIVE,
    check_rowwise,
    drop_paths,
    dropped_patches,
    is_plain_linear,
    is_plain_norm,
    linear_macs,
    masked_pool,
    norm_weights,
)  # fmt: skip
from tokengame.errors import TokenGameError
from tokengame.kernels.weights import BlockWeights, LinearWeights, ModelWeights, NormWeights
from tokengame.packed.layout import RaggedLayout
from tokengame.packed.rows import add_in_pieces

ROWWISE_MLPS = (Mlp, GluMlp, SwiGLU)

INTERFACE = Interface(
    attributes=frozenset({
        "pretrained_cfg", "default_cfg", "num_features", "head_hidden_size", "embed_dim", "num_classes", "global_pool",
        "num_prefix_tokens", "num_reg_tokens", "has_class_token", "feature_info", "dynamic_img_size", "patch_embed",
        "get_classifier", "forward_head", "pool",
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


class TimmViT(Backbone):
    """A timm VisionTransformer or VisionTransformerDistilled of plain pre-norm blocks."""

    interface = INTERFACE

    def __init__(self, model: Any):
        check_supported(model)
        check_changes(model, _bypassed(model), ["blocks", "norm"])
        attn = model.blocks[0].attn
        self.model = model
        self.depth, self.dim = len(model.blocks), model.embed_dim
        self.heads, self.head_dim, self.scale = attn.num_heads, attn.head_dim, attn.scale
        self.prefix, self.has_class_token = model.num_prefix_tokens, model.has_class_token
        self.patch_size, self.patches = model.patch_embed.patch_size, model.patch_embed.num_patches
        self.input_size = tuple(model.patch_embed.img_size or (0, 0))
        self.classes = _classes(model)

    @staticmethod
    def accepts(model: Any) -> bool:
        return type(model) in (VisionTransformer, VisionTransformerDistilled)

    @property
    def blocks(self) -> list[Any]:
        return list(self.model.blocks)

    @property
    def reads_prefix_only(self) -> bool:
        return self.model.global_pool == "token" and self.model.attn_pool is None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.model.patch_embed.dynamic_feat_size((height, width))

    # Embedding

    def embed(self, images: Tensor) -> Tensor:
        return self.after_embedding(self.model._pos_embed(self.model.patch_embed(images)))

    def after_embedding(self, x: Tensor) -> Tensor:
        return self.model.norm_pre(x)

    def drop_patches(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return dropped_patches(self.model.patch_drop, x, self.prefix) if self.drops_patches else (x, None)

    @property
    def drops_patches(self) -> bool:
        drop = self.model.patch_drop
        return drop.training and isinstance(drop, PatchDropout)

    @property
    def embeds_plainly(self) -> bool:
        return type(self.model.norm_pre) is nn.Identity

    def constant_tokens(self, images: Tensor) -> Tensor | None:
        model, patches = self.model, self.model.patch_embed
        if images.shape[1:] != (patches.proj.in_channels, *(patches.img_size or ())):
            return None
        grid = patches.grid_size if model.dynamic_img_size else (patches.num_patches,)
        return model._pos_embed(images.new_zeros(1, *grid, self.dim))[0]  # what timm makes of patches that are zero

    # Blocks

    def norm_attention(self, block: int, x: Tensor) -> Tensor:
        return self.model.blocks[block].norm1(x)

    def project(self, block: int, normed: Tensor, _layout: RaggedLayout, first: int = 0, last: int = 3) -> Tensor:
        attn = self.model.blocks[block].attn
        parts, norms = last - first, (attn.q_norm, attn.k_norm)[first:last]
        width = attn.num_heads * attn.head_dim
        some = slice(first * width, last * width)
        if parts < 3 and is_plain_linear(attn.qkv):
            bias = attn.qkv.bias
            found = F.linear(normed, attn.qkv.weight[some], None if bias is None else bias[some])
        else:
            found = attn.qkv(normed)[:, some]
        heads = found.unflatten(1, (parts, attn.num_heads, attn.head_dim))
        if all(isinstance(norm, nn.Identity) for norm in norms):
            return heads
        normalised = [norm(part) for norm, part in zip(norms, heads.unbind(1), strict=False)]
        return torch.stack([*normalised, *heads.unbind(1)[len(norms) :]], 1)

    def add_attention(self, block: int, x: Tensor, attended: Tensor, layout: RaggedLayout) -> Tensor:
        module = self.model.blocks[block]
        attn, out = module.attn, module.attn.norm(attended)
        if getattr(attn, "gate", None) is not None:
            out = out * attn.gate(module.norm1(x)).sigmoid()
        return x + drop_paths(module.drop_path1, module.ls1(attn.proj_drop(attn.proj(out))), layout)

    def feed_forward(self, block: int, x: Tensor, layout: RaggedLayout) -> Tensor:
        module = self.model.blocks[block]

        def update(rows: Tensor) -> Tensor:
            return module.ls2(module.mlp(module.norm2(rows)))

        if module.training:
            return x + drop_paths(module.drop_path2, update(x), layout)
        return add_in_pieces(lambda rows: module.drop_path2(update(rows)), x)

    def attention_dropout(self, block: int) -> float:
        drop = self.model.blocks[block].attn.attn_drop
        return drop.p if drop.training and isinstance(drop, nn.Dropout) else 0.0

    @property
    def checkpoints(self) -> bool:
        return self.model.grad_checkpointing

    def key_value_weights(self, block: int) -> KeyValueWeights | None:
        attn = self.model.blocks[block].attn
        if not is_plain_linear(attn.qkv) or not isinstance(attn.k_norm, nn.Identity) or self.attention_dropout(block):
            return None
        _, key, value = attn.qkv.weight.view(3, attn.num_heads, attn.head_dim, -1)
        bias = None if attn.qkv.bias is None else attn.qkv.bias.view(3, attn.num_heads, attn.head_dim)[2]
        return KeyValueWeights(key, value, bias)

    # Head

    def final_norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x)

    def head(self, x: Tensor, layout: RaggedLayout, size: Tensor | None = None) -> Tensor:
        model, x = self.model, self.model.norm(x)
        if model.attn_pool is not None:
            return self._attention_pool(x, layout, size)
        if model.global_pool == "token":
            return model.forward_head(x[layout.first_rows(self.prefix)].unflatten(0, (layout.images, self.prefix)))
        rows, mask = layout.pad(x), layout.mask.clone()
        mask[:, : self._pooled_from] = False
        pooled = masked_pool(model.global_pool, rows, mask, None if size is None else layout.pad(size))
        return model.head(model.head_drop(model.fc_norm(pooled)))

    @property
    def _pooled_from(self) -> int:
        """The first row of an image that pooling reads."""
        return 0 if self.model.pool_include_prefix else self.prefix

    def _attention_pool(self, x: Tensor, layout: RaggedLayout, size: Tensor | None) -> Tensor:
        rows = x.new_zeros(layout.rows) if size is None else size.log().to(x.dtype)
        bias = layout.pad(rows, float("-inf"))[:, None, None, self._pooled_from :]
        pooled = self.model.attn_pool(layout.pad(x)[:, self._pooled_from :], attn_mask=bias)
        return self.model.head(self.model.head_drop(self.model.fc_norm(pooled)))

    # Costs

    def costs(self, block: int) -> BlockCosts:
        attn, mlp = self.model.blocks[block].attn, self.model.blocks[block].mlp
        query = linear_macs(attn.qkv) // 3
        return BlockCosts(query, 2 * query, linear_macs(attn) - 3 * query, linear_macs(mlp))

    def embed_macs(self) -> int:
        convolutions = [m for m in self.model.patch_embed.proj.modules() if isinstance(m, nn.Conv2d)]
        return sum(m.weight.numel() for m in convolutions)

    def head_macs(self, rows: Tensor) -> Tensor:
        rows, pool = rows - self._pooled_from, self.model.attn_pool
        heads = linear_macs(self.model.head) + linear_macs(getattr(self.model, "head_dist", None))
        if not isinstance(pool, AttentionPoolLatent):
            return rows * 0 + heads
        latent = pool.latent_len
        fixed = latent * (linear_macs(pool.q) + linear_macs(pool.proj) + linear_macs(pool.mlp))
        return rows * (linear_macs(pool.kv) + 2 * latent * pool.num_heads * pool.head_dim) + fixed + heads

    # The model as a whole

    def preprocessing(self) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = timm.data.resolve_data_config({}, model=self.model)
        size = self.model.patch_embed.img_size
        if size is not None:
            config["input_size"] = (config["input_size"][0], *size)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}

    def unfused(self) -> nn.Module:
        twin = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        for block in twin.blocks:
            block.attn.fused_attn = False
        return twin

    def plain_weights(self) -> ModelWeights | None:
        blocks = self.blocks
        if not all(_is_plain_block(block) for block in blocks):
            return None
        return ModelWeights([_block_weights(block) for block in blocks], self._patch_weights(), self._head_weights())

    def _patch_weights(self) -> LinearWeights | None:
        embed = self.model.patch_embed
        proj = embed.proj
        plain = type(proj) is nn.Conv2d and type(embed.norm) is nn.Identity and not embed.dynamic_img_pad
        if not plain or proj.kernel_size not in ((8, 8), (16, 16), (32, 32)):
            return None
        return LinearWeights(proj.weight.flatten(1), proj.bias)

    def _head_weights(self) -> tuple[NormWeights, LinearWeights] | None:
        model = self.model
        plain = type(model) is VisionTransformer and model.global_pool == "token" and model.attn_pool is None
        plain = plain and type(model.fc_norm) is nn.Identity and type(model.head_drop) in INACTIVE
        if not plain or not is_plain_norm(model.norm) or type(model.head) is not nn.Linear:
            return None
        return norm_weights(model.norm), LinearWeights(model.head.weight, model.head.bias)


def _is_plain_block(block: Any) -> bool:
    """Whether a block is norm, attention, exact GELU and layer scale as the kernels compute them, by exact type."""
    attn, mlp = block.attn, block.mlp
    if type(mlp) is not Mlp or type(mlp.act) is not nn.GELU or mlp.act.approximate != "none":
        return False
    if not all(type(layer) is nn.Linear for layer in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)):
        return False
    if not is_plain_norm(block.norm1) or not is_plain_norm(block.norm2):
        return False
    nothing = (attn.q_norm, attn.k_norm, attn.norm, mlp.norm)
    drops = (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2, block.drop_path1, block.drop_path2)
    scales = (block.ls1, block.ls2)
    return (
        all(type(part) is nn.Identity for part in nothing)
        and all(type(drop) in INACTIVE for drop in drops)
        and all(type(scale) in (nn.Identity, LayerScale) for scale in scales)
        and getattr(attn, "gate", None) is None
    )


def _block_weights(block: Any) -> BlockWeights:
    attn, mlp = block.attn, block.mlp
    scales = [None if isinstance(ls, nn.Identity) else ls.gamma for ls in (block.ls1, block.ls2)]
    return BlockWeights(
        norm1=norm_weights(block.norm1),
        qkv=LinearWeights(attn.qkv.weight, attn.qkv.bias),
        proj=LinearWeights(attn.proj.weight, attn.proj.bias, scales[0]),
        norm2=norm_weights(block.norm2),
        fc1=LinearWeights(mlp.fc1.weight, mlp.fc1.bias),
        fc2=LinearWeights(mlp.fc2.weight, mlp.fc2.bias, scales[1]),
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=attn.scale,
    )


def _classes(model: Any) -> int:
    """Logits of the head that the model has now, which users replace; 0 for embeddings."""
    if isinstance(model.head, nn.Identity):
        return 0
    return getattr(model.head, "out_features", model.num_classes)


def _bypassed(model: Any) -> list[str]:
    """Parts that are never called, because packed rows take another way."""
    blocks = [f"blocks.{index}" for index in range(len(model.blocks))]
    return ["", "blocks", *blocks, *(f"{name}.attn" for name in blocks), *(f"{name}.attn.attn_drop" for name in blocks)]


def check_supported(model: Any) -> None:
    """Raise TokenGameError, naming the part, unless `model` can be run exactly on packed rows."""
    name = type(model).__name__
    if type(model.patch_embed) is not PatchEmbed:
        raise TokenGameError(f"{name} embeds patches with {type(model.patch_embed).__name__}; only PatchEmbed is plain")
    if model.num_prefix_tokens and not model.has_class_token and model.global_pool == "token":
        raise TokenGameError(f"{name} pools a class token it does not have")
    if model.global_pool not in ("token", "avg", "avgmax", "max", "map"):
        raise TokenGameError(f"{name} pools by {model.global_pool!r}: its output depends on every token of the grid")
    if model.attn_pool is not None and model.attn_pool.pos_embed is not None:
        raise TokenGameError(f"{name} adds positions in its pooling, which needs the whole grid")
    if type(model.patch_drop) not in (nn.Identity, PatchDropout):
        raise TokenGameError(f"{name} drops patches with {type(model.patch_drop).__name__}; only PatchDropout is known")
    if not len(model.blocks):
        raise TokenGameError(f"{name} has no blocks, so there is nothing to prune in")
    for index, block in enumerate(model.blocks):
        _check_block(f"{name} block {index}", block)


def _check_block(where: str, block: Any) -> None:
    if type(block) is not Block:
        raise TokenGameError(f"{where} is a {type(block).__name__}; only the pre-norm Block can be split exactly")
    if type(block.attn) is not Attention:
        raise TokenGameError(f"{where} attends with {type(block.attn).__name__}; only plain Attention is exact")
    if not isinstance(block.mlp, ROWWISE_MLPS) or getattr(block.mlp, "use_conv", False):
        raise TokenGameError(f"{where} has the MLP {type(block.mlp).__name__}, which may mix tokens")
    check_rowwise(where, block)
