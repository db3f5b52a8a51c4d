"""Where a model is: a directory or file of this machine, or the hub's snapshot of a repository."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from llm_quantize import events
from llm_quantize.data import demo_model
from llm_quantize.errors import UsageError, printable
from llm_quantize.events import EventSink
from llm_quantize.models.hub import ollama
from llm_quantize.models.hub.fetch import resolve

BUILT_IN = "builtin:demo-llama"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model lies: its directory or file, the name to call it by, and its hub commit if it has one.

    ``temporary``: the directory holds headers without weights, until this is cleaned up (``hub.LocalSnapshot``).
    ``called``: ``name``, where a file's own says nothing; else ""."""

    path: Path
    name: str
    revision: str | None
    temporary: tempfile.TemporaryDirectory[str] | None = None
    called: str = ""


def locate(
    model: str | os.PathLike[str], revision: str | None, on_event: EventSink | None, *, headers_only: bool = False
) -> Place:
    """Where ``model`` is: an existing path, which wins over a hub id, a model of Ollama's store, or the hub's snapshot.

    ``BUILT_IN`` is the small trained model that comes with this package.
    """
    text = os.fspath(model)
    if text == BUILT_IN:
        return _local(demo_model(), revision)
    path = Path(text).expanduser()
    try:
        exists = bool(text) and path.exists()
    except (OSError, ValueError):
        exists = False
    if exists:
        return _local(path, revision)
    if ollama.is_named(text):
        return _of_ollama(text, revision, on_event)
    if not text or text.startswith(("/", ".", "~")) or text.count("/") > 1 or text.endswith("/"):
        raise UsageError(
            "no such model directory",
            file=text or "(empty)",
            remedy="give an existing directory or GGUF file, or a hub id such as HuggingFaceTB/SmolLM2-135M",
        )
    snapshot = resolve(text, revision, on_event=on_event, headers_only=headers_only)
    return Place(snapshot.directory, text, snapshot.commit, snapshot.temporary)


def _of_ollama(model: str, revision: str | None, on_event: EventSink | None) -> Place:
    found = ollama.stored(model)
    place = _local(found.path, revision)
    tell = on_event or events.ignore
    for note in found.notes:
        tell(events.Caution(note))
    return replace(place, name=found.name, called=found.name)


def _local(path: Path, revision: str | None) -> Place:
    if revision is not None:
        raise UsageError(
            f"a {'directory' if path.is_dir() else 'file'} has no revisions",
            file=path,
            found=f"--revision {printable(revision, 80)}",
            remedy="leave --revision out, or give the hub id instead of the path",
        )
    real = path.resolve()
    name = os.fsencode(real.name).decode("utf-8", "replace") or "model"  # bytes that are not UTF-8 go into no metadata
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        name = real.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return Place(path.absolute(), name, None)
