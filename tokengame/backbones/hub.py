"""The Hugging Face hub and other hosts of weights: one sentence, soon, where they cannot be reached."""

from __future__ import annotations

import socket
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants as hub
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from tokengame.errors import first_line

SECONDS = 5
"""that a host may take to answer"""


def reachable(address: str) -> bool:
    """Whether the host of a web address answers; behind a proxy that is taken for granted."""
    parts = urlsplit(address)
    try:
        if not getproxies():
            socket.create_connection((parts.hostname or "", parts.port or 443), timeout=SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def offline_at_once() -> Iterator[None]:
    """Where its host cannot be reached, let the hub's library use what is here: it would retry for a minute."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or not reachable(hub.ENDPOINT)
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def reason(error: BaseException) -> str:
    """Why something could not be fetched, in a few words."""
    host = urlsplit(hub.ENDPOINT).netloc
    causes = [error]
    while (before := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(before)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{host} wants its terms accepted there, and then `hf auth login` here"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"{host} has none of this name, or it is private and wants `hf auth login`"
    if any(isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled) for cause in causes):
        return f"no connection to {host}, and no copy of it on this machine"
    return textwrap.shorten(first_line(error), 200, placeholder="...")
