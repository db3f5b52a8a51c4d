"""The journal of an unfinished output: one line per record, ``crc32 length json``; a damaged line is passed over.

Its first record holds the identity of the run: what is made, from what, by which version.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_quantize.errors import IntegrityError, UsageError


def canonical_json(value: Any) -> bytes:
    """``value`` as JSON bytes that do not depend on dictionary order or locale."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def record_line(record: Mapping[str, Any]) -> bytes:
    """One journal line: CRC-32 and length of the JSON that follows."""
    data = canonical_json(record)
    return b"%08x %d %s\n" % (zlib.crc32(data), len(data), data)


def parse_journal(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The valid records of a journal, and how many damaged lines were passed over (a torn last line counts)."""
    records: list[dict[str, Any]] = []
    damaged = 0
    for line in data.split(b"\n"):
        if not line:
            continue
        record = _parse_line(line)
        if record is None:
            damaged += 1
        else:
            records.append(record)
    return records, damaged


_BY_FILES = {"layout_sha256", "text", "imatrix", "importance_gaps"}


def other_identity(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first key in which two identities differ."""
    keys = dict.fromkeys([*wanted, *sorted(found)])
    return next((key for key in keys if found.get(key) != wanted.get(key)), None)


def source_changed(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The key by which two identities show that the source changed, None where an argument (or the version) did.

    Small files (configuration, tokenizer) show in the layout only, and in what the text became by them.
    """
    differing = [key for key in dict.fromkeys([*wanted, *sorted(found)]) if found.get(key) != wanted.get(key)]
    told = [key for key in differing if key.startswith("source")]
    if told:
        return told[0]
    return "layout_sha256" if "layout_sha256" in differing and set(differing) <= _BY_FILES else None


def refuse_other_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], file: Path) -> None:
    """Raise IntegrityError (another source) or UsageError (another argument or version) naming what differs."""
    key = other_identity(found, wanted)
    if key is None:
        return
    changed = source_changed(found, wanted)
    key = changed or key
    facts: dict[str, Any] = {
        "file": file,
        "expected": f"{key} = {found.get(key)} (the unfinished run)",
        "found": f"{key} = {wanted.get(key)} (this run)",
        "remedy": "use the same arguments and source as before, or start again with --overwrite",
    }
    if changed:
        raise IntegrityError("the source changed since the unfinished run", **facts)
    raise UsageError(f"an unfinished run with another {key} holds this output", **facts)


def _parse_line(line: bytes) -> dict[str, Any] | None:
    fields = line.split(b" ", 2)
    if len(fields) != 3:
        return None
    crc, length, body = fields
    if crc != b"%08x" % zlib.crc32(body) or length != b"%d" % len(body):
        return None
    try:
        record = json.loads(body)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
