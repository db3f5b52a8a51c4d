"""Sources that were found to be what an artifact was made of: a second look need not read them whole.

An artifact's manifest holds the hash of every part of its source; they decide. That a source was held against them
once is kept with its files' sizes, times and inodes and with samples of its content: where all of these are still the
same, so is the source. Times are compared for being equal, never for which is younger, as a copy has younger ones and a
clock may have run ahead. A record that is damaged, or cannot be kept, costs a reading and nothing else.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_quantize.artifacts.manifest import manifest_bytes, unsealed
from llm_quantize.errors import LlmQuantizeError
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.whole_file import write_file
from llm_quantize.models.opening import Source

Times = list[list[Any]]


@dataclass(frozen=True)
class Vouched:
    """Records in ``directory``; ``times``: of the source's files now (``output.source_times``); ``hashes``: of parts of
    the source that were read for one artifact, for the next."""

    directory: Path
    source: Source
    times: Times
    hashes: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def knows(self, artifact: Path) -> bool:
        """Whether the source, as it is now, was held against the manifest of ``artifact`` before."""
        record = self._record(artifact)
        if not record.is_file():
            return False
        try:
            return unsealed(record) == self._facts()
        except LlmQuantizeError:
            return False

    def keep(self, artifact: Path) -> None:
        """The source is what ``artifact`` was made of: remember it."""
        with suppress(LlmQuantizeError, OSError):  # a cache that cannot be written: the source is read again next time
            write_file(self._record(artifact), [manifest_bytes(self._facts())], replace=True)

    @cached_property
    def _sampled(self) -> str:
        return self.source.digest

    def _facts(self) -> dict[str, Any]:
        return {"times": self.times, "sampled": self._sampled}

    def _record(self, artifact: Path) -> Path:
        """The record of this manifest, wherever it lies, and of these files."""
        manifest = hashlib.sha256(manifest_path(artifact).read_bytes()).hexdigest()
        files = sorted(str(file.resolve()) for file in self.source.checkpoint.files)
        return self.directory / f"{hashlib.sha256(canonical_json([manifest, files])).hexdigest()}.json"
