"""Files written and read by position, by any thread of any process that was given them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llm_quantize.io.durable import fail_os, read_at
from llm_quantize.io.ownership import gone

HASH_CHUNK = 4 << 20

Buffer = bytes | bytearray | memoryview
Inode = tuple[int, int]


@dataclass(frozen=True)
class Span:
    """Where a unit's bytes stand: file number, offset, length."""

    file: int
    offset: int
    nbytes: int


def gaps(spans: Iterable[Span], file: int, start: int, size: int) -> Iterator[Span]:
    """What of file number ``file``, from ``start`` to its end at ``size``, no span covers."""
    for span in sorted((span for span in spans if span.file == file), key=lambda span: span.offset):
        if span.offset > start:
            yield Span(file, start, span.offset - start)
        start = max(start, span.offset + span.nbytes)
    if size > start:
        yield Span(file, start, size - start)


class OpenFiles:
    """Files that are open in this process: ``descriptors``, one for each of ``paths``.

    Another process that is given them, pickled, opens the same files by path, once, and keeps them open to its end; it
    raises BusyError where others stand there by then. Whoever made the first of these holds the locks.
    """

    def __init__(self, paths: Sequence[Path], descriptors: Sequence[int]) -> None:
        self.paths, self._descriptors = tuple(paths), descriptors

    def __reduce__(self) -> tuple[object, ...]:
        inodes = tuple(_inode(descriptor) for descriptor in self._descriptors)
        return _opened_here, (self.paths, inodes)

    def write(self, span: Span, position: int, data: Buffer) -> None:
        """Write ``data`` at ``position`` bytes into ``span``. Thread-safe."""
        view = memoryview(data).cast("B")
        if position < 0 or position + len(view) > span.nbytes:
            raise ValueError("write outside of the span")
        offset = span.offset + position
        try:
            while view:
                written = os.pwrite(self._descriptors[span.file], view, offset)
                offset += written
                view = view[written:]
        except OSError as error:
            fail_os(error, "writing failed", self.paths[span.file])

    def read(self, span: Span) -> bytes:
        """All bytes of ``span``."""
        try:
            return read_at(self._descriptors[span.file], span.nbytes, span.offset)
        except OSError as error:
            fail_os(error, "what was written cannot be read back", self.paths[span.file])

    def flaw(self, span: Span, sha256: str) -> str | None:
        """What is wrong with bytes that shall hash to ``sha256``; None where nothing is."""
        digest = hashlib.sha256()
        try:
            for start in range(0, span.nbytes, HASH_CHUNK):
                count = min(HASH_CHUNK, span.nbytes - start)
                digest.update(read_at(self._descriptors[span.file], count, span.offset + start))
        except OSError as error:
            # Writing a bad sector again is what makes a disk replace it; if that fails too, the write says so.
            return f"cannot be read back ({error.strerror})"
        return None if digest.hexdigest() == sha256 else "does not match its journal record"


def _inode(descriptor: int) -> Inode:
    facts = os.fstat(descriptor)
    return facts.st_dev, facts.st_ino


@cache
def _opened_here(paths: tuple[Path, ...], inodes: tuple[Inode, ...]) -> OpenFiles:
    """The same files, opened by this process, which has not made them."""
    descriptors: list[int] = []
    for path, inode in zip(paths, inodes, strict=True):
        try:
            descriptors.append(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK))
        except FileNotFoundError:
            raise gone(path) from None
        except OSError as error:
            fail_os(error, "the output cannot be opened", path)
        if _inode(descriptors[-1]) != inode:
            raise gone(path)
    return OpenFiles(paths, descriptors)
