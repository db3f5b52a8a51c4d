"""``compare``: variants of one model, made or taken, each measured, and one report of them all.

    model → quantize (one source read) → divergence of all variants in one streamed pass → errors of tensors → speed
    and generated text in the runtime → index.html, comparison.md, comparison.json

Everything that takes long is kept in the output directory as soon as it is known (``artifacts/`` and
``measured.json``), so that the same call after an interruption continues.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from llm_quantize import events
from llm_quantize.advice.footprint import context_of
from llm_quantize.advice.machines import choices, needs_of, this_machine
from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.artifacts.preflight import refuse_unwritable
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.compare import effort
from llm_quantize.compare.bench import Bench, MeasuredFile, measured_file, refuse_twice, samples_of, with_labels
from llm_quantize.compare.making import make_words
from llm_quantize.compare.measurements import Measurements, key_of
from llm_quantize.compare.notes import importance_notes, inputs_notes, speed_notes
from llm_quantize.errors import MissingExtraError, UsageError
from llm_quantize.evaluation.texts import BUILT_IN, EvaluationText, evaluation_text
from llm_quantize.events import EventSink, ignore
from llm_quantize.io.artifact_paths import manifest_path, remove_artifact
from llm_quantize.io.durable import fail_os, make_directory
from llm_quantize.io.whole_file import refuse_existing
from llm_quantize.measures import grades
from llm_quantize.measures.divergence import Divergence
from llm_quantize.measures.perplexity import Tokens
from llm_quantize.models.opening import Source, open_source
from llm_quantize.options import Options
from llm_quantize.reports.findings import (
    ComparisonResult,
    ModelFacts,
    Reference,
    Sample,
    TextFacts,
    Variant,
    divergence_from_dict,
    divergence_to_dict,
)
from llm_quantize.reports.provenance import machine_facts, model_facts, program_versions
from llm_quantize.runtimes import artifact_at, runtime_for

DEFAULT_VARIANTS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
REPORTS = {"json": "comparison.json", "html": "index.html", "markdown": "comparison.md"}
_NO_SPEED = "none of these ran in its runtime"


def parse_variants(text: str) -> list[tuple[str, str]]:
    """(format, level) of each part of ``gguf:Q8_0,gguf:Q4_K_M``; a part without a colon is a GGUF level.

    Raises UsageError for an empty part.
    """
    found = []
    for part in text.split(","):
        format, colon, level = part.strip().rpartition(":")
        if not level.strip() or (colon and not format.strip()):
            raise UsageError(
                "a variant has no name", expected="FORMAT:LEVEL,..., for example gguf:Q8_0,gguf:Q4_K_M", found=text
            )
        found.append((format.strip().lower() or "gguf", level.strip()))
    return list(dict.fromkeys(found))


def compare(
    model: str,
    output_dir: str | Path,
    *,
    variants: Sequence[tuple[str, str]] = (),
    artifacts: Sequence[str | Path] = (),
    options: Options | None = None,
    revision: str | None = None,
    lora: Sequence[str] = (),
    commands: Sequence[str] = (),
    on_event: EventSink = ignore,
) -> ComparisonResult:
    """Make ``variants`` of ``model`` in ``output_dir``/artifacts, take ``artifacts`` that exist, measure them all.

    Neither given: DEFAULT_VARIANTS. Speed and samples are left out, and the result says why, where the runtime is not
    installed. ``commands``: what the report shows to make it again. ``on_event`` hears the events of
    ``pipeline.quantize`` and of ``measure_quality``, and stages.

    Raises UsageError (an artifact twice, text shorter than a window), MissingExtraError without torch, and what
    ``pipeline.quantize``, ``measure_quality`` and ``measure_speed`` raise.
    """
    options = options or Options()
    asked = options.measurement
    folder = Path(output_dir)
    _refuse_folder(folder)
    kept = Measurements(folder / "measured.json")
    if not variants and not artifacts:
        variants = [("gguf", level) for level in DEFAULT_VARIANTS]
    for module in ("torch", "transformers"):
        if find_spec(module) is None:
            raise MissingExtraError("Measuring quality", "torch")
    # What cannot be measured is refused before hours of quantizing, not after.
    taken = [measured_file(Path(path)) for path in artifacts]
    source = open_source(model, revision=revision, lora=lora, on_event=on_event)
    with source.checkpoint:
        for artifact in taken:
            open_decoded(source, artifact.path).close()
        tokenizer = TextTokenizer(source)
        _refuse_unmeasurable(source, tokenizer, options)
        text = evaluation_text(
            tokenizer,
            asked.texts,
            context=asked.context_of(source.architecture.hyper.context_length),
            limit=asked.windows,
            on_event=on_event,
        )
        levels = {format: [level for other, level in variants if other == format] for format, _ in variants}
        told, *makes, measured, benched = _parts(source, levels, len(taken), text, options, on_event)
        facts = model_facts(source, model, on_event=told)
        made = _make(model, folder / "artifacts", levels, options, (revision, lora), kept, makes)
        found = made + taken
        refuse_twice(found)
        words = [
            make_words(
                one.format, one.asked or one.level, options, revision, lora=lora, weighed=one.importance is not None
            )
            for one in made
        ] + [None] * len(taken)
        found = with_labels(found)
        quality = _quality(source, facts.fingerprint, found, text, options, kept, folder, measured)
        bench = Bench(
            source,
            kept,
            fingerprint=facts.fingerprint,
            prompts=asked.prompts,
            speed=asked.speed,
            threads=options.threads,
            max_ram=options.max_ram,
        )
        bench_costs = effort.on_the_bench(source, len(found), len(asked.prompts), runs=asked.speed)
        rows, own = _on_the_bench(bench, found, quality, kept, words, events.parts(benched, bench_costs))
        here, cache = this_machine(), context_of(source)
        rows = tuple(
            replace(row, needs=needs_of(source, one.path, here, cache, row.speed))
            for row, one in zip(rows, found, strict=True)
        )
    notes = (*quality.notes, *inputs_notes(found), *importance_notes(found), *speed_notes(rows), *bench.notes)
    result = _result(facts, text, replace(quality, notes=notes), rows, own, bench.absent, options, commands)
    result = replace(result, machine=replace(result.machine, vram=here.vram), cache=cache)
    return replace(result, machines=choices(result))


def _parts(
    source: Source,
    levels: Mapping[str, Sequence[str]],
    taken: int,
    text: EvaluationText,
    options: Options,
    on_event: EventSink,
) -> list[events.Part]:
    """A sink for each part of the run: telling which model it is, making each format, measuring, and the bench."""
    count, asked = sum(map(len, levels.values())) + taken, options.measurement
    makes = [effort.making(source, format, wanted, options) for format, wanted in levels.items()]
    bench = effort.on_the_bench(source, count, len(asked.prompts), runs=asked.speed)
    measure = effort.measuring(source, text.windows, count)
    return events.parts(on_event, [effort.telling(source), *makes, measure, sum(bench)])


def _on_the_bench(
    bench: Bench,
    found: Sequence[MeasuredFile],
    quality: _Quality,
    kept: Measurements,
    words: Sequence[tuple[str, ...] | None],
    parts: Sequence[EventSink],
) -> tuple[tuple[Variant, ...], tuple[Sample, ...]]:
    """Every variant with all its figures, and what the source writes."""
    sinks = iter(parts)  # in the order of effort.on_the_bench
    errors = [bench.tensor_errors(artifact, next(sinks)) for artifact in found]
    speeds = [bench.speed(artifact, next(sinks)) for artifact in found]
    own = bench.source_answers(next(sinks))
    rows = tuple(
        Variant(
            format=artifact.format,
            level=artifact.level,
            file=artifact.path.name,
            size=artifact.size,
            bits_per_weight=artifact.bits_per_weight,
            quantize_cpu_seconds=kept.get(key_of("cpu", artifact=artifact.identity)),
            divergence=divergence,
            grade=grades.grade(divergence.kld),
            speed=speed,
            tensor_errors=tuple(tensors),
            samples=samples_of(bench.answers(artifact, next(sinks)), own),
            runs_in=runtime_for(artifact_at(artifact.path)).LABEL,
            make=make,
            path=str(artifact.path),
        )
        for artifact, divergence, speed, tensors, make in zip(
            found, quality.divergences, speeds, errors, words, strict=True
        )
    )
    return rows, samples_of(own)


def _result(
    model: ModelFacts,
    text: EvaluationText,
    quality: _Quality,
    rows: tuple[Variant, ...],
    own: tuple[Sample, ...],
    absent: str,
    options: Options,
    commands: Sequence[str],
) -> ComparisonResult:
    measured = next((row.speed.runtime for row in rows if row.speed is not None), absent or _NO_SPEED)
    first = quality.divergences[0]
    return ComparisonResult(
        model=model,
        text=TextFacts(
            names=tuple(name if name == BUILT_IN else Path(name).name for name in text.names),
            sha256=_sha256(text.windows),
            context=int(text.windows.shape[1]),
            windows=len(text.windows),
            tokens=first.tokens,
        ),
        machine=machine_facts(measured, options.threads),
        reference=Reference(
            perplexity=first.reference_perplexity,
            perplexity_sem=first.reference_perplexity_sem,
            bits_per_weight=8 * model.size / max(1, model.parameters),
            noise_floor=quality.noise_floor,
            samples=own,
        ),
        variants=rows,
        grades=grades.GRADES,
        versions=program_versions(),
        commands=tuple(commands),
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        notes=quality.notes,
    )


def _refuse_unmeasurable(source: Source, tokenizer: TextTokenizer, options: Options) -> None:
    from llm_quantize.streams.network import require_device

    require_device(options.calibration.device)
    longest = source.architecture.hyper.context_length
    if options.measurement.context is not None and options.measurement.context > longest:
        raise UsageError(
            "the windows are longer than the model's context",
            expected=f"at most {longest} tokens",
            found=options.measurement.context,
            remedy="give a smaller --context",
        )
    for prompt in options.measurement.prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise UsageError("a prompt is not UTF-8", found=repr(prompt), remedy="give --prompt as UTF-8")
        if not tokenizer.encode(prompt):
            raise UsageError("a prompt has no tokens", found=repr(prompt), remedy="give --prompt some text")


def _refuse_folder(folder: Path) -> None:
    """Raise AccessError where the reports could not be written after all the work, UsageError where they would take
    the place of pages that are not a comparison's."""
    refuse_unwritable(folder / "artifacts")
    stand = [name for name in REPORTS.values() if refuse_existing(folder / name, replace=True)]
    if stand and REPORTS["json"] not in stand:
        raise UsageError(
            "the output directory holds a file that is not of a comparison",
            file=folder / stand[0],
            remedy="choose another directory with -o, or move the file away",
        )


def write_reports(result: ComparisonResult, folder: Path, lang: str = "en") -> dict[str, Path]:
    """Write index.html, comparison.md and comparison.json into ``folder``; gives {"html", "markdown", "json"}.

    Raises UsageError for an unknown language, AccessError or ResourceError where a file cannot be written.
    """
    from llm_quantize.reports.markdown import markdown
    from llm_quantize.reports.page import page, write_text

    facts = json.dumps(result.to_dict(), ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    texts = {"json": facts, "html": page(result, lang), "markdown": markdown(result, lang)}
    return {kind: write_text(folder / REPORTS[kind], text) for kind, text in texts.items()}


def remove_made(folder: Path, result: ComparisonResult, taken: Sequence[str | Path] = ()) -> None:
    """Remove what ``compare`` made of ``result`` besides the reports: its artifacts with their manifests, and what was
    kept to continue. ``taken`` artifacts and all other files stay. Raises AccessError or ResourceError."""
    Measurements(folder / "measured.json").remove()
    places, kept = folder / "artifacts", {Path(path).resolve() for path in taken}
    try:
        for path in [places / variant.file for variant in result.variants]:
            if path.resolve() in kept or path.is_symlink():
                continue
            if path.is_dir():
                remove_artifact(path)
            elif path.is_file():
                manifest_path(path).unlink(missing_ok=True)
                path.unlink()
        if places.is_dir() and not places.is_symlink() and not any(places.iterdir()):
            places.rmdir()
    except OSError as error:
        fail_os(error, "an artifact cannot be removed", places)


def _sha256(windows: Tokens) -> str:
    return hashlib.sha256(np.ascontiguousarray(windows).astype("<i4").tobytes()).hexdigest()


def _make(
    model: str,
    folder: Path,
    levels: Mapping[str, Sequence[str]],
    options: Options,
    opened: tuple[str | None, Sequence[str]],
    kept: Measurements,
    sinks: Sequence[EventSink],
) -> list[MeasuredFile]:
    """Quantize to every level of each format in one read of the source; what is there already is reused.
    ``opened``: revision and adapters of the source."""
    from llm_quantize.pipeline import quantize

    found: list[MeasuredFile] = []
    for (format, wanted), on_event in zip(levels.items(), sinks, strict=True):
        results = quantize(
            model,
            format,
            levels=wanted,
            output_dir=folder,
            revision=opened[0],
            lora=opened[1],
            options=options,
            on_event=on_event,
        )
        names = wanted if len(wanted) == len(results) else [result.level for result in results]
        for asked, result in zip(names, results, strict=True):
            # What a directory says of its weights is not what made it: W8A8 rounds them as W8A16 does.
            label = asked if result.level.startswith(asked) else result.level
            artifact = replace(measured_file(result.path), level=label, asked=asked)
            if result.status == "written" and not result.resumed_units:
                kept.put(key_of("cpu", artifact=artifact.identity), result.seconds)
            found.append(artifact)
    return found


@dataclass(frozen=True)
class _Quality:
    """``divergences`` in the order of the artifacts; ``notes``: where their metadata differ from the source's."""

    divergences: tuple[Divergence, ...]
    noise_floor: float
    notes: tuple[str, ...]


_INPUTS = "rounded where the runtime rounds them"
"""What a figure is of, in its key: those of weights alone were kept before."""
_ERRORS = "clustered by window"
"""What its standard errors are of: those of tokens were kept before, without acceptance."""


def _quality(
    source: Source,
    fingerprint: str,
    found: Sequence[MeasuredFile],
    text: EvaluationText,
    options: Options,
    kept: Measurements,
    folder: Path,
    on_event: EventSink,
) -> _Quality:
    """Divergences of all artifacts, those that are not known yet in one streamed pass."""
    from llm_quantize.evaluation.quality import measure_quality

    about = {"model": fingerprint, "text": _sha256(text.windows), "inputs": _INPUTS, "errors": _ERRORS}
    keys = [key_of("quality", artifact=artifact.identity, **about) for artifact in found]
    floor = key_of("noise", **about)
    missing = [index for index, key in enumerate(keys) if kept.get(key) is None or kept.get(floor) is None]
    if missing:
        on_event(events.Stage("measure"))
        make_directory(folder)
        measured = measure_quality(
            source,
            [found[index].path for index in missing],
            text.windows,
            threads=options.threads,
            max_ram=options.max_ram,
            device=options.calibration.device,
            texts=text.names,
            scratch=folder,
            on_event=on_event,
        )
        kept.put(floor, measured.noise.kld)
        for index, one in zip(missing, measured.artifacts, strict=True):
            notes = [f"{Path(one.path).name}: {note}" for note in one.notes]
            notes += one.rounded_sentences
            kept.put(keys[index], {"divergence": divergence_to_dict(one.divergence), "notes": notes})
    facts = [kept.get(key) for key in keys]
    return _Quality(
        divergences=tuple(divergence_from_dict(fact["divergence"]) for fact in facts),
        noise_floor=kept.get(floor),
        notes=tuple(note for fact in facts for note in fact["notes"]),
    )
