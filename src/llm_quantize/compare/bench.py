"""One artifact at a time: the errors of its tensors, its speed, its memory and its words; all remembered."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gguf.constants import Keys, LlamaFileType

from llm_quantize import events
from llm_quantize.compare.measurements import Measurements, artifact_identity, key_of
from llm_quantize.errors import MissingExtraError, UnsupportedError, UsageError
from llm_quantize.evaluation.generation_check import Answer, check_generation, judge, source_answers
from llm_quantize.evaluation.speed import Speed, measure_speed
from llm_quantize.events import EventSink
from llm_quantize.formats.gguf.metadata import PROVENANCE
from llm_quantize.io.artifact_files import artifact_files
from llm_quantize.io.gguf_file import GgufFile, read_gguf
from llm_quantize.memory import memory_limit
from llm_quantize.models.directories import open_artifact_directory
from llm_quantize.models.opening import Source
from llm_quantize.models.quantized import is_stored_directory
from llm_quantize.reports.findings import Sample, TensorError
from llm_quantize.reports.provenance import machine_facts
from llm_quantize.runtimes import artifact_at, runtime_for

NEW_TOKENS = 64


@dataclass(frozen=True)
class MeasuredFile:
    """A file (or directory) to measure. ``level``: what people call it. ``identity``: measurements.artifact_identity;
    ``importance``: None: made without an importance matrix, else the texts that it is of, as the file names them (""
    where it does not). ``asked``: the level that was asked for, of one that is made; None: it was taken as it is."""

    path: Path
    level: str
    identity: str
    size: int
    bits_per_weight: float
    importance: str | None = None
    format: str = "gguf"
    asked: str | None = None


def measured_file(path: Path) -> MeasuredFile:
    """What the files say of themselves. Raises what reading their headers raises."""
    if is_stored_directory(path):
        return _measured_directory(path)
    files = [read_gguf(file) for file in artifact_files(path)]
    weights = sum(math.prod(tensor.shape) for file in files for tensor in file.tensors)
    size = sum(file.file_size for file in files)
    bits = 8 * size / max(1, weights)
    return MeasuredFile(path, _level(files[0], path), artifact_identity(path), size, bits, _importance(files[0]))


def _measured_directory(path: Path) -> MeasuredFile:
    """Its size is that of its weights, without tokenizer and card."""
    with open_artifact_directory(path) as packed:
        bits = 8 * packed.size / max(1, packed.weights)
        return MeasuredFile(path, packed.label, artifact_identity(path), packed.size, bits, format=packed.method)


def _importance(file: GgufFile) -> str | None:
    """Under the keys of llama.cpp's quantizer (formats/gguf.py)."""
    if not any(key in file.metadata for key in ("quantize.imatrix.file", "quantize.imatrix.entries_count")):
        return None
    texts = file.metadata.get("quantize.imatrix.dataset")
    return texts.value if texts is not None and isinstance(texts.value, str) else ""


def _level(file: GgufFile, path: Path) -> str:
    """The level that the file names: ours, else llama.cpp's file type, else its name."""
    own = file.metadata.get(f"{PROVENANCE}.level")
    if own is not None and isinstance(own.value, str) and own.value:
        return own.value
    kind = file.metadata.get(Keys.General.FILE_TYPE)
    known = {member.value: member.name.removeprefix("MOSTLY_").removeprefix("ALL_") for member in LlamaFileType}
    return known.get(kind.value, path.stem) if kind is not None and isinstance(kind.value, int) else path.stem


def refuse_twice(found: Sequence[MeasuredFile]) -> None:
    """Raise UsageError where two are at one place."""
    for path, count in Counter(artifact.path.resolve() for artifact in found).items():
        if count > 1:
            raise UsageError("an artifact is given twice", file=path, remedy="name it once")


def with_labels(found: Sequence[MeasuredFile]) -> list[MeasuredFile]:
    """Levels as labels, file names where a level stands twice, with their suffixes where that is not enough."""
    for suffix in (".gguf", ""):
        counts = Counter(artifact.level for artifact in found)
        found = [
            replace(one, level=one.path.name.removesuffix(suffix)) if counts[one.level] > 1 else one for one in found
        ]
    return list(found)


def _asked_alone(artifact: MeasuredFile) -> bool:
    """Whether its runtime is a process of its own for each request: what it refuses is said of this artifact."""
    return runtime_for(artifact_at(artifact.path)).open_model is None


class Bench:
    """Measures one artifact after another. ``absent``: why none ran in its runtime, empty where they did. ``notes``:
    which of those that are no GGUF files were not run, and why.

    ``fingerprint``: of the source's content (``Source.content``). ``prompts``: what each artifact continues,
    NEW_TOKENS tokens each.
    """

    def __init__(
        self,
        source: Source,
        kept: Measurements,
        *,
        fingerprint: str,
        prompts: Sequence[str],
        speed: bool,
        threads: int | None,
        max_ram: int | None,
    ) -> None:
        self._source, self._kept = source, kept
        self._prompts, self._threads, self._max_ram = tuple(prompts), threads, max_ram
        self._fingerprint = fingerprint
        self._machine = machine_facts("", threads)
        self.absent = "" if speed else "--no-speed"
        self.notes: list[str] = []

    def _known(self, key: str, stage: str, on_event: EventSink, measure: Callable[[], Any]) -> Any:
        if self._kept.get(key) is None:
            on_event(events.Stage(stage))
            self._kept.put(key, measure())
        return self._kept.get(key)

    def tensor_errors(self, artifact: MeasuredFile, on_event: EventSink) -> list[TensorError]:
        """Relative error of every tensor that is not exact, in the order of the artifact's names."""
        from llm_quantize.artifacts.opening import open_decoded
        from llm_quantize.evaluation.tensor_errors import tensor_errors

        def measure() -> list[Any]:
            with closing(open_decoded(self._source, artifact.path)) as decoded:
                found = tensor_errors(self._source, decoded, threads=self._threads, on_event=on_event)
            kept = sorted((one for one in found if one.relative > 0), key=lambda one: one.name)
            return [[one.name, one.layer, one.role, one.qtype, min(one.relative, 1e9)] for one in kept]

        key = key_of("errors", artifact=artifact.identity, model=self._fingerprint)
        stage = f"{artifact.level}: errors of tensors"
        return [TensorError(*fact) for fact in self._known(key, stage, on_event, measure)]

    def speed(self, artifact: MeasuredFile, on_event: EventSink) -> Speed | None:
        """Tokens per second and memory in the runtime; None where nothing can run."""
        threads = self._threads

        def measure() -> Mapping[str, Any]:
            return asdict(measure_speed(artifact.path, threads=threads))

        if self.absent:
            return None
        try:
            key = key_of("speed", artifact=artifact.identity, threads=threads, machine=asdict(self._machine))
            return Speed(**self._known(key, f"{artifact.level}: speed", on_event, measure))
        except UnsupportedError as error:
            self._refused(artifact, error, on_event)
            return None

    def _refused(self, artifact: MeasuredFile, error: UnsupportedError, on_event: EventSink) -> None:
        """Say once why an artifact does not run. Raises what is no word about this artifact or its runtime."""
        if _asked_alone(artifact):
            note = f"{artifact.level} was not run: {error.what}; {error.remedy or error.found or ''}"
            self.notes += [note] if note not in self.notes else []
        elif isinstance(error, MissingExtraError):
            self._without_runtime(error, on_event)
        else:
            raise error

    def answers(self, artifact: MeasuredFile, on_event: EventSink) -> tuple[Answer, ...]:
        """What the artifact writes after each prompt, in the runtime; nothing where nothing can run."""

        def measure() -> list[Any]:
            found = check_generation(artifact.path, prompts=self._prompts, max_tokens=NEW_TOKENS, threads=self._threads)
            return [asdict(answer) for answer in found.answers]

        if self.absent or not self._prompts:
            return ()
        key = key_of("answers", artifact=artifact.identity, prompts=self._prompts, tokens=NEW_TOKENS)
        try:
            return tuple(Answer(**fact) for fact in self._known(key, f"{artifact.level}: write", on_event, measure))
        except UnsupportedError as error:
            self._refused(artifact, error, on_event)
            return ()

    def source_answers(self, on_event: EventSink) -> tuple[Answer, ...]:
        """What the source writes, in transformers, where it fits in memory twice over; otherwise nothing."""
        checkpoint, limit = self._source.checkpoint, memory_limit(self._max_ram)
        size = sum(header.file_size for header in checkpoint.headers)
        plain = {tensor.dtype for tensor in checkpoint.tensors.values()} <= {"F32", "F16", "BF16"}
        plain = plain and checkpoint.metadata is None and not checkpoint.adapters  # the directory is the model, that is
        if self.absent or not self._prompts or not plain or (limit is not None and 2 * size > limit):
            return ()

        def measure() -> list[Any]:
            from llm_quantize.calibration.tokens import TextTokenizer

            encode = TextTokenizer(self._source).encode
            found = source_answers(
                checkpoint.directory, encode, prompts=self._prompts, max_tokens=NEW_TOKENS, threads=self._threads
            )
            return [asdict(answer) for answer in found]

        key = key_of("source", model=self._fingerprint, prompts=self._prompts, tokens=NEW_TOKENS)
        return tuple(Answer(**fact) for fact in self._known(key, "source: write", on_event, measure))

    def _without_runtime(self, error: MissingExtraError, on_event: EventSink) -> None:
        self.absent = f"{error.what}; {error.remedy}"
        on_event(events.Caution(f"speed and samples are not measured: {self.absent}"))


def samples_of(answers: Sequence[Answer], own: Sequence[Answer] = ()) -> tuple[Sample, ...]:
    """The texts for the report, with a flag where one is worse than the source's ``own``; without those, none."""
    flags = {finding.prompt: finding.kind for finding in judge(answers, own)} if own and answers else {}
    return tuple(Sample(answer.prompt, answer.text, flags.get(answer.prompt, "")) for answer in answers)
