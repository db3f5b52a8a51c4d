"""Resumable output: files written by position under a ``.partial`` name, a journal with checksums, one rename.

The rule that everything rests on: a unit counts as done only if its journal record parses, its CRC holds, it names the
same inputs, **and** the bytes in the partial file hash to what the record says. Locks, fsync and order only decide
how little is done again after a crash, never whether the result is right.

The journal's first record (``journal.py``) describes the run: what, from what, by which version. A torn or damaged
line is skipped and its unit is done again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_quantize.errors import IntegrityError, LlmQuantizeError
from llm_quantize.io.artifact_paths import (
    folders_of,
    hidden_directory,
    partial_path,
    place_directory,
    place_file,
    remove_stale_journal,
)
from llm_quantize.io.durable import (
    allocate,
    fail_os,
    make_folder,
    open_directory,
    open_regular_output,
    read_at,
    remove_files,
)
from llm_quantize.io.files_at import Buffer, OpenFiles, Span, gaps
from llm_quantize.io.journal import other_identity, parse_journal, record_line, refuse_other_identity
from llm_quantize.io.leftovers import discard_hidden, discard_own, hold_hidden
from llm_quantize.io.output_file import OutputFile
from llm_quantize.io.ownership import refuse_moved, refuse_target, take_lock, taken_away

__all__ = ["OpenFiles", "OutputFile", "ResumableOutput", "Span"]

SYNC_BYTES = 256 << 20
SYNC_SECONDS = 10.0


class ResumableOutput:
    """One artifact being written: ``target`` is its final path, a file, or a directory when it has several files.

    ``identity`` says what is being made from what; a partial artifact with another identity is refused, naming the
    argument that differs. ``spans`` gives each unit's place. ``replace`` takes, at the end, the place of a finished
    artifact, and discards an unfinished run with another identity; its own it resumes. Use as a context manager;
    leaving it without ``finish`` keeps the partial file and the journal for the next run. Without a journal nothing
    could be resumed, so nothing is kept.
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
        replace: bool = False,
    ) -> None:
        self.target = target
        self.files = tuple(files)
        self.spans = spans
        self.records: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        self._identity = dict(identity)
        self._journal_path = journal_path
        self._warn = on_warning
        self.replace = replace
        self._is_directory = len(self.files) > 1
        self.partial = partial_path(target)
        self._descriptors: list[int] = []
        self._directory = -1
        self._journal = -1
        self._hidden = -1
        self._disposable = False
        self._lock = threading.Lock()
        self._failure: LlmQuantizeError | None = None
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
        if self._disposable:
            self._dispose()
        for descriptor in (*self._descriptors, self._directory, self._journal, self._hidden):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptors.clear()  # in place: who was given ``opened`` must not write into what is opened next
        self._directory = self._journal = self._hidden = -1

    def _dispose(self) -> None:
        """Remove a partial that no later run could resume, while its lock is still ours."""
        self._disposable = False
        try:
            discard_own(self._directory if self._is_directory else self._descriptors[0], self.partial, self._names)
        except OSError as error:
            self._warn(f"{self.partial}: cannot be removed ({error.strerror})")

    @property
    def _names(self) -> list[str]:
        return [file.name for file in self.files]

    def _paths(self) -> list[Path]:
        return [self.partial / file.name for file in self.files] if self._is_directory else [self.partial]

    def _open(self) -> None:
        try:
            self._refuse_target()
            self.target.parent.mkdir(parents=True, exist_ok=True)
            created = not self.partial.exists()
            self._open_partial()
            self._refuse_target()
            refuse_moved(self._places())
            self._disposable = created
            if self._journal_path is not None:
                self._journal_path.parent.mkdir(parents=True, exist_ok=True)
                self._journal = open_regular_output(self._journal_path, append=True)
                take_lock(self._journal, self.target, self._warn)
                refuse_moved(self._places())
                self._disposable = False
            self._load_journal()
            self._allocate()
        except OSError as error:
            named = isinstance(error.filename, str | Path)
            fail_os(error, "the output cannot be created", Path(error.filename) if named else self.target)

    def _refuse_target(self) -> None:
        refuse_target(self.target, is_directory=self._is_directory, replace=self.replace, names=self._names)

    def _open_partial(self) -> None:
        """Open and lock what stands, or shall stand, under the partial name; a refused writer leaves nothing there."""
        if self._is_directory:
            if not self.partial.is_symlink():
                self.partial.mkdir(exist_ok=True)
            self._directory = open_directory(self.partial)
            take_lock(self._directory, self.target, None)
        for path in self._paths():
            if self._is_directory and path.parent != self.partial:
                make_folder(path.parent)
            self._descriptors.append(open_regular_output(path))
            if len(self._descriptors) == 1:
                take_lock(self._descriptors[0], self.target, self._warn)

    def hidden(self) -> Path:
        """A directory for the hidden states of this run, ours as long as the output is open, gone when it is finished.

        Raises BusyError, AccessError, ResourceError.
        """
        if self._hidden < 0:
            self._hidden = hold_hidden(self.target)
        return hidden_directory(self.target)

    @property
    def opened(self) -> OpenFiles:
        """The files, for those who write and check units: threads of this process, or processes of their own."""
        return OpenFiles(self._paths(), self._descriptors)

    @property
    def locks(self) -> tuple[int, ...]:
        """The descriptors that are locked: the output is ours as long as any process has one of them open."""
        return tuple(fd for fd in (*self._descriptors[:1], self._directory, self._journal) if fd >= 0)

    def _places(self) -> list[tuple[int, Path]]:
        places = [(self._directory, self.partial), *zip(self._descriptors, self._paths(), strict=False)]
        return places if self._journal_path is None else [*places, (self._journal, self._journal_path)]

    def _load_journal(self) -> None:
        data = b"" if self._journal < 0 else read_at(self._journal, os.fstat(self._journal).st_size, 0)
        records, damaged = parse_journal(data)
        if (obstacle := self._obstacle(data, records)) is not None:
            if obstacle:
                self._warn(obstacle)
            self._start_again()
            return
        refuse_other_identity(records[0]["identity"], self._identity, self.partial)
        first = record_line(records[0])
        self._synced_journal_length = len(first) if data.startswith(first) else 0
        if damaged:
            self._warn(f"{self._journal_path}: {damaged} damaged journal record(s) passed over; those units are redone")
        for record in records[1:]:
            note = record.get("note")
            self.notes |= note if isinstance(note, dict) else {}
            for unit in record.get("forget", ()):
                self.records.pop(unit, None)
            span = self.spans.get(record.get("unit", ""))
            if span is not None and [span.file, span.offset, span.nbytes] == record.get("span"):
                self.records[record["unit"]] = record
        if not data.endswith(b"\n"):
            self._append_raw(b"\n")
        # What we are about to read back may still be in memory only: a disk that loses it must say so first.
        self.sync()

    def _obstacle(self, data: bytes, records: Sequence[Mapping[str, Any]]) -> str | None:
        """Why what is there is not resumed: a warning, or nothing to say (""). None: resume it, or refuse."""
        begun = any(os.fstat(descriptor).st_size for descriptor in self._descriptors)
        if self._journal < 0:
            return f"{self.partial}: an unfinished run stood here; --no-checkpoints starts it again" if begun else ""
        if not data:
            text = f"an unfinished run stood here, but its journal is not {self._journal_path}; starting again"
            return f"{self.partial}: {text} (is --checkpoint-dir another now?)" if begun else ""
        if not records or not isinstance(records[0].get("identity"), dict):
            return f"{self._journal_path}: the journal is unreadable; starting again"
        if not begun and len(records) > 1:
            # Where the artifact is in place already the journal is only what was not yet taken away.
            return "" if self.target.exists() else f"{self.partial}: the unfinished output is gone; starting again"
        if self.replace and (key := other_identity(records[0]["identity"], self._identity)) is not None:
            return f"{self.partial}: an unfinished run with another {key} is discarded, as --overwrite asks"
        return None

    def _start_again(self) -> None:
        """Nothing of an earlier run is known: empty every file, so that its bytes cannot show in gaps between units."""
        if self._journal >= 0:
            os.ftruncate(self._journal, 0)
        for descriptor in self._descriptors:
            os.ftruncate(descriptor, 0)
        if self._is_directory:
            remove_files(self.partial, keep=self._names, folders=folders_of(self._names))
        self._disposable = self._journal < 0
        remove_stale_journal(self.target, self._journal_path)
        if self._journal >= 0:
            self._append({"identity": self._identity, "files": self._names})
            self._synced_journal_length = os.fstat(self._journal).st_size

    def _allocate(self) -> None:
        for number, (file, path) in enumerate(zip(self.files, self._paths(), strict=True)):
            try:
                allocate(self._descriptors[number], file.size)
            except OSError as error:
                fail_os(error, "the output cannot be allocated", path)
            for at, piece in file.known():
                self.write(Span(number, at, len(piece)), 0, piece)
            if self.records:
                self._clear_gaps(number, file)

    def _clear_gaps(self, number: int, file: OutputFile) -> None:
        """Zeros between units, which no hash covers: what an accident left there must not reach the artifact."""
        known = [Span(number, at, nbytes) for at, nbytes in file.known_spans]
        for gap in gaps([*self.spans.values(), *known], number, 0, file.size):
            self.write(gap, 0, bytes(gap.nbytes))

    # what an earlier run left

    def check(self, unit: str) -> bool:
        """Whether the bytes of a recorded unit still hash to its record; a unit that does not is forgotten."""
        flaw = self.opened.flaw(self.spans[unit], str(self.records[unit].get("sha256")))
        if flaw is not None:
            self.doubt(unit, flaw)
        return flaw is None

    def doubt(self, unit: str, flaw: str) -> None:
        """Forget a unit whose bytes are not those of its record, and tell ``flaw`` (see ``OpenFiles.flaw``)."""
        with self._lock:
            del self.records[unit]
        self._warn(f"{self.partial}: {unit} {flaw}; doing it again")

    def read(self, unit: str) -> bytes:
        """The bytes of a recorded unit, found sound before."""
        return self.opened.read(self.spans[unit])

    def forget(self, *units: str) -> None:
        """Drop the records of ``units``, in the journal too: no later run takes what was made of another source."""
        with self._lock:
            for unit in units:
                del self.records[unit]
            if units:
                self._append({"forget": list(units)})

    # writing

    def write(self, span: Span, position: int, data: Buffer) -> None:
        """As ``OpenFiles.write``."""
        self.opened.write(span, position, data)

    def record(self, unit: str, facts: Mapping[str, Any]) -> None:
        """Declare a unit done: its bytes have been written and ``facts['sha256']`` is their hash. Thread-safe."""
        span = self.spans[unit]
        record = {"unit": unit, "span": [span.file, span.offset, span.nbytes], **facts}
        with self._lock:
            self._append(record)
            self.records[unit] = record
            self._unsynced += span.nbytes
            if self._unsynced >= SYNC_BYTES or time.monotonic() - self._last_sync >= SYNC_SECONDS:
                self._sync()

    def note(self, facts: Mapping[str, Any]) -> None:
        """Remember facts about this run for the next one (``notes``); they are not part of the identity."""
        if any(self.notes.get(key) != value for key, value in facts.items()):
            with self._lock:
                self._append({"note": dict(facts)})
        self.notes |= facts

    def sync(self) -> None:
        """Make all that was written and recorded durable."""
        with self._lock:
            self._sync()

    def _sync(self) -> None:
        self._refuse_after_failure()
        self._failure = taken_away(self._places())
        self._refuse_after_failure()
        try:
            for descriptor in self._descriptors:
                os.fsync(descriptor)
            if self._journal >= 0:
                os.fsync(self._journal)
                self._synced_journal_length = os.fstat(self._journal).st_size
        except OSError as error:
            self._cut_journal()
            self._fail(error, "the output could not be made durable", self.target)
        self._unsynced = 0
        self._last_sync = time.monotonic()

    def _cut_journal(self) -> None:
        """After a failed fsync memory may show bytes that the disk lost: no unit since the last good one counts."""
        if self._journal < 0:
            return
        try:
            os.ftruncate(self._journal, self._synced_journal_length)
        except OSError as error:
            self._warn(f"{self._journal_path}: cannot be cut back ({error.strerror}); delete it before the next run")

    def _fail(self, error: OSError, what: str, file: Path) -> None:
        """Raise, and let no other thread record anything after this failure."""
        try:
            fail_os(error, what, file)
        except LlmQuantizeError as failure:
            self._failure = failure
            raise

    def _refuse_after_failure(self) -> None:
        if self._failure is not None:
            raise self._failure  # the first cause, whichever thread is asked first

    def _append(self, record: Mapping[str, Any]) -> None:
        self._append_raw(record_line(record))

    def _append_raw(self, data: bytes) -> None:
        if self._journal < 0:
            return
        self._refuse_after_failure()
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._journal, view) :]
        except OSError as error:
            self._fail(error, "the journal cannot be written", self._journal_path or self.target)

    # the end

    def finish(self, manifest: bytes) -> None:
        """All units are recorded: make them durable, put the manifest in place, rename once, drop the journal.

        Raises IntegrityError if a unit is missing, BusyError if the partial files are no longer ours. The manifest of
        a single file stands beside it; that of a directory inside it. Between any two steps the disk holds either no
        artifact under the final name or a whole one with its own manifest.
        """
        missing = [unit for unit in self.spans if unit not in self.records]
        if missing:
            raise IntegrityError("not all parts of the output were written", file=self.target, found=missing[:3])
        self.sync()
        try:
            refuse_moved(self._places())
            self._disposable = False
            if self._is_directory:
                place_directory(self.target, manifest, self._names)
            else:
                place_file(self.target, manifest)
            discard_hidden(self.target, held=self._hidden >= 0)
            if self._journal_path is not None:
                self._journal_path.unlink(missing_ok=True)
            remove_stale_journal(self.target, self._journal_path)
        except OSError as error:
            fail_os(error, "the finished output cannot be put in place", self.target)
