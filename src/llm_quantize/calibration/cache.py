"""Statistics that are kept: where they lie, whether they are still what was written, and a manifest that says so."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_quantize import events
from llm_quantize.artifacts.manifest import manifest_bytes, read_manifest
from llm_quantize.errors import AccessError, IntegrityError, MalformedInputError, UnsupportedError
from llm_quantize.events import EventSink
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.io.durable import fail_os
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.paths import opened, read_failure
from llm_quantize.io.statistics_file import StatisticsIdentity, read_statistics

_CHUNK = 8 << 20
_SET_ANOTHER = "set LLM_QUANTIZE_CACHE to a directory that you can write to"


def prepare_directory(directory: Path) -> None:
    """Make ``directory`` where it is not. Raises AccessError where it cannot be made or written, ResourceError where
    the disk is at fault."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            fail_os(error, "the cache directory cannot be created", directory)
        raise AccessError(
            "the cache directory cannot be created", file=directory, found=error.strerror, remedy=_SET_ANOTHER
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise AccessError("the cache directory cannot be written", file=directory, remedy=_SET_ANOTHER)


def manifest_of(file: Path, name: str, facts: Mapping[str, Any]) -> bytes:
    """The manifest of the statistics in ``file``, which are to be called ``name``: their hash, and ``facts``."""
    size, digest = _measured(file)
    entry = {"name": name, "size": size, "sha256": digest}
    return manifest_bytes({**facts, "files": [entry], "tensors": []})


def is_kept(target: Path, identity: StatisticsIdentity, on_event: EventSink) -> bool:
    """Whether statistics of ``identity`` lie at ``target`` as they were written. Others, those of an older version and
    those that were damaged since are removed, with a warning: every later run would refuse them, or worse, believe
    them."""
    if not target.is_file():
        return False
    flaw = _flaw(target, identity)
    if flaw is None:
        return True
    on_event(events.Caution(f"{target}: these statistics {flaw}; they are collected again"))
    try:
        target.unlink(missing_ok=True)
        manifest_path(target).unlink(missing_ok=True)
    except OSError as error:
        fail_os(error, "damaged statistics cannot be removed", target)
    return False


def _flaw(target: Path, identity: StatisticsIdentity) -> str | None:
    """What is wrong with kept statistics that should be of ``identity``; None where nothing is."""
    try:
        with read_statistics(target) as found:
            kept = found.identity
        if canonical_json([kept.model, kept.text]) != canonical_json([identity.model, identity.text]):
            return "are of another model or text than their name says"
        manifest = read_manifest(manifest_path(target))
        if manifest is None or manifest["files"][0].get("sha256") != _measured(target)[1]:
            return "are not what their manifest says"
    except UnsupportedError:
        return "were kept by another version of llm-quantize"
    except (MalformedInputError, IntegrityError):
        return "were damaged"
    return None


def _measured(file: Path) -> tuple[int, str]:
    """Size and SHA-256 of ``file``."""
    digest, size = hashlib.sha256(), 0
    with opened(file) as descriptor:
        try:
            while piece := os.read(descriptor, _CHUNK):
                digest.update(piece)
                size += len(piece)
        except OSError as error:
            raise read_failure(error, file) from error
    return size, digest.hexdigest()
