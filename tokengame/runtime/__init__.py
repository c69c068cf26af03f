"""What runs in production: the pruned model, its cascade, its fused forward, its features and what it costs."""

from tokengame.runtime.cascade import PrunedOutput
from tokengame.runtime.pruned import PrunedViT, prune, prune_by

__all__ = ["PrunedOutput", "PrunedViT", "prune", "prune_by"]
