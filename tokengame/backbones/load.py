"""Models by name: any timm model, with timm's weights or a local file, and the embedded one."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.resources import as_file, files
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
from huggingface_hub import constants as hub
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.models import parse_model_name
from torch import nn

from tokengame.backbones.checkpoint import load_into, read_state
from tokengame.errors import TokenGameError, first_line

EMBEDDED = "fashion"
"""name of the embedded backbone: width 96, 8 blocks, 14 x 14 patches, trained on fashion scenes"""


def load_model(name: str, weights: str | None = None) -> nn.Module:
    """A timm model in evaluation mode.

    Args:
        name: as timm takes it (also "hf-hub:timm/...", "local-dir:FOLDER"), or "fashion" for the embedded backbone.
        weights: local checkpoint (.safetensors, .pth, .bin, ...); without one timm downloads its own. The classes are
            the file's.

    Raises:
        TokenGameError: unknown name, no network, weights missing, unreadable, of another kind or architecture, or not
            finite.
    """
    if name == EMBEDDED:
        with as_file(files("tokengame") / "assets" / "fashion_vit.safetensors") as path:
            weights = weights or str(path)
            return load_into(build_embedded(), read_state(weights), weights)
    _require_known(name)
    if weights is None:
        return _pretrained(name)
    state = read_state(weights)
    head = state.get("head.weight")
    return load_into(untrained(name, **({} if head is None else {"num_classes": len(head)})), state, weights)


def _require_known(name: str) -> None:
    try:
        source, model = parse_model_name(name)
    except (ValueError, AssertionError) as error:
        raise TokenGameError(f"timm knows no model {name!r}: {first_line(error)}") from None
    if source in (None, "timm") and not timm.is_model(model.split(".")[0]):
        close = timm.list_models(f"*{model.split('.')[0].split('_')[0]}*")[:3]
        raise TokenGameError(f"timm knows no model {name!r}" + (f"; similar: {', '.join(close)}" if close else ""))


def _pretrained(name: str) -> nn.Module:
    """The model with the weights that timm downloads, or has downloaded before."""
    with _offline_at_once():
        try:
            return timm.create_model(name, pretrained=True).eval()
        except Exception as error:  # of whatever fetches and reads
            hint = "pass a local file with --weights"
            raise TokenGameError(f"timm cannot fetch weights for {name} ({_reason(error)}); {hint}") from None


def untrained(name: str, **settings: Any) -> nn.Module:
    """timm's model `name` with random weights."""
    with _offline_at_once() if ":" in name else nullcontext():  # the architecture of others is known here
        try:
            return timm.create_model(name, **settings).eval()
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise TokenGameError(f"timm knows no model {name!r} ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    offline = isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled))
    host = urlsplit(hub.ENDPOINT).netloc
    return f"no connection to {host}, and no copy of it on this machine" if offline else first_line(error)


@contextmanager
def _offline_at_once() -> Iterator[None]:
    """Where its host cannot be reached, let the hub's library use what is here: it would retry for a minute."""
    before, address = hub.HF_HUB_OFFLINE, urlsplit(hub.ENDPOINT)
    try:
        if not before and not getproxies():
            socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def build_embedded() -> Any:
    """The embedded architecture with random weights: timm's plain ViT, nothing else."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=112, patch_size=8, embed_dim=96, depth=8, num_heads=3, num_classes=10
    )
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 112, 112), "crop_pct": 1.0}
    return model
