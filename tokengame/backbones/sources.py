"""What a source of models is: a module with three functions, one for each way to get the weights."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from tokengame.files import Note

Settings = dict[str, Any]
"""of the model, by the names that its library has for them, e.g. img_size and num_classes in timm"""


class Source(Protocol):
    """Models by name, all in evaluation mode.

    Raises (from each function):
        TokenGameError: no such model or setting; or its weights cannot be fetched, are damaged, or do not fit.
    """

    def untrained(self, name: str, settings: Settings) -> nn.Module:
        """With random weights."""

    def pretrained(self, name: str, settings: Settings, note: Note) -> nn.Module:
        """With the weights that the source has for this name."""

    def from_file(self, name: str, weights: str, settings: Settings, note: Note) -> nn.Module:
        """With the weights in a file or folder."""
