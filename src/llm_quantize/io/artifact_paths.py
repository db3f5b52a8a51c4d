"""Names around an artifact (partial, manifest, replaced), and removing what an unfinished run left."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from llm_quantize.io.durable import fail_os, open_regular_output, remove_files


def partial_path(target: Path) -> Path:
    """Where an artifact stands while it is being made."""
    return target.with_name(target.name + ".partial")


def replaced_path(target: Path) -> Path:
    """Where an artifact directory waits, for an instant, while another takes its place."""
    return target.with_name(target.name + ".replaced.partial")


def manifest_path(target: Path) -> Path:
    """Where an artifact's manifest stands: inside a directory, beside a single file."""
    if target.is_dir():
        return target / "manifest.json"
    return target.with_name(target.name + ".manifest.json")


def is_artifact_directory(path: Path) -> bool:
    """Whether ``path`` is a directory that holds GGUF files and a manifest, and nothing else."""
    if path.is_symlink() or not path.is_dir():
        return False
    names = (entry for entry in path.iterdir())
    return all(entry.is_file() and (entry.suffix == ".gguf" or entry.name == "manifest.json") for entry in names)


def discard_partial(target: Path, journal_path: Path | None) -> None:
    """Remove what an unfinished run of ``target`` left, unless a process is writing there now."""
    partial = partial_path(target)
    is_directory = partial.is_dir() and not partial.is_symlink()
    first = sorted(partial.glob("*.gguf"))[:1] if is_directory else [partial]
    journal = [] if journal_path is None else [journal_path]
    held: list[int] = []
    try:
        for path in (*first, *journal):
            if path.is_file() and not path.is_symlink():
                held.append(open_regular_output(path))
                fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_directory:
            remove_artifact(partial)
        for path in (partial, partial_path(manifest_path(target)), *journal):
            if path.is_symlink() or path.is_file():
                path.unlink()
        remove_artifact(replaced_path(target))
    except BlockingIOError:
        return
    except OSError as error:
        fail_os(error, "an unfinished output cannot be removed", partial)
    finally:
        for descriptor in held:
            os.close(descriptor)


def remove_artifact(directory: Path) -> None:
    """Remove an artifact directory; one that holds anything else is left alone. Raises OSError."""
    if is_artifact_directory(directory):
        remove_files(directory)
        directory.rmdir()
