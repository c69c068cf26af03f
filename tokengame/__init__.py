"""tokengame makes a trained Vision Transformer faster: it removes tokens, and a small learned policy says which.

fast = tokengame.prune(model, "policy.safetensors")
fast.dial = 0.3
logits = fast(images)
model = fast.restore()
"""

from tokengame import kernels
from tokengame.errors import TokenGameError
from tokengame.policies import Policy
from tokengame.runtime import PrunedOutput, PrunedViT, prune

__version__ = "0.11.0"
__all__ = ["Policy", "PrunedOutput", "PrunedViT", "TokenGameError", "kernels", "prune"]
