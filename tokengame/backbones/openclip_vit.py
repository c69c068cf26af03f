"""Image towers of open_clip on packed rows: its own VisionTransformer (CLIP, CoCa), and towers that hold a timm model.

open_clip is optional: it is never imported here, its classes are known by name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from tokengame.backbones.base import Backbone, BlockCosts, KeyValueWeights
from tokengame.backbones.calls import Call, Interface, Intermediates, check_masks
from tokengame.backbones.changes import check_changes
from tokengame.backbones.of_timm import TIMM
from tokengame.backbones.parts import (
    activation_of,
    check_packed_attention,
    check_rowwise,
    dropped_patches,
    is_plain_norm,
    linear_macs,
    masked_pool,
    norm_weights,
    packed_key_values,
    packed_projection,
    patch_weights,
)
from tokengame.errors import TokenGameError
from tokengame.kernels.plain import BlockWeights, LinearWeights, ModelWeights, NormWeights
from tokengame.packed.layout import RaggedLayout
from tokengame.packed.rows import add_in_pieces

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
"""of the images that CLIP was trained on, open_clip's default"""
CROP_MODES = {"shortest": "center", "longest": "border", "squash": "squash"}
"""timm's names of open_clip's ways to resize"""

INTERFACE = Interface(
    attributes=frozenset({
        "image_size", "patch_size", "grid_size", "output_dim", "output_tokens", "pool_type", "attn_pool_type",
        "final_ln_after_pool", "image_mean", "image_std", "preprocess_cfg",
    }),
    changes=frozenset({"lock", "set_grad_checkpointing"}),
    refused={
        "prune_intermediate_layers": "remove layers of the model, then prune it",
        "set_input_size": "set the input size of the model, then prune it",
    },
)  # fmt: skip
"""of open_clip's image towers, as far as the models around them read it"""


class Tower(Backbone):
    """What image towers share: open_clip's calls and preprocessing."""

    interface = INTERFACE
    classes = 0

    def read_call(self, x: Tensor) -> Call:  # type: ignore[override]  # open_clip's arguments
        check_masks(x, None, False)
        return Call(x)

    def read_intermediates(  # type: ignore[override]
        self, x: Tensor, indices: int | list[int] | None = None, stop_early: bool = False,
        normalize_intermediates: bool = False, intermediates_only: bool = False, output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> Call:  # fmt: skip
        """open_clip's `forward_intermediates`: a dictionary, whose `image_features` is the embedding."""
        check_masks(x, None, False)
        taken, last = feature_take_indices(self.depth, indices)
        if stop_early and not intermediates_only and last < self.depth - 1:
            raise TokenGameError(
                "a pruned model embeds images after its last block: leave out stop_early, or add intermediates_only"
            )
        grid = self.grid(*x.shape[2:])

        def answer(embedding: Tensor, features: list[Tensor]) -> dict[str, Any]:
            normed = [self.final_norm(x) if normalize_intermediates else x for x in features]
            found = Intermediates(normed, self.prefix, grid, output_fmt, output_extra_tokens).as_dict(None)
            return found if intermediates_only else found | {"image_features": embedding}

        return Call(x, tuple(sorted(set(taken))), answer)

    def preprocessing(self) -> dict[str, Any]:
        """As open_clip says in `preprocess_cfg` of the tower, otherwise its defaults."""
        config = getattr(self.model, "preprocess_cfg", {})
        return {
            "input_size": [3, *self.input_size],
            "interpolation": config.get("interpolation", "bicubic"),
            "mean": list(config.get("mean", MEAN)),
            "std": list(config.get("std", STD)),
            "crop_pct": 1.0,
            "crop_mode": CROP_MODES[config.get("resize_mode", "shortest")],
        }


class OpenCLIPViT(Tower):
    """open_clip's own VisionTransformer; images have the size that it was made for, as natively.

    `output_tokens` (CoCa): tokens are those of the full grid, see `PrunedViT.forward_features`.
    """

    def __init__(self, model: Any):
        _check_supported(model)
        check_changes(model, _bypassed(model), ["transformer.resblocks", "ln_post"])
        attn = model.transformer.resblocks[0].attn
        self.model = model
        self.depth, self.dim = len(model.transformer.resblocks), model.transformer.width
        self.heads, self.head_dim = attn.num_heads, self.dim // attn.num_heads
        self.scale = self.head_dim**-0.5
        self.prefix, self.has_class_token = 1, True
        self.patch_size, self.input_size = model.patch_size, model.image_size
        self.patches = model.grid_size[0] * model.grid_size[1]

    @staticmethod
    def accepts(model: Any) -> bool:
        return _is_open_clips(model, "VisionTransformer")

    @property
    def dtype(self) -> torch.dtype:
        """Of the layers; norms and embeddings may stay in float32."""
        return self.model.conv1.weight.dtype

    @property
    def blocks(self) -> list[Any]:
        return list(self.model.transformer.resblocks)

    @property
    def reads_prefix_only(self) -> bool:
        return self.model.attn_pool is None and self.model.pool_type == "tok"

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch_size[0], width // self.patch_size[1]

    def read_call(self, x: Tensor) -> Call:  # type: ignore[override]
        if not self.model.output_tokens:
            return super().read_call(x)
        check_masks(x, None, False)
        return Call(x, (self.depth - 1,), lambda embedding, features: (embedding, self.model._pool(features[0])[1]))

    def native(self, images: Tensor) -> Tensor:
        return self.model(images)[0] if self.model.output_tokens else self.model(images)

    def native_features(self, images: Tensor) -> Tensor:
        return self.final_norm(self.model.transformer(self.model._embeds(images)))

    # Embedding

    def _with_positions(self, patches: Tensor) -> Tensor:
        """[B, N, C] -> [B, 1 + N, C] behind the class token"""
        model, dtype = self.model, patches.dtype
        token = model.class_embedding.expand(len(patches), 1, -1).to(dtype)
        return torch.cat([token, patches], 1) + model.positional_embedding.to(dtype)

    def embed(self, images: Tensor) -> Tensor:
        return self.after_embedding(self._with_positions(self.model.conv1(images).flatten(2).transpose(1, 2)))

    def after_embedding(self, x: Tensor) -> Tensor:
        return self.model.ln_pre(x)

    @property
    def embeds_plainly(self) -> bool:
        return type(self.model.ln_pre) is nn.Identity

    def constant_tokens(self, images: Tensor) -> Tensor | None:
        if images.shape[1:] != (self.model.conv1.in_channels, *self.input_size):
            return None
        return self._with_positions(images.new_zeros(1, self.patches, self.dim))[0]

    def drop_patches(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return dropped_patches(self.model.patch_dropout, x, self.prefix) if self.drops_patches else (x, None)

    @property
    def drops_patches(self) -> bool:
        drop = self.model.patch_dropout
        return drop.training and not isinstance(drop, nn.Identity)

    # Blocks

    def norm_attention(self, block: int, x: Tensor) -> Tensor:
        return self.model.transformer.resblocks[block].ln_1(x)

    def project(self, block: int, normed: Tensor, _layout: RaggedLayout, first: int = 0, last: int = 3) -> Tensor:
        attn = self.model.transformer.resblocks[block].attn
        heads = packed_projection(attn, normed, first, last)
        norms = [getattr(attn, name, None) for name in ("ln_q", "ln_k")][first:last]
        if all(norm is None or isinstance(norm, nn.Identity) for norm in norms):
            return heads
        normalised = [norm(part) for norm, part in zip(norms, heads.unbind(1), strict=False)]  # type: ignore[misc]
        return torch.stack([*normalised, *heads.unbind(1)[len(norms) :]], 1)

    def add_attention(self, block: int, x: Tensor, attended: Tensor, _layout: RaggedLayout) -> Tensor:
        module = self.model.transformer.resblocks[block]
        return x + module.ls_1(_attention_output(module, attended))

    def feed_forward(self, block: int, x: Tensor, _layout: RaggedLayout) -> Tensor:
        module = self.model.transformer.resblocks[block]
        return add_in_pieces(lambda rows: module.ls_2(module.mlp(module.ln_2(rows))), x)

    def attention_dropout(self, block: int) -> float:
        attn = self.model.transformer.resblocks[block].attn
        dropped = attn.dropout if isinstance(attn, nn.MultiheadAttention) else attn.attn_drop.p
        return dropped if attn.training else 0.0

    @property
    def checkpoints(self) -> bool:
        return self.model.transformer.grad_checkpointing

    def key_value_weights(self, block: int) -> KeyValueWeights | None:
        attn = self.model.transformer.resblocks[block].attn
        plain = isinstance(getattr(attn, "ln_k", None), nn.Identity | None)
        return packed_key_values(attn) if plain and not self.attention_dropout(block) else None

    # Head

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm of rows before they are pooled; attention pooling has a norm of its own."""
        return x if self.model.attn_pool is not None else self.model.ln_post(x)

    def head(self, x: Tensor, layout: RaggedLayout, size: Tensor | None = None) -> Tensor:
        model = self.model
        if model.attn_pool is not None:
            pooled, _ = model._global_pool(model.ln_post(self._attention_pool(x, layout, size)))
        elif model.pool_type == "tok":
            pooled = model.ln_post(layout.first(x))
        else:
            pooled = self._average_pool(x, layout, size)
        return pooled if model.proj is None else pooled @ model.proj

    def _average_pool(self, x: Tensor, layout: RaggedLayout, size: Tensor | None) -> Tensor:
        """[M, C] -> [B, C] over patches, with the norm before or after."""
        late, norm = self.model.final_ln_after_pool, self.model.ln_post
        mask = layout.mask.clone()
        mask[:, 0] = False
        rows = layout.pad(x if late else norm(x))
        pooled = masked_pool("avg", rows, mask, None if size is None else layout.pad(size))
        return norm(pooled) if late else pooled

    def _attention_pool(self, x: Tensor, layout: RaggedLayout, size: Tensor | None) -> Tensor:
        """[M, C] -> [B, queries, D] over all rows."""
        pool, sizes = self.model.attn_pool, x.new_zeros(layout.rows) if size is None else size.log().to(x.dtype)
        rows, bias = pool.ln_k(layout.pad(x)), layout.pad(sizes, float("-inf"))
        queries = pool.ln_q(pool.query).expand(layout.images, -1, -1)
        return pool.attn(queries, rows, rows, key_padding_mask=bias, need_weights=False)[0]

    # Costs

    def costs(self, block: int) -> BlockCosts:
        module = self.model.transformer.resblocks[block]
        query = module.attn.in_proj_weight.numel() // 3
        return BlockCosts(query, 2 * query, linear_macs(module.attn), linear_macs(module.mlp))

    def embed_macs(self) -> int:
        return self.model.conv1.weight.numel()

    def head_macs(self, rows: Tensor) -> Tensor:
        pool, outputs = self.model.attn_pool, 0 if self.model.proj is None else self.model.proj.numel()
        if pool is None:
            return rows * 0 + outputs
        queries, width = pool.query.shape
        fixed = queries * (width * width + linear_macs(pool.attn))
        each = 2 * width * self.dim + 2 * queries * width  # key and value; two products
        return rows * each + fixed + outputs * (queries if self.model.pool_type == "none" else 1)

    # The weights for the compiled kernels

    def plain_weights(self) -> ModelWeights | None:
        if not all(_is_plain_block(block) for block in self.blocks):
            return None
        return ModelWeights(
            [_block_weights(block) for block in self.blocks], patch_weights(self.model.conv1), self._head_weights()
        )

    def _head_weights(self) -> tuple[NormWeights, LinearWeights] | None:
        model = self.model
        if not self.reads_prefix_only or model.proj is None or not _is_plain_norm(model.ln_post):
            return None
        return norm_weights(model.ln_post), LinearWeights(model.proj.t(), None)


def _is_open_clips(model: Any, name: str) -> bool:
    return type(model).__module__.startswith("open_clip.") and type(model).__name__ == name


def _is_plain_norm(norm: Any) -> bool:
    return is_plain_norm(norm) or (_is_open_clips(norm, "LayerNorm") and norm.bias is not None)


def _attention_output(block: Any, attended: Tensor) -> Tensor:
    """[M, H * D] attention output through the output projection and what is around it: [M, C]."""
    attn, out = block.attn, block.attn.out_proj
    if isinstance(attn, nn.MultiheadAttention):
        return F.linear(attended, out.weight, out.bias)  # hooks of out_proj never run natively
    if attn.head_scale is not None:
        attended = (attended.unflatten(1, (attn.num_heads, -1)) * attn.head_scale[:, 0]).flatten(1)
    return block.ln_attn(attn.out_drop(out(attn.ln_inner(attended))))


def _is_plain_block(block: Any) -> bool:
    """Whether a block is norm, attention, MLP and layer scale as the kernels compute them."""
    mlp = list(block.mlp)
    usual = type(block.attn) is nn.MultiheadAttention and [type(p) for p in mlp[::2]] == [nn.Linear, nn.Linear]
    usual = usual and len(mlp) == 3 and activation_of(mlp[1]) is not None
    scales = all(type(s) is nn.Identity or _is_open_clips(s, "LayerScale") for s in (block.ls_1, block.ls_2))
    return usual and scales and all(map(_is_plain_norm, (block.ln_1, block.ln_2)))


def _block_weights(block: Any) -> BlockWeights:
    attn, mlp, activation = block.attn, block.mlp, activation_of(block.mlp[1])
    assert activation is not None
    scales = [None if isinstance(ls, nn.Identity) else ls.gamma for ls in (block.ls_1, block.ls_2)]
    return BlockWeights(
        norm1=norm_weights(block.ln_1),
        qkv=LinearWeights(attn.in_proj_weight, attn.in_proj_bias),
        proj=LinearWeights(attn.out_proj.weight, attn.out_proj.bias, scales[0]),
        norm2=norm_weights(block.ln_2),
        fc1=LinearWeights(mlp.c_fc.weight, mlp.c_fc.bias),
        fc2=LinearWeights(mlp.c_proj.weight, mlp.c_proj.bias, scales[1]),
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=attn.head_dim**-0.5,
        activation=activation,
    )


def _bypassed(model: Any) -> list[str]:
    """Parts that are never called, because packed rows take another way."""
    blocks = [f"transformer.resblocks.{index}" for index in range(len(model.transformer.resblocks))]
    attentions = [f"{name}.attn" for name in blocks]
    inside = [f"{name}.attn_drop" for name in attentions if hasattr(model.get_submodule(name), "attn_drop")]
    pool = ["attn_pool"] if model.attn_pool is not None else []
    return ["", "transformer", "transformer.resblocks", *blocks, *attentions, *inside, *pool]


def _check_supported(model: Any) -> None:
    """Raise TokenGameError, naming the part, unless `model` can be run exactly on packed rows."""
    name = type(model).__name__
    if getattr(model, "attn_pool_contrastive", None) is not None:
        raise TokenGameError(f"{name} has two attention pools ({model.attn_pool_type}), which open_clip calls untested")
    if model.attn_pool is None and model.pool_type not in ("tok", "avg"):
        raise TokenGameError(f"{name} pools by {model.pool_type!r}: its output depends on every token of the grid")
    if model.attn_pool is not None and not _is_open_clips(model.attn_pool, "AttentionalPooler"):
        raise TokenGameError(f"{name} pools with {type(model.attn_pool).__name__}; only AttentionalPooler is known")
    drop = model.patch_dropout
    if type(drop) is not nn.Identity and not (_is_open_clips(drop, "PatchDropout") and drop.exclude_first_token):
        raise TokenGameError(f"{name} drops patches with {type(drop).__name__}, which is not known, or class tokens")
    if not _is_open_clips(model.transformer, "Transformer"):
        raise TokenGameError(f"{name} has a {type(model.transformer).__name__}; only open_clip's Transformer is known")
    if not len(model.transformer.resblocks):
        raise TokenGameError(f"{name} has no blocks, so there is nothing to prune in")
    for index, block in enumerate(model.transformer.resblocks):
        _check_block(f"{name} block {index}", block)


def _check_block(where: str, block: Any) -> None:
    custom = _is_open_clips(block, "CustomResidualAttentionBlock")
    if not custom and not _is_open_clips(block, "ResidualAttentionBlock"):
        raise TokenGameError(f"{where} is a {type(block).__name__}; only open_clip's own blocks are known to be exact")
    if not custom:
        check_packed_attention(where, block.attn)
    elif not _is_open_clips(block.attn, "Attention"):
        raise TokenGameError(f"{where} attends with {type(block.attn).__name__}; only open_clip's Attention is exact")
    elif block.attn.logit_scale is not None:
        raise TokenGameError(f"{where} attends by scaled cosine (scaled_cosine_attn), which is not supported")
    if hasattr(block, "ln_1_kv"):
        raise TokenGameError(f"{where} attends to other tokens than its own (is_cross_attention)")
    check_rowwise(where, block, block.attn)


def _of_trunk(name: str) -> Any:
    """The method `name` of the trunk's backbone."""

    def call(self: OpenCLIPTimm, *arguments: Any, **named: Any) -> Any:
        return getattr(self.trunk, name)(*arguments, **named)

    return call


def _trunks(name: str) -> Any:
    """The property `name` of the trunk's backbone."""
    return property(lambda self: getattr(self.trunk, name))


class OpenCLIPTimm(Tower):
    """open_clip's TimmModel: a timm model of any supported family, and a head on what it pools."""

    def __init__(self, model: Any):
        check_changes(model, [""], [])
        self.model = model
        self.trunk = next(family(model.trunk) for family in TIMM if family.accepts(model.trunk))
        for name in ("depth", "dim", "heads", "head_dim", "scale", "prefix", "has_class_token", "patch_size", "patches",
                     "input_size", "positional"):  # fmt: skip
            setattr(self, name, getattr(self.trunk, name))

    @staticmethod
    def accepts(model: Any) -> bool:
        return _is_open_clips(model, "TimmModel") and any(family.accepts(model.trunk) for family in TIMM)

    blocks, reads_prefix_only = _trunks("blocks"), _trunks("reads_prefix_only")
    embeds_plainly, drops_patches, checkpoints = map(_trunks, ("embeds_plainly", "drops_patches", "checkpoints"))
    grid, embed, after_embedding = map(_of_trunk, ("grid", "embed", "after_embedding"))
    drop_patches, constant_tokens = map(_of_trunk, ("drop_patches", "constant_tokens"))
    whole_layout, last_half = map(_of_trunk, ("whole_layout", "last_half"))
    norm_attention, project = map(_of_trunk, ("norm_attention", "project"))
    pair_bias, rotary_table = map(_of_trunk, ("pair_bias", "rotary_table"))
    heads_of, next_heads = map(_of_trunk, ("heads_of", "next_heads"))
    add_attention, feed_forward, final_norm = map(_of_trunk, ("add_attention", "feed_forward", "final_norm"))
    attention_dropout, key_value_weights = map(_of_trunk, ("attention_dropout", "key_value_weights"))
    costs, embed_macs, native_features = map(_of_trunk, ("costs", "embed_macs", "native_features"))
    fingerprint_parameters = _of_trunk("fingerprint_parameters")

    def head(self, x: Tensor, layout: RaggedLayout, size: Tensor | None = None) -> Tensor:
        return self.model.head(self.trunk.head(x, layout, size))

    def head_macs(self, rows: Tensor) -> Tensor:
        return self.trunk.head_macs(rows) + linear_macs(self.model.head)

    def plain_weights(self) -> ModelWeights | None:
        weights = self.trunk.plain_weights()
        if weights is None or not len(self.model.head):
            return weights
        return ModelWeights(weights.blocks, weights.patches, None)
