"""tokengame makes a trained Vision Transformer faster: it removes tokens, and a small learned policy says which.

fast = tokengame.prune(model)
policy = tokengame.train(model, images)
fast = tokengame.prune(model, policy, gmacs_ratio=0.6)
fast.dial = 0.3
logits = fast(images)
model = fast.restore()
"""

from typing import TYPE_CHECKING, Any

from tokengame.errors import TokenGameError

if TYPE_CHECKING:
    from tokengame import kernels
    from tokengame.api import calibrate, evaluate, train
    from tokengame.deploy import export
    from tokengame.policies import Policy
    from tokengame.runtime import PrunedOutput, PrunedViT, prune

__version__ = "0.20.0"
__all__ = [
    "Policy", "PrunedOutput", "PrunedViT", "TokenGameError", "calibrate", "evaluate", "export", "kernels", "prune",
    "train",
]  # fmt: skip

_HOMES = {
    "Policy": "tokengame.policies",
    **dict.fromkeys(("PrunedOutput", "PrunedViT", "prune"), "tokengame.runtime"),
    "export": "tokengame.deploy",
    **dict.fromkeys(("calibrate", "evaluate", "train"), "tokengame.api"),
}


def __getattr__(name: str) -> Any:
    """Import the other public names when they are first used: PyTorch takes seconds, and `--help` needs none of it."""
    from importlib import import_module

    if name == "kernels":
        return import_module("tokengame.kernels")
    if name not in _HOMES:
        raise AttributeError(f"module 'tokengame' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
