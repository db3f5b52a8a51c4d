"""ggml itself, through ctypes: the C symbols that the xllamacpp wheel's shared object exports."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.util
import os
from functools import cache
from pathlib import Path

import numpy as np

from llm_quantize.qtypes.ggml_types import BLOCK_SIZES, GgmlType


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@cache
def library() -> ctypes.CDLL:
    """The shared object with ggml in it, initialised (ggml fills its float16 tables on the first context)."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.submodule_search_locations is None:
        raise RuntimeError("the oracle needs xllamacpp: pip install '.[llamacpp]'")
    folders = [Path(p) for p in spec.submodule_search_locations]
    candidates = [p for f in folders for pattern in ("*.so", "*.dylib", "*.pyd") for p in sorted(f.rglob(pattern))]
    for path in candidates:
        loaded = ctypes.CDLL(str(path))
        if hasattr(loaded, "ggml_quantize_chunk"):
            _declare(loaded)
            context = loaded.ggml_init(_InitParams(1024, None, True))
            loaded.ggml_free(context)
            return loaded
    raise RuntimeError(f"no ggml_quantize_chunk in {[str(p) for p in candidates]}")


def _declare(ggml: ctypes.CDLL) -> None:
    ggml.ggml_init.restype = ctypes.c_void_p
    ggml.ggml_init.argtypes = [_InitParams]
    ggml.ggml_free.restype = None
    ggml.ggml_free.argtypes = [ctypes.c_void_p]
    ggml.ggml_quantize_init.restype = None
    ggml.ggml_quantize_init.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_free.restype = None
    ggml.ggml_quantize_free.argtypes = []
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # source
        ctypes.c_void_p,  # target
        ctypes.c_int64,  # first element
        ctypes.c_int64,  # rows
        ctypes.c_int64,  # columns
        ctypes.c_void_p,  # importance
    ]


def quantize(qtype: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """ggml_quantize_chunk of float32 ``rows`` (R, C): uint8 (R, row bytes)."""
    kind = GgmlType[qtype.upper()]
    block, size = BLOCK_SIZES[kind]
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    count, columns = rows.shape
    out = np.zeros((count, columns // block * size), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    pointer = None if weights is None else weights.ctypes.data
    ggml = library()
    ggml.ggml_quantize_init(int(kind))
    written = ggml.ggml_quantize_chunk(int(kind), rows.ctypes.data, out.ctypes.data, 0, count, columns, pointer)
    if written != out.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {out.nbytes}")
    return out


def dequantize(qtype: str, packed: np.ndarray, columns: int) -> np.ndarray:
    """float32 (R, ``columns``) that ggml decodes ``packed`` (R, row bytes) to, by its function for this type."""
    decode = getattr(library(), f"dequantize_row_{qtype}")
    decode.restype, decode.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    source, out = np.ascontiguousarray(packed), np.zeros((len(packed), columns), np.float32)
    for row, values in zip(source, out, strict=True):
        decode(row.ctypes.data, values.ctypes.data, columns)
    return out


def described(kind: int) -> tuple[str, int, int]:
    """(name, weights of a block, bytes of a block) of a type, as ggml says."""
    ggml = library()
    name, weights, size = ggml.ggml_type_name, ggml.ggml_blck_size, ggml.ggml_type_size
    name.restype, weights.restype, size.restype = ctypes.c_char_p, ctypes.c_int64, ctypes.c_size_t
    for function in (name, weights, size):
        function.argtypes = [ctypes.c_int]
    return name(kind).decode(), weights(kind), size(kind)


def release() -> None:
    """Free the tables that ggml built for its IQ types."""
    library().ggml_quantize_free()


def quantize_or_stop(qtype: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray | None:
    """:func:`quantize` in a child process; None when ggml stops it (its assertions end the process)."""
    quantize(qtype, np.ones((1, 256), np.float32), np.ones(256, np.float32))  # the child inherits ggml's tables
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            os.environ["GGML_NO_BACKTRACE"] = "1"
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(quantize(qtype, rows, importance).tobytes())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        written = pipe.read()
    os.waitpid(child, 0)
    return np.frombuffer(written, np.uint8).reshape(len(rows), -1) if written else None
