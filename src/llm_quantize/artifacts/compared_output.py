"""A finished artifact in the place of an output: what a run would write is held against what stands there.

Nothing is written. The run sees an output of its own; every byte that it would put into a file is compared with the
byte that the artifact has there, a few rows at a time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_quantize.artifacts.origin import alike
from llm_quantize.io.durable import fail_os, read_at
from llm_quantize.io.files_at import HASH_CHUNK, Buffer, OpenFiles, Span, gaps
from llm_quantize.io.leftovers import discard_hidden
from llm_quantize.io.output import ResumableOutput
from llm_quantize.io.paths import open_argument
from llm_quantize.plan import CARD_UNIT, ArtifactPlan, TensorPlan


@dataclass(frozen=True)
class Place:
    """Where a unit of the run stands in the artifact: rows [start, stop) of ``tensor`` ("": the card), of ``row_bytes``
    each, at ``offset`` of file number ``file``; None where the artifact has no such tensor of that size.
    ``source_sha256``: of what it was made of, "" where that is not recorded."""

    tensor: str
    start: int
    stop: int
    row_bytes: int
    file: int
    offset: int | None
    source_sha256: str = ""


@dataclass
class Found:
    """What of a tensor, or of a file beside its tensors (``tensor`` ""), is not what the run makes: how many ``rows``
    (0: not counted), between ``first`` and ``last``; ``offset``: of the first byte in ``file``, None where the artifact
    has nothing there."""

    file: str
    tensor: str = ""
    rows: int = 0
    first: int = 0
    last: int = 0
    offset: int | None = None

    def add(self, rows: Sequence[int], offset: int) -> None:
        """Further rows."""
        self.first = min(self.first, rows[0]) if self.rows else rows[0]
        self.last = max(self.last, rows[-1]) if self.rows else rows[-1]
        self.rows += len(rows)
        self.offset = offset if self.offset is None else min(self.offset, offset)


@dataclass
class Held:
    """What a comparison has found: {tensor: what differs}, {file: what differs beside tensors}, and tensors of which
    the source says otherwise than when the artifact was made."""

    tensors: dict[str, Found] = field(default_factory=dict)
    files: dict[str, Found] = field(default_factory=dict)
    sources: dict[str, None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def same(self) -> bool:
        return not (self.tensors or self.files or self.sources)

    def absent(self, file: str, tensor: str) -> None:
        with self._lock:
            self.tensors.setdefault(tensor, Found(file, tensor))

    def differ(self, file: str, place: Place, rows: Sequence[int], offset: int) -> None:
        with self._lock:
            self.tensors.setdefault(place.tensor, Found(file, place.tensor)).add(rows, offset)

    def of_file(self, file: str, offset: int | None) -> None:
        with self._lock:
            found = self.files.setdefault(file, Found(file, offset=offset))
            if offset is not None and found.offset is not None:
                found.offset = min(found.offset, offset)


class _Files(OpenFiles):
    """The files of an artifact, of which writing compares."""

    def __init__(
        self, paths: Sequence[Path], descriptors: Sequence[int], places: Mapping[Span, Place], held: Held
    ) -> None:
        super().__init__(paths, descriptors)
        self._handles, self._places, self._held = descriptors, places, held

    def write(self, span: Span, position: int, data: Buffer) -> None:
        """Compare ``data`` with what the artifact has at ``position`` bytes into the place of ``span``. Thread-safe."""
        place, view = self._places[span], memoryview(data).cast("B")
        name = self.paths[place.file].name
        if place.offset is None:
            self._held.absent(name, place.tensor)
            return
        for at in range(0, len(view), HASH_CHUNK):
            piece = view[at : at + HASH_CHUNK]
            start = position + at
            found = np.frombuffer(self._bytes(place.file, place.offset + start, len(piece)), np.uint8)
            wanted = np.frombuffer(piece, np.uint8)
            if np.array_equal(found, wanted):
                continue
            unlike = np.flatnonzero(found != wanted[: len(found)])
            unlike = np.append(unlike, np.arange(len(found), len(piece)))
            if not place.tensor:
                self._held.of_file(name, place.offset + start + int(unlike[0]))
                continue
            rows = np.unique((start + unlike) // place.row_bytes) + place.start
            self._held.differ(name, place, rows.tolist(), place.offset + start + int(unlike[0]))

    def read(self, span: Span) -> bytes:
        """What the artifact has in the place of ``span``, which was found to be the same."""
        place = self._places[span]
        return b"" if place.offset is None else self._bytes(place.file, place.offset, span.nbytes)

    def _bytes(self, file: int, offset: int, count: int) -> bytes:
        """Fewer where the file ends."""
        try:
            size = os.fstat(self._handles[file]).st_size
            return read_at(self._handles[file], max(0, min(count, size - offset)), offset)
        except OSError as error:
            fail_os(error, "the artifact cannot be read", self.paths[file])


class ComparedOutput(ResumableOutput):
    """The artifact in ``paths`` (one for each file of ``plan``) as an output of a run: nothing is written. ``places``:
    {unit: where it stands}; ``held``: what differs. Files beside it (hidden states) are called after ``target``, which
    does not exist, and are gone at the end. Raises what opening the files raises."""

    def __init__(
        self,
        target: Path,
        plan: ArtifactPlan,
        paths: Sequence[Path],
        places: Mapping[str, Place],
        on_warning: Callable[[str], None],
    ) -> None:
        super().__init__(
            target, plan.files, identity=plan.identity, spans=plan.units(), journal_path=None, on_warning=on_warning
        )
        self.held = Held()
        self._where, self._known = tuple(paths), places
        self._spans = {span: places[unit] for unit, span in self.spans.items()}

    def _open(self) -> None:
        discard_hidden(self.target)
        for path in self._where:
            self._descriptors.append(open_argument(path, "file of the artifact")[0])

    def _close(self) -> None:
        discard_hidden(self.target, held=self._hidden >= 0)
        super()._close()

    @property
    def opened(self) -> OpenFiles:
        return _Files(self._where, self._descriptors, self._spans, self.held)

    @property
    def locks(self) -> tuple[int, ...]:
        return ()

    def record(self, unit: str, facts: Mapping[str, Any]) -> None:
        """A unit is compared; what it was made of, too."""
        self.records[unit] = {"unit": unit, **facts}
        place = self._known[unit]
        made_of = str(facts.get("source_sha256", ""))
        if place.source_sha256 and alike(made_of, place.source_sha256) and made_of != place.source_sha256:
            self.held.sources[place.tensor] = None

    def sync(self) -> None:
        """There is nothing to keep."""

    def finish(self, manifest: bytes) -> None:
        """Compare what is no unit: what is known of every file, zeros between, and how long they are."""
        for number, path in enumerate(self._where):
            try:
                self._compare_file(number, path)
            except OSError as error:
                fail_os(error, "the artifact cannot be read", path)

    def _compare_file(self, number: int, path: Path) -> None:
        file, descriptor = self.files[number], self._descriptors[number]
        size = os.fstat(descriptor).st_size
        for at, piece in file.known():
            self._compare(path, descriptor, at, piece)
        if size != file.size:
            self.held.of_file(path.name, min(size, file.size))
            return
        known = [Span(number, at, nbytes) for at, nbytes in file.known_spans]
        for gap in gaps([*self.spans.values(), *known], number, 0, file.size):
            for at in range(0, gap.nbytes, HASH_CHUNK):
                self._compare(path, descriptor, gap.offset + at, bytes(min(HASH_CHUNK, gap.nbytes - at)))

    def _compare(self, path: Path, descriptor: int, at: int, wanted: bytes) -> None:
        first = _first_unlike(read_at(descriptor, len(wanted), at), wanted)
        if first is not None:
            self.held.of_file(path.name, at + first)


def _first_unlike(found: bytes, wanted: bytes) -> int | None:
    if found == wanted:
        return None
    return next(
        (index for index, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), len(found)
    )


def places_of(plan: ArtifactPlan, entries: Iterable[Mapping[str, Any]]) -> dict[str, Place]:
    """Where each unit of ``plan`` stands in the artifact; ``entries``: the tensors of its manifest, whose offsets may
    be others than those planned where another version wrote the fronts."""
    known = {str(entry["name"]): entry for entry in entries}
    return dict(_places(plan, known))


def _places(plan: ArtifactPlan, known: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Place]]:
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    for unit, span in plan.units().items():
        if unit == CARD_UNIT:
            yield unit, Place("", 0, 1, max(1, span.nbytes), span.file, span.offset)
            continue
        name, _, rows = unit.rpartition("[")
        start, _, stop = rows.rstrip("]").partition(":")
        yield unit, _place(tensors[name], int(start), int(stop), known.get(name))


def _place(tensor: TensorPlan, start: int, stop: int, entry: Mapping[str, Any] | None) -> Place:
    offset = None
    hashes = {}
    if entry is not None and entry["bytes"] == tensor.nbytes and entry.get("file", 0) == tensor.file:
        offset = max(0, entry["offset"]) + start * tensor.row_bytes
        hashes = {tuple(unit["rows"]): str(unit["source_sha256"]) for unit in entry["units"]}
    sha256 = hashes.get((start, stop), "")
    return Place(tensor.name, start, stop, max(1, tensor.row_bytes), tensor.file, offset, sha256)
