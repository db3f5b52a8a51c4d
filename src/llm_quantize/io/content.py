"""SHA-256 of whole files, kept: a file that is what it was when it was hashed is not read again.

What was kept of files is believed where each one's size, times, inode and some pieces of its content, at even distances
from its first bytes to its last, are the same (``standing``); else the whole file decides. Times are compared for being
equal, never for which is younger, as a copy has younger ones and a clock may have run ahead. A record that is damaged,
or that cannot be kept, costs a reading and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm_quantize.errors import LlmQuantizeError
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.paths import opened, pread_into
from llm_quantize.io.whole_file import write_file

CHUNK = 8 << 20
TICK_NS = 20_000_000
"""More than the steps in which file systems tell time: the kernel's clock has 100 to 1,000 a second."""
SAMPLES, SAMPLE_BYTES = 16, 4096
RECORD_BYTES = 4 << 20

Told = Callable[[int, int], None]
"""Bytes that are read, of all that have to be."""


def contents(files: Iterable[Path], *, kept: Path | None, told: Told | None = None) -> list[str]:
    """The SHA-256 of each of ``files``. ``kept``: the directory where hashes are kept, None: nowhere.

    Raises what opening and reading raise, IntegrityError where a file becomes shorter meanwhile.
    """
    paths = list(files)
    total, before, found = sum(path.stat().st_size for path in paths), 0, []
    for path in paths:
        offset = before

        def progress(done: int, offset: int = offset) -> None:
            if told is not None:
                told(offset + done, total)

        found.append(_content(path, kept, progress))
        before += path.stat().st_size
    return found


def _content(path: Path, kept: Path | None, told: Callable[[int], None]) -> str:
    with opened(path) as descriptor:
        facts = _facts(descriptor, path)
        record = None if kept is None else kept / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()}.json"
        known = None if record is None else kept_hash(record, facts)
        if known is not None:
            return known
        if record is not None:
            _let_time_pass(facts["ctime_ns"])
        digest = _whole(descriptor, path, facts["size"], told)
        # A file that was written to meanwhile has other facts by now, and its record then fits nothing.
        if record is not None:
            keep_hash(record, facts, digest)
    return digest


def standing(path: Path) -> dict[str, Any]:
    """What must be the same for what was kept of a file to be believed (JSON-ready): size, times in nanoseconds, inode,
    and a hash of pieces. Raises what opening and reading raise."""
    with opened(path) as descriptor:
        return _facts(descriptor, path)


def _let_time_pass(ctime_ns: int) -> None:
    """Wait out the tick of the system's clock in which a file was written: what is written to it after that has another
    time of change."""
    since = time.time_ns() - ctime_ns
    if 0 <= since < TICK_NS:
        time.sleep((TICK_NS - since) / 1e9)


def _facts(descriptor: int, path: Path) -> dict[str, Any]:
    found = os.fstat(descriptor)
    sampled = hashlib.sha256()
    last = max(0, found.st_size - SAMPLE_BYTES)
    for offset in sorted({index * last // (SAMPLES - 1) for index in range(SAMPLES)}):
        piece = bytearray(min(SAMPLE_BYTES, found.st_size - offset))
        pread_into(descriptor, memoryview(piece), offset, path)
        sampled.update(piece)
    times = {"mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}
    return {"size": found.st_size, **times, "inode": found.st_ino, "sampled": sampled.hexdigest()}


def _whole(descriptor: int, path: Path, size: int, told: Callable[[int], None]) -> str:
    digest, buffer = hashlib.sha256(), bytearray(min(CHUNK, max(1, size)))
    for offset in range(0, size, len(buffer)):
        piece = memoryview(buffer)[: min(len(buffer), size - offset)]
        pread_into(descriptor, piece, offset, path)
        digest.update(piece)
        told(offset + len(piece))
    return digest.hexdigest()


def kept_hash(record: Path, facts: Mapping[str, Any]) -> str | None:
    """The hash in ``record``, where it was kept with the same ``facts``; None where there is none to be believed."""
    try:
        if not record.is_file():
            return None
        found = read_json_object(record, limit_bytes=RECORD_BYTES)
    except (LlmQuantizeError, OSError):
        return None
    sealed = found.pop("seal", None)
    digest = found.pop("sha256", None)
    same = found == facts and sealed == _seal({**facts, "sha256": digest})
    return digest if same and isinstance(digest, str) else None


def keep_hash(record: Path, facts: Mapping[str, Any], sha256: str) -> None:
    """Keep ``sha256`` of what ``facts`` (JSON-ready) describe."""
    content = {**facts, "sha256": sha256}
    # What cannot be kept (a read-only or full disk, another process that writes the same) is hashed again next time.
    with suppress(LlmQuantizeError, OSError):
        write_file(record, [canonical_json({**content, "seal": _seal(content)})], replace=True)


def _seal(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(facts)).hexdigest()
