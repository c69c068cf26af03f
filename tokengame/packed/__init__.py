"""Rows of many images, a different count for every image, in one tensor without padding."""

from tokengame.packed.heads import CachedKeysValues, Heads, ObservationRequest, Observed
from tokengame.packed.layout import RaggedLayout

__all__ = ["CachedKeysValues", "Heads", "ObservationRequest", "Observed", "RaggedLayout"]
