"""Safetensors files written byte by byte, right ones and wrong ones, without the library that checks them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}


def entries(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """The header of tensors laid one after another: {name: (dtype, shape)} in order."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return header


def write_raw(path: Path, header: bytes | Mapping[str, Any], data: bytes = b"", *, length: int | None = None) -> Path:
    """``length`` (that of the header by default), header, data. A mapping is written as JSON."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((len(body) if length is None else length).to_bytes(8, "little") + body + data)
    return path


def write_tensors(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    dtypes: Mapping[str, str] | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A right file of ``arrays``; ``dtypes`` overrides the word for an array's type (uint16 as BF16, uint8 as FP8)."""
    words = {"float64": "F64", "float32": "F32", "float16": "F16", "uint16": "BF16", "uint8": "U8"}
    words |= {"int64": "I64", "int32": "I32"}
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        word = (dtypes or {}).get(name) or words[array.dtype.name]
        span = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": word, "shape": list(array.shape), "data_offsets": span}
        data += raw
    return write_raw(path, header, data)


def write_model(
    directory: Path,
    shards: Mapping[str, Mapping[str, np.ndarray]],
    *,
    config: Mapping[str, Any] | None = None,
    weight_map: Mapping[str, str] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Path:
    """A model directory: one shard without index, or several with it (``weight_map`` replaces the right one)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config if config is not None else {"model_type": "llama"}))
    for name, arrays in shards.items():
        write_tensors(directory / name, arrays, dtypes)
    if list(shards) != ["model.safetensors"] or weight_map is not None:
        owners = {tensor: name for name, arrays in shards.items() for tensor in arrays}
        index = {"metadata": {}, "weight_map": weight_map if weight_map is not None else owners}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
