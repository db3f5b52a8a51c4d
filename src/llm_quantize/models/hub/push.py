"""Files to a repository of the hub, in one commit: all of them show, or none does.

``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` mean what they mean to huggingface_hub. Large files are sent first,
and those that the hub has already are not sent again, so that the same call after any interruption goes on.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_quantize.errors import NetworkError
from llm_quantize.models.hub.errors import refused


def require_token() -> None:
    """Raise NetworkError where huggingface_hub has no token, or is told to be offline."""
    hub, constants = (importlib.import_module(name) for name in ("huggingface_hub", "huggingface_hub.constants"))
    if constants.HF_HUB_OFFLINE:
        raise NetworkError("offline mode is on", remedy="unset HF_HUB_OFFLINE")
    if not hub.get_token():
        raise NetworkError(
            "pushing needs a token of the hub, and there is none",
            remedy="hf auth login, or HF_TOKEN=... with a token that may write (huggingface.co/settings/tokens)",
        )


def require_name(repository: str) -> None:
    """Raise UsageError where ``repository`` (ORG/NAME, or NAME alone) can be no name of one. Asks no hub."""
    with refused(repository):
        importlib.import_module("huggingface_hub.utils").validate_repo_id(repository)


def account() -> str:
    """The name of the account that the token belongs to. Raises NetworkError."""
    hub = importlib.import_module("huggingface_hub")
    with refused("whoami"):
        return str(hub.HfApi().whoami()["name"])


def push_files(
    repository: str, files: Sequence[tuple[str, Path | bytes]], *, private: bool, message: str, bars: bool = False
) -> str:
    """Write ``files`` [(name there, file or bytes)] to ``repository``, which is made where it is not there (``private``
    or public), and return the address of the commit. ``bars``: huggingface_hub draws its progress.

    Raises UsageError (no name of a repository), NetworkError (refused, unreachable; files that are not there
    afterwards, as a .gitignore of the repository can have it).
    """
    hub = importlib.import_module("huggingface_hub")
    api = hub.HfApi()
    with refused(repository), _drawn(bars):
        api.create_repo(repository, private=private, repo_type="model", exist_ok=True)
        operations = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=_given(data)) for name, data in files]
        done = api.create_commit(repository, operations, commit_message=message, repo_type="model")
        held = set(api.list_repo_files(repository, revision=done.oid, repo_type="model"))
    absent = sorted({name for name, _ in files} - held)
    if absent:
        raise NetworkError(
            "the hub has left files out",
            file=repository,
            found=", ".join(absent),
            remedy="look at the repository's .gitignore, take it out, and run the same command again",
        )
    return str(done.commit_url)


def _given(data: Path | bytes) -> Any:
    return data if isinstance(data, bytes) else str(data)


@contextmanager
def _drawn(bars: bool) -> Iterator[None]:
    """huggingface_hub's progress bars, or none."""
    utils = importlib.import_module("huggingface_hub.utils")
    if bars or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()
