"""Sources that were found to be what an artifact was made of: a second look need not read them whole.

An artifact's manifest holds the hash of every part of its source; they decide. That a source was held against them
once is kept as hashes of files are (io/content.py), and believed where every file of the source stands as it did then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.io.content import keep_hash, kept_hash, standing
from llm_quantize.io.journal import canonical_json

Times = list[list[Any]]


@dataclass(frozen=True)
class Vouched:
    """Records in ``directory`` of a source whose ``files`` stand as in ``facts``. ``times``: of its files
    (``output.source_times``); ``hashes``: of parts of the source that were read for one artifact, for the next."""

    directory: Path
    files: tuple[str, ...]
    facts: dict[str, Any]
    times: Times
    hashes: dict[tuple[str, int, int], str] = field(default_factory=dict)

    @classmethod
    def of(cls, files: Sequence[Path], times: Times, directory: Path) -> Self:
        """The source in ``files`` as it is now. Raises what opening and reading raise."""
        ordered = sorted(files)
        names = tuple(str(file.resolve()) for file in ordered)
        return cls(directory, names, {"files": [standing(file) for file in ordered]}, times)

    def knows(self, artifact: Path) -> bool:
        """Whether the source, as it is now, was held against the manifest of ``artifact`` before."""
        manifest = _hash(artifact)
        return kept_hash(self._record(manifest), self.facts) == manifest

    def keep(self, artifact: Path) -> None:
        """The source is what ``artifact`` was made of: remember it."""
        manifest = _hash(artifact)
        keep_hash(self._record(manifest), self.facts, manifest)

    def _record(self, manifest: str) -> Path:
        """The record of this manifest, wherever it lies, and of these files."""
        return self.directory / f"{hashlib.sha256(canonical_json([manifest, self.files])).hexdigest()}.json"


def _hash(artifact: Path) -> str:
    return hashlib.sha256(manifest_path(artifact).read_bytes()).hexdigest()
