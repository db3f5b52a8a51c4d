"""The files of an output as they are planned: bytes that are known, or a file taken over as it is, never held whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llm_quantize.errors import IntegrityError
from llm_quantize.io.paths import opened, pread_into, refuse_larger

PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class CopiedFile:
    """A regular file as it was when its ``size`` (bytes) and ``sha256`` were taken."""

    path: Path
    size: int
    sha256: str

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, in order. Raises IntegrityError, at the latest behind the last piece, where they are no longer
        those that were hashed, ResourceError where the disk fails."""
        digest = hashlib.sha256()
        for piece in read_pieces(self.path, self.size):
            digest.update(piece)
            yield piece
        if digest.hexdigest() != self.sha256:
            raise IntegrityError(
                "a file of the source changed while it was needed",
                file=self.path,
                expected=f"SHA-256 {self.sha256}",
                found=digest.hexdigest(),
                remedy="run the same command again when the source is at rest",
            )


@dataclass(frozen=True)
class OutputFile:
    """One file to be written: its final name inside the artifact, its exact size, and the bytes at its front; of one
    that is ``copied``, all of them. ``between``: (offset, bytes) of what else is known before any work, where headers
    stand between the data: in order, behind the front, each apart from the next."""

    name: str
    size: int
    header: bytes = field(repr=False)
    copied: CopiedFile | None = None
    between: tuple[tuple[int, bytes], ...] = ()

    def known(self) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of all that is known, in order, in pieces. Raises as ``CopiedFile.pieces`` does."""
        at = 0
        for piece in (self.header,) if self.copied is None else self.copied.pieces():
            yield at, piece
            at += len(piece)
        yield from self.between

    @property
    def known_spans(self) -> tuple[tuple[int, int], ...]:
        """(offset, bytes) of the front, and of what stands between."""
        front = len(self.header) if self.copied is None else self.copied.size
        return ((0, front), *((at, len(piece)) for at, piece in self.between))

    @property
    def known_bytes(self) -> int:
        """How many those are."""
        return sum(nbytes for _, nbytes in self.known_spans)

    @property
    def held_bytes(self) -> int:
        """How much memory they take: those of a copied file come in pieces."""
        held = len(self.header) + sum(len(piece) for _, piece in self.between)
        return held + (0 if self.copied is None else min(self.copied.size, PIECE_BYTES))

    @property
    def known_sha256(self) -> str:
        """Their hash, one after the other."""
        if self.copied is not None:
            return self.copied.sha256
        digest = hashlib.sha256()
        for _, piece in self.known():
            digest.update(piece)
        return digest.hexdigest()


def copied_file(path: Path, limit_bytes: int) -> CopiedFile:
    """The file at ``path``, read once for its hash. Raises MalformedInputError (absent, not a regular file, more than
    ``limit_bytes``), AccessError, IntegrityError, ResourceError."""
    with opened(path) as descriptor:
        size = refuse_larger(path, limit_bytes, os.fstat(descriptor).st_size)
    return CopiedFile(path, size, _sha256(path, size))


def file_sha256(path: Path) -> str:
    """The hash of a regular file, whatever its size. Raises as ``copied_file`` does."""
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
    return _sha256(path, size)


def _sha256(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    for piece in read_pieces(path, size):
        digest.update(piece)
    return digest.hexdigest()


def read_pieces(path: Path, size: int) -> Iterator[bytes]:
    """The first ``size`` bytes of a regular file, at most PIECE_BYTES at a time. Raises as
    ``paths.opened`` and ``paths.pread_into`` do."""
    with opened(path) as descriptor:
        for offset in range(0, size, PIECE_BYTES):
            data = bytearray(min(PIECE_BYTES, size - offset))
            pread_into(descriptor, memoryview(data), offset, path)
            yield bytes(data)
