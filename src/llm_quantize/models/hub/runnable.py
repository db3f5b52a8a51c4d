"""What of a hub repository is run: one of its GGUF files, or the whole model directory."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from llm_quantize.errors import UsageError, printable
from llm_quantize.events import EventSink
from llm_quantize.models.hub.fetch import fetch_chosen, headers_chosen, resolve

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_SHOWN = 12


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form ORG/NAME, or ORG/NAME:FILE, and is no path: neither it nor a folder ORG is here."""
    if os.path.lexists(text) or text.endswith(".gguf") or os.path.lexists(text.partition("/")[0]):
        return False
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[^/:]+)?", text, re.ASCII) is not None


def fetch_runnable(text: str, revision: str | None, on_event: EventSink) -> Path:
    """The GGUF file (of a split one the first), or the model directory, of the hub repository ``text``, in the cache.

    ``text``: ORG/NAME, or ORG/NAME:FILE with a level or a part of a file's name. A repository of several GGUF files,
    none of which is named, is refused with their names (UsageError). Raises what ``fetch.resolve`` raises.
    """
    model_id, _, wanted = text.partition(":")
    found = fetch_chosen(model_id, revision, partial(_chosen, model_id, wanted), on_event=on_event)
    return found[0] if found else resolve(model_id, revision, on_event=on_event).directory


@contextmanager
def gguf_on_hub(text: str, revision: str | None, on_event: EventSink) -> Iterator[list[Path]]:
    """The GGUF file ``text`` of a hub repository (ORG/NAME:FILE, as ``fetch_runnable`` takes it), all parts of a split
    one; of what is not in the cache only headers, gone at the end. Raises what ``fetch.headers_chosen`` raises."""
    model_id, _, wanted = text.partition(":")
    paths, holder = headers_chosen(model_id, revision, partial(_chosen, model_id, wanted), on_event=on_event)
    try:
        yield paths
    finally:
        if holder is not None:
            holder.cleanup()


def _chosen(model_id: str, wanted: str, names: Collection[str]) -> list[str]:
    """All parts of one GGUF file among ``names``; none where the repository is a model directory."""
    files = sorted(name for name in names if name.endswith(".gguf") and not _NO_MODEL.search(name))
    models: dict[str, list[str]] = {}
    for name in files:
        models.setdefault(_PART.sub(".gguf", name), []).append(name)
    if not wanted and (not models or any(name.endswith(".safetensors") for name in names)):
        return []
    fitting = [name for name in models if _means(wanted, name)]
    if len(fitting) != 1:
        shown = ", ".join(list(models)[:_SHOWN]) + (f" and {len(models) - _SHOWN} more" if len(models) > _SHOWN else "")
        name = printable(model_id, 120)
        raise UsageError(
            f"{name} holds several GGUF files" if fitting else f"{name} holds no such GGUF file",
            expected=f"one of {shown or 'none'}",
            found=wanted or "none named",
            remedy=f"name one: {model_id}:Q4_K_M, or a part of the file's name that only it has",
        )
    return models[fitting[0]]


def _means(wanted: str, name: str) -> bool:
    """Whether ``wanted``, a level or a part of a name, means the file ``name``: a level not as part of another one."""
    pattern = rf"(?<![A-Za-z0-9]){re.escape(wanted.removesuffix('.gguf'))}(?![A-Za-z0-9_])"
    return not wanted or re.search(pattern, name, re.IGNORECASE) is not None
