"""timm's models with relative positions on packed rows: Beit (BEiT, BEiT v2) and VisionTransformerRelPos.

Their attention logits have a learned number for each pair of places; those of the tokens that are left are gathered.
"""

from __future__ import annotations

import torch
from timm.models.beit import Beit
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor

from tokengame.backbones.timm_base import TimmBackbone


class TimmBeit(TimmBackbone):
    """A timm Beit: relative positions of each block, of all blocks, or none."""

    kinds = (Beit,)

    @property
    def positional(self) -> bool:  # type: ignore[override]
        model = self.model
        tables = [block.attn.relative_position_bias_table for block in model.blocks]
        return model.rel_pos_bias is not None or any(table is not None for table in tables)

    def embed(self, images: Tensor) -> Tensor:
        model, patches = self.model, self.model.patch_embed(images)
        x = torch.cat([model.cls_token.expand(len(patches), -1, -1), patches], 1)
        return model.pos_drop(x if model.pos_embed is None else x + model.pos_embed)

    def pair_bias(self, block: int, _grid: tuple[int, int]) -> Tensor | None:
        attn, shared = self.model.blocks[block].attn, self.model.rel_pos_bias
        own = None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()[0]
        if own is None or shared is None:
            return shared() if own is None and shared is not None else own
        return own + shared()


class TimmRelPos(TimmBackbone):
    """A timm VisionTransformerRelPos: a table of relative positions, or an MLP of them; of each block or of all."""

    kinds = (VisionTransformerRelPos,)
    positional = True

    def embed(self, images: Tensor) -> Tensor:
        tokens, first = self.model.patch_embed(images), self.model.cls_token
        return tokens if first is None else torch.cat([first.expand(tokens.shape[0], -1, -1), tokens], 1)

    def pair_bias(self, block: int, _grid: tuple[int, int]) -> Tensor | None:
        own, shared = self.model.blocks[block].attn.rel_pos, self.model.shared_rel_pos
        source = shared if own is None else own
        return None if source is None else source.get_bias()[0]
