"""Where a model is: a directory of this machine, or the hub's snapshot of a repository."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llm_quantize.data import demo_model
from llm_quantize.errors import UnsupportedError, UsageError, printable
from llm_quantize.events import EventSink
from llm_quantize.models.hub.fetch import resolve

BUILT_IN = "builtin:demo-llama"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model lies: its directory, the name to call it by, and its hub commit if it has one.

    ``temporary``: the directory holds headers without weights, until this is cleaned up (``hub.LocalSnapshot``)."""

    directory: Path
    name: str
    revision: str | None
    temporary: tempfile.TemporaryDirectory[str] | None = None


def locate(
    model: str | os.PathLike[str], revision: str | None, on_event: EventSink | None, *, headers_only: bool = False
) -> Place:
    """The directory of ``model``: itself, or the hub's snapshot. An existing path wins over a hub id.

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
    if not text or text.startswith(("/", ".", "~")) or text.count("/") > 1 or text.endswith("/"):
        raise UsageError(
            "no such model directory",
            file=text or "(empty)",
            remedy="give an existing directory, or a hub id such as HuggingFaceTB/SmolLM2-135M",
        )
    snapshot = resolve(text, revision, on_event=on_event, headers_only=headers_only)
    return Place(snapshot.directory, text, snapshot.commit, snapshot.temporary)


def _local(path: Path, revision: str | None) -> Place:
    if not path.is_dir():
        remedy = "give the directory that holds config.json and the .safetensors files"
        if path.suffix == ".gguf":
            raise UnsupportedError("a GGUF file is not a source that this version reads", file=path, remedy=remedy)
        raise UsageError("MODEL must be a directory or a hub id", file=path, found="a file", remedy=remedy)
    if revision is not None:
        raise UsageError(
            "a directory has no revisions",
            file=path,
            found=f"--revision {printable(revision, 80)}",
            remedy="leave --revision out, or give the hub id instead of the directory",
        )
    real = path.resolve()
    name = os.fsencode(real.name).decode("utf-8", "replace") or "model"  # bytes that are not UTF-8 go into no metadata
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        name = real.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return Place(path.absolute(), name, None)
