"""The main path: open → plan → preflight → quantize → finish. Everything else is a room this path walks through."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llm_quantize
from llm_quantize import preflight
from llm_quantize.architectures import Architecture, open_architecture
from llm_quantize.architectures.base import OutputTensor, TensorMap
from llm_quantize.checkpoint import Checkpoint, open_checkpoint
from llm_quantize.engine import run, stop_on_signals
from llm_quantize.errors import IntegrityError, MalformedInputError, UnsupportedError, UsageError
from llm_quantize.events import EventSink, ignore
from llm_quantize.formats import gguf as gguf_format
from llm_quantize.formats.gguf_vocabulary import read_vocabulary, runtime_name
from llm_quantize.io.artifact_paths import discard_partial, manifest_path, partial_path
from llm_quantize.io.gguf_file import MetaValue, layout_gguf
from llm_quantize.io.imatrix_file import Imatrix, read_imatrix
from llm_quantize.io.output import ResumableOutput
from llm_quantize.manifest import manifest_bytes, read_manifest
from llm_quantize.plan import ArtifactPlan, plan_artifact
from llm_quantize.recipes import Overrides, TensorShape, assign, parse_level
from llm_quantize.work import (
    NONFINITE_POLICIES,
    Importance,
    Recheck,
    Target,
    Worker,
    missing_units,
    refuse_other_source,
    replaced_values,
    unit_records,
)

FORMATS = ("gguf",)
FLOAT_LEVELS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Options:
    """What a user may set beside model and levels. Sizes in bytes."""

    threads: int | None = None
    max_ram: int | None = None
    overrides: Overrides = field(default_factory=Overrides)
    split_max_size: int | None = None
    imatrix: Path | None = None
    nonfinite: str = "refuse"
    checkpoints: bool = True
    checkpoint_dir: Path | None = None
    overwrite: bool = False
    ignore_space: bool = False


@dataclass(frozen=True)
class Source:
    """An opened model: its checkpoint, architecture, tensor map and the metadata that no recipe changes."""

    checkpoint: Checkpoint
    architecture: Architecture
    tensors: TensorMap
    metadata: Mapping[str, MetaValue]

    @property
    def left_out(self) -> dict[str, str]:
        """Every source tensor that the artifact does not hold, and why."""
        return {**self.checkpoint.left_out, **self.tensors.left_out}


@dataclass(frozen=True)
class ArtifactResult:
    """A finished artifact. ``status``: "written", or "already complete". ``seconds``: CPU time spent quantizing it."""

    plan: ArtifactPlan
    path: Path
    status: str
    seconds: float
    resumed_units: int
    degraded: Mapping[str, int] = field(default_factory=dict)

    @property
    def level(self) -> str:
        return self.plan.level

    @property
    def size(self) -> int:
        return self.plan.size

    @property
    def bits_per_weight(self) -> float:
        return self.plan.bits_per_weight


def open_source(model: str, *, revision: str | None = None, on_event: EventSink = ignore) -> Source:
    """Open a model: headers, configuration, tokenizer. Raises the error tree for anything malformed or unknown."""
    checkpoint = open_checkpoint(model, revision=revision, on_event=on_event)
    try:
        return _describe(checkpoint, on_event)
    except BaseException:
        checkpoint.close()
        raise


def _describe(checkpoint: Checkpoint, on_event: EventSink) -> Source:
    architecture = open_architecture(checkpoint.config, file=checkpoint.directory / "config.json")
    for note in architecture.notes:
        on_event({"event": "warning", "text": note})
    tensors = architecture.map_tensors(checkpoint.tensors)
    for output in tensors.outputs:
        for piece in output.pieces:
            checkpoint.check_readable(piece.source)
    embedding = next((output for output in tensors.outputs if output.name == "token_embd.weight"), None)
    rows = embedding.shape[0] if embedding is not None else None
    vocabulary = read_vocabulary(checkpoint.directory, checkpoint.config, embedding_rows=rows)
    counted = [output for output in tensors.outputs if output.constant is None]
    experts = [output for output in counted if len(output.shape) == 3]
    general = gguf_format.general_metadata(
        architecture=architecture.gguf_name,
        name=runtime_name(checkpoint.name, checkpoint.directory, vocabulary),
        parameters=sum(_weights(output) for output in counted),
        expert_parameters=sum(_weights(output) for output in experts),
        experts=architecture.hyper.n_expert,
        card=gguf_format.read_card(checkpoint.directory, lambda text: on_event({"event": "warning", "text": text})),
        generation_config=checkpoint.generation_config,
    )
    metadata = {**general, **architecture.metadata(checkpoint.generation_config), **vocabulary}
    return Source(checkpoint, architecture, tensors, metadata)


def _weights(output: OutputTensor) -> int:
    count = 1
    for size in output.shape:
        count *= size
    return count


def plan(
    model: str,
    format: str = "gguf",
    *,
    levels: Sequence[str],
    name: str | None = None,
    revision: str | None = None,
    options: Options | None = None,
    on_event: EventSink = ignore,
) -> list[ArtifactPlan]:
    """Exact plans for each level, from headers alone; no weight is read and nothing is written."""
    source = open_source(model, revision=revision, on_event=on_event)
    with source.checkpoint:
        return plan_source(source, format, levels=levels, name=name, options=options or Options())


def plan_source(
    source: Source, format: str, *, levels: Sequence[str], name: str | None, options: Options
) -> list[ArtifactPlan]:
    """``plan`` for an opened source."""
    if format not in FORMATS:
        raise UnsupportedError(f"unknown format {format!r}", expected=", ".join(FORMATS), found=format)
    if not levels:
        raise UsageError("no level given", remedy="name one or more with -q, for example -q Q4_K_M")
    imatrix = None if options.imatrix is None else read_imatrix(options.imatrix)
    _importance_rows(source, imatrix)
    names = list(dict.fromkeys(parse_level(level).name for level in levels))
    stem = _file_stem(name or source.checkpoint.name)
    return [_plan_level(source, level, stem, imatrix, options) for level in names]


def _plan_level(source: Source, name: str, stem: str, imatrix: Imatrix | None, options: Options) -> ArtifactPlan:
    level = parse_level(name)
    outputs = source.tensors.outputs
    shapes = [TensorShape(output.name, output.shape, _unquantized(source, output, name)) for output in outputs]
    assigned = assign(
        name,
        shapes,
        source.architecture.hyper,
        arch=source.architecture.gguf_name,
        importance_names=None if imatrix is None else imatrix.values.keys(),
        overrides=options.overrides,
    )
    version = llm_quantize.__version__
    metadata = dict(source.metadata)
    quantized = name not in FLOAT_LEVELS
    metadata |= gguf_format.recipe_metadata(file_type=level.file_type, quantized=quantized, level=name, version=version)
    if imatrix is not None:
        metadata |= gguf_format.importance_metadata(
            file=options.imatrix.name if options.imatrix else "",
            datasets=imatrix.datasets,
            entries=len(imatrix.values),
            chunks=imatrix.chunks,
        )
    overrides = options.overrides
    chosen = {
        "version": version,
        "imatrix": None if imatrix is None else imatrix.sha256,
        "output_type": overrides.output_type,
        "embedding_type": overrides.embedding_type,
        "tensor_types": [list(pair) for pair in overrides.tensor_types],
        "pure": overrides.pure,
        "split_max_size": options.split_max_size,
        "nonfinite": options.nonfinite,
    }
    files = [[fact.name, fact.size, fact.header_sha256] for fact in source.checkpoint.fingerprint()]
    return plan_artifact(
        level=name,
        name=f"{stem}-{name}",
        outputs=outputs,
        qtypes=assigned.qtypes,
        metadata=metadata,
        source_identity={
            "source": source.checkpoint.name,
            "source_revision": source.checkpoint.revision,
            "source_metadata_sha256": hashlib.sha256(layout_gguf(source.metadata, []).header).hexdigest(),
            "source_files": files,
        },
        options=chosen,
        split_max_bytes=options.split_max_size,
        warnings=assigned.warnings,
    )


def _unquantized(source: Source, output: OutputTensor, level: str) -> str:
    """The qtype of a tensor that the recipe leaves alone: what the runtime wants in F32, all else at 16 bit."""
    if output.float32 or output.constant is not None or len(output.shape) < 2 or level == "F32":
        return "f32"
    if level in ("F16", "BF16"):
        return level.lower()
    stored = {str(source.checkpoint.stored_dtype(piece.source)) for piece in output.pieces}
    return {"float16": "f16", "uint16": "bf16"}.get(stored.pop() if len(stored) == 1 else "", "f32")


def _importance_rows(source: Source, imatrix: Imatrix | None) -> Importance:
    """float32 (matrices, columns) for each output tensor that the matrix covers; a wrong shape is refused."""
    if imatrix is None:
        return {}
    found = {output.name: imatrix.rows(output.name, output.shape) for output in source.tensors.outputs}
    return {name: rows for name, rows in found.items() if rows is not None}


def _files(source: Source) -> dict[str, Path]:
    return {name: info.file for name, info in source.checkpoint.tensors.items()}


def _file_stem(name: str) -> str:
    stem = re.sub(r"[^\w.+-]+", "-", name.rsplit("/", 1)[-1]).strip("-.") or "model"
    if len(stem.encode()) > 180:
        raise UsageError("the output name is too long", found=len(stem.encode()), expected="at most 180 bytes")
    return stem


def quantize(
    model: str,
    format: str = "gguf",
    *,
    levels: Sequence[str],
    output_dir: str | Path = ".",
    name: str | None = None,
    revision: str | None = None,
    options: Options | None = None,
    on_event: EventSink = ignore,
) -> list[ArtifactResult]:
    """Quantize a model to every level in one read of the source; each artifact appears whole, under its final name.

    The same call after any interruption continues, and ends in the same bytes. Raises the error tree; StoppedError
    after SIGINT or SIGTERM (resumable).
    """
    options = options or Options()
    if options.nonfinite not in NONFINITE_POLICIES:
        raise UsageError("unknown --nonfinite policy", expected=NONFINITE_POLICIES, found=options.nonfinite)
    source = open_source(model, revision=revision, on_event=on_event)
    with source.checkpoint:
        plans = plan_source(source, format, levels=levels, name=name, options=options)
        for warning in (text for artifact in plans for text in artifact.warnings):
            on_event({"event": "warning", "text": warning})
        paths = [_target_path(Path(output_dir), artifact) for artifact in plans]
        done = [_already_complete(source, artifact, path, options) for artifact, path in zip(plans, paths, strict=True)]
        todo = [(artifact, path) for artifact, path, ready in zip(plans, paths, done, strict=True) if not ready]
        fitted = preflight.check(
            [artifact for artifact, _ in todo],
            Path(output_dir),
            threads=options.threads,
            max_ram=options.max_ram,
            already_allocated=sum(_partial_bytes(path) for _, path in todo),
            ignore_space=options.ignore_space,
        )
        written = _write_all(source, todo, options, fitted.threads, on_event) if todo else {}
    results = []
    for artifact, path in zip(plans, paths, strict=True):
        result = written.get(path) or ArtifactResult(artifact, path, "already complete", 0.0, 0)
        facts = {"level": result.level, "path": str(path), "size": result.size, "status": result.status}
        on_event({"event": "artifact", **facts})
        results.append(result)
    return results


def _write_all(
    source: Source,
    todo: Sequence[tuple[ArtifactPlan, Path]],
    options: Options,
    threads: int,
    on_event: EventSink,
) -> dict[Path, ArtifactResult]:
    """Quantize what is missing into every open output, then put each in place."""
    imatrix = None if options.imatrix is None else read_imatrix(options.imatrix)
    times = _source_times(source.checkpoint)
    worker = Worker(source.checkpoint, _importance_rows(source, imatrix), options.nonfinite, _files(source))
    with ExitStack() as stack, stop_on_signals() as stop:
        targets = [
            Target(artifact, stack.enter_context(_open_output(artifact, path, options, on_event)))
            for artifact, path in todo
        ]
        deep = any(target.output.notes.get("source_times") != times for target in targets)
        rechecks = [(target, key) for target in targets for key in target.output.records]
        resumed = dict.fromkeys((path for _, path in todo), 0)
        for _ in run(Recheck(source.checkpoint, deep), rechecks, threads=threads, stop=stop):
            pass
        for target, (_, path) in zip(targets, todo, strict=True):
            resumed[path] = len(target.output.records)
            target.output.note({"source_times": times})
        units = list(missing_units(targets))
        total = sum(unit.weight for unit in units)
        on_event({"event": "start", "total": total, "threads": threads, "resumed_units": sum(resumed.values())})
        finished = 0
        for unit in run(worker, units, threads=threads, stop=stop):
            finished += unit.weight
            on_event({"event": "progress", "done": finished, "total": total})
        _refuse_changed(source.checkpoint)
        for target in targets:
            target.output.finish(_manifest(source, target))
    return {
        path: ArtifactResult(artifact, path, "written", target.seconds, resumed[path], replaced_values(target))
        for target, (artifact, path) in zip(targets, todo, strict=True)
    }


def _refuse_changed(checkpoint: Checkpoint) -> None:
    """Raise IntegrityError if a weight file is no longer the one whose header was read."""
    for header in checkpoint.headers:
        facts = header.path.stat()
        if (facts.st_size, facts.st_mtime_ns) != (header.file_size, header.mtime_ns):
            raise IntegrityError(
                "the source changed while it was read",
                file=header.path,
                remedy="run the same command again when the source is at rest",
            )


def _source_times(checkpoint: Checkpoint) -> list[list[Any]]:
    """What changes when a weight file is written, replaced or touched; a copy may keep the first time, not the rest."""
    facts = [(header.path.name, header.path.stat()) for header in checkpoint.headers]
    return [[name, fact.st_mtime_ns, fact.st_ctime_ns, fact.st_ino] for name, fact in facts]


def _target_path(directory: Path, artifact: ArtifactPlan) -> Path:
    return directory / (artifact.name if len(artifact.files) > 1 else artifact.files[0].name)


def _journal_path(path: Path, options: Options) -> Path | None:
    if not options.checkpoints:
        return None
    return (options.checkpoint_dir or path.parent) / f"{path.name}.journal"


def _open_output(artifact: ArtifactPlan, path: Path, options: Options, on_event: EventSink) -> ResumableOutput:
    return ResumableOutput(
        path,
        artifact.files,
        identity=artifact.identity,
        spans=artifact.units(),
        journal_path=_journal_path(path, options),
        on_warning=lambda text: on_event({"event": "warning", "text": text}),
        replace=options.overwrite,
    )


def _partial_bytes(path: Path) -> int:
    """Bytes that an unfinished run has already allocated on disk."""
    partial = partial_path(path)
    files = list(partial.iterdir()) if partial.is_dir() else [partial]
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


def _already_complete(source: Source, artifact: ArtifactPlan, path: Path, options: Options) -> bool:
    """Whether ``path`` is this very artifact, finished. Anything else under that name is refused.

    A source that was written or replaced after the artifact is read once more: its hashes stand in the manifest.
    """
    if not path.exists() or options.overwrite:
        return False
    manifest = manifest_path(path)
    sizes = [file.stat().st_size for file in (sorted(path.glob("*.gguf")) if path.is_dir() else [path])]
    if manifest.is_file() and sizes == [file.size for file in artifact.files]:
        try:
            known = read_manifest(manifest) or {}
        except (MalformedInputError, IntegrityError):
            known = {}
        if known.get("plan_sha256") == artifact.digest:
            made = manifest.stat().st_mtime_ns
            if any(max(times[1], times[2]) >= made for times in _source_times(source.checkpoint)):
                refuse_other_source(source.checkpoint, artifact, known)
            discard_partial(path, _journal_path(path, options))
            return True
    raise UsageError(
        "the output exists and was not made by this command from this source",
        file=path,
        remedy="choose another name with -n or directory with -o, or replace it with --overwrite",
    )


def _manifest(source: Source, target: Target) -> bytes:
    """The manifest: deterministic, without times or machine names, so that it is as reproducible as the artifact."""
    artifact = target.plan
    content = {
        "format": "gguf",
        "level": artifact.level,
        "plan_sha256": artifact.digest,
        "identity": dict(artifact.identity),
        "weights": artifact.weights,
        "files": [{"name": file.name, "size": file.size} for file in artifact.files],
        "left_out": source.left_out,
        "folded": dict(source.checkpoint.folded),
        "nonfinite_replaced": replaced_values(target),
        "tensors": unit_records(target),
    }
    return manifest_bytes(content)
