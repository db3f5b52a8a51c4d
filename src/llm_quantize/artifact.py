"""Artifacts on disk: their names, their unfinished forms, their manifests, and whether one is finished already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_quantize.checkpoint import Checkpoint
from llm_quantize.errors import IntegrityError, MalformedInputError, UsageError
from llm_quantize.events import EventSink
from llm_quantize.io.artifact_paths import discard_partial, manifest_path, partial_path
from llm_quantize.io.output import ResumableOutput
from llm_quantize.manifest import manifest_bytes, read_manifest
from llm_quantize.plan import ArtifactPlan
from llm_quantize.planning import Options
from llm_quantize.source import Source
from llm_quantize.work import Target, refuse_other_source, replaced_values, unit_records


def refuse_changed(checkpoint: Checkpoint) -> None:
    """Raise IntegrityError if a weight file is no longer the one whose header was read."""
    for header in checkpoint.headers:
        facts = header.path.stat()
        if (facts.st_size, facts.st_mtime_ns) != (header.file_size, header.mtime_ns):
            raise IntegrityError(
                "the source changed while it was read",
                file=header.path,
                remedy="run the same command again when the source is at rest",
            )


def source_times(checkpoint: Checkpoint) -> list[list[Any]]:
    """What changes when a weight file is written, replaced or touched; a copy may keep the first time, not the rest."""
    facts = [(header.path.name, header.path.stat()) for header in checkpoint.headers]
    return [[name, fact.st_mtime_ns, fact.st_ctime_ns, fact.st_ino] for name, fact in facts]


def target_path(directory: Path, artifact: ArtifactPlan) -> Path:
    return directory / (artifact.name if len(artifact.files) > 1 else artifact.files[0].name)


def _journal_path(path: Path, options: Options) -> Path | None:
    if not options.checkpoints:
        return None
    return (options.checkpoint_dir or path.parent) / f"{path.name}.journal"


def open_output(artifact: ArtifactPlan, path: Path, options: Options, on_event: EventSink) -> ResumableOutput:
    return ResumableOutput(
        path,
        artifact.files,
        identity=artifact.identity,
        spans=artifact.units(),
        journal_path=_journal_path(path, options),
        on_warning=lambda text: on_event({"event": "warning", "text": text}),
        replace=options.overwrite,
    )


def partial_bytes(path: Path) -> int:
    """Bytes that an unfinished run has already allocated on disk."""
    partial = partial_path(path)
    files = list(partial.iterdir()) if partial.is_dir() else [partial]
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


def already_complete(source: Source, artifact: ArtifactPlan, path: Path, options: Options) -> bool:
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
            if any(max(times[1], times[2]) >= made for times in source_times(source.checkpoint)):
                refuse_other_source(source.checkpoint, artifact, known)
            discard_partial(path, _journal_path(path, options))
            return True
    raise UsageError(
        "the output exists and was not made by this command from this source",
        file=path,
        remedy="choose another name with -n or directory with -o, or replace it with --overwrite",
    )


def sealed_manifest(source: Source, target: Target) -> bytes:
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
