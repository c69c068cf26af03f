"""What commands that train say about themselves: in config.json, and at the end, which command comes next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokengame.cli.common import OnImages, flag

if TYPE_CHECKING:
    from tokengame.data.datasets import ImageSource
    from tokengame.data.hub import HuggingFaceStream

STREAM = "stream:"


def about(command: OnImages) -> dict[str, Any]:
    """Where the images and the weights of a run are, for its config.json."""
    return {name: getattr(command, name) for name in ("images", "split", "weights", "model_kwargs", "class_map")}


def held_back(command: Any, source: ImageSource | HuggingFaceStream) -> dict[str, Any]:
    """The flags by which `eval` measures on the images that a command has held back; of a stream there are none."""
    from tokengame.data.hub import HuggingFaceImages, HuggingFaceStream

    if isinstance(source, HuggingFaceStream):
        return {}
    split = command.split if isinstance(source, HuggingFaceImages) else None
    return {"holdout": command.holdout, "seed": command.seed, "split": split}


def next_command(command: OnImages, policy: Path, images: str, **flags: Any) -> str:
    """The `tokengame eval` that measures a new policy with the user's own flags, quoted for a shell.

    Args:
        command: that has written the policy.
        policy: the file.
        images: to measure on.
        flags: others; those that are None are left out.
    """
    own = {name: getattr(command, name) for name in ("weights", "class_map")}
    named = {"backbone": command.backbone, "images": images.removeprefix(STREAM), **own, "policy": policy, **flags}
    if command.device != "auto":
        named["device"] = command.device
    words = [word for name, value in named.items() if value is not None for word in (flag(name), str(value))]
    words += [flag("model_kwargs"), *command.model_kwargs] if command.model_kwargs else []
    return shlex.join(["tokengame", "eval", *words])
