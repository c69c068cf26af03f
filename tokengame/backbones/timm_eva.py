"""timm's models with rotary positions on packed rows: Eva (EVA, EVA02, DINOv3, Perception Encoder, ...) and NaFlexVit.

A row is rotated by the angles of the place that it comes from, so a token that is left keeps its own, and one that
absorbs others keeps its own too. The angles of all places are computed once a call, by the model's own module, and are
handed on with the layout.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from tokengame.backbones.calls import Call
from tokengame.backbones.parts import linear_macs
from tokengame.backbones.timm_base import TimmBackbone
from tokengame.backbones.timm_eva_weights import block_weights, is_plain_block
from tokengame.backbones.timm_weights import block_weights as vit_block_weights
from tokengame.backbones.timm_weights import is_plain_block as is_plain_vit_block
from tokengame.errors import TokenGameError
from tokengame.kernels.plain import ModelWeights
from tokengame.packed.layout import Places, RaggedLayout


class RotaryBackbone(TimmBackbone):
    """A family whose model has a `rope`, or None."""

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return self.model.rope is not None

    def rotary_embedding(self, grid: tuple[int, int]) -> Tensor:
        """Sines and cosines of a grid, as the model itself gets them: [N, 2 D], or [depth, H, N, 2 D]."""
        return self.model.rope.get_embed(shape=grid)

    def whole_layout(self, tokens: Tensor, grid: tuple[int, int]) -> RaggedLayout:
        layout = super().whole_layout(tokens, grid)
        if layout.places is None:
            return layout
        found = self.rotary_embedding(grid)
        by_block = found.transpose(1, 2) if found.ndim == 4 else found[None, :, None]  # [1 or depth, N, 1 or H, 2 D]
        none = torch.zeros_like(by_block[:, :1])
        none[..., none.shape[-1] // 2 :] = 1  # sines 0, cosines 1
        return layout.at(layout.places._replace(angles=torch.cat([none, by_block], 1)))

    def angles(self, block: int, layout: RaggedLayout, rows: int) -> Tensor | None:
        places = layout.places
        if places is None or places.angles is None:
            return None
        own = F.pad(places.position + 1, (0, rows - layout.rows))  # 0: prefix tokens and padding, not rotated
        return places.angles[block % len(places.angles)].index_select(0, own)

    def embed(self, images: Tensor) -> Tensor:
        return self.after_embedding(self.position(images))

    @abstractmethod
    def position(self, images: Tensor) -> Tensor:
        """Embedded tokens [B, prefix + N, C] before `norm_pre`."""

    def after_embedding(self, x: Tensor) -> Tensor:
        return self.model.norm_pre(x)

    @property
    def embeds_plainly(self) -> bool:
        return type(self.model.norm_pre) is nn.Identity


class TimmEva(RotaryBackbone):
    """A timm Eva: EVA, EVA02, DINOv3, Perception Encoder, ViTs with rotary positions, Sapiens2."""

    kinds = (Eva,)

    def rotary_embedding(self, grid: tuple[int, int]) -> Tensor:
        rope = self.model.rope
        if not self.model.dynamic_img_size and hasattr(rope, "feat_shape"):
            return rope.get_embed()
        return super().rotary_embedding(grid)

    def plain_weights(self) -> ModelWeights | None:
        if not all(is_plain_block(block) for block in self.blocks):
            return None
        if len({block.attn.rotate_half for block in self.blocks}) > 1:
            return None
        order = self._order if self.positional else None
        return ModelWeights([block_weights(block, order) for block in self.blocks], None, None)

    @property
    def _order(self) -> Tensor | None:
        """[D] the numbers of a head, so that d turns with d +- D / 2; None where they are in that order."""
        if self.blocks[0].attn.rotate_half:
            return None
        return torch.arange(self.head_dim).view(-1, 2).T.flatten()

    def rotary_table(self, places: Places) -> Tensor | None:
        if places.angles is None:
            return None
        sin, cos = places.angles[:, 1:].chunk(2, -1)
        table, order = torch.stack([cos, sin], 3).float(), self._order
        return table if order is None else table[..., order].contiguous()

    def position(self, images: Tensor) -> Tensor:
        model = copy.copy(self.model)  # rotation and patch dropout come later
        model._modules = {**model._modules, "rope": None, "patch_drop": None}
        return model._pos_embed(model.patch_embed(images))[0]

    @property
    def pooled_from(self) -> int:
        return self.prefix if self._attention_pool is None else 0


class TimmNaFlex(RotaryBackbone):
    """A timm NaFlexVit that is called with images."""

    kinds = (NaFlexVit,)

    def _read_stem(self) -> None:
        embeds: Any = self.model.embeds
        self.patch_size = embeds.patch_size
        size = embeds.default_img_size or (getattr(self.model, "pretrained_cfg", None) or {}).get("input_size")
        grid = embeds.pos_embed_grid_size or (16, 16)
        self.input_size = tuple(size[-2:]) if size else (grid[0] * self.patch_size[0], grid[1] * self.patch_size[1])
        rows, columns = self.grid(*self.input_size)
        self.patches = rows * columns
        self.patch_macs = linear_macs(embeds.proj) if embeds.is_linear else embeds.proj.weight.numel()

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.model.embeds.dynamic_feat_size((height, width))

    def position(self, images: Tensor) -> Tensor:
        return self.model.embeds(images)[0]

    def plain_weights(self) -> ModelWeights | None:
        if self.positional:
            return None
        if all(map(is_plain_vit_block, self.blocks)):
            return ModelWeights([*map(vit_block_weights, self.blocks)], None, None)
        if all(map(is_plain_block, self.blocks)):
            return ModelWeights([block_weights(block, None) for block in self.blocks], None, None)
        return None

    def read_call(  # type: ignore[override]
        self, images: Any, patch_coord: Any = None, patch_valid: Any = None, attn_mask: Any = None
    ) -> Call:
        if isinstance(images, dict) or patch_coord is not None or patch_valid is not None:
            raise TokenGameError(
                "a pruned NaFlexVit takes images [batch, channels, height, width], not patches with coordinates: pass "
                "images of one size, or give the patches to fast.restore()"
            )
        return super().read_call(images, attn_mask)
