"""What decides: networks that turn observations into keep logits, and the file that holds a learned one."""

from tokengame.policies.policy import Policy

__all__ = ["Policy"]
