"""Names around an artifact, putting it in place, removing what is left."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from llm_quantize.errors import MalformedInputError
from llm_quantize.io.durable import fail_os, open_regular_output, remove_files, sync_directory, write_whole
from llm_quantize.io.json_file import read_json_object

_MANIFEST_LIMIT = 256 << 20


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


def journal_path(target: Path, directory: Path | None = None) -> Path:
    """Where an unfinished artifact's journal stands: beside it, or in ``directory``.

    Artifacts of one name in several places may share a directory of journals: there the name says which place.
    """
    here = os.path.realpath(target.parent)
    if directory is None or os.path.realpath(directory) == here:
        return target.with_name(target.name + ".journal")
    place = hashlib.sha256(os.fsencode(f"{here}/{target.name}")).hexdigest()[:8]
    return directory / f"{target.name}.{place}.journal"


def hidden_directory(target: Path) -> Path:
    """Where the hidden states of an unfinished artifact lie."""
    return target.with_name(target.name + ".hidden")


def discard_hidden(target: Path) -> None:
    """Remove the hidden states of a finished artifact, also those of a process that was killed before it could take
    their name away."""
    directory = hidden_directory(target)
    if directory.is_dir() and not directory.is_symlink():
        with suppress(OSError):  # another process was quicker, or something of another's lies there: it may stay
            left = [path for path in directory.glob("llm-quantize-*.activations") if not path.is_symlink()]
            for path in [*(directory / str(slot) for slot in range(4)), *left]:
                path.unlink(missing_ok=True)
            directory.rmdir()


def remove_stale_journal(target: Path, current: Path | None) -> None:
    """Remove the journal beside ``target`` if the run keeps another one, or none. Raises OSError."""
    beside = journal_path(target)
    if current != beside and beside.is_file() and not beside.is_symlink():
        beside.unlink()


def is_artifact_directory(path: Path, names: Collection[str] = ()) -> bool:
    """Whether ``path`` is a directory that holds a manifest, the files that it lists, GGUF files and files called as
    one of ``names`` (NAME or FOLDER/NAME), and nothing else."""
    if path.is_symlink() or not path.is_dir():
        return False
    known = {"manifest.json", *names, *_listed(path / "manifest.json")}
    return all(
        _is_known_folder(entry, known)
        if entry.is_dir() and not entry.is_symlink()
        else entry.is_file() and (entry.suffix == ".gguf" or entry.name in known)
        for entry in path.iterdir()
    )


def folders_of(names: Collection[str]) -> set[str]:
    """The folders that ``names`` of an artifact's files lie in."""
    return {name.partition("/")[0] for name in names if "/" in name}


def _is_known_folder(folder: Path, known: Collection[str]) -> bool:
    """Whether a folder of an artifact holds files of ``known`` names, and nothing else."""
    inner = [f"{folder.name}/{entry.name}" for entry in folder.iterdir() if entry.is_file()]
    return folder.name in folders_of(known) and set(inner) <= set(known) and len(inner) == len(list(folder.iterdir()))


def _listed(manifest: Path) -> Iterator[str]:
    """The names of the files that a manifest lists; none where it is no manifest."""
    if manifest.is_symlink() or not manifest.is_file():
        return
    try:
        files = read_json_object(manifest, limit_bytes=_MANIFEST_LIMIT).get("files")
    except MalformedInputError:
        return
    for entry in files if isinstance(files, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            yield entry["name"]


def discard_partial(target: Path, current: Path | None) -> None:
    """Remove what an unfinished run of ``target`` left, unless a process is writing there now.

    ``current``: its journal; one that an earlier run left beside the target goes too.
    """
    partial, beside = partial_path(target), journal_path(target)
    is_directory = partial.is_dir() and not partial.is_symlink()
    first = sorted(partial.glob("*.gguf"))[:1] if is_directory else [partial]
    journal = [path for path in {beside, current or beside} if path.is_file() and not path.is_symlink()]
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


def remove_artifact(directory: Path, names: Collection[str] = ()) -> None:
    """Remove an artifact directory; one that holds anything else is left alone. ``names``: of the files of one that
    has no manifest yet. Raises OSError."""
    if is_artifact_directory(directory, names):
        remove_files(directory, folders=folders_of({*names, *_listed(directory / "manifest.json")}))
        directory.rmdir()


def place_file(target: Path, manifest: bytes) -> None:
    """Put a finished partial file under its final name, its manifest first. Raises OSError."""
    final = manifest_path(target)
    staged = partial_path(final)
    write_whole(staged, manifest)
    if target.exists():
        target.unlink()
        sync_directory(target.parent)
    staged.rename(final)
    sync_directory(target.parent)
    partial_path(target).rename(target)
    sync_directory(target.parent)


def place_directory(target: Path, manifest: bytes) -> None:
    """Put a finished partial directory, its manifest inside, under its final name. Raises OSError."""
    partial, replaced = partial_path(target), replaced_path(target)
    write_whole(partial / "manifest.json", manifest)
    for folder in (entry for entry in partial.iterdir() if entry.is_dir()):
        sync_directory(folder)
    sync_directory(partial)
    if target.is_dir():
        remove_artifact(replaced)
        target.rename(replaced)
    partial.rename(target)
    sync_directory(target.parent)
    remove_artifact(replaced)
