"""Which bytes of its source a unit was made of, as a hash that records and manifests hold: ``source_sha256``.

    HEX           SHA-256 of rows as they were read: the source's own bytes, or the float32 values of a packed matrix
    fields:HEX    of rows of packed matrices: SHA-256 of which rows, and of all that is stored of each matrix

What is made now says ``fields`` wherever every piece is packed; older versions hashed values there, and their records
stay good: whoever holds a source against a record makes the kind that is recorded.
"""

from __future__ import annotations

import hashlib

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import StampedSource, chunk_ranges, placed, read_output_rows

__all__ = ["FIELDS", "alike", "source_hash", "stamped", "stamped_hash"]

FIELDS = "fields:"


def alike(one: str, other: str) -> bool:
    """Whether two hashes are of one kind, so that they tell whether they are of the same bytes."""
    return one.startswith(FIELDS) == other.startswith(FIELDS)


def stamped(source: StampedSource, output: OutputTensor) -> bool:
    """Whether every row of ``output`` comes from a packed matrix."""
    return bool(output.pieces) and all(source.is_stamped(piece.source) for piece in output.pieces)


def stamped_hash(source: StampedSource, output: OutputTensor, start: int, stop: int) -> str:
    """``fields:`` and a hash of all that is stored of the matrices that rows [start, stop) come from, and of which rows
    of them; "" where one of them is not packed. Nothing is decoded."""
    if not stamped(source, output):
        return ""
    digest = hashlib.sha256()
    for base, count, piece in placed(source, output):
        first, last = max(start, base) - base, min(stop, base + count) - base
        if first < last:
            rows: tuple[int, ...] = (piece.start + first, piece.start + last)
            rows += piece.deal if piece.deal[1] > 1 else ()
            digest.update(source.stamp(piece.source) + b"".join(row.to_bytes(8, "little") for row in rows))
    return f"{FIELDS}{digest.hexdigest()}"


def source_hash(source: StampedSource, output: OutputTensor, start: int, stop: int, *, like: str = FIELDS) -> str:
    """The hash of what rows [start, stop) are made of, of the kind of ``like``, a hash that is recorded."""
    found = stamped_hash(source, output, start, stop) if like.startswith(FIELDS) else ""
    if found:
        return found
    digest = hashlib.sha256()
    for _, first, last in chunk_ranges(output.shape, start, stop):
        read_output_rows(source, output, first, last, digest=digest)
    return digest.hexdigest()
