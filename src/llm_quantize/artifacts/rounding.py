"""One unit of work: read some rows once, quantize them for every artifact that lacks them, write.

Jobs (``Unit``) and results (``Record``) are plain data; what does them (``Rounding``) opens model and outputs in any
process that it comes to. Only the driver, which has the ``Target``s, writes journals. What an earlier run did is
checked in recheck.py.
"""

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
    StampedSource,
    chunk_ranges,
    matrix_shape,
    read_output_rows,
    to_float32,
    unit_ranges,
    weights_of,
)
from llm_quantize.artifacts.clock import Clock
from llm_quantize.artifacts.manifest import NONFINITE_FACTS
from llm_quantize.artifacts.origin import stamped_hash
from llm_quantize.artifacts.verdict import REQUANTIZED, Difference, conversion, of_units
from llm_quantize.errors import NumericPolicyError
from llm_quantize.io.output import OpenFiles, ResumableOutput
from llm_quantize.kernels.weighing import vector_for
from llm_quantize.plan import ArtifactPlan, TensorPlan, unit_key
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.range import DIVIDED, first_beyond, refusal

Importance = Mapping[str, npt.NDArray[np.float32]]

_UNIT_FACTS = ("sha256", "source_sha256", *NONFINITE_FACTS)
_HOLDS_NONFINITE = ("f32", "f16", "bf16")


@dataclass
class Target:
    """An artifact being made: its plan and its open output; ``seconds``: its share of this run's CPU time so far."""

    plan: ArtifactPlan
    output: ResumableOutput
    seconds: float = 0.0

    def keep(self, record: Record) -> None:
        """Declare a unit done."""
        began = time.thread_time()
        self.output.record(record.unit, record.facts)
        self.seconds += record.seconds + time.thread_time() - began


@dataclass(frozen=True)
class Policy:
    """What is done about NaN and infinity in the source. ``files``: where each source tensor lies, for messages."""

    source: StampedSource
    nonfinite: str = "refuse"
    files: Mapping[str, Path] = field(default_factory=dict)

    def fate(self, qtype: str) -> str:
        """What becomes of a NaN or infinite weight in this type: one of NONFINITE_FACTS."""
        if self.nonfinite != "keep":
            return "nonfinite_replaced"
        return "nonfinite_kept" if qtype in _HOLDS_NONFINITE else "nonfinite_lost"

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


@dataclass(frozen=True, eq=False)
class Unit:
    """Rows [start, stop) of tensor number ``tensor``, wanted by ``artifacts`` (numbers; all list the same tensors in
    the same order). ``importance``: float32 (the matrices that these rows are of, columns), None where none is used."""

    tensor: int
    start: int
    stop: int
    artifacts: tuple[int, ...]
    importance: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Record:
    """A unit done for one artifact: what its journal is to say, the weights in it, its share of the CPU seconds."""

    artifact: int
    unit: str
    facts: Mapping[str, Any]
    weights: int
    seconds: float


def missing_units(targets: Sequence[Target], importance: Importance) -> Iterator[Unit]:
    """Units that at least one target lacks, in the order of the source's tensors. ``importance``: float32 (matrices,
    columns) per output tensor.

    Matrices that a method quantizes as a whole are not among them (see blockwise/)."""
    numbers = range(len(targets))
    alike = all(target.plan.alike for target in targets)
    for group in [numbers] if alike and targets else [[number] for number in numbers]:
        yield from _missing_in(targets, group, importance)


def _missing_in(targets: Sequence[Target], group: Sequence[int], importance: Importance) -> Iterator[Unit]:
    """The units that are missing in artifacts (numbers) that list the same tensors in the same order."""
    rounded = {number: frozenset(targets[number].plan.rounded()) for number in group}
    for index, tensor in enumerate(targets[group[0]].plan.tensors):
        per_matrix = tensor.output.shape[-2] if len(tensor.output.shape) > 1 else 1
        for start, stop in unit_ranges(tensor.output.shape):
            key = unit_key(tensor.name, start, stop)
            wanting = tuple(n for n in group if index in rounded[n] and key not in targets[n].output.records)
            if not wanting:
                continue
            weighed = any(QTYPES[targets[n].plan.tensors[index].qtype].uses_importance for n in wanting)
            vectors = importance.get(tensor.name) if weighed else None
            if vectors is not None:
                vectors = vectors[start // per_matrix : -(-stop // per_matrix)]
            yield Unit(index, start, stop, wanting, vectors)


def unit_weights(targets: Sequence[Target], unit: Unit) -> int:
    """Weights to quantize in a unit, counted once per artifact."""
    shape = targets[unit.artifacts[0]].plan.tensors[unit.tensor].output.shape
    return (unit.stop - unit.start) * matrix_shape(shape)[1] * len(unit.artifacts)


_scratch = threading.local()


def _buffer() -> npt.NDArray[np.uint8]:
    """This thread's own buffer for one chunk as it lies in the source: touched once, used again and again."""
    if not hasattr(_scratch, "chunk"):
        _scratch.chunk = np.empty(8 * CHUNK_WEIGHTS, np.uint8)
    chunk: npt.NDArray[np.uint8] = _scratch.chunk
    return chunk


@dataclass(frozen=True)
class Rounding:
    """Does units. Of each artifact: ``tensors`` that it holds, ``files`` where they are written, ``remedies`` for
    weights that overflow (``ArtifactPlan.too_large``). Thread-safe, and fit for other processes as far as the policy's
    source is (``models.shared``). ``judged``: those whose records say how far they are from the source."""

    policy: Policy
    tensors: tuple[tuple[TensorPlan, ...], ...]
    files: tuple[OpenFiles, ...]
    remedies: tuple[str, ...]
    judged: tuple[bool, ...] = ()

    def __call__(self, unit: Unit) -> tuple[Record, ...]:
        """Do one unit: a record for each artifact that wants it. Raises NumericPolicyError for NaN, infinity or an
        overflowing scale."""
        clock = Clock(unit.artifacts)
        plans = {number: self.tensors[number][unit.tensor] for number in unit.artifacts}
        output = plans[unit.artifacts[0]].output
        origin = stamped_hash(self.policy.source, output, unit.start, unit.stop)
        source_digest = None if origin else hashlib.sha256()
        digests = {number: hashlib.sha256() for number in plans}
        nonfinite = 0
        overflowed: dict[str, int] = {}
        off = {plans[n].qtype: Difference() for n in plans if self.judged and self.judged[n]}
        for matrix, start, stop in chunk_ranges(output.shape, unit.start, unit.stop):
            rows = read_output_rows(self.policy.source, output, start, stop, buffer=_buffer(), digest=source_digest)
            rows, count = self.policy.finite(output, rows, start)
            nonfinite += count
            clock.charge(*plans)
            packed: dict[str, npt.NDArray[np.uint8]] = {}
            for number, tensor in plans.items():
                if tensor.qtype not in packed:
                    importance = _importance(unit, output, matrix)
                    packed[tensor.qtype], bad = self._quantize(number, tensor, rows, importance, start)
                    overflowed[tensor.qtype] = overflowed.get(tensor.qtype, 0) + bad
                    if tensor.qtype in off:
                        decoded = kernels.dequantize(tensor.qtype, packed[tensor.qtype], rows.shape[-1])
                        off[tensor.qtype].add(decoded.reshape(rows.shape), to_float32(rows))
                    clock.charge(*(n for n, other in plans.items() if other.qtype == tensor.qtype))
                data = packed[tensor.qtype].data
                place = (start - unit.start) * tensor.row_bytes
                self.files[number].write(tensor.span(unit.start, unit.stop), place, data)
                digests[number].update(data)
                clock.charge(number)
        facts = {
            number: {
                "sha256": digests[number].hexdigest(),
                "source_sha256": origin if source_digest is None else source_digest.hexdigest(),
                **self._counts(tensor.qtype, nonfinite, overflowed.get(tensor.qtype, 0)),
                **(off[tensor.qtype].facts() if tensor.qtype in off and self.judged[number] else {}),
            }
            for number, tensor in plans.items()
        }
        key = unit_key(output.name, unit.start, unit.stop)
        weights = (unit.stop - unit.start) * matrix_shape(output.shape)[1]
        return tuple(Record(n, key, facts[n], weights, clock.seconds[n]) for n in plans)

    def _counts(self, qtype: str, nonfinite: int, overflowed: int) -> dict[str, int]:
        """What a record says of values that are not what the source says, where there are any."""
        counts = {self.policy.fate(qtype): nonfinite, "scales_overflowed": overflowed}
        return {fact: count for fact, count in counts.items() if count}

    def _quantize(
        self, number: int, tensor: TensorPlan, rows: Rows, importance: npt.NDArray[np.float32] | None, start: int
    ) -> tuple[npt.NDArray[np.uint8], int]:
        """Packed rows, and how many blocks hold weights that are too large for the type (only under "keep"; else that
        is refused)."""
        qtype = QTYPES[tensor.qtype]
        vector = vector_for(tensor.qtype, importance)
        packed = kernels.quantize(tensor.qtype, rows, vector)
        told = vector is None and tensor.qtype in DIVIDED
        bad, beyond = qtype.infinite_blocks(packed), -1 if told else first_beyond(rows, qtype.largest)
        if not bad.size and beyond < 0:
            return packed, 0
        if self.policy.nonfinite == "keep":
            # A block that held NaN or infinity before is counted by its weights, not here.
            blocks = to_float32(rows).reshape(-1, qtype.block_size)
            lost = np.union1d(bad, np.flatnonzero((np.abs(blocks) > qtype.largest).any(axis=1)))
            return packed, int(np.count_nonzero(np.isfinite(blocks[lost]).all(axis=1)))
        if beyond < 0:
            first = int(bad[0]) * qtype.block_size
            weights = to_float32(rows).reshape(-1)[first : first + qtype.block_size]
            beyond = first + int(np.argmax(np.abs(weights)))
        row, column = divmod(beyond, rows.shape[-1])
        value = float(to_float32(rows[row : row + 1])[0, column])
        remedy = self.remedies[number]
        raise refusal(tensor.name, tensor.qtype, start + row, column, value, limit=qtype.largest, remedy=remedy)


def _importance(unit: Unit, output: OutputTensor, matrix: int) -> npt.NDArray[np.float32] | None:
    """float32 (columns,): the importance of one matrix of a unit."""
    if unit.importance is None:
        return None
    per_matrix = output.shape[-2] if len(output.shape) > 1 else 1
    return np.ascontiguousarray(unit.importance[matrix - unit.start // per_matrix])


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
    for index, tensor in enumerate(target.plan.tensors):
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
                **_verdict(target, index),
                "units": units,
            }
        )
    return entries


def _verdict(target: Target, index: int) -> dict[str, Any]:
    """What became of a tensor that is rounded by itself; of a field, of what was not read from the source, and where
    nobody asked, nothing."""
    tensor = target.plan.tensors[index]
    if not target.plan.judged or not tensor.output.pieces or tensor.name in target.plan.fields_of:
        return {}
    if index in target.plan.held:
        return {"verdict": REQUANTIZED}  # a transform moved scales
    records = target.output.records
    return of_units(records[unit_key(tensor.name, *rows)] for rows in unit_ranges(tensor.output.shape))


def conversion_of(target: Target) -> dict[str, Any] | None:
    """The verdict of a whole artifact, from its records; None where nobody asked."""
    plan = target.plan
    if not plan.judged:
        return None
    sizes = {matrix.name: weights_of(matrix.weight.shape) for matrix in plan.matrices}
    judged = [(entry["name"], sizes[entry["name"]], entry) for entry in matrix_records(target)]
    single = ((tensor, _verdict(target, index)) for index, tensor in enumerate(plan.tensors))
    judged += [(one.name, weights_of(one.output.shape), facts) for one, facts in single if facts]
    return conversion(judged)
