"""A file of our own that appears whole or not at all: written in pieces under a ``.partial`` name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from llm_quantize.errors import AccessError, UsageError
from llm_quantize.io.artifact_paths import partial_path
from llm_quantize.io.durable import fail_os, open_regular_output, sync_directory
from llm_quantize.io.ownership import refuse_moved, take_lock

Buffer = bytes | bytearray | memoryview


def refuse_existing(path: Path, *, replace: bool) -> bool:
    """Whether the file ``path`` stands. Raises UsageError where it does and may not be replaced, AccessError where it
    is no regular file or its name cannot be one."""
    try:
        stands = path.exists()
    except OSError as error:  # a name too long, a directory on the way that may not be searched
        fail_os(error, "the output cannot be created", path)
    if path.is_symlink() or (stands and not path.is_file()):
        raise AccessError("the output exists and is not a regular file", file=path, remedy="choose another -o")
    if stands and not replace:
        raise UsageError("the output exists", file=path, remedy="choose another -o, or add --overwrite")
    return stands


def refuse_input(path: Path, inputs: Iterable[str | Path]) -> None:
    """Raise UsageError where ``path`` is one of the files that are read, under whatever name."""
    for file in inputs:
        if path.is_file() and Path(file).is_file() and path.samefile(file):
            raise UsageError(
                "the output is a file that is read", file=path, remedy="choose another name for the output"
            )


def write_file(path: str | Path, pieces: Iterable[Buffer], *, replace: bool = False) -> int:
    """Write ``pieces`` one after the other as the file ``path``, durable, and return its size in bytes.

    On failure nothing stands under ``path`` that did not before. Raises UsageError (it exists and ``replace`` is
    not set), AccessError, BusyError (another process writes it), ResourceError.
    """
    path = Path(path)
    refuse_existing(path, replace=replace)
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_regular_output(partial)
    except OSError as error:
        fail_os(error, "the output cannot be created", path)
    try:
        take_lock(descriptor, path, None)
        refuse_moved([(descriptor, partial)])
        size = _fill(descriptor, partial, path, pieces)
    finally:
        os.close(descriptor)
    return size


def _fill(descriptor: int, partial: Path, path: Path, pieces: Iterable[Buffer]) -> int:
    offset = 0
    placed = False
    try:
        os.ftruncate(descriptor, 0)
        for piece in pieces:
            view = memoryview(piece).cast("B")
            while view:
                written = os.pwrite(descriptor, view, offset)
                offset += written
                view = view[written:]
        os.fsync(descriptor)
        partial.rename(path)
        placed = True
        sync_directory(path.parent)
    except OSError as error:
        fail_os(error, "writing failed", path)
    finally:
        if not placed:
            with suppress(OSError):  # what failed first is told; the next attempt empties this file
                partial.unlink(missing_ok=True)
    return offset
