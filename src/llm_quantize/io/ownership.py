"""Whether an output is ours: the final name, locks, and paths that must keep naming what we have open."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from llm_quantize.errors import AccessError, BusyError
from llm_quantize.io.artifact_paths import is_artifact_directory, replaced_path
from llm_quantize.io.durable import is_same_file

Places = Sequence[tuple[int, Path]]
"""(descriptor, the path it was opened under); a negative descriptor is not open."""


def refuse_target(target: Path, *, is_directory: bool, replace: bool, names: Collection[str] = ()) -> None:
    """What stands under the final name may be replaced only by its own kind; no foreign file is ever removed.
    ``names``: of the artifact's files, where one that was replaced before may have lost its manifest.

    Raises BusyError where an artifact was not there when the run began, AccessError for anything else.
    """
    if not target.exists() and not target.is_symlink():
        return
    replaced = replaced_path(target)
    if is_directory and (replaced.exists() or replaced.is_symlink()) and not is_artifact_directory(replaced, names):
        raise AccessError(
            "something that is no artifact stands where what is replaced has to wait for an instant",
            file=replaced,
            expected="nothing, or a directory of a manifest and the files that it lists",
            remedy="move it away, and run the same command again",
        )
    if target.exists() and not replace:
        raise BusyError("another process has just finished this output", file=target)
    if not (is_artifact_directory(target) if is_directory else target.is_file()):
        raise AccessError(
            "the output exists and is not an artifact that --overwrite may replace",
            file=target,
            expected="a directory of a manifest and the files that it lists, nothing else"
            if is_directory
            else "a file",
            remedy="move it away, or choose another name with -n or directory with -o",
        )


def take_lock(descriptor: int, target: Path, warn: Callable[[str], None] | None) -> None:
    """Lock for writing ``target``, without waiting. Raises BusyError if another process holds the lock.

    Where the file system has no locks ``warn`` is told.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BusyError(
            "another process is writing this output",
            file=target,
            remedy="wait for it to end, or choose another directory with -o",
        ) from error
    except OSError:
        if warn is not None:
            warn(f"{target.parent}: this file system has no locks; do not run two writers on one output")


def _first_moved(places: Places) -> Path | None:
    return next((path for fd, path in places if fd >= 0 and not is_same_file(fd, path)), None)


def refuse_moved(places: Places) -> None:
    """Raise BusyError if a writer that finished between our open and our lock has renamed what we opened."""
    moved = _first_moved(places)
    if moved is not None:
        raise BusyError(
            "another process has finished or removed this output",
            file=moved,
            remedy="run the same command again when the other process has ended",
        )


def taken_away(places: Places) -> BusyError | None:
    """The error for an output that no longer stands under its name while it is being written; None while it does."""
    moved = _first_moved(places)
    return None if moved is None else gone(moved)


def gone(moved: Path) -> BusyError:
    """The error for an unfinished output that no longer stands at ``moved``, saying what happened."""
    if not moved.parent.is_dir():
        what = f"the directory {moved.parent} was removed or renamed"
    elif moved.is_symlink() or moved.exists():
        what = "something else was put in its place"
    else:
        what = "it was removed or renamed"
    return BusyError(
        f"the unfinished output was taken away while it was written: {what}",
        file=moved,
        remedy="put it back if it was renamed, and run the same command again with nothing else working there",
    )
