"""timm's VisionTransformer (ViT, DeiT, DINOv2, SigLIP, CLIP, hybrids, ViTamin, ...) on packed rows."""

from __future__ import annotations

from timm.layers import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokengame.backbones.parts import INACTIVE, is_plain_norm, norm_weights, patch_weights
from tokengame.backbones.timm_base import TimmBackbone
from tokengame.backbones.timm_weights import block_weights, is_plain_block
from tokengame.errors import TokenGameError
from tokengame.kernels.plain import LinearWeights, ModelWeights, NormWeights


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
        if not all(is_plain_block(block) for block in blocks):
            return None
        return ModelWeights([block_weights(block) for block in blocks], self._patch_weights(), self._head_weights())

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
