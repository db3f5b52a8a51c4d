"""Which files an artifact consists of: one, or the parts of a split one."""

from __future__ import annotations

import re
from pathlib import Path

from llm_quantize.errors import UsageError

_OWN = ("config.json", "manifest.json")
"""What makes a directory one artifact."""

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def first_file(artifact: str | Path) -> Path:
    """The GGUF file to open: the artifact itself, or the first part of a split one (its directory or any part).

    Raises UsageError where there is no such artifact, or a directory holds several.
    """
    return artifact_files(Path(artifact))[0]


def artifacts_in(path: Path) -> list[Path]:
    """The artifacts at ``path``: itself, or each that lies in it where it is a directory of several: GGUF files, of a
    split one its first part, and model directories."""
    if not path.is_dir() or any((path / name).is_file() for name in _OWN):
        return [path]
    wholes: dict[str, Path] = {}
    for entry in sorted(path.glob("*.gguf")):
        part = _PART.fullmatch(entry.name)
        wholes.setdefault(f"{part[1]} of {part[3]}" if part else entry.name, entry)
    folders = sorted(entry for entry in path.iterdir() if any((entry / name).is_file() for name in _OWN))
    found = [*wholes.values(), *(entry for entry in folders if entry.suffix != ".partial")]
    return [path] if not found or (len(found) == 1 and wholes) else found


def artifact_files(path: Path) -> list[Path]:
    """The GGUF files of the artifact at ``path``, in order: a file; all parts of a split one, given any of them; or
    what its directory holds.

    Raises UsageError where ``path`` or a part is absent, and where a directory holds none or several artifacts.
    """
    if path.is_dir():
        names = sorted(entry.name for entry in path.glob("*.gguf"))
        if not names:
            raise UsageError("no GGUF file in this directory", file=path, remedy="give the path of the artifact")
        wholes = {(found[1], found[3]) if (found := _PART.fullmatch(name)) else name for name in names}
        if len(wholes) > 1:
            raise UsageError(
                "this directory holds several artifacts", file=path, found=", ".join(names), remedy="name one of them"
            )
        return artifact_files(path / names[0])
    if not path.exists():
        raise UsageError("no such artifact", file=path, remedy="check the path")
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    files = [path.with_name(f"{part[1]}-{i:05d}-of-{part[3]}.gguf") for i in range(1, int(part[3]) + 1)]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UsageError(
            "parts of this split artifact are absent", file=path, found=", ".join(absent), remedy="put them beside it"
        )
    return files
