"""Policies on the Hugging Face hub: what is stored there, and one sentence where something is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub import constants as hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from tokengame.backbones.hub import offline_at_once, reason
from tokengame.errors import TokenGameError, first_line
from tokengame.ranges import require

PREFIX = "hf:"
"""before the name of a repository, where a path or another name may stand too"""
FILE = "policy.safetensors"
"""the policy, in a repository or a folder of the same files"""


def download(name: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The policy file of a repository, from this machine's cache where it has not changed.

    Args:
        name: "user/name", also with "hf:" before it and with "@" and a branch, tag or commit behind it.
        revision: the same, instead.
        token: for a private repository; by default that of `hf auth login`.

    Raises:
        TokenGameError: no connection and no copy here, no such repository or revision, or it holds no policy.
    """
    repo, _, named = name.removeprefix(PREFIX).partition("@")
    with _explained(f"cannot load the policy {repo}", repo), offline_at_once():
        found = hf_hub_download(repo, FILE, revision=revision or named or None, token=token, endpoint=hub.ENDPOINT)
    return Path(found)


def upload(repo: str, folder: Path, private: bool, token: str | bool | None, message: str) -> str:
    """Commit the files of `folder` to a repository, which is made where there is none.

    Returns:
        The address of the commit.

    Raises:
        TokenGameError: no connection, not logged in, or no such rights.
    """
    api = HfApi(endpoint=hub.ENDPOINT, token=token)
    with _explained(f"cannot push to {repo}", repo), offline_at_once():
        place = api.create_repo(repo, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=place, folder_path=folder, commit_message=message).commit_url)


@contextmanager
def _explained(what: str, repo: str) -> Iterator[None]:
    """In this context an error of the hub is one sentence."""
    form = f"{what}: a repository on the hub is user/name, which this is not"
    require(0 < repo.count("/") < 2 and "" not in repo.split("/"), form)
    try:
        yield
    except (HFValidationError, LocalTokenNotFoundError) as error:
        why = "run `hf auth login`, or give token=" if isinstance(error, LocalTokenNotFoundError) else first_line(error)
        raise TokenGameError(f"{what}: {why}") from None
    except Exception as error:  # of the hub's library and of those below it
        raise TokenGameError(f"{what}: {_why(error)}") from None


def _why(error: Exception) -> str:
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return reason(error).replace("and no copy of it", "and no copy")
    if isinstance(error, EntryNotFoundError):
        return f"that repository holds no {FILE}; `Policy.push_to_hub` writes one"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    if status in (401, 403) and "RepositoryNotFound" not in type(error).__name__:
        return "you have no right to; run `hf auth login`, or give a token= that may"
    return reason(error)
