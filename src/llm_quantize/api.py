"""The library's functions as Python calls them: one for each command, the same words, and results to work with.

Each raises what its command ends with, an error of ``llm_quantize.errors``, and takes ``on_event``, a callable that
hears the typed events of ``llm_quantize.events``. Without one, a notebook shows progress; elsewhere only warnings are
told, to the logger ``llm_quantize``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_quantize.errors import UsageError
from llm_quantize.events import Event, EventSink, Generated
from llm_quantize.options import CalibrationOptions, Options
from llm_quantize.reports.listening import heard
from llm_quantize.results import Generation, ModelInfo, Results

if TYPE_CHECKING:
    from llm_quantize.advice.answer import Advice
    from llm_quantize.artifacts.result import ArtifactResult
    from llm_quantize.artifacts.verification import Verification
    from llm_quantize.calibration.outcome import Calibration
    from llm_quantize.compare.assessment import Assessment
    from llm_quantize.formats.recipe import Recipe
    from llm_quantize.plan import ArtifactPlan
    from llm_quantize.reports.findings import ComparisonResult


def info(
    model: str | Path,
    *,
    revision: str | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    on_event: EventSink | None = None,
) -> ModelInfo:
    """What ``model`` is, from its headers: architecture, parameters, tensors, tokenizer, memory.

    ``model``: a model directory, quantized or not, a GGUF file, a hub id at ``revision``, or builtin:demo-llama.
    ``lora``: adapters that are merged into it as it is read: directories or hub ids, with "=0.5" for half of one.

    Raises UsageError (no such model), MalformedInputError, UnsupportedError, AccessError, NetworkError.
    """
    from llm_quantize.advice.describe import describe

    with heard(on_event, "info") as sink:
        return ModelInfo(describe(str(model), revision=revision, lora=_adapters(lora), on_event=sink))


def plan(
    model: str | Path,
    format: str = "gguf",
    *,
    levels: str | Sequence[str],
    name: str | None = None,
    revision: str | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    options: Options | None = None,
    on_event: EventSink | None = None,
) -> Results[ArtifactPlan]:
    """The exact plan of each level, every byte of it, from headers alone: no weight is read and nothing is written.

    ``format``: gguf, gptq, awq, compressed-tensors or safetensors. ``levels``: one or more, as "Q4_K_M" or "4bit".
    ``name``: of the output, without level and suffix; None: the model's. ``lora``: as in ``info``.

    Raises UsageError and UnsupportedError for what cannot be made, and what opening the model raises (``info``).
    """
    from llm_quantize import pipeline

    with heard(on_event, "plan") as sink:
        asked = _several(levels)
        return Results(
            pipeline.plan(
                str(model),
                format,
                levels=asked,
                name=name,
                revision=revision,
                lora=_adapters(lora),
                options=options,
                on_event=sink,
            )
        )


def quantize(
    model: str | Path,
    format: str = "gguf",
    *,
    levels: str | Sequence[str],
    output_dir: str | Path = ".",
    name: str | None = None,
    revision: str | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    options: Options | None = None,
    on_event: EventSink | None = None,
) -> Results[ArtifactResult]:
    """Quantize ``model`` to every level in one read of the source; each artifact appears whole, under its final name.

    Arguments as in ``plan``. The same call after any interruption continues, and ends in the same bytes; what is
    finished already is left alone (``status`` "already complete").

    Raises UsageError and UnsupportedError before any work; MissingExtraError where a level needs calibration and torch
    is not installed; ResourceError (disk, memory); NumericPolicyError (NaN, infinite weights, a scale that overflows);
    BusyError (another process writes the same output); IntegrityError (the source changed meanwhile); StoppedError
    after a signal. What was done otherwise than asked is no error: ask ``degradations`` of each result.
    """
    from llm_quantize import pipeline

    with heard(on_event, "quantize") as sink:
        found = pipeline.quantize(
            str(model),
            format,
            levels=_several(levels),
            output_dir=output_dir,
            name=name,
            revision=revision,
            lora=_adapters(lora),
            options=options,
            on_event=sink,
        )
    return Results(found)


def fit(
    model: str | Path,
    format: str = "gguf",
    *,
    size: int,
    context: int | None = None,
    kv: str | None = None,
    exact: bool = False,
    revision: str | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    options: Options | None = None,
    on_event: EventSink | None = None,
) -> Recipe:
    """The types with which an artifact of ``model`` loses least in ``size`` bytes; the command is `quantize --fit`.

    ``format``: gguf or compressed-tensors. ``context``: tokens of a cache that must fit too, in the type ``kv`` (None:
    16 bits), with what the runtime takes. ``exact``: what each tensor loses is measured, not told by gradients.
    ``options``: the text, the importance and the memory; those that the artifact will be made with. To be used as
    `quantize(model, levels=recipe.level, options=Options(overrides=Overrides(recipe=recipe)))`.

    Raises ResourceError where nothing fits, naming the smallest artifact; UsageError for what contradicts a size;
    MissingExtraError without torch; StoppedError after a signal: the same call goes on.
    """
    from llm_quantize.advice import fit as fitting

    with heard(on_event, "fit") as sink:
        return fitting.fit(
            str(model),
            format,
            size,
            context=context,
            kv=kv,
            exact=exact,
            revision=revision,
            lora=_adapters(lora),
            options=options,
            on_event=sink,
        )


def recipe_from(file: str | Path, *, revision: str | None = None, on_event: EventSink | None = None) -> Recipe:
    """The types of the tensors of ``file``, for another model of the same architecture and as many blocks; the command
    is `info FILE --recipe`.

    ``file``: a GGUF file (of a split one its directory or any part), or one of the hub, ORG/NAME:FILE at ``revision``:
    a recipe for gguf. Or a model directory of integers: a recipe for compressed-tensors. Reads headers only.

    Raises UsageError (no such file, types that are not written here), MalformedInputError, UnsupportedError,
    AccessError, NetworkError.
    """
    from llm_quantize.models import recipes

    with heard(on_event, "info") as sink:
        return recipes.recipe_from(file, revision=revision, on_event=sink)


def verify(
    artifact: str | Path,
    *,
    source: str | Path | None = None,
    revision: str | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    rederive: bool = False,
    calibration_data: Sequence[str | Path] = (),
    imatrix: str | Path | None = None,
    statistics: str | Path | None = None,
    attest: str | Path | None = None,
    against: str | Path | None = None,
    threads: int | None = None,
    max_ram: int | None = None,
    on_event: EventSink | None = None,
) -> Verification:
    """Check every tensor of ``artifact``: structure, the hashes of its manifest, finite values, and with ``source``
    (the model it was made from, at ``revision``) the error against it.

    ``artifact``: a GGUF file, the directory of a split one, or a model directory, also of other tools. What is wrong is
    in the result (``ok``, ``all_problems``, ``raise_on_problems``).

    ``rederive``: make one of ours again from what its manifest records, and compare every byte (``rederived`` of the
    result). Its source is ``source``, else the hub's commit or built-in model that it was made from; the user's files
    that it was made with are given again: texts (``calibration_data``), ``imatrix``, ``statistics``. ``threads`` and
    ``max_ram`` (bytes) bound that.
    ``attest``: a file to write, an in-toto statement of what was found. ``against``: such a file, whose hashes the
    artifact's files are held against.

    Raises UsageError or MalformedInputError where the artifact cannot be read at all, and what opening ``source``
    raises; with ``rederive`` UnsupportedError where nothing is recorded, and what ``quantize`` raises.
    """
    from llm_quantize.made import Given
    from llm_quantize.provenance.check import check

    given = Given(tuple(map(str, calibration_data)), _path(imatrix), _path(statistics))
    with heard(on_event, "verify") as sink:
        return check(
            artifact,
            source=None if source is None else str(source),
            revision=revision,
            lora=_adapters(lora),
            rederive=rederive,
            given=given,
            attest=_path(attest),
            against=_path(against),
            threads=threads,
            max_ram=max_ram,
            on_event=sink,
        )


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def evaluate(
    artifacts: str | Path | Sequence[str | Path],
    *,
    source: str | Path,
    options: Options | None = None,
    revision: str | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    on_event: EventSink | None = None,
) -> Assessment:
    """Measure what ``artifacts`` lost against ``source``: KL divergence (nats per token), perplexity, agreement on the
    likeliest token, the error of every tensor. The command is `analyze quality`.

    All artifacts see the same tokens. The text, the length and number of windows, a real runtime, and whether the
    artifacts shall write, are in ``options.measurement``. ``rows`` of the result has one row for each artifact. Takes
    one decoder block of each model in memory at a time.

    Raises MissingExtraError without torch; UsageError (no artifact, text shorter than a window); IntegrityError
    (another model's artifact); ResourceError before any work; NumericPolicyError (values that are not finite).
    """
    from llm_quantize.compare.assessment import assess

    with heard(on_event, "measure") as sink:
        paths = [artifacts] if isinstance(artifacts, str | Path) else list(artifacts)
        return assess(str(source), paths, options, revision=revision, lora=_adapters(lora), on_event=sink)


def convert(
    model: str | Path,
    format: str,
    level: str | None = None,
    *,
    output_dir: str | Path = ".",
    name: str | None = None,
    revision: str | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    options: Options | None = None,
    measure: bool = False,
    on_event: EventSink | None = None,
) -> ArtifactResult:
    """``model``, quantized or not, in another format, its codes and scales as they are where the format holds them.

    ``level`` None: the one that holds what the source has. ``lora``: as in ``info``; tensors that no adapter changes
    keep their codes. ``conversion`` of the result is the verdict: "exact" (the artifact decodes to the source's values,
    which was looked at), "rounded", or "re-quantized" (with ``options.method.method`` "gptq"), with how many tensors
    and weights are which, and the largest relative error; of each tensor the manifest says it. ``options.exact``: what
    is not exact is refused, or removed. ``measure``: the KL divergence against the source too (it needs torch and
    transformers), kept in the manifest.

    Raises as ``quantize``; UsageError where no level holds the source and none is named; UnsupportedError (exit code 4)
    and NumericPolicyError (9) where ``options.exact`` cannot be kept.
    """
    from llm_quantize import conversion

    with heard(on_event, "quantize") as sink:
        return conversion.convert(
            str(model),
            format,
            level,
            output_dir=output_dir,
            name=name,
            revision=revision,
            lora=_adapters(lora),
            options=options,
            measure=measure,
            on_event=sink,
        )


def compare(
    model: str | Path,
    output_dir: str | Path = "report",
    *,
    variants: str | Sequence[str] = (),
    artifacts: Sequence[str | Path] = (),
    lang: str = "en",
    options: Options | None = None,
    revision: str | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    on_event: EventSink | None = None,
) -> ComparisonResult:
    """Make ``variants`` of ``model``, take ``artifacts`` as they are, measure loss, size, speed and memory of them all,
    and write index.html, comparison.md and comparison.json into ``output_dir``.

    ``variants``: such as "gguf:Q4_K_M" or "gptq:4bit"; without a format it is a GGUF level; neither variants nor
    artifacts: Q8_0 to Q2_K. They stay in ``output_dir``/artifacts. ``lang``: of the page, "en" or "ja". ``rows`` of the
    result has one row for each variant.

    Raises as ``quantize`` and ``evaluate``, and UsageError for an artifact that is given twice.
    """
    from llm_quantize.compare import comparison

    with heard(on_event, "quantize") as sink:
        result = comparison.compare(
            str(model),
            output_dir,
            variants=[one for text in _several(variants) for one in comparison.parse_variants(text)],
            artifacts=artifacts,
            options=options,
            revision=revision,
            lora=_adapters(lora),
            on_event=sink,
        )
    comparison.write_reports(result, Path(output_dir), lang)
    return result


def recommend(
    model: str | Path,
    *,
    ram: int | None = None,
    vram: int | None = None,
    gpu: str | None = None,
    device: str = "auto",
    runtime: str | None = None,
    context: int | None = None,
    priority: str = "quality",
    measured: str | Path | None = None,
    revision: str | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    on_event: EventSink | None = None,
) -> Advice:
    """Which runtime, format and level of ``model`` to take for a machine, and why; reads headers only.

    ``ram`` and ``vram``: bytes of the computer and of its GPU, None: this one's. ``gpu``: its name ("RTX 4090") or its
    compute capability ("8.9"). ``device``: auto, cpu, cuda or apple. ``runtime``: llama.cpp, vllm, transformers,
    ctranslate2 or mlx; None: what is usual for the machine, with the answers of the others in ``others``.
    ``context``: tokens of the cache, None: 8192, or what the model was made for. ``priority``: quality, speed or size.
    ``measured``: a comparison.json of this model; None: report/comparison.json, if there is one of it. ``lora``: as
    ``quantize`` takes it. ``take`` of the result is None where nothing fits.

    Raises UsageError for settings that contradict each other, and what opening the model raises (``info``).
    """
    from llm_quantize.advice import recommend as advice
    from llm_quantize.advice.experience import experience_of
    from llm_quantize.advice.machine import detect
    from llm_quantize.models.opening import open_source

    machine = detect(device, ram=ram, vram=vram, gpu=gpu)
    with heard(on_event, "recommend") as sink:
        source = open_source(str(model), revision=revision, lora=_adapters(lora), on_event=sink, headers_only=True)
        with source.checkpoint:
            return advice.recommend(
                source,
                machine,
                model=str(model),
                revision=revision,
                lora=_adapters(lora),
                context=context,
                priority=priority,
                experience=experience_of(source, None if measured is None else Path(measured), sink),
                runtime=runtime,
            )


def calibrate(
    model: str | Path,
    output: str | Path | None = None,
    *,
    format: str | None = None,
    options: CalibrationOptions | None = None,
    revision: str | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    on_event: EventSink | None = None,
) -> Calibration:
    """Run text through ``model``, one block in memory at a time, and keep how much each input channel matters. The
    command is `analyze importance`.

    The statistics are kept under the hashes of model and text, reused by every later run, and lie at ``path`` of the
    result, for ``Options(statistics=...)``. ``output``: also write them there, as ``format``: "imatrix" (llama.cpp's),
    "dat" (its older form), "json" (a summary), "statistics" (our own), "svg" (a picture of how many tokens each expert
    saw); None: by the suffix.

    Raises MissingExtraError without torch; ResourceError before any work; NumericPolicyError (an activation that is not
    finite); StoppedError after a signal; what reading the text raises.
    """
    from llm_quantize.calibration import collect
    from llm_quantize.calibration.outcome import KINDS, kind_of, refuse_export
    from llm_quantize.models.opening import open_source
    from llm_quantize.reports.experts import export

    options = options or CalibrationOptions()
    target = None if output is None else Path(output)
    kind = format or ("" if target is None else kind_of(target))
    if format is not None and format not in KINDS:
        raise UsageError("no such format of statistics", expected=", ".join(KINDS), found=format)
    with heard(on_event, "calibrate") as sink:
        source = open_source(str(model), revision=revision, lora=_adapters(lora), on_event=sink)
        with source.checkpoint:
            if target is not None:
                read: list[str | Path] = [header.path for header in source.checkpoint.headers]
                inputs: list[str | Path] = [*read, *source.checkpoint.directory.glob("*.json"), *options.data]
                refuse_export(source, target, kind, options.collect, inputs)
            result = collect.calibrate(source, options, on_event=sink)
            if target is not None:
                export(result, source, target, kind)
    return result


def run(
    artifact: str | Path,
    prompt: str,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
    context: int | None = None,
    gpu_layers: int = 0,
    threads: int | None = None,
    runtime: str | None = None,
    revision: str | None = None,
    on_text: Callable[[str], object] | None = None,
    on_event: EventSink | None = None,
) -> Generation:
    """The text that ``artifact`` writes after ``prompt`` in its real runtime: GGUF in llama.cpp, a model directory in
    transformers or vLLM (``runtime``). A hub id is fetched first (``revision``); ``ORG/NAME:Q4_K_M`` names one of its
    GGUF files.

    ``temperature`` 0 takes the likeliest token, else one is drawn with ``seed``, from the likeliest that together have
    the share ``top_p``. ``chat``: the prompt is a message, set in the model's own template; ``system``: one before it.
    ``context``: tokens of prompt and answer at most, None: what they need. ``gpu_layers``: how many a GPU computes.
    ``threads`` None: as many as there are idle CPUs. ``on_text`` hears each piece as it comes.

    Raises MissingExtraError where the runtime is not installed; UsageError (no such artifact, an empty prompt, a
    runtime for other artifacts, a setting without effect); UnsupportedError (the runtime cannot load it, there is no
    template).
    """
    from llm_quantize.runtimes import generate

    pieces: list[str] = []
    written: list[Generated] = []
    with heard(on_event, "run") as sink:

        def hear(event: Event) -> None:
            if isinstance(event, Generated):
                written.append(event)
            sink(event)

        for piece in generate(
            artifact,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            chat=chat or system is not None,
            system=system,
            context=context,
            gpu_layers=gpu_layers,
            threads=threads,
            runtime=runtime,
            revision=revision,
            on_event=hear,
        ):
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)
    (told,) = written
    return Generation(str(artifact), prompt, "".join(pieces), told.tokens, told.seconds, told.threads)


def _several(names: str | Sequence[str]) -> list[str]:
    """A list, also of a single name: a text is a sequence too, of letters."""
    return [names] if isinstance(names, str) else list(names)


def _adapters(lora: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """The adapters as the command line names them, also a single one."""
    return (str(lora),) if isinstance(lora, str | Path) else tuple(map(str, lora))
