"""The families of timm's models, which towers of open_clip are built on too."""

from __future__ import annotations

from tokengame.backbones.base import Backbone
from tokengame.backbones.timm_vit import TimmViT

TIMM: tuple[type[Backbone], ...] = (TimmViT,)
"""the first that accepts a model of timm wraps it"""
