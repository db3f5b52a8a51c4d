"""What an unfinished run leaves beside its artifact: held while it works, taken away when nobody works there any more.

Nothing is removed that a living process has locked: a command that finds its output complete may run beside one that
makes it anew.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from llm_quantize.errors import LlmQuantizeError
from llm_quantize.io.artifact_paths import (
    hidden_directory,
    journal_path,
    manifest_path,
    partial_path,
    remove_artifact,
    replaced_path,
)
from llm_quantize.io.durable import fail_os, is_same_file, open_directory, open_regular_output
from llm_quantize.io.journal import parse_journal
from llm_quantize.io.ownership import take_lock

HIDDEN_SLOTS = 4
"""Files of hidden states: two of each stream, which take turns."""

_TRIES, _PAUSE = 100, 0.05


def hold_hidden(target: Path) -> int:
    """The directory of the hidden states of ``target``, made where it is not, and locked: its descriptor.

    Raises BusyError where another process keeps it locked, AccessError for a link, ResourceError.
    """
    directory = hidden_directory(target)
    try:
        return _held(directory, target)
    except OSError as error:
        fail_os(error, "the hidden states cannot be put on disk", directory)


def _held(directory: Path, target: Path) -> int:
    for left in reversed(range(_TRIES)):
        if not directory.is_symlink():
            directory.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = open_directory(directory)
        except FileNotFoundError:  # taken away between the two calls, by one that tidies up
            continue
        if _is_free(descriptor, directory) or not left:
            break
        os.close(descriptor)
        time.sleep(_PAUSE)
    try:
        take_lock(descriptor, target, None)
    except LlmQuantizeError:
        os.close(descriptor)
        raise
    return descriptor


def _is_free(descriptor: int, path: Path) -> bool:
    """Whether nobody has ``descriptor`` locked, and ``path`` still names it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return is_same_file(descriptor, path)


def allocated_bytes(target: Path) -> int:
    """Bytes on disk that an unfinished run has already allocated for ``target``."""
    partial = partial_path(target)
    files = list(partial.rglob("*")) if partial.is_dir() else [partial]
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


def hidden_bytes(target: Path) -> int:
    """Bytes on disk that the hidden states of ``target`` hold already, and that a run goes on to use."""
    directory = hidden_directory(target)
    slots = [directory / str(slot) for slot in range(HIDDEN_SLOTS)]
    return sum(slot.stat().st_blocks * 512 for slot in slots if slot.is_file() and not slot.is_symlink())


def discard_hidden(target: Path, *, held: bool = False) -> None:
    """Remove the hidden states of a finished artifact, also those of a process that was killed before it could do so.
    Those that a process has locked stay, unless it is this one (``held``)."""
    directory = hidden_directory(target)
    if not directory.is_dir() or directory.is_symlink():
        return
    with suppress(OSError):  # another process was quicker, or something of another's lies there: it may stay
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if not held:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left = [path for path in directory.glob("llm-quantize-*.activations") if not path.is_symlink()]
            for path in [*(directory / str(slot) for slot in range(HIDDEN_SLOTS)), *left]:
                path.unlink(missing_ok=True)
            directory.rmdir()
        finally:
            os.close(descriptor)


def discard_partial(target: Path, current: Path | None, names: Collection[str] = ()) -> None:
    """Remove what an unfinished run of ``target`` left, unless a process is writing there now.

    ``current``: its journal; one that an earlier run left beside the target goes too. ``names``: of the files of the
    artifact, beside those that the journal names. Raises AccessError, ResourceError.
    """
    partial, beside = partial_path(target), journal_path(target)
    journals = [path for path in {beside, current or beside} if path.is_file() and not path.is_symlink()]
    held: list[int] = []
    try:
        if partial.is_dir() and not partial.is_symlink():
            held.append(open_directory(partial))
        elif partial.is_file() and not partial.is_symlink():
            held.append(open_regular_output(partial))
        held += [open_regular_output(path) for path in journals]
        for descriptor in held:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # another process writes it, or may: this file system has no locks
                return
        if partial.is_dir() and not partial.is_symlink():
            files = [path for path in partial.rglob("*") if path.is_file() and path.stat().st_size == 0]
            empty = [path.relative_to(partial).as_posix() for path in files]
            remove_artifact(partial, {*names, *empty, *_named_in(journals)})
        for path in (partial, partial_path(manifest_path(target)), *journals):
            if path.is_symlink() or path.is_file():
                path.unlink()
        remove_artifact(replaced_path(target), names)
    except OSError as error:
        fail_os(error, "an unfinished output cannot be removed", partial)
    finally:
        for descriptor in held:
            os.close(descriptor)


def discard_own(holder: int, partial: Path, names: Collection[str]) -> None:
    """Remove an unfinished output of files ``names`` that no later run could resume, where ``holder``, which this
    process has locked, still stands there. Raises OSError."""
    if not is_same_file(holder, partial):
        return
    if partial.is_dir():
        remove_artifact(partial, names)
    else:
        partial.unlink()


def _named_in(journals: Collection[Path]) -> set[str]:
    """The files that journals say they are of."""
    names: set[str] = set()
    for path in journals:
        for record in parse_journal(path.read_bytes())[0]:
            found = record.get("files")
            names.update(name for name in (found if isinstance(found, list) else ()) if isinstance(name, str))
    return names
