"""A model put into another format, as far as may be with its very numbers, and what became of them.

The way is the pipeline's own; here is what is asked of it: the level that holds the source, its own groups and zero
points, codes kept where they can be, and every tensor held against the source's (artifacts/verdict.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_quantize import events, pipeline
from llm_quantize.artifacts.manifest import manifest_bytes, read_manifest
from llm_quantize.artifacts.result import ArtifactResult
from llm_quantize.artifacts.verdict import EXACT, MEASURED, REQUANTIZED, ROUNDED
from llm_quantize.calibration import choose
from llm_quantize.compare.assessment import assess
from llm_quantize.errors import IntegrityError, MalformedInputError, NumericPolicyError, UnsupportedError, UsageError
from llm_quantize.events import EventSink, ignore
from llm_quantize.formats.base import scheme_of
from llm_quantize.formats.keeping import PLAIN, holding_of, is_act_order
from llm_quantize.formats.table import ACT_ORDER, FORMATS, format_name
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.io.whole_file import write_file
from llm_quantize.models.opening import Source, open_source
from llm_quantize.options import Options
from llm_quantize.plan import ArtifactPlan
from llm_quantize.qtypes.holding import CODES, NEVER, SURELY
from llm_quantize.results import Shown, json_ready

KEEP = "keep"
"""The method that is meant where the user names none."""

_FLOATS = frozenset(PLAIN)


@dataclass(frozen=True, repr=False)
class Foreseen(Shown):
    """A conversion before it is made. ``plan``: every byte of it. ``verdict``: what will be said of it at best, for
    what types alone tell: a scale that its type does not hold is found out only by looking. ``tensors``: {name: the
    same of each}, matrices by their modules. ``never``: the names of those that certainly are not exact."""

    plan: ArtifactPlan
    verdict: str
    tensors: dict[str, str]
    never: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Format, level, size, and the verdict."""
        facts = {"format": self.plan.format, "level": self.plan.level, "size": self.plan.size}
        return {**facts, "verdict": self.verdict, "not_exact": len(self.never)}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**self.plan.to_dict(), "verdict": self.verdict, "verdicts": self.tensors}


def foresee(
    model: str,
    format: str,
    level: str | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    lora: Sequence[str] = (),
    options: Options | None = None,
    on_event: EventSink = ignore,
) -> Foreseen:
    """What ``convert`` would make, from headers alone; nothing is written. Raises as ``convert`` before its work."""
    source = open_source(model, revision=revision, lora=lora, on_event=on_event, headers_only=True)
    with source.checkpoint:
        name = bare_name(source) if name is None else name
        return _foreseen(source, format_name(format), level, name, options or Options())


def _foreseen(source: Source, format: str, level: str | None, name: str | None, options: Options) -> Foreseen:
    level, options = settled(source, format, level, options)
    importance = choose.foresee(source, format, [level], options)
    (plan,) = pipeline.plan_source(source, format, levels=[level], name=name, options=options, importance=importance)
    keeps, method = options.method.method_of(format).keeps, options.method.method_of(format)
    told, never, act_order = {}, [], FORMATS[format].act_order
    wide = "scheme" in plan.identity and scheme_of(plan).qtype.scale == "float32"
    for matrix in plan.matrices:
        held = NEVER
        if keeps:
            held = holding_of(source, matrix.weight, matrix.qtype, wide=wide, act_order=act_order)
        word = REQUANTIZED if method.reads_text and matrix.seen else ROUNDED
        told[matrix.name] = EXACT if held == SURELY else word
        if held in (NEVER, CODES):
            never.append(matrix.name)
    for index in plan.rounded():
        tensor = plan.tensors[index]
        types = {source.checkpoint.tensors[piece.source].dtype.lower() for piece in tensor.output.pieces}
        # Floats may fit narrower ones, as norms in float32 do that were trained in bfloat16; products hardly ever do.
        exact = tensor.qtype in _FLOATS and (tensor.qtype == "f32" or types <= {*_FLOATS, "f64"})
        if tensor.output.pieces:
            told[tensor.name] = EXACT if exact else ROUNDED
            if tensor.qtype not in _FLOATS:
                never.append(tensor.name)
    words = set(told.values())
    verdict = next((word for word in (REQUANTIZED, ROUNDED) if word in words), EXACT)
    return Foreseen(plan, verdict, told, tuple(never))


def bare_name(source: Source) -> str | None:
    """What conversions of ``source`` are called: the name that it has without its level, where its own manifest or what
    it stores says which level that is; None where it has no other name than its own."""
    own, *adapters = (name.rsplit("/", 1)[-1] for name in source.names)
    try:
        manifest = read_manifest(manifest_path(source.checkpoint.directory)) or {}
    except (IntegrityError, MalformedInputError):  # a stranger's, or another tool's: it says nothing
        manifest = {}
    made = manifest.get("made")
    if isinstance(made, dict) and own == f"{made.get('name')}-{manifest.get('level')}":
        return "-".join([str(made["name"]), *adapters])
    labels = {label for form in FORMATS.values() for label in form.labels(source)}
    ends = (f"-{label}" for label in sorted(labels, key=len, reverse=True))
    found = next((own.removesuffix(end) for end in ends if own.endswith(end) and own != end), None)
    return None if found is None else "-".join([found, *adapters])


def settled(source: Source, format: str, level: str | None, options: Options) -> tuple[str, Options]:
    """The level and the options of a conversion: the source's own groups, zero points and unquantized modules where the
    user asks for nothing else. Raises UsageError where no level is named and none holds what the source has."""
    method = options.method if options.method.method is not None else replace(options.method, method=KEEP)
    options = replace(options, method=method, judged=True)
    form = FORMATS[format]
    kept = form.keeping(source, level, options)
    if kept is not None and kept.weights:
        return kept.level, kept.options
    if level is None:
        name, kind, order = source.checkpoint.name, source.checkpoint.kind or "not quantized", _order_of(source, format)
        raise UsageError(
            f"no level of {format} holds this model as it is, so one must be named",
            expected=", ".join(form.levels),
            found=f"{name}, {kind}, act-order: {order}" if order else f"{name}, {kind}",
            remedy=f"name the level to round it to, for example -q {form.example}",
        )
    return level, options if kept is None else kept.options


def _order_of(source: Source, format: str) -> str:
    """What stands in the way, where act-order is why ``format`` does not hold what ``source`` has; else ""."""
    if FORMATS[format].act_order or not any(is_act_order(source, one) for one in source.tensors.outputs):
        return ""
    keeps = " and ".join(ACT_ORDER)
    told = f"g_idx spreads the columns of each group over the row, {format} has them side by side"
    return f"{told}; {keeps} keeps them"


def convert(
    model: str,
    format: str,
    level: str | None = None,
    *,
    output_dir: str | Path = ".",
    name: str | None = None,
    revision: str | None = None,
    lora: Sequence[str] = (),
    options: Options | None = None,
    measure: bool = False,
    on_event: EventSink = ignore,
) -> ArtifactResult:
    """``model`` as ``format``, by the same way as everything that is made here: kill-safe, resumable, reproducible.

    ``level`` None: the one that holds the source. With ``options.exact``, what cannot be exact is refused before any
    work, and what turns out not to be is removed. ``measure``: the KL divergence against the source, kept in the
    manifest. Raises what ``pipeline.quantize`` raises; UsageError where no level holds the source; UnsupportedError
    and NumericPolicyError for what is not exact and was to be.
    """
    options, format = options or Options(), format_name(format)
    if measure:
        choose.need_torch("Measuring quality", "torch", "transformers")
    source = open_source(model, revision=revision, lora=lora, headers_only=True)
    with source.checkpoint:
        name = bare_name(source) if name is None else name
        level, options = settled(source, format, level, options)
        if options.exact:
            _refuse_inexact(source, _foreseen(source, format, level, name, options))
    (result,) = pipeline.quantize(
        model,
        format,
        levels=[level],
        output_dir=output_dir,
        name=name,
        revision=revision,
        lora=lora,
        options=options,
        on_event=on_event,
    )
    if options.exact and (result.conversion or {}).get("verdict") != EXACT:
        raise NumericPolicyError(
            "the conversion that is there is not exact, and --exact does not accept that",
            file=result.path,
            expected=EXACT,
            found=(result.conversion or {}).get("verdict", "no verdict"),
            remedy="leave --exact out, or convert to a level that holds the source",
        )
    if measure and MEASURED not in (result.conversion or {}):
        return _with_measured(result, _measured(model, result.path, options, revision, lora, on_event))
    return result


def _refuse_inexact(source: Source, foreseen: Foreseen) -> None:
    """Raise UnsupportedError for a conversion that cannot be exact, naming what cannot be kept."""
    if not foreseen.never:
        return
    first, more = foreseen.never[0], len(foreseen.never) - 1
    order = _order_of(source, foreseen.plan.format)
    order = f", act-order: {order}" if order else ""
    info = source.checkpoint.tensors.get(f"{first}.weight") or source.checkpoint.tensors.get(first)
    stored = "" if info is None else f" ({info.dtype})"
    raise UnsupportedError(
        f"{foreseen.plan.format} {foreseen.plan.level} cannot hold this model exactly",
        tensor=first,
        expected="a grid that holds what the source stores",
        found=f"{source.checkpoint.kind or 'floats'}{stored}{order}" + (f"; and {more:,} more tensors" if more else ""),
        remedy="leave --exact out, name another level or format, or take safetensors F32, which holds any source",
    )


def _measured(
    model: str, path: Path, options: Options, revision: str | None, lora: Sequence[str], on_event: EventSink
) -> dict[str, Any]:
    """What the artifact loses against the source on the evaluation text: KLD in nats per token."""
    on_event(events.Stage("measure"))
    quality = assess(model, [path], options, revision=revision, lora=lora, on_event=on_event).quality
    found = quality.artifacts[0].divergence.to_dict()
    figures = {key: found[key] for key in ("kld", "kld_sem", "clusters", "same_top", "acceptance", "tokens")}
    return json_ready({**figures, "texts": list(quality.texts)})  # type: ignore[no-any-return]


def _with_measured(result: ArtifactResult, measured: dict[str, Any]) -> ArtifactResult:
    """``result`` with what was measured, which its manifest says too from now on."""
    file = manifest_path(result.path)
    content, told = read_manifest(file), {**(result.conversion or {}), MEASURED: measured}
    if content is not None:
        write_file(file, [manifest_bytes({**content, "conversion": told})], replace=True)
    result.__dict__["conversion"] = told
    return result
