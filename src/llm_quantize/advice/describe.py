"""What a model, quantized or not, or a GGUF file is, from its headers: the facts behind ``llm-quantize info``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf.constants import Keys

from llm_quantize import events
from llm_quantize.advice.footprint import shape_of
from llm_quantize.architectures.rows import weights_of
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.errors import IntegrityError, MalformedInputError, UnsupportedError
from llm_quantize.events import EventSink, ignore
from llm_quantize.formats.gguf.describe import describe as gguf_metadata
from llm_quantize.formats.gguf.vocabulary.reading import has_tokenizer
from llm_quantize.formats.packed_formats import read_format
from llm_quantize.io.artifact_files import artifact_files
from llm_quantize.io.gguf_file import GgufFile, read_gguf
from llm_quantize.models import gguf, quantized
from llm_quantize.models.ctranslate2 import CTranslate2Directory, is_ctranslate2
from llm_quantize.models.files import read_config
from llm_quantize.models.hub import ollama
from llm_quantize.models.opening import Source, open_source
from llm_quantize.models.quantized import PackedDirectory, is_packed_directory, quantization_of
from llm_quantize.models.weight_sets import left_lying

CONTEXT = 8192  # tokens of the cache whose memory is told, or all that the model was trained for, if fewer


def describe(
    model: str, *, revision: str | None = None, lora: Sequence[str] = (), on_event: EventSink = ignore
) -> dict[str, Any]:
    """JSON-ready facts of a checkpoint (directory or hub id), of a GPTQ, AWQ or compressed-tensors directory, or of a
    GGUF artifact (a file, or every part of a split one, given by its directory or by any part). Sizes in bytes.

    Raises the error tree for anything malformed or unsupported, UsageError for a directory of several artifacts.
    """
    path = ollama.stored(model).path if ollama.is_named(model) else Path(model)
    if not lora and path.exists() and gguf.sniff(path):
        return _describe_gguf([read_gguf(part) for part in artifact_files(path)])
    if not lora and is_ctranslate2(path):
        return _describe_ctranslate2(CTranslate2Directory(path))
    if not lora and quantized.sniff(path):
        with PackedDirectory(path) as packed:
            for note in left_lying(path, packed.headers):
                on_event(events.Caution(note))
            return _describe_packed(packed)
    source = open_source(model, revision=revision, lora=lora, on_event=on_event, headers_only=True)
    with source.checkpoint:
        return {**_describe_source(source), **_of_scaled_floats(path), **_origin(path)}


def _of_scaled_floats(path: Path) -> dict[str, Any]:
    """What a directory of FP8 with scales, which is a source like one of plain floats, says of its quantization where
    a format of ours has it."""
    if not is_packed_directory(path):
        return {}
    settings = quantization_of(read_config(path), path / "config.json")
    if read_format(settings.values.get("quant_method")) is None:
        return {}
    try:
        with PackedDirectory(path) as packed:
            return {"quantization": _quantization(packed)}
    except (MalformedInputError, IntegrityError, UnsupportedError) as error:  # as a source of floats it can be read
        return {"quantization": error.what}


def _origin(path: Path) -> dict[str, Any]:
    """What the manifest of a plain directory of ours says it was made from; nothing where there is none of ours."""
    try:
        manifest = read_manifest(path / "manifest.json")
    except (MalformedInputError, IntegrityError) as error:
        return {"manifest": error.what}
    if manifest is None:
        return {}
    facts = {"source": "model", "source_revision": "revision", "source_kind": "kind", "level": "level"}
    identity = manifest["identity"]
    return {"made_from": {word: identity[key] for key, word in facts.items() if identity.get(key) is not None}}


def _describe_source(source: Source) -> dict[str, Any]:
    checkpoint, hyper = source.checkpoint, source.architecture.hyper
    weights = sum(weights_of(output.shape) for output in source.tensors.outputs if output.constant is None)
    dtypes: dict[str, dict[str, int]] = {}
    for info in checkpoint.tensors.values():
        entry = dtypes.setdefault(info.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += info.nbytes
    names = {output.name for output in source.tensors.outputs}
    tokens = min(CONTEXT, hyper.context_length) if hyper.context_length else CONTEXT
    return {
        "name": checkpoint.name,
        "directory": None if checkpoint.temporary is not None else str(checkpoint.directory),
        "revision": checkpoint.revision,
        **({"adapters": [merge.words for merge in checkpoint.adapters]} if checkpoint.adapters else {}),
        "model_type": checkpoint.config.get("model_type"),
        "architecture": source.architecture.gguf_name,
        "parameters": weights,
        "layers": hyper.n_layer,
        "hidden_size": hyper.embedding_length,
        "heads": hyper.n_head,
        "kv_heads": hyper.n_head_kv,
        "head_dim": hyper.head_dim,
        "experts": hyper.n_expert,
        "vocabulary": hyper.vocab_size,
        "context_length": hyper.context_length,
        "tied_embeddings": "output.weight" not in names,
        "dtypes": dtypes,
        "files": [{"name": fact.name, "size": fact.size} for fact in checkpoint.fingerprint()],
        **_source_tokenizer(source),
        "memory": {
            "source_weights": sum(info.nbytes for info in checkpoint.tensors.values()),
            "weights_16bit": 2 * weights,
            "kv_cache_f16": {"tokens": tokens, "bytes": shape_of(source).cache(tokens)},
        },
        "left_out": source.left_out,
        "tensors": [
            {"name": info.name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
            for info in checkpoint.tensors.values()
        ],
    }


def _source_tokenizer(source: Source) -> dict[str, Any]:
    """What GGUF would say of the tokenizer; where llama.cpp cannot run this model, why."""
    try:
        return _tokenizer(gguf_metadata(source))
    except UnsupportedError as error:
        return {**_tokenizer({}), "gguf": f"cannot be made: {error.what}"}
    except MalformedInputError as error:
        if has_tokenizer(source.checkpoint.directory):
            raise
        return {**_tokenizer({}), "gguf": f"cannot be made: {error.what}"}


def _tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    keys = Keys.Tokenizer

    def value(key: str) -> Any:
        found = metadata.get(key)
        return None if found is None else found.value

    words = value(keys.LIST)
    return {
        "tokenizer": {
            "model": value(keys.MODEL),
            "pre_tokenizer": value(keys.PRE),
            "tokens": len(words) if isinstance(words, Sequence) else 0,
            "chat_template": keys.CHAT_TEMPLATE in metadata,
        }
    }


def _describe_ctranslate2(found: CTranslate2Directory) -> dict[str, Any]:
    dtypes: dict[str, dict[str, int]] = {}
    for variable in found.variables.values():
        entry = dtypes.setdefault(variable.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += variable.nbytes
    return {
        "name": found.path.resolve().name,
        "directory": str(found.path),
        "files": [{"name": found.file.path.name, "size": found.size}],
        "size": found.size,
        "format": found.method,
        "level": found.label,
        "network": found.file.kind,
        "parameters": found.weights,
        "bits_per_weight": round(8 * found.size / max(1, found.weights), 4),
        "variables": len(found.file.variables),
        "aliases": dict(found.file.aliases),
        "dtypes": dtypes,
        **_origin(found.path),
    }


def _describe_packed(packed: PackedDirectory) -> dict[str, Any]:
    matrices, config = packed.matrices.values(), packed.config
    weights = sum(matrix.rows * matrix.columns for matrix in matrices)
    weights += sum(info.elements for info in packed.plain.values())
    dtypes: dict[str, dict[str, int]] = {}
    stored = [(matrix.qtype, matrix.nbytes) for matrix in matrices]
    for kind, nbytes in [*stored, *((info.dtype, info.nbytes) for info in packed.plain.values())]:
        entry = dtypes.setdefault(kind, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += nbytes
    left = [name for name, info in packed.plain.items() if len(info.shape) > 1]
    return {
        "name": packed.path.resolve().name,
        "directory": str(packed.path),
        "files": [{"name": header.path.name, "size": header.file_size} for header in packed.headers],
        "size": packed.size,
        "model_type": config.get("model_type"),
        "parameters": weights,
        "bits_per_weight": round(8 * packed.size / max(1, weights), 4),
        "quantization": _quantization(packed),
        "not_quantized": _counted(name.removesuffix(".weight") for name in left),
        "dtypes": dtypes,
        **({"notes": "; ".join(packed.notes)} if packed.notes else {}),
        "tensors": [
            {"name": info.name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
            for info in packed.tensors.values()
        ],
    }


def _quantization(packed: PackedDirectory) -> dict[str, Any]:
    matrices = packed.matrices.values()
    grids = Counter(matrix.qtype for matrix in matrices)
    spread = sum(packed.grid(matrix).act_order for matrix in matrices)
    return {
        "format": packed.method,
        "layout": packed.layout_name,
        "bits": _one_or_all(matrix.bits for matrix in matrices),
        "group_size": _one_or_all(-1 if matrix.group >= matrix.columns else matrix.group for matrix in matrices),
        "symmetric": _one_or_all(matrix.symmetric for matrix in matrices),
        "matrices": len(matrices),
        **({"grids": dict(sorted(grids.items()))} if len(grids) > 1 else {}),
        **({"act_order": spread} if spread else {}),
        **({"activations": packed.inputs_text} if packed.inputs_text else {}),
        **({"keys_and_values": packed.cache_text} if packed.cache_text else {}),
    }


def _one_or_all(values: Iterable[Any]) -> Any:
    """The value that all have, else each that occurs."""
    found = sorted(set(values))
    return found[0] if len(found) == 1 else found


def _counted(names: Iterable[str]) -> dict[str, int]:
    """{name with a star in the place of every number: how many there are}."""
    return dict(Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))


def _describe_gguf(files: Sequence[GgufFile]) -> dict[str, Any]:
    first, size = files[0], sum(file.file_size for file in files)
    tensors = [tensor for file in files for tensor in file.tensors]
    types: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        entry = types.setdefault(tensor.type.name, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    weights = sum(weights_of(tensor.shape) for tensor in tensors)
    simple = {
        key: value.value
        for key, value in first.metadata.items()
        if value.item is None and not isinstance(value.value, bytes) and len(str(value.value)) <= 200
    }
    return {
        "name": simple.get(Keys.General.NAME, first.path.name),
        "file": str(first.path),
        "files": [{"name": file.path.name, "size": file.file_size} for file in files],
        "size": size,
        "architecture": simple.get(Keys.General.ARCHITECTURE),
        "parameters": weights,
        "bits_per_weight": round(8 * size / max(1, weights), 4),
        "dtypes": types,
        **_tokenizer(first.metadata),
        "metadata": simple,
        "tensors": [{"name": t.name, "dtype": t.type.name, "shape": list(t.shape), "bytes": t.nbytes} for t in tensors],
    }
