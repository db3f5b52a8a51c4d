"""Names around an artifact, putting it in place, removing what is left."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from llm_quantize.errors import MalformedInputError
from llm_quantize.io.durable import remove_files, sync_directory, write_whole
from llm_quantize.io.json_file import read_json_object

MANIFEST = "manifest.json"
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
        return target / MANIFEST
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
    known = {MANIFEST, *names, *_listed(path / MANIFEST)}
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


def remove_artifact(directory: Path, names: Collection[str] = ()) -> None:
    """Remove an artifact directory; one that holds anything else is left alone. ``names``: of the files of one that
    has no manifest yet. The manifest goes last: a removal that is killed can be ended by the next. Raises OSError."""
    if is_artifact_directory(directory, names):
        folders = folders_of({*names, *_listed(directory / MANIFEST)})
        remove_files(directory, keep=[MANIFEST], folders=folders)
        sync_directory(directory)
        remove_files(directory)
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


def place_directory(target: Path, manifest: bytes, names: Collection[str] = ()) -> None:
    """Put a finished partial directory, its manifest inside, under its final name. ``names``: of its files, which an
    earlier attempt may have left half removed in the place for what is replaced. Raises OSError."""
    partial, replaced = partial_path(target), replaced_path(target)
    write_whole(partial / MANIFEST, manifest)
    for folder in (entry for entry in partial.iterdir() if entry.is_dir()):
        sync_directory(folder)
    sync_directory(partial)
    if target.is_dir():
        remove_artifact(replaced, names)
        target.rename(replaced)
    partial.rename(target)
    sync_directory(target.parent)
    remove_artifact(replaced, names)
