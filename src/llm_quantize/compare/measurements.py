"""What an unfinished comparison has measured already: small facts by key in one JSON file, replaced whole each time.

A key names what was measured, on which bytes, with which settings, so that a fact is never taken for another's. A
file that is damaged or of another version is begun anew: every fact in it can be measured again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import llm_quantize
from llm_quantize.errors import MalformedInputError
from llm_quantize.io.artifact_files import artifact_files
from llm_quantize.io.cache import kept_hashes
from llm_quantize.io.content import contents
from llm_quantize.io.durable import fail_os, sync_directory, write_whole
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.whole_file import refuse_existing
from llm_quantize.models.directories import weight_files
from llm_quantize.models.identity import small_files_digest
from llm_quantize.models.quantized import is_stored_directory

MAX_BYTES = 256 << 20
SEAL = "facts_sha256"


class Measurements:
    """The facts in ``path``. Raises AccessError, ResourceError where the file cannot be read or written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._facts: dict[str, Any] = {}
        refuse_existing(path, replace=True)
        if path.is_file():
            try:
                found = read_json_object(path, limit_bytes=MAX_BYTES)
            except MalformedInputError:
                found = {}
            facts = found.get("facts")
            known = found.get("version") == llm_quantize.__version__ and found.get(SEAL) == _sealed(facts)
            if known and isinstance(facts, dict):
                self._facts = facts

    def get(self, key: str) -> Any:
        """The fact, or None."""
        return self._facts.get(key)

    def put(self, key: str, fact: Any) -> None:
        """Keep a JSON-ready fact, durably."""
        self._facts[key] = fact
        staged = self.path.with_name(self.path.name + ".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            sealed = {"version": llm_quantize.__version__, "facts": self._facts, SEAL: _sealed(self._facts)}
            write_whole(staged, canonical_json(sealed))
            staged.replace(self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            fail_os(error, "the measurements cannot be kept", self.path)

    def remove(self) -> None:
        """Forget everything."""
        self._facts = {}
        self.path.unlink(missing_ok=True)


def _sealed(facts: Any) -> str:
    return hashlib.sha256(canonical_json(facts)).hexdigest()


def key_of(kind: str, **facts: Any) -> str:
    """A key for what ``facts`` (JSON-ready) say was measured."""
    return f"{kind}-{hashlib.sha256(canonical_json(facts)).hexdigest()}"


def artifact_identity(path: Path) -> str:
    """SHA-256 over all that an artifact holds: a copy of it is the same, and nothing else is.

    Raises what reading raises.
    """
    if not is_stored_directory(path):
        return key_of("gguf", files=contents(artifact_files(path), kept=kept_hashes()))
    config = hashlib.sha256((path / "config.json").read_bytes()).hexdigest()
    weights = contents(weight_files(path), kept=kept_hashes())
    return key_of("directory", config=config, beside=small_files_digest(path), files=weights)
