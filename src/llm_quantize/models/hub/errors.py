"""What huggingface_hub raises, in our tree and in our own words."""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from llm_quantize.errors import LlmQuantizeError, NetworkError, ResourceError, UsageError

UNREACHABLE = "no connection"
"""``found`` of the NetworkError that means that no hub answered at all."""

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@contextmanager
def translated(model_id: str, name: str | None, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises inside the block into UsageError, NetworkError or ResourceError.

    ``name`` is the file in question, if one is. The texts of server and library are dropped: they may hold URLs
    with signatures or tokens.
    """
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        yield
    except errors.HFValidationError as error:
        raise UsageError(
            "neither a directory nor a hub id", file=model_id, remedy="give a directory, or an id such as org/model"
        ) from error
    except (errors.EntryNotFoundError, errors.HTTPError, errors.HfHubHTTPError, OSError, TimeoutError) as error:
        raise _network_error(error, errors, model_id, name, revision) from error


@contextmanager
def refused(repository: str) -> Iterator[None]:
    """Turn what huggingface_hub raises inside the block, which writes to ``repository``, into UsageError or
    NetworkError, without the words of server and library."""
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        yield
    except errors.HFValidationError as error:
        raise UsageError(
            "this is no name of a repository", file=repository, expected="ORG/NAME", remedy="choose another --repo"
        ) from error
    except (errors.HTTPError, errors.HfHubHTTPError, ValueError, RuntimeError, OSError) as error:
        # Around what a large file met, huggingface_hub and hf_xet put a RuntimeError.
        status = next((code for cause in _chain(error) if (code := _status(cause)) is not None), None)
        what, remedy = _REFUSALS.get(status or 0, _REFUSALS[500] if (status or 0) >= 500 else _BROKEN)
        found = UNREACHABLE if status is None else f"HTTP {status}"
        raise NetworkError(what, file=repository, found=found, remedy=remedy) from error


_AGAIN = "run the same command again: large files that the hub has are not sent again, and nothing shows before all is"
_REFUSALS = {
    400: ("the hub takes no such name, model card or file", "check --repo and --base-model; the rest may be our fault"),
    401: ("the hub does not accept this token", "make one that may write (hf auth login, or HF_TOKEN), and try again"),
    403: ("the token may not write there", "choose a --repo of your own, or a token with the permission to write"),
    404: ("the hub knows no such account, or does not show it", "check the spelling of --repo ORG/NAME"),
    409: ("somebody else wrote to the repository at the same time", _AGAIN),
    413: ("the hub takes no file of this size", "split the artifact: --split-max-size, --output-shard-size"),
    429: ("the hub asks us to slow down", f"wait a few minutes; {_AGAIN}"),
    500: ("the hub has a failure of its own", f"try later; {_AGAIN}"),
}
_BROKEN = ("the hub cannot be reached, or the connection broke", f"check the network and HF_ENDPOINT; {_AGAIN}")


def _network_error(
    error: BaseException, errors: Any, model_id: str, name: str | None, revision: str | None
) -> LlmQuantizeError:
    where = model_id if name is None else f"{model_id}/{name}"
    causes = list(_chain(error))
    status = next((code for cause in causes if (code := _status(cause)) is not None), None)
    again = "run the same command again: what was fetched is kept"
    if any(isinstance(cause, errors.GatedRepoError) for cause in causes):
        return NetworkError(
            "this model is gated: its owner wants its terms accepted first",
            file=where,
            found=f"HTTP {status}",
            remedy="accept the terms on the model's hub page, and set HF_TOKEN to a token of that account",
        )
    if any(isinstance(cause, errors.RevisionNotFoundError) for cause in causes):
        return NetworkError(
            "this model has no such revision",
            file=where,
            found=revision,
            remedy="choose a branch, tag or commit that its hub page lists",
        )
    if status == 401 or any(isinstance(cause, errors.RepositoryNotFoundError) for cause in causes):
        return NetworkError(
            "the hub knows no such public model, or it is private",
            file=where,
            found=f"HTTP {status}",
            remedy="check the spelling (org/model; no directory of this name is here either);"
            " for a private model set HF_TOKEN to a token that may read it",
        )
    if status in (403, 404, 429) or (status is not None and status >= 500):
        what, remedy = {
            403: ("the hub refuses access", "set HF_TOKEN to a token that has the permission to read this model"),
            404: ("the hub does not hold this", "check the model's hub page, or choose another --revision"),
            429: ("the hub asks us to slow down", f"wait a few minutes; set HF_TOKEN for a higher limit; {again}"),
        }.get(status, ("the hub has a failure of its own", f"try later; {again}"))
        return NetworkError(what, file=where, found=f"HTTP {status}", remedy=remedy)
    local = next((cause for cause in causes if isinstance(cause, OSError) and cause.errno in _DISK), None)
    if local is not None:
        return ResourceError(
            f"the cache cannot be written ({os.strerror(local.errno or 0)})",
            file=where,
            remedy=f"free some space, or set HF_HOME to another disk; {again}",
        )
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    return NetworkError(
        "the hub cannot be reached, or the connection broke",
        file=where,
        expected=f"an answer from {host}",
        found=UNREACHABLE if status is None else f"HTTP {status}",
        remedy="if a directory was meant: none of this name is here; otherwise check the network and HF_ENDPOINT,"
        f" or set HF_HUB_OFFLINE=1 to use the cache; {again}",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__


def _status(error: BaseException) -> int | None:
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None
