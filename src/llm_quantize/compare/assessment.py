"""``analyze quality``: one model and some artifacts, and everything this package can say of them.

model → text → divergence (streamed, and in the runtime) → errors of tensors → generated text → one result
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from llm_quantize import events, memory
from llm_quantize.advice.footprint import context_of
from llm_quantize.advice.machines import choices, needs_of, this_machine
from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.compare import effort
from llm_quantize.compare.bench import measured_file
from llm_quantize.errors import NumericPolicyError
from llm_quantize.evaluation.generation_check import Answer, GenerationCheck, check_generation, source_answers
from llm_quantize.evaluation.quality import ArtifactQuality, QualityResult, measure_quality
from llm_quantize.evaluation.tensor_errors import TensorLoss, tensor_errors
from llm_quantize.evaluation.texts import EvaluationText, evaluation_text
from llm_quantize.events import EventSink, ignore
from llm_quantize.measures import grades
from llm_quantize.measures.uncertainty import figure
from llm_quantize.models.opening import Source, open_source
from llm_quantize.options import PROMPTS, Options
from llm_quantize.reports.provenance import machine_facts, model_facts, program_versions
from llm_quantize.results import Tabled, json_ready
from llm_quantize.runtimes import artifact_at, runtime_for

if TYPE_CHECKING:
    from llm_quantize.reports.findings import ComparisonResult, ModelFacts

_LARGEST_ERROR = 1e9  # in a report, for a tensor of zeros that is not zeros any more


@dataclass(frozen=True, repr=False)
class Assessment(Tabled):
    """What artifacts lost. ``quality``: their divergences; ``tensors``: of each artifact the errors of its tensors, the
    worst first; ``generation``: what each wrote, empty where that was not asked for; both in the order of
    ``quality.artifacts``. ``comparison``: the same as data for a report."""

    columns = QualityResult.columns

    quality: QualityResult
    tensors: tuple[tuple[TensorLoss, ...], ...]
    generation: tuple[GenerationCheck, ...]
    comparison: ComparisonResult

    def to_dict(self) -> dict[str, Any]:
        """The same facts, JSON-ready."""
        written = self.quality.to_dict()
        for index, artifact in enumerate(written["artifacts"]):
            artifact["tensors"] = json_ready(self.tensors[index])
            artifact["generation"] = json_ready(self.generation[index].to_dict()) if self.generation else None
        return written

    def summary(self) -> dict[str, Any]:
        """As of ``quality``."""
        return self.quality.summary()

    def rows(self) -> list[dict[str, Any]]:
        """One for each artifact, as of ``quality``."""
        return self.quality.rows()

    def gate(self, max_kld: float | None) -> NumericPolicyError | None:
        """The error for what does not pass, or None: ``max_kld`` (None: no limit)."""
        return None if max_kld is None else self.quality.gate(max_kld)


def assess(
    model: str,
    artifacts: Sequence[str | Path],
    options: Options | None = None,
    *,
    revision: str | None = None,
    lora: Sequence[str] = (),
    commands: Sequence[str] = (),
    on_event: EventSink = ignore,
) -> Assessment:
    """Measure ``artifacts`` against ``model``. ``commands``: what a report shows to make it again.

    Raises what opening the model, reading the text, ``measure_quality``, ``tensor_errors`` and ``check_generation``
    raise.
    """
    options = options or Options()
    asked = options.measurement
    source = open_source(model, revision=revision, lora=lora, on_event=on_event)
    with source.checkpoint:
        text = evaluation_text(
            TextTokenizer(source),
            asked.texts,
            context=asked.context_of(source.architecture.hyper.context_length),
            limit=asked.windows,
            on_event=on_event,
        )
        importance = _importance(source, options.statistics)
        count, prompts = len(artifacts), len(PROMPTS) if asked.generate else 0
        errors, *_ = costs = effort.on_the_bench(source, count, prompts, runs=asked.generate)
        measured, compared, wrote = events.parts(
            on_event,
            [effort.measuring(source, text.windows, count), count * errors, sum(costs[2 * count :])],
        )
        measured(events.Stage("divergence"))
        quality = measure_quality(
            source,
            artifacts,
            text.windows,
            threads=options.threads,
            max_ram=options.max_ram,
            device=options.calibration.device,
            runtime=asked.runtime,
            texts=[Path(name).name for name in text.names],
            on_event=measured,
        )
        tensors = []
        for path, part in zip(artifacts, events.parts(compared, [1.0] * count), strict=True):
            part(events.Stage(f"errors of tensors in {Path(path).name}"))
            threads = quality.memory.threads
            with closing(open_decoded(source, path)) as decoded:
                losses = tensor_errors(source, decoded, importance=importance, threads=threads, on_event=part)
            tensors.append(tuple(losses))
        generation = _generation(source, artifacts, options, wrote) if asked.generate else ()
        facts = model_facts(source, model, on_event=on_event)
        comparison = _comparison(source, facts, text, quality, tensors, generation, commands, options)
    return Assessment(quality, tuple(tensors), generation, comparison)


def _importance(source: Source, file: Path | None) -> dict[str, npt.NDArray[Any]] | None:
    """{GGUF name: importance (matrices, columns)} of a file of either kind."""
    if file is None:
        return None
    from llm_quantize.calibration.choose import from_statistics
    from llm_quantize.io.imatrix_file import read_imatrix

    imatrix = from_statistics(file, source) if file.suffix == ".safetensors" else read_imatrix(file)
    rows = {output.name: imatrix.rows(output.name, output.shape) for output in source.tensors.outputs}
    return {name: values for name, values in rows.items() if values is not None}


def _generation(
    source: Source, artifacts: Sequence[str | Path], options: Options, on_event: EventSink
) -> tuple[GenerationCheck, ...]:
    checkpoint, limit = source.checkpoint, memory.memory_limit(options.max_ram)
    size = sum(header.file_size for header in checkpoint.headers)
    own: tuple[Answer, ...] = ()
    if limit is not None and 2 * size > limit - memory.resident_bytes():
        text = "the source does not fit in memory whole: what the artifacts write is judged without it"
        on_event(events.Caution(text))
    elif checkpoint.metadata is not None:
        text = "the source is a GGUF file, which transformers does not run: what artifacts write is judged without it"
        on_event(events.Caution(text))
    elif checkpoint.adapters:
        text = "the source is merged only while it is read: what artifacts write is judged without what it writes"
        on_event(events.Caution(text))
    else:
        on_event(events.Stage("text that the source writes"))
        encode = TextTokenizer(source).encode
        own = source_answers(checkpoint.directory, encode, threads=options.threads, on_event=on_event)
    return tuple(
        check_generation(path, reference=own, threads=options.threads, on_event=on_event) for path in artifacts
    )


def _comparison(
    source: Source,
    facts: ModelFacts,
    text: EvaluationText,
    quality: QualityResult,
    tensors: Sequence[Sequence[TensorLoss]],
    generation: Sequence[GenerationCheck],
    commands: Sequence[str],
    options: Options,
) -> ComparisonResult:
    from llm_quantize.reports.findings import ComparisonResult, Reference, TextFacts

    first = quality.artifacts[0].divergence
    here, cache = this_machine(), context_of(source)
    result = ComparisonResult(
        model=facts,
        text=TextFacts(quality.texts, quality.text_sha256, quality.context, quality.windows, quality.tokens),
        machine=replace(machine_facts("analyze quality measures no speed", options.threads), vram=here.vram),
        reference=Reference(
            perplexity=first.reference_perplexity,
            perplexity_sem=first.reference_perplexity_sem,
            bits_per_weight=8 * facts.size / max(1, facts.parameters),
            noise_floor=quality.noise.kld,
            samples=_samples(generation[0].reference) if generation else (),
        ),
        variants=tuple(
            replace(
                _variant(one, tensors[index], generation[index] if generation else None),
                needs=needs_of(source, Path(one.path), here, cache, None),
            )
            for index, one in enumerate(quality.artifacts)
        ),
        grades=grades.GRADES,
        versions=program_versions(),
        commands=tuple(commands),
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        notes=tuple(_notes(quality, generation)),
        cache=cache,
    )
    return replace(result, machines=choices(result))


def _samples(answers: Sequence[Any]) -> tuple[Any, ...]:
    from llm_quantize.reports.findings import Sample

    return tuple(Sample(answer.prompt, answer.text) for answer in answers)


def _variant(one: ArtifactQuality, losses: Sequence[TensorLoss], written: GenerationCheck | None) -> Any:
    from llm_quantize.reports.findings import TensorError, Variant

    file = measured_file(Path(one.path))
    return Variant(
        format=file.format,
        level=file.level,
        file=Path(one.path).name,
        size=one.size,
        bits_per_weight=file.bits_per_weight,
        quantize_cpu_seconds=None,
        divergence=one.divergence,
        grade=one.grade,
        tensor_errors=tuple(
            TensorError(loss.name, loss.layer, loss.role, loss.qtype, min(loss.relative, _LARGEST_ERROR))
            for loss in sorted(losses, key=lambda loss: loss.name)
            if loss.relative > 0
        ),
        samples=() if written is None else _samples(written.answers),
        runs_in=runtime_for(artifact_at(Path(one.path))).LABEL,
        path=one.path,
    )


def _notes(quality: QualityResult, generation: Sequence[GenerationCheck]) -> list[str]:
    notes = [f"{Path(one.path).name}: {note}" for one in quality.artifacts for note in one.notes]
    notes += [sentence for one in quality.artifacts for sentence in one.rounded_sentences]
    notes += [sentence for one in quality.artifacts if (sentence := runtime_sentence(one))]
    for one, check in zip(quality.artifacts, generation, strict=False):
        notes += [f"{Path(one.path).name}, after “{f.prompt}”: {f.text}" for f in check.findings]
    return notes


def runtime_sentence(one: ArtifactQuality) -> str:
    """What the runtime's figure says beside the streamed one; empty where it was not asked for."""
    real = one.runtime
    if real is None:
        return ""
    agree = "as its rounding of activations explains" if real.explained else "MORE than rounding explains"
    return (
        f"{Path(one.path).name} in {real.runtime}: KLD {real.divergence.kld:.6f}, "
        f"{figure(real.difference, real.difference_sem, 6, signed=True)} from the streamed "
        f"{one.divergence.kld:.6f}; the two are KLD {real.rounding.kld:.6f} apart, {agree}"
    )
