"""Artifacts on disk: their names, their unfinished forms, their manifests, and whether one is finished already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from llm_quantize import events
from llm_quantize.artifacts.manifest import manifest_bytes, nonfinite_counts, read_manifest
from llm_quantize.artifacts.recheck import refuse_other_source
from llm_quantize.artifacts.rounding import Target, conversion_of, matrix_records, unit_records
from llm_quantize.artifacts.vouched import Vouched
from llm_quantize.errors import IntegrityError, MalformedInputError, NumericPolicyError, UnsupportedError, UsageError
from llm_quantize.events import EventSink
from llm_quantize.formats.card import fill_card, fill_verdict
from llm_quantize.formats.table import FORMATS
from llm_quantize.io.artifact_paths import journal_path, manifest_path
from llm_quantize.io.journal import canonical_json, other_identity, parse_journal, source_changed
from llm_quantize.io.leftovers import discard_hidden, discard_partial
from llm_quantize.io.output import ResumableOutput
from llm_quantize.models.base import Model
from llm_quantize.models.opening import Source
from llm_quantize.options import Options
from llm_quantize.plan import ARITHMETIC, CARD_UNIT, ArtifactPlan

DType = Literal["float32", "bfloat16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")
"""Types in which text is run through a model (calibration/collect.py)."""


def refuse_changed(checkpoint: Model, before: Sequence[Sequence[Any]]) -> None:
    """Raise IntegrityError if a weight file was written or replaced since ``before`` (``source_times`` of then)."""
    now = source_times(checkpoint)
    for header, then, facts in zip(checkpoint.headers, before, now, strict=True):
        if list(then) != facts or (facts[4], facts[1]) != (header.file_size, header.mtime_ns):
            raise IntegrityError(
                "the source changed while it was read",
                file=header.path,
                expected=_told(then),
                found=_told(facts),
                remedy="run the same command again when the source is at rest: what was read is compared with it then",
            )


def _told(facts: Sequence[Any]) -> str:
    _, modified, changed, inode, size = facts
    return f"{size:,} bytes, inode {inode}, modified at {modified} ns, changed at {changed} ns"


def source_times(checkpoint: Model) -> list[list[Any]]:
    """Name, time of the last write, time of the last change, inode and size of every weight file.

    Writing or replacing a file changes some of them; a tool may set the first time back, not the second.
    Raises IntegrityError if a file is gone.
    """
    times = []
    for header in checkpoint.headers:
        try:
            fact = header.path.stat()
        except OSError as error:
            raise IntegrityError(
                "a file of the source was taken away while it was needed",
                file=header.path,
                found=error.strerror,
                remedy="put it back and run the same command again",
            ) from error
        times.append([header.path.name, fact.st_mtime_ns, fact.st_ctime_ns, fact.st_ino, fact.st_size])
    return times


def target_path(directory: Path, artifact: ArtifactPlan) -> Path:
    return directory / (artifact.name if len(artifact.files) > 1 else artifact.files[0].name)


def _journal_path(path: Path, options: Options) -> Path | None:
    if not options.checkpoints:
        return None
    return journal_path(path, options.checkpoint_dir)


def open_output(artifact: ArtifactPlan, path: Path, options: Options, on_event: EventSink) -> ResumableOutput:
    return ResumableOutput(
        path,
        artifact.files,
        identity=artifact.identity,
        spans=artifact.units(),
        journal_path=_journal_path(path, options),
        on_warning=lambda text: on_event(events.Caution(text)),
        replace=options.overwrite,
    )


def as_begun(artifact: ArtifactPlan, path: Path, options: Options, on_event: EventSink) -> ArtifactPlan:
    """``artifact`` in the arithmetic in which it was begun or made, perhaps on another machine: two kinds of it are not
    mixed, and either is right."""
    begun = _begun(path, options)
    dtype = begun.get(ARITHMETIC)
    if dtype not in DTYPES or other_identity({**artifact.identity, ARITHMETIC: dtype}, begun) is not None:
        return artifact
    if artifact.identity.get(ARITHMETIC) == dtype:
        return artifact
    on_event(events.Note(f"{path.name} was begun in {dtype}, and goes on so: this machine would choose another type"))
    return replace(artifact, identity=begun)


def _begun(path: Path, options: Options) -> Mapping[str, Any]:
    """The identity of the unfinished artifact, else of the finished one that is not to be replaced; empty for none."""
    journal = _journal_path(path, options)
    if journal is not None and journal.is_file() and not journal.is_symlink():
        records, _ = parse_journal(journal.read_bytes())
        found = records[0].get("identity") if records else None
        if isinstance(found, dict):
            return found
    if options.overwrite or not path.exists():
        return {}
    try:
        manifest = read_manifest(manifest_path(path))
    except (MalformedInputError, IntegrityError):  # told where it is asked whether the artifact is complete
        return {}
    return {} if manifest is None else dict(manifest["identity"])


def already_complete(
    source: Source, artifact: ArtifactPlan, path: Path, options: Options, vouched: Vouched, on_event: EventSink
) -> bool:
    """Whether ``path`` is this very artifact, finished. Anything else under that name is refused.

    A source of which ``vouched`` does not know that it is the one that the artifact was made of is read once more: its
    hashes stand in the manifest.
    """
    _refuse_source(source, path)
    if not path.exists() or options.overwrite:
        return False
    manifest = manifest_path(path)
    files = [path / file.name for file in artifact.files] if path.is_dir() else [path]
    sizes = [file.stat().st_size if file.is_file() else -1 for file in files]
    known: Mapping[str, Any] = {}
    with suppress(MalformedInputError, IntegrityError):  # a damaged manifest vouches for nothing
        known = read_manifest(manifest) or {}
    if sizes == [file.size for file in artifact.files] and known.get("plan_sha256") == artifact.digest:
        if not vouched.knows(path):
            refuse_other_source(source.checkpoint, artifact, known, vouched.hashes, on_event)
            refuse_changed(source.checkpoint, vouched.times)
            vouched.keep(path)
        discard_partial(path, _journal_path(path, options), [file.name for file in artifact.files])
        discard_hidden(path)
        return True
    before, now = known.get("identity", {}), artifact.identity
    key = source_changed(before, now) if before.get("source") == now.get("source") else None
    if key is not None:
        raise IntegrityError(
            "the source changed since the artifact was made: its weights, its configuration or its tokenizer",
            file=path,
            expected=f"{key} = {before.get(key)} (the artifact)",
            found=f"{key} = {now.get(key)} (this run)",
            remedy="restore the source, choose another directory with -o, or replace it with --overwrite",
        )
    raise _exists(path)


_OPEN = ("imatrix", "text", "layout_sha256")
"""What of an identity is not known before the importance is collected."""


def refuse_other(source: Source, artifact: ArtifactPlan, path: Path, options: Options, texts: Sequence[str]) -> None:
    """Raise UsageError where something else than ``artifact`` has its name, as far as that can be told before its
    importance is collected on ``texts``: so that hours of calibration do not end in a refusal."""
    _refuse_source(source, path)
    if not path.exists() or options.overwrite:
        return
    try:
        known = (read_manifest(manifest_path(path)) or {}).get("identity", {})
        found = FORMATS[artifact.format].texts_of(path)
    except (MalformedInputError, UnsupportedError, IntegrityError, UsageError):
        known, found = {}, None
    asked = json.loads(canonical_json(dict(artifact.identity)))
    same = all(known.get(key) == value for key, value in asked.items() if key not in _OPEN)
    open_keys = [key for key in _OPEN[:2] if key in asked]  # none: no text makes this one
    collected = not open_keys or any(known.get(key) for key in open_keys)
    if not same or not collected or (found is not None and list(found) != list(texts)):
        raise _exists(path)


def discard_inexact(source: Source, target: Target, path: Path, options: Options) -> NumericPolicyError | None:
    """None where what ``target`` holds is its source exactly; else the error that says what is not, after the
    unfinished artifact was removed. Its output must be closed."""
    verdict = conversion_of(target)
    worst = None if verdict is None else verdict.get("worst")
    if verdict is None or worst is None:
        return None
    discard_partial(path, _journal_path(path, options), [file.name for file in target.plan.files])
    discard_hidden(path)
    counts = ", ".join(f"{count:,} {word}" for word, count in verdict["tensors"].items())
    return NumericPolicyError(
        "the conversion is not exact, and --exact does not accept that; nothing is left of it",
        file=path,
        tensor=worst["tensor"],
        expected=f"every tensor as {source.checkpoint.name} has it",
        found=f"{counts}; the largest relative error is {worst['relative_error']:.4g}",
        remedy="leave --exact out, or convert to a level that holds this tensor",
    )


def _exists(path: Path) -> UsageError:
    return UsageError(
        "the output exists and was not made by this command from this source",
        file=path,
        remedy="choose another name with -n or directory with -o, or replace it with --overwrite",
    )


def _refuse_source(source: Source, path: Path) -> None:
    """Raise UsageError where the artifact would take the place of a file of its own source, even with --overwrite."""
    place = path.resolve()
    own = next((file for file in source.checkpoint.files if place in (file.resolve(), file.resolve().parent)), None)
    if own is not None:
        raise UsageError(
            "the output would replace the model that it is made from",
            file=own,
            remedy="choose another name with -n or directory with -o",
        )


def finish_card(target: Target) -> None:
    """Put what was measured into the model card, if the artifact has one with room for it."""
    card = target.plan.card
    if card is None or CARD_UNIT in target.output.records:
        return
    data, verdict = fill_card(card.text, target.output.notes.get("measured")), conversion_of(target)
    if verdict is not None:
        data = fill_verdict(data, verdict)
    target.output.write(target.output.spans[CARD_UNIT], 0, data)
    target.output.record(CARD_UNIT, {"sha256": hashlib.sha256(data).hexdigest()})


def sealed_manifest(source: Source, target: Target, made: Mapping[str, Any]) -> bytes:
    """The manifest: deterministic, without times or machine names, so that it is as reproducible as the artifact.
    ``made``: how to make it again (made.py)."""
    artifact = target.plan
    tensors = unit_records(target)
    matrices = matrix_records(target)
    measured = target.output.notes.get("measured")
    card, verdict = target.output.records.get(CARD_UNIT), conversion_of(target)
    content = {
        "format": artifact.format,
        "level": artifact.level,
        "plan_sha256": artifact.digest,
        "identity": dict(artifact.identity),
        "weights": artifact.weights,
        "files": [{"name": file.name, "size": file.size, "front_sha256": file.known_sha256} for file in artifact.files],
        "left_out": source.left_out,
        "folded": dict(source.checkpoint.folded),
        **({"fallbacks": artifact.fallbacks()} if artifact.fallbacks() else {}),
        **nonfinite_counts(tensors),
        "tensors": tensors,
        **({"matrices": matrices} if matrices else {}),
        **({"measured": measured} if measured else {}),
        **({} if verdict is None else {"conversion": verdict}),
        **({"card_sha256": card["sha256"]} if card else {}),
        "made": dict(made),
    }
    return manifest_bytes(content)
