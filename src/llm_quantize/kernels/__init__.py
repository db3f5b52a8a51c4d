"""Quantize and dequantize rows of weights; the meaning is ``reference.py``, the speed is ``native/``.

The fast twin returns the reference's bytes exactly, at every SIMD level and for every split of the rows, so callers
may cut a tensor where they like and run the pieces on as many threads as they have.
"""

from __future__ import annotations

import os
from typing import Final

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.kernels import _native, iq_grids, reference
from llm_quantize.qtypes import QTYPES, QType

__all__ = ["dequantize", "quantize", "scan_nonfinite", "set_simd_level", "simd_level", "simd_levels", "widened"]

LEVEL_VARIABLE: Final = "LLM_QUANTIZE_SIMD"
PASSED_THROUGH: Final = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}


def simd_levels() -> list[str]:
    """Names of the SIMD levels that this processor and build can run, slowest first."""
    return list(_native.levels())


def _first_level() -> str:
    levels = simd_levels()
    if not levels:
        raise UnsupportedError(
            "This processor is too old for the native kernels",
            expected="x86-64-v2 (SSE4.2) or newer",
            remedy="run on a processor made after 2009",
        )
    wanted = os.environ.get(LEVEL_VARIABLE, "")
    if wanted and wanted not in levels:
        raise UsageError(
            f"The environment variable {LEVEL_VARIABLE} names a SIMD level that cannot run here",
            expected=", ".join(levels),
            found=wanted,
            remedy=f"unset {LEVEL_VARIABLE}",
        )
    return wanted or levels[-1]


_level = _first_level()


def simd_level() -> str:
    """The level that :func:`quantize` uses now."""
    return _level


def set_simd_level(name: str) -> None:
    """Use the level ``name`` from now on, in this process. UsageError if it cannot run here."""
    global _level
    levels = simd_levels()
    if name not in levels:
        raise UsageError("No such SIMD level here", expected=", ".join(levels), found=name)
    _level = name


def quantize(
    qtype: str,
    rows: npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16],
    importance: npt.NDArray[np.float32] | None = None,
    *,
    out: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """Packed rows, uint8 (R, row_bytes), the same bytes as ggml's quantizer.

    ``rows`` (R, C), C-contiguous: float32, float16, or uint16 holding bfloat16 bits; C whole blocks, finite values.
    ``importance`` float32 (C,), non-negative and finite: mean square of each input channel (ggml's imatrix row); types
    that do not use it ignore it. ``out`` is written and returned when given. Releases the GIL; may run on many threads.
    Raises UsageError for an unknown type or a wrong shape or dtype.
    """
    row_type = _qtype(qtype)
    if rows.ndim != 2 or rows.dtype not in (np.float32, np.float16, np.uint16) or not rows.flags.c_contiguous:
        raise UsageError(
            "Rows to quantize have the wrong form",
            expected="(rows, columns), C-contiguous, float32, float16 or uint16",
            found=f"{rows.shape}, {rows.dtype}, contiguous: {rows.flags.c_contiguous}",
        )
    shape = (rows.shape[0], row_type.row_bytes(rows.shape[1]))
    if importance is not None:
        _check_importance(importance, rows.shape[1])
    elif row_type.needs_importance:
        raise UsageError(f"The type {qtype} needs an imatrix", remedy="give one with --imatrix")
    if out is None:
        out = np.empty(shape, np.uint8)
    elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous or not out.flags.writeable:
        raise UsageError(
            "The output array has the wrong form",
            expected=f"{shape}, uint8, C-contiguous, writeable",
            found=f"{out.shape}, {out.dtype}",
        )
    if rows.dtype == PASSED_THROUGH.get(qtype):
        out[...] = rows.view(np.uint8)
        return out
    used = importance if row_type.uses_importance else None
    _native.quantize(_level, qtype, rows, used, out, iq_grids.native_codebook(qtype))
    return out


def scan_nonfinite(
    rows: npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16],
) -> tuple[int, int]:
    """How many values are infinite or NaN, and the flat index of the first one (-1 when there is none).

    ``rows``: float32, float16, or uint16 holding bfloat16 bits; any shape, C-contiguous. Releases the GIL.
    Raises UsageError for another dtype or layout.
    """
    if rows.dtype not in (np.float32, np.float16, np.uint16) or not rows.flags.c_contiguous:
        raise UsageError(
            "Values to scan have the wrong form",
            expected="C-contiguous float32, float16 or uint16",
            found=f"{rows.dtype}, contiguous: {rows.flags.c_contiguous}",
        )
    return _native.scan_nonfinite(_level, rows)


def widened(values: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """float16 of any shape in float32, C-contiguous: what ``astype`` gives, several times as fast."""
    out = np.empty(values.shape, np.float32)
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint16)
    _native.widen_f16(_level, flat, out.reshape(-1))
    return out


def dequantize(qtype: str, packed: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.float32]:
    """The weights (R, ``columns``) that ``packed`` (R, row_bytes) stands for, as ggml decodes them.

    Raises UsageError for an unknown type or a wrong shape.
    """
    row_bytes = _qtype(qtype).row_bytes(columns)
    if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] != row_bytes:
        raise UsageError(
            "Packed rows have the wrong form",
            expected=f"(rows, {row_bytes}), uint8",
            found=f"{packed.shape}, {packed.dtype}",
        )
    if packed.size == 0:
        return np.empty((packed.shape[0], columns), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # of any bits, damaged ones too; what is not finite stays so
        return reference.DEQUANTIZE[qtype](packed, columns)


def _qtype(name: str) -> QType:
    if name not in QTYPES:
        raise UsageError("No such type of tensor", expected=", ".join(QTYPES), found=name)
    return QTYPES[name]


def _check_importance(importance: npt.NDArray[np.float32], columns: int) -> None:
    if importance.shape != (columns,) or importance.dtype != np.float32 or not importance.flags.c_contiguous:
        raise UsageError(
            "An importance vector has the wrong form",
            expected=f"({columns},), float32, C-contiguous",
            found=f"{importance.shape}, {importance.dtype}",
        )
