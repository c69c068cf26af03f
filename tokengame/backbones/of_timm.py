"""The families of timm's models, which towers of open_clip are built on too."""

from __future__ import annotations

from tokengame.backbones.timm_base import TimmBackbone
from tokengame.backbones.timm_eva import TimmEva, TimmNaFlex
from tokengame.backbones.timm_relative import TimmBeit, TimmRelPos
from tokengame.backbones.timm_vit import TimmViT

TIMM: tuple[type[TimmBackbone], ...] = (TimmViT, TimmEva, TimmBeit, TimmNaFlex, TimmRelPos)
"""the first that accepts a model of timm wraps it"""
