"""timm's VisionTransformer (ViT, DeiT, DINOv2, SigLIP, CLIP, hybrids, ViTamin, ...) on packed rows."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention, LayerScale, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tokengame.backbones.parts import INACTIVE, is_plain_norm, norm_weights, patch_weights
from tokengame.backbones.timm_base import TimmBackbone
from tokengame.backbones.timm_mlp import is_none_or_plain, mlp_weights, none_or_norm
from tokengame.errors import TokenGameError
from tokengame.kernels.plain import BlockWeights, LinearWeights, ModelWeights, NormWeights


class TimmViT(TimmBackbone):
    """A timm VisionTransformer or VisionTransformerDistilled."""

    kinds = (VisionTransformer, VisionTransformerDistilled)

    # Embedding

    def embed(self, images: Tensor) -> Tensor:
        tokens = self.model._pos_embed(self.model.patch_embed(images))
        rows, columns = self.grid(*images.shape[2:])
        if tokens.shape[1] != self.prefix + rows * columns:
            raise TokenGameError(
                f"{type(self.model.patch_embed).__name__} gives {tokens.shape[1] - self.prefix} patches of such images "
                f"and says that they are {rows} x {columns}"
            )
        return self.after_embedding(tokens)

    def after_embedding(self, x: Tensor) -> Tensor:
        return self.model.norm_pre(x)

    @property
    def embeds_plainly(self) -> bool:
        return type(self.model.norm_pre) is nn.Identity

    def constant_tokens(self, images: Tensor) -> Tensor | None:
        model, patches = self.model, self.model.patch_embed
        if images.shape[1:] != (patches.proj.in_channels, *(patches.img_size or ())):
            return None
        grid = patches.grid_size if model.dynamic_img_size else (patches.num_patches,)
        return model._pos_embed(images.new_zeros(1, *grid, self.dim))[0]  # what timm makes of patches that are zero

    # Weights for the compiled kernels

    def plain_weights(self) -> ModelWeights | None:
        blocks = self.blocks
        if not all(_is_plain_block(block) for block in blocks):
            return None
        return ModelWeights([_block_weights(block) for block in blocks], self._patch_weights(), self._head_weights())

    def _patch_weights(self) -> LinearWeights | None:
        embed = self.model.patch_embed
        if type(embed) is not PatchEmbed or type(embed.norm) is not nn.Identity or embed.dynamic_img_pad:
            return None
        return patch_weights(embed.proj)

    def _head_weights(self) -> tuple[NormWeights, LinearWeights] | None:
        model = self.model
        plain = type(model) is VisionTransformer and model.global_pool == "token" and model.attn_pool is None
        plain = plain and type(model.fc_norm) is nn.Identity and type(model.head_drop) in INACTIVE
        if not plain or not is_plain_norm(model.norm) or type(model.head) is not nn.Linear:
            return None
        return norm_weights(model.norm), LinearWeights(model.head.weight, model.head.bias)


def _is_plain_block(block: Any) -> bool:
    """Whether a block is norm, attention, MLP and layer scale as the kernels compute them, by exact type."""
    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    attn = block.attn
    if mlp_weights(block.mlp, None) is None or not all(type(layer) is nn.Linear for layer in (attn.qkv, attn.proj)):
        return False
    if not is_plain_norm(block.norm1) or not is_plain_norm(block.norm2) or not is_none_or_plain(attn.norm):
        return False
    nothing = (attn.q_norm, attn.k_norm)
    drops = (attn.attn_drop, attn.proj_drop, block.drop_path1, block.drop_path2)
    scales = (block.ls1, block.ls2)
    return (
        all(type(part) is nn.Identity for part in nothing)
        and all(type(drop) in INACTIVE for drop in drops)
        and all(type(scale) in (nn.Identity, LayerScale) for scale in scales)
        and getattr(attn, "gate", None) is None
    )


def _block_weights(block: Any) -> BlockWeights:
    attn = block.attn
    scales = [None if isinstance(ls, nn.Identity) else ls.gamma for ls in (block.ls1, block.ls2)]
    mlp = mlp_weights(block.mlp, scales[1])
    assert mlp is not None
    return BlockWeights(
        norm1=norm_weights(block.norm1),
        qkv=LinearWeights(attn.qkv.weight, attn.qkv.bias),
        proj=LinearWeights(attn.proj.weight, attn.proj.bias, scales[0]),
        norm2=norm_weights(block.norm2),
        **vars(mlp),
        proj_norm=none_or_norm(attn.norm),
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=attn.scale,
    )
