"""One unit of work: read some rows once, quantize them for every artifact that lacks them, write, record."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize import kernels
from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import (
    CHUNK_WEIGHTS,
    Rows,
    RowSource,
    chunk_ranges,
    matrix_shape,
    read_output_rows,
    to_float32,
    unit_ranges,
)
from llm_quantize.artifacts.manifest import NONFINITE_FACTS
from llm_quantize.errors import IntegrityError, NumericPolicyError
from llm_quantize.events import EventSink
from llm_quantize.io.output import ResumableOutput
from llm_quantize.plan import CARD_UNIT, ArtifactPlan, TensorPlan, unit_key
from llm_quantize.qtypes import QTYPES

Importance = Mapping[str, npt.NDArray[np.float32]]

_UNIT_FACTS = ("sha256", "source_sha256", *NONFINITE_FACTS)
_HOLDS_NONFINITE = ("f32", "f16", "bf16")


@dataclass
class Target:
    """An artifact being made: its plan and its open output; ``seconds``: its share of this run's thread time so far."""

    plan: ArtifactPlan
    output: ResumableOutput
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of one tensor, wanted by ``targets`` (all plans list the same tensors in the same order)."""

    tensor: int
    start: int
    stop: int
    targets: tuple[Target, ...]

    @property
    def output(self) -> OutputTensor:
        return self.targets[0].plan.tensors[self.tensor].output

    @property
    def key(self) -> str:
        return unit_key(self.output.name, self.start, self.stop)

    @property
    def weight(self) -> int:
        """Weights to quantize, counted once per artifact."""
        return (self.stop - self.start) * matrix_shape(self.output.shape)[1] * len(self.targets)


def missing_units(targets: Sequence[Target]) -> Iterator[Unit]:
    """Units that at least one target lacks, in the order of the source's tensors; all targets list the same tensors.

    Matrices that a method quantizes as a whole are not among them (see blockwise/)."""
    if not targets:
        return
    rounded = [frozenset(target.plan.rounded()) for target in targets]
    for index, tensor in enumerate(targets[0].plan.tensors):
        for start, stop in unit_ranges(tensor.output.shape):
            key = unit_key(tensor.name, start, stop)
            wanting = tuple(
                target
                for target, own in zip(targets, rounded, strict=True)
                if index in own and key not in target.output.records
            )
            if wanting:
                yield Unit(index, start, stop, wanting)


class _Clock:
    """Divides this thread's CPU time among artifacts: each span since the last charge goes to those it served."""

    def __init__(self) -> None:
        self._last = time.thread_time()

    def charge(self, *targets: Target) -> None:
        """The time since the last charge, in equal parts."""
        now = time.thread_time()
        for target in targets:
            with target.lock:
                target.seconds += (now - self._last) / len(targets)
        self._last = now


@dataclass(frozen=True)
class Worker:
    """Quantizes units. ``importance``: float32 (matrices, columns) per output tensor; ``files``: where each source
    tensor lies, for messages. Thread-safe."""

    source: RowSource
    importance: Importance
    nonfinite: str = "refuse"
    files: Mapping[str, Path] = field(default_factory=dict)
    memory: threading.local = field(default_factory=threading.local)

    def _buffer(self) -> npt.NDArray[np.uint8]:
        """This thread's own buffer for one chunk as it lies in the source: touched once, used again and again."""
        if not hasattr(self.memory, "chunk"):
            self.memory.chunk = np.empty(8 * CHUNK_WEIGHTS, np.uint8)
        chunk: npt.NDArray[np.uint8] = self.memory.chunk
        return chunk

    def __call__(self, unit: Unit) -> Unit:
        """Do one unit. Raises NumericPolicyError for NaN, infinity or an overflowing scale."""
        clock = _Clock()
        source_digest = hashlib.sha256()
        digests = [hashlib.sha256() for _ in unit.targets]
        nonfinite = 0
        overflowed: dict[str, int] = {}
        for matrix, start, stop in chunk_ranges(unit.output.shape, unit.start, unit.stop):
            rows = read_output_rows(self.source, unit.output, start, stop, buffer=self._buffer(), digest=source_digest)
            rows, count = self.finite(unit.output, rows, start)
            nonfinite += count
            clock.charge(*unit.targets)
            packed: dict[str, npt.NDArray[np.uint8]] = {}
            for target, digest in zip(unit.targets, digests, strict=True):
                tensor = target.plan.tensors[unit.tensor]
                if tensor.qtype not in packed:
                    packed[tensor.qtype], bad = self._quantize(tensor, rows, matrix, start)
                    overflowed[tensor.qtype] = overflowed.get(tensor.qtype, 0) + bad
                    clock.charge(*(t for t in unit.targets if t.plan.tensors[unit.tensor].qtype == tensor.qtype))
                data = packed[tensor.qtype]
                span = tensor.span(unit.start, unit.stop)
                target.output.write(span, (start - unit.start) * tensor.row_bytes, data.data)
                digest.update(data.data)
                clock.charge(target)
        for target, digest in zip(unit.targets, digests, strict=True):
            facts: dict[str, Any] = {"sha256": digest.hexdigest(), "source_sha256": source_digest.hexdigest()}
            qtype = target.plan.tensors[unit.tensor].qtype
            counts = {self._fate(qtype): nonfinite, "scales_overflowed": overflowed.get(qtype, 0)}
            facts |= {fact: count for fact, count in counts.items() if count}
            target.output.record(unit.key, facts)
            clock.charge(target)
        return unit

    def _fate(self, qtype: str) -> str:
        """What becomes of a NaN or infinite weight in this type: one of NONFINITE_FACTS."""
        if self.nonfinite != "keep":
            return "nonfinite_replaced"
        return "nonfinite_kept" if qtype in _HOLDS_NONFINITE else "nonfinite_lost"

    def _quantize(self, tensor: TensorPlan, rows: Rows, matrix: int, start: int) -> tuple[npt.NDArray[np.uint8], int]:
        """Packed rows, and how many float16 scales overflowed in them (only under "keep"; else that is refused)."""
        qtype = QTYPES[tensor.qtype]
        vectors = self.importance.get(tensor.name) if qtype.uses_importance else None
        importance = None if vectors is None else np.ascontiguousarray(vectors[matrix])
        packed = kernels.quantize(tensor.qtype, rows, importance)
        bad = qtype.infinite_blocks(packed)
        if not bad.size:
            return packed, 0
        if self.nonfinite == "keep":
            # A block that held NaN or infinity before is counted by its weights, not here.
            weights = to_float32(rows).reshape(-1, qtype.block_size)[bad]
            return packed, int(np.count_nonzero(np.isfinite(weights).all(axis=1)))
        row = start + int(bad[0]) * qtype.block_size // max(1, tensor.output.shape[-1])
        raise NumericPolicyError(
            f"the weights are too large for {tensor.qtype}: a float16 scale overflows",
            tensor=tensor.name,
            found=f"row {row}",
            expected="magnitudes below about 65504",
            remedy=f"keep this tensor in BF16, from the start: --tensor-type '^{tensor.name}$=bf16' --overwrite",
        )

    def finite(self, output: OutputTensor, rows: Rows, start: int) -> tuple[Rows, int]:
        """The rows, by the policy for NaN and infinity, and how many such values the source has there."""
        count, first = kernels.scan_nonfinite(rows)
        if count == 0 or self.nonfinite == "keep":
            return rows, count
        if self.nonfinite == "zero":
            return np.nan_to_num(to_float32(rows), nan=0.0, posinf=0.0, neginf=0.0), count
        columns = rows.shape[-1]
        total = self.count_nonfinite(output)
        sources = ", ".join(piece.source for piece in output.pieces[:3])
        raise NumericPolicyError(
            "a weight is NaN or infinite",
            file=self.files.get(output.pieces[0].source) if output.pieces else None,
            tensor=output.name,
            found=f"{total} such values, the first at row {start + first // columns}, column {first % columns}",
            expected="finite weights",
            remedy=f"check the source ({sources}); --nonfinite=zero replaces them by zero; --nonfinite=keep keeps them "
            "in F32, F16 and BF16 tensors only (in a quantized type they are lost, and their block is damaged); add "
            "--overwrite, as the unfinished run was made with another policy",
        )

    def count_nonfinite(self, output: OutputTensor) -> int:
        """How many NaN and infinite values the source has in the rows of ``output``."""
        total = 0
        for _, start, stop in chunk_ranges(output.shape, 0, matrix_shape(output.shape)[0]):
            total += kernels.scan_nonfinite(read_output_rows(self.source, output, start, stop))[0]
        return total


@dataclass(frozen=True)
class Recheck:
    """Checks a unit that an earlier run recorded: its bytes, and (``deep``) that the source still hashes the same."""

    source: RowSource
    deep: bool
    known: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def __call__(self, job: tuple[Target, str]) -> bool:
        """Whether the unit's bytes are as recorded. Raises IntegrityError where the source changed."""
        target, _ = job
        clock = _Clock()
        try:
            return self._sound(*job)
        finally:
            clock.charge(target)

    def _sound(self, target: Target, key: str) -> bool:
        record = target.output.records[key]
        if not target.output.check(key):
            return False
        if not self.deep or key == CARD_UNIT:
            return True
        tensor, start, stop = _parse_key(target.plan, key)
        found = self._hash(target.plan, tensor, start, stop)
        if found != record["source_sha256"]:
            if target.output.replace:
                target.output.forget(key)
                return False
            raise _source_changed("since the unfinished run", tensor, record["source_sha256"], found)
        return True

    def _hash(self, plan: ArtifactPlan, tensor: TensorPlan, start: int, stop: int) -> str:
        """``source_hash`` of what a unit was made of; that of a matrix, which several units share, is kept."""
        origin = plan.origin(tensor, start, stop)
        key = (origin[0].name, *origin[1:])
        if key not in self.known:
            self.known[key] = source_hash(self.source, *origin)
        return self.known[key]


def refuse_other_source(
    source: RowSource, plan: ArtifactPlan, manifest: Mapping[str, Any], on_event: EventSink
) -> None:
    """Raise IntegrityError naming the first tensor whose weights are not those that ``manifest``'s artifact holds."""
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    done, progress = 0, {"event": "check", "what": "the source, changed since the artifact was made"}
    on_event({**progress, "done": 0, "total": plan.weights})
    for entry in manifest.get("tensors", []):
        tensor = tensors[entry["name"]]
        for unit in entry["units"]:
            found = source_hash(source, *plan.origin(tensor, *unit["rows"]))
            if found != unit["source_sha256"]:
                raise _source_changed("since the artifact was made", tensor, unit["source_sha256"], found)
            done += (unit["rows"][1] - unit["rows"][0]) * matrix_shape(tensor.output.shape)[1]
            on_event({**progress, "done": done, "total": plan.weights})


def source_hash(source: RowSource, output: OutputTensor, start: int, stop: int) -> str:
    """SHA-256 of the source's bytes of rows [start, stop), as ``read_output_rows`` reads them."""
    digest = hashlib.sha256()
    for _, first, last in chunk_ranges(output.shape, start, stop):
        read_output_rows(source, output, first, last, digest=digest)
    return digest.hexdigest()


def _source_changed(when: str, tensor: TensorPlan, expected: str, found: str) -> IntegrityError:
    return IntegrityError(
        f"the source's weights changed {when}",
        tensor=tensor.name,
        expected=f"source bytes with SHA-256 {expected}",
        found=found,
        remedy="restore the source, or start again with --overwrite",
    )


def _parse_key(plan: ArtifactPlan, key: str) -> tuple[TensorPlan, int, int]:
    name, _, rows = key.rpartition("[")
    start, _, stop = rows.rstrip("]").partition(":")
    tensor = next(tensor for tensor in plan.tensors if tensor.name == name)
    return tensor, int(start), int(stop)


def matrix_records(target: Target) -> list[dict[str, Any]]:
    """What the manifest says of each matrix that a method quantized as a whole: its grid, and what became of it."""
    found = []
    for matrix in target.plan.matrices:
        first = target.plan.tensors[matrix.fields[0]]
        record = target.output.records[unit_key(first.name, *unit_ranges(first.output.shape)[0])]
        names = [target.plan.tensors[index].name for index in matrix.fields]
        found.append({"name": matrix.name, "type": matrix.qtype, "fields": names, **record.get("matrix", {})})
    return found


def unit_records(target: Target) -> list[dict[str, Any]]:
    """What the manifest says of each tensor: type, place, sources, and the hashes of its units."""
    entries = []
    for tensor in target.plan.tensors:
        units = []
        for start, stop in unit_ranges(tensor.output.shape):
            record = target.output.records[unit_key(tensor.name, start, stop)]
            facts = {key: record[key] for key in _UNIT_FACTS if key in record}
            units.append({"rows": [start, stop], **facts})
        entries.append(
            {
                "name": tensor.name,
                "type": tensor.qtype,
                "shape": list(tensor.output.shape),
                "file": tensor.file,
                "offset": tensor.offset,
                "bytes": tensor.nbytes,
                "sources": sorted({piece.source for piece in tensor.output.pieces}),
                "units": units,
            }
        )
    return entries
