"""Models of Ollama's store on this machine, by their names: ``ollama:llama3.2``, ``ollama:hf.co/owner/name:Q4_K_M``.

A manifest, MODELS/manifests/HOST/NAMESPACE/NAME/TAG (Ollama 0.5 and later), is JSON: ``layers``, each with a
``mediaType``, a ``digest`` ("sha256:" and 64 digits) and a ``size``. A digest is the file MODELS/blobs/sha256-DIGITS.
MODELS is $OLLAMA_MODELS, .ollama/models in the home directory, or that of the service, /usr/share/ollama.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llm_quantize.errors import IntegrityError, MalformedInputError, UnsupportedError, UsageError, printable
from llm_quantize.io.json_file import read_json_object

PREFIX = "ollama:"
_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}(:[0-9]{1,5})?", re.ASCII)
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)
_LIMIT = 4 << 20
_KIND = "application/vnd.ollama.image."
_MODEL, _ADAPTER, _PROJECTOR = f"{_KIND}model", f"{_KIND}adapter", f"{_KIND}projector"
_TEMPLATE, _TENSOR = f"{_KIND}template", f"{_KIND}tensor"
_SHOWN = 8


@dataclass(frozen=True)
class Stored:
    """A model of the store. ``path``: its GGUF file. ``name``: what to call it. ``notes``: what is beside it."""

    path: Path
    name: str
    notes: tuple[str, ...]


def is_named(model: str) -> bool:
    """Whether ``model`` is a name in Ollama's store, and no path."""
    return model.startswith(PREFIX)


def stored(model: str) -> Stored:
    """The model called ``model`` ("ollama:NAME"). Raises UsageError (no such store or name), MalformedInputError (a
    manifest of another form), UnsupportedError (weights that are no GGUF file, an adapter on top of them),
    IntegrityError (a file that the store lacks, or of another size)."""
    parts = _parts(model)
    manifest = next(
        (path for path in (store / "manifests" / Path(*parts) for store in _stores()) if path.is_file()), None
    )
    if manifest is None:
        raise _absent(model)
    layers = _layers(manifest)
    adapters = layers.get(_ADAPTER, [])
    if adapters:
        raise UnsupportedError(
            "this model of Ollama is a base with an adapter (LoRA) on top, which are not merged here",
            file=manifest,
            expected="a model whose weights are one GGUF file",
            found=f"an adapter, {printable(str(adapters[0].get('digest')), 80)}",
            remedy="merge them with llama-export-lora of llama.cpp, and give that file; the base alone is the model "
            "that its Modelfile names after FROM",
        )
    if len(layers.get(_MODEL, [])) != 1:
        raise UnsupportedError(
            "the weights of this model of Ollama are not one GGUF file",
            file=manifest,
            expected=f"one layer of {_MODEL}",
            found=f"{len(layers.get(_MODEL, []))}, and {len(layers.get(_TENSOR, []))} of single tensors",
            remedy="give the model that it was made from",
        )
    name = parts[2] if parts[3] == _TAG else f"{parts[2]}-{parts[3]}"
    return Stored(_blob(layers[_MODEL][0], manifest), name, tuple(_notes(layers)))


def _notes(layers: Mapping[str, list[dict[str, Any]]]) -> Iterator[str]:
    if _PROJECTOR in layers:
        yield "this model of Ollama has a projector for pictures in a file of its own, which is not read"
    if _TEMPLATE in layers:
        yield (
            "Ollama's own template of this model is not carried over; the chat template is the one in its GGUF file, "
            "if there is one"
        )


def _parts(model: str) -> tuple[str, str, str, str]:
    """(host, namespace, name, tag) of "ollama:[HOST/][NAMESPACE/]NAME[:TAG]". Raises UsageError."""
    text = model.removeprefix(PREFIX)
    *front, last = text.split("/")
    name, _, tag = last.partition(":")
    words = [*front, name]
    host, space, name = (*(_HOST, _NAMESPACE)[: max(0, 3 - len(words))], *words)[:3]
    found = (host, space, name, tag or _TAG)
    if len(words) > 3 or any(_PART.fullmatch(part) is None for part in found) or ":" in f"{name}{tag}":
        raise UsageError(
            "this is no name of a model of Ollama",
            expected="ollama:NAME, ollama:NAME:TAG or ollama:HOST/NAMESPACE/NAME:TAG",
            found=printable(model, 200),
            remedy="take it from ollama list",
        )
    return found


def _stores() -> Iterator[Path]:
    """Where models of Ollama may be, the likeliest first."""
    named = os.environ.get("OLLAMA_MODELS")
    if named:
        yield Path(named)
        return
    yield Path("~/.ollama/models").expanduser()
    yield Path("/usr/share/ollama/.ollama/models")


def _absent(model: str) -> UsageError:
    stores = list(_stores())
    there = next((store / "manifests" for store in stores if (store / "manifests").is_dir()), None)
    held = (
        []
        if there is None
        else list(islice((path for path in sorted(there.glob("*/*/*/*")) if path.is_file()), _SHOWN))
    )
    names = ", ".join(f"{path.parent.name}:{path.name}" for path in held)
    return UsageError(
        "there is no such model in Ollama's store",
        file=stores[0] if there is None else there,
        expected=names or "a store with models",
        found=printable(model, 200),
        remedy=f"ollama pull {printable(model.removeprefix(PREFIX), 120)}, or set OLLAMA_MODELS to where the store is",
    )


def _layers(manifest: Path) -> dict[str, list[dict[str, Any]]]:
    """{mediaType: its layers}."""
    found: dict[str, list[dict[str, Any]]] = {}
    layers = read_json_object(manifest, limit_bytes=_LIMIT).get("layers")
    if not isinstance(layers, list) or not all(isinstance(one, dict) for one in layers):
        raise _damaged(manifest, "layers, each an object", layers)
    for one in layers:
        found.setdefault(str(one.get("mediaType")), []).append(one)
    return found


def _blob(layer: Mapping[str, Any], manifest: Path) -> Path:
    """The file of a layer, proved to be there and of its size."""
    digest = _DIGEST.fullmatch(str(layer.get("digest")))
    size = layer.get("size")
    if digest is None or type(size) is not int:
        raise _damaged(manifest, "a digest and a size", layer)
    path = manifest.parents[4] / "blobs" / f"sha256-{digest[1]}"
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise IntegrityError(
            "a file of this model of Ollama is absent, or of another size",
            file=path,
            expected=f"{size:,} bytes",
            found="no such file" if found is None else f"{found:,} bytes",
            remedy="ollama pull it again",
        )
    return path


def _damaged(manifest: Path, expected: str, found: object) -> MalformedInputError:
    return MalformedInputError(
        "the manifest of this model of Ollama has another form",
        file=manifest,
        expected=expected,
        found=printable(repr(found), 120),
        remedy="ollama pull it again",
    )
