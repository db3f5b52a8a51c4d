"""The manifest of an artifact: what it was made from, and the hash of every part; sealed by a hash of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm_quantize.errors import IntegrityError, MalformedInputError, printable
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.json_file import read_json_object

MAX_MANIFEST_BYTES = 256 << 20
SEAL = "manifest_sha256"

# What became of NaN and infinite weights, counted per unit: replaced by zero, kept in a type that holds them, lost in
# one that does not. Last: float16 scales (or values) that became infinite though every weight under them was finite.
NONFINITE_FACTS = ("nonfinite_replaced", "nonfinite_kept", "nonfinite_lost", "scales_overflowed")

_REMEDY = "delete it to verify without a manifest, or make the artifact again"


def manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """The file for ``content`` (JSON-ready): sorted, indented, with a hash over all else."""
    plain = json.loads(canonical_json(dict(content)))
    sealed = plain | {SEAL: hashlib.sha256(canonical_json(plain)).hexdigest()}
    return json.dumps(sealed, indent=1, sort_keys=True).encode() + b"\n"


def read_manifest(file: Path) -> dict[str, Any] | None:
    """The manifest in ``file``, or None where there is none.

    Raises MalformedInputError (not JSON, or not a manifest) and IntegrityError (changed since it was written).
    """
    if not file.is_file():
        return None
    manifest = unsealed(file)
    if not _is_manifest(manifest):
        expected = "an object with identity, files and tensors as llm-quantize writes them"
        raise MalformedInputError("the manifest has the wrong form", file=file, expected=expected, remedy=_REMEDY)
    return manifest


def unsealed(file: Path) -> dict[str, Any]:
    """What ``manifest_bytes`` wrote, whatever it is of.

    Raises MalformedInputError (not JSON) and IntegrityError (changed since it was written).
    """
    manifest = read_json_object(file, limit_bytes=MAX_MANIFEST_BYTES)
    seal = manifest.pop(SEAL, None)
    found = hashlib.sha256(canonical_json(manifest)).hexdigest()
    if seal != found:
        raise IntegrityError(
            "the manifest was changed since it was written",
            file=file,
            expected=f"{SEAL} = {found}",
            found=seal,
            remedy=_REMEDY,
        )
    return manifest


def nonfinite_counts(tensors: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """{fact: {tensor: count}} for each of NONFINITE_FACTS, from a manifest's "tensors"; counts of zero are left out."""
    counts: dict[str, dict[str, int]] = {fact: {} for fact in NONFINITE_FACTS}
    for entry in sorted(tensors, key=lambda tensor: str(tensor["name"])):
        for fact, found in counts.items():
            total = sum(unit.get(fact, 0) for unit in entry["units"])
            if total:
                found[entry["name"]] = total
    return counts


def fallbacks(planned: Mapping[str, Iterable[str]], matrices: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """{what could not be done as asked: the tensors or matrices}, from a manifest's "fallbacks" and "matrices"."""
    found = {text: [str(name) for name in names] for text, names in planned.items()}
    for entry in matrices:
        told = entry.get("fallbacks", {})
        for text in sorted(told) if isinstance(told, dict) else ():
            found.setdefault(text, []).append(str(entry.get("name")))
    return dict(sorted(found.items()))


def _is_manifest(value: Mapping[str, Any]) -> bool:
    return (
        isinstance(value.get("identity"), dict)
        and _all(value.get("files"), lambda entry: _has(entry, name=str, size=int))
        and _all(value.get("tensors"), _is_tensor)
        and isinstance(value.get("fallbacks", {}), dict)
        and all(isinstance(names, list) for names in value.get("fallbacks", {}).values())
        and _all(value.get("matrices", []), lambda entry: _has(entry, name=str, type=str, fields=list))
    )


def _is_tensor(entry: Any) -> bool:
    return _has(entry, name=str, type=str, bytes=int, offset=int, units=list) and _all(entry["units"], _is_unit)


def _is_unit(entry: Any) -> bool:
    if not _has(entry, rows=list, sha256=str, source_sha256=str):
        return False
    if not all(isinstance(entry.get(fact, 0), int) for fact in NONFINITE_FACTS):
        return False
    rows = entry["rows"]
    return len(rows) == 2 and all(isinstance(row, int) for row in rows)


def _all(values: Any, check: Any) -> bool:
    return isinstance(values, list) and all(check(value) for value in values)


def _has(entry: Any, **kinds: type) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())


def adapters_told(adapters: object) -> str:
    """What people read of the adapters that a manifest names, which may be a stranger's; "none" where there are
    none."""
    merges = adapters if isinstance(adapters, list) else [adapters]
    words = [str(merge.get("words", "")) if isinstance(merge, dict) else str(merge) for merge in merges]
    return printable("; ".join(words) or "none", 200)
