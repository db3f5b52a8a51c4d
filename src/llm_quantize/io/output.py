"""Resumable output: files written by position under a ``.partial`` name, a journal with checksums, one rename.

The rule that everything rests on: a unit counts as done only if its journal record parses, its CRC holds, it names the
same inputs, **and** the bytes in the partial file hash to what the record says. Locks, fsync and order only decide
how little is done again after a crash, never whether the result is right.

Journal: one line per record, ``crc32 length json``. The first describes the run (what, from what, by which version);
a torn or damaged line is skipped and its unit is done again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llm_quantize.errors import (
    AccessError,
    BusyError,
    IntegrityError,
    ResourceError,
    UsageError,
)

SYNC_BYTES = 256 << 20
SYNC_SECONDS = 10.0
HASH_CHUNK = 4 << 20

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class OutputFile:
    """One file to be written: its final name inside the artifact, its exact size, and the bytes at its front."""

    name: str
    size: int
    header: bytes


@dataclass(frozen=True)
class Span:
    """Where a unit's bytes stand: file number, offset, length."""

    file: int
    offset: int
    nbytes: int


def canonical_json(value: Any) -> bytes:
    """``value`` as JSON bytes that do not depend on dictionary order or locale."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def fail_os(error: OSError, what: str, file: Path) -> NoReturn:
    """Raise the tree's error for a failed system call: disk and limits are 5, access is 6."""
    facts: dict[str, Any] = {"file": file, "found": error.strerror}
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some disk space and run the same command again: it continues where it stopped"
        raise ResourceError(f"{what}: the disk is full", remedy=remedy, **facts) from error
    if error.errno == errno.EFBIG:
        remedy = "raise the file size limit, use another file system, or --split-max-size"
        raise ResourceError(f"{what}: the file is larger than allowed", remedy=remedy, **facts) from error
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "choose a directory that you can write to with -o"
        raise AccessError(f"{what}: not permitted", remedy=remedy, **facts) from error
    remedy = "check the disk and run the same command again: finished parts are kept"
    raise ResourceError(f"{what}: the system refused", remedy=remedy, **facts) from error


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


class ResumableOutput:
    """One artifact being written: ``target`` is its final path, a file, or a directory when it has several files.

    ``identity`` says what is being made from what; a partial artifact with another identity is refused, naming the
    argument that differs. ``spans`` gives each unit's place. Use as a context manager; leaving it without
    ``finish`` keeps the partial file and the journal for the next run.
    """

    def __init__(
        self,
        target: Path,
        files: Sequence[OutputFile],
        *,
        identity: Mapping[str, Any],
        spans: Mapping[str, Span],
        journal_path: Path | None,
        on_warning: Callable[[str], None],
    ) -> None:
        self.target = target
        self.files = tuple(files)
        self.spans = spans
        self.records: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        self._identity = dict(identity)
        self._journal_path = journal_path
        self._warn = on_warning
        self._is_directory = len(self.files) > 1
        self.partial = target.with_name(target.name + ".partial")
        self._descriptors: list[int] = []
        self._journal = -1
        self._lock = threading.Lock()
        self._unsynced = 0
        self._synced_journal_length = 0
        self._last_sync = time.monotonic()

    # opening and resuming

    def __enter__(self) -> ResumableOutput:
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        for descriptor in (*self._descriptors, *([self._journal] if self._journal >= 0 else [])):
            os.close(descriptor)
        self._descriptors, self._journal = [], -1

    def _paths(self) -> list[Path]:
        return [self.partial / file.name for file in self.files] if self._is_directory else [self.partial]

    def _open(self) -> None:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if self._is_directory:
                self.partial.mkdir(exist_ok=True)
            if self._journal_path is not None:
                self._journal_path.parent.mkdir(parents=True, exist_ok=True)
                self._journal = _open_output(self._journal_path)
            for path in self._paths():
                self._descriptors.append(_open_output(path))
        except OSError as error:
            fail_os(error, "the output cannot be created", self.target)
        self._take_lock()
        self._refuse_moved()
        self._load_journal()
        self._allocate()

    def _refuse_moved(self) -> None:
        """A writer that finished between our open and our lock has renamed what we opened: hands off."""
        paths = [*self._paths(), *([self._journal_path] if self._journal_path is not None else [])]
        for descriptor, path in zip((*self._descriptors, self._journal), paths, strict=False):
            ours = os.fstat(descriptor)
            if not path.exists() or not os.path.samestat(ours, path.stat()):
                raise BusyError("another process has just finished this output", file=self.target)

    def _take_lock(self) -> None:
        for descriptor in (*self._descriptors[:1], *([self._journal] if self._journal >= 0 else [])):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BusyError(
                    "another process is writing this output",
                    file=self.target,
                    remedy="wait for it to end, or choose another directory with -o",
                ) from error
            except OSError:
                self._warn(f"{self.target.parent}: this file system has no locks; do not run two writers on one output")

    def _load_journal(self) -> None:
        if self._journal < 0:
            for descriptor in self._descriptors:
                os.ftruncate(descriptor, 0)
            return
        data = _read_all(self._journal)
        records, damaged = parse_journal(data)
        if not records or "identity" not in records[0]:
            if data:
                self._warn(f"{self._journal_path}: the journal is unreadable; starting again")
            os.ftruncate(self._journal, 0)
            self._append({"identity": self._identity})
            return
        self._compare_identity(records[0]["identity"])
        if damaged:
            self._warn(f"{self._journal_path}: {damaged} damaged journal record(s) passed over; those units are redone")
        for record in records[1:]:
            self.notes |= record.get("note", {})
            span = self.spans.get(record.get("unit", ""))
            if span is not None and [span.file, span.offset, span.nbytes] == record.get("span"):
                self.records[record["unit"]] = record
        if data and not data.endswith(b"\n"):
            self._append_raw(b"\n")

    def _compare_identity(self, found: Mapping[str, Any]) -> None:
        for key in dict.fromkeys([*self._identity, *sorted(found)]):
            if found.get(key) == self._identity.get(key):
                continue
            facts: dict[str, Any] = {
                "file": self.partial,
                "expected": f"{key} = {found.get(key)} (the unfinished run)",
                "found": f"{key} = {self._identity.get(key)} (this run)",
                "remedy": "use the same arguments and source as before, or start again with --overwrite",
            }
            if key.startswith("source"):
                raise IntegrityError("the source changed since the unfinished run", **facts)
            raise UsageError(f"an unfinished run with another {key} holds this output", **facts)

    def _allocate(self) -> None:
        for number, (file, path) in enumerate(zip(self.files, self._paths(), strict=True)):
            descriptor = self._descriptors[number]
            try:
                if os.fstat(descriptor).st_size != file.size:
                    os.ftruncate(descriptor, file.size)
                _fallocate(descriptor, file.size)
            except OSError as error:
                fail_os(error, "the output cannot be allocated", path)
            self.write(Span(number, 0, len(file.header)), 0, file.header)

    # checking what an earlier run left

    def check(self, unit: str) -> bool:
        """Whether the bytes of a recorded unit still hash to its record; a unit that does not is forgotten."""
        record = self.records[unit]
        span = self.spans[unit]
        digest = hashlib.sha256()
        for start in range(0, span.nbytes, HASH_CHUNK):
            count = min(HASH_CHUNK, span.nbytes - start)
            digest.update(os.pread(self._descriptors[span.file], count, span.offset + start))
        if digest.hexdigest() == record["sha256"]:
            return True
        self.forget(unit)
        self._warn(f"{self.partial}: {unit} does not match its journal record; doing it again")
        return False

    def forget(self, unit: str) -> None:
        """Drop a unit's record; it will be done again."""
        with self._lock:
            del self.records[unit]

    # writing

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
            fail_os(error, "writing failed", self._paths()[span.file])

    def record(self, unit: str, facts: Mapping[str, Any]) -> None:
        """Declare a unit done: its bytes have been written and ``facts['sha256']`` is their hash. Thread-safe."""
        span = self.spans[unit]
        record = {"unit": unit, "span": [span.file, span.offset, span.nbytes], **facts}
        with self._lock:
            self.records[unit] = record
            if self._journal >= 0:
                self._append(record)
            self._unsynced += span.nbytes
            if self._unsynced >= SYNC_BYTES or time.monotonic() - self._last_sync >= SYNC_SECONDS:
                self._sync()

    def note(self, facts: Mapping[str, Any]) -> None:
        """Remember facts about this run for the next one (``notes``); they are not part of the identity."""
        if self._journal >= 0 and any(self.notes.get(key) != value for key, value in facts.items()):
            with self._lock:
                self._append({"note": dict(facts)})
        self.notes |= facts

    def sync(self) -> None:
        """Make all that was written and recorded durable."""
        with self._lock:
            self._sync()

    def _sync(self) -> None:
        try:
            for descriptor in self._descriptors:
                os.fsync(descriptor)
            if self._journal >= 0:
                os.fsync(self._journal)
                self._synced_journal_length = os.fstat(self._journal).st_size
        except OSError as error:
            # After a failed fsync the cache may show bytes that the disk lost: nothing since the last good one counts.
            if self._journal >= 0:
                os.ftruncate(self._journal, self._synced_journal_length)
            fail_os(error, "the output could not be made durable", self.target)
        self._unsynced = 0
        self._last_sync = time.monotonic()

    def _append(self, record: Mapping[str, Any]) -> None:
        self._append_raw(record_line(record))

    def _append_raw(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._journal, view) :]
        except OSError as error:
            fail_os(error, "the journal cannot be written", self._journal_path or self.target)

    # the end

    def finish(self, manifest: bytes) -> None:
        """All units are recorded: make them durable, put the manifest in place, rename once, drop the journal.

        Raises IntegrityError if a unit is missing. The manifest of a single file stands beside it; that of a
        directory inside it.
        """
        missing = [unit for unit in self.spans if unit not in self.records]
        if missing:
            raise IntegrityError("not all parts of the output were written", file=self.target, found=missing[:3])
        self.sync()
        try:
            _write_file(manifest_path(self.target, staged=self.partial if self._is_directory else None), manifest)
            if self._is_directory:
                _sync_directory(self.partial)
                if self.target.is_dir():
                    _remove_tree(self.target)
            self.partial.rename(self.target)
            _sync_directory(self.target.parent)
            if self._journal_path is not None:
                self._journal_path.unlink(missing_ok=True)
        except OSError as error:
            fail_os(error, "the finished output cannot be put in place", self.target)


def manifest_path(target: Path, *, staged: Path | None = None) -> Path:
    """Where an artifact's manifest stands: inside a directory, beside a single file."""
    if staged is not None or target.is_dir():
        return (staged or target) / "manifest.json"
    return target.with_name(target.name + ".manifest.json")


def discard_partial(target: Path, journal_path: Path | None) -> None:
    """Forget an unfinished run of ``target`` (``--overwrite``)."""
    partial = target.with_name(target.name + ".partial")
    if partial.is_dir() and not partial.is_symlink():
        _remove_tree(partial)
    else:
        partial.unlink(missing_ok=True)
    if journal_path is not None:
        journal_path.unlink(missing_ok=True)


def _remove_tree(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def _open_output(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AccessError("the output exists and is not a regular file", file=path, remedy="choose another -o or -n")
    if path.suffix == ".journal":
        os.lseek(descriptor, 0, os.SEEK_END)
    return descriptor


def _fallocate(descriptor: int, size: int) -> None:
    if size == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _read_all(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    parts, offset = [], 0
    while offset < size:
        part = os.pread(descriptor, size - offset, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _write_file(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
