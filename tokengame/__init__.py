"""tokengame makes a trained Vision Transformer faster: its patch tokens play a Markov game for who may stay.

fast = tokengame.prune(model, "policy.safetensors")
fast.dial = 0.3
logits = fast(images)
model = fast.restore()
"""

from tokengame.errors import TokenGameError
from tokengame.policy import Policy
from tokengame.runtime import PrunedViT, prune

__version__ = "0.10.0"
__all__ = ["Policy", "PrunedViT", "TokenGameError", "prune"]
