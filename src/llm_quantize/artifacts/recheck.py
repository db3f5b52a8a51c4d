"""What earlier runs recorded is read back before it is believed: its bytes, and what they were made of.

A source that changed invalidates what was made of it, and, where text is run through the model, everything else that
followed from it: all matrices, the hidden states, and what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_quantize import events
from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import StampedSource, matrix_shape, unit_ranges
from llm_quantize.artifacts.clock import Clock
from llm_quantize.artifacts.origin import alike, source_hash
from llm_quantize.artifacts.rounding import Target
from llm_quantize.errors import IntegrityError
from llm_quantize.events import EventSink
from llm_quantize.io.output import OpenFiles, Span
from llm_quantize.plan import CARD_UNIT, ArtifactPlan, MatrixPlan, TensorPlan, unit_key

SOURCES = "matrix_sources"
"""The note that says what weights a run saw that runs text through the model: {matrix: SHA-256}."""


@dataclass(frozen=True, eq=False)
class Check:
    """A unit that an earlier run recorded for ``artifact``: its place and hash. ``origin``: what it was made of, and
    ``source_sha256`` of that; None where the source need not be read again. Without a ``span`` only the source is
    asked: of a matrix that is not made yet."""

    artifact: int
    unit: str
    span: Span | None
    sha256: str
    origin: tuple[OutputTensor, int, int] | None = None
    source_sha256: str = ""

    @property
    def nbytes(self) -> int:
        return 0 if self.span is None else self.span.nbytes


@dataclass(frozen=True)
class Verdict:
    """What became of a recorded unit: ``flaw`` of its bytes, or the hash ``found`` for a source that changed; sound
    where both are None. ``nbytes`` were read back."""

    artifact: int
    unit: str
    nbytes: int
    flaw: str | None
    found: str | None
    seconds: float


def recorded_units(targets: Sequence[Target], *, deep: bool) -> list[Check]:
    """All units that earlier runs recorded; ``deep``: whether the source still hashes the same is asked too, and of
    matrices that the run has seen but not made as well."""
    checks = []
    for number, target in enumerate(targets):
        records = target.output.records
        for key, record in records.items():
            origin = None if key == CARD_UNIT or not deep else target.plan.origin(*_parse_key(target.plan, key))
            known = "" if origin is None else str(record["source_sha256"])
            checks.append(Check(number, key, target.output.spans[key], str(record.get("sha256", "")), origin, known))
        seen = target.output.notes.get(SOURCES)
        seen = seen if deep and isinstance(seen, dict) else {}
        for matrix in target.plan.matrices if seen else ():
            key = _first_unit(target.plan, matrix)
            if key not in records and matrix.name in seen:
                checks.append(Check(number, key, None, "", _whole(matrix), str(seen[matrix.name])))
    return checks


def settle(targets: Sequence[Target], verdicts: Iterator[Verdict]) -> Iterator[int]:
    """Forget what is not sound, and what does not hold any more as the source is now; yields the bytes read back.

    Raises IntegrityError where the source changed and the output is not one to be replaced.
    """
    changed: dict[int, list[str]] = {}
    for verdict in verdicts:
        target = targets[verdict.artifact]
        target.seconds += verdict.seconds
        if verdict.flaw is not None:
            target.output.doubt(verdict.unit, verdict.flaw)
        elif verdict.found is not None:
            _refuse_unless_replaced(target, verdict)
            changed.setdefault(verdict.artifact, []).append(verdict.unit)
        yield verdict.nbytes
    for number, units in changed.items():
        _invalidate(targets[number], units)


def _refuse_unless_replaced(target: Target, verdict: Verdict) -> None:
    if target.output.replace:
        return
    tensor, _, _ = _parse_key(target.plan, verdict.unit)
    record = target.output.records.get(verdict.unit)
    known = "of other bytes" if record is None else str(record["source_sha256"])
    raise _source_changed("since the unfinished run", tensor, known, str(verdict.found))


def _invalidate(target: Target, units: Sequence[str]) -> None:
    """Forget ``units``, whose source changed, and all that depended on it."""
    plan, gone = target.plan, set(units)
    if plan.chained:
        dependent = {*plan.held, *(index for matrix in plan.matrices for index in matrix.fields)}
        names = {plan.tensors[index].name for index in dependent}
        gone |= {key for key in target.output.records if key == CARD_UNIT or key.rpartition("[")[0] in names}
        target.output.note(dict.fromkeys(("hidden", "measured", SOURCES)))
    target.output.forget(*sorted(gone.intersection(target.output.records)))


def note_sources(target: Target, source: StampedSource) -> None:
    """Remember which weights a run sees that runs text through the model: each matrix depends on others."""
    if target.output.notes.get(SOURCES) is None:
        hashes = {matrix.name: source_hash(source, *_whole(matrix)) for matrix in target.plan.matrices}
        target.output.note({SOURCES: hashes})


def _whole(matrix: MatrixPlan) -> tuple[OutputTensor, int, int]:
    return matrix.weight, 0, matrix_shape(matrix.weight.shape)[0]


def _first_unit(plan: ArtifactPlan, matrix: MatrixPlan) -> str:
    tensor = plan.tensors[matrix.fields[0]]
    return unit_key(tensor.name, *unit_ranges(tensor.output.shape)[0])


@dataclass(frozen=True)
class Recheck:
    """Checks units that an earlier run recorded: their bytes, and that the source still hashes the same. As fit for
    threads and processes as ``Rounding``."""

    source: StampedSource
    files: tuple[OpenFiles, ...]
    known: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def __call__(self, check: Check) -> Verdict:
        """Read one unit back, and where it is sound what it was made of."""
        clock = Clock([check.artifact])
        flaw, found = None, None
        if check.span is not None:
            flaw = self.files[check.artifact].flaw(check.span, check.sha256)
        if flaw is None and check.origin is not None:
            found = self._hash(*check.origin, check.source_sha256)
        clock.charge(check.artifact)
        found = None if found == check.source_sha256 else found
        return Verdict(check.artifact, check.unit, check.nbytes, flaw, found, clock.seconds[check.artifact])

    def _hash(self, output: OutputTensor, start: int, stop: int, recorded: str) -> str:
        """``source_hash`` of what a unit was made of; that of a matrix, which several units share, is kept."""
        key = (output.name, start, stop)
        if key not in self.known or not alike(self.known[key], recorded):
            self.known[key] = source_hash(self.source, output, start, stop, like=recorded)
        return self.known[key]


def refuse_other_source(
    source: StampedSource,
    plan: ArtifactPlan,
    manifest: Mapping[str, Any],
    hashes: dict[tuple[str, int, int], str],
    on_event: EventSink,
) -> None:
    """Raise IntegrityError naming the first tensor whose weights are not those that ``manifest``'s artifact holds.
    ``hashes``: of parts of the source that were read before, and are not read again."""
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    done, what = 0, "the source against what the artifact was made of"
    on_event(events.Check(what, 0, plan.weights))
    for entry in manifest.get("tensors", []):
        tensor = tensors[entry["name"]]
        for unit in entry["units"]:
            output, start, stop = plan.origin(tensor, *unit["rows"])
            recorded = unit["source_sha256"]
            found = hashes.get((output.name, start, stop), "")
            if not found or not alike(found, recorded):
                found = source_hash(source, output, start, stop, like=recorded)
            hashes[output.name, start, stop] = found
            if found != recorded:
                raise _source_changed("since the artifact was made", tensor, recorded, found)
            done += (unit["rows"][1] - unit["rows"][0]) * matrix_shape(tensor.output.shape)[1]
            on_event(events.Check(what, done, plan.weights))


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
