"""AutoAWQ's layouts for multiplying one token (0.2.9, modules/linear/gemv.py and gemv_fast.py). They are read and not
written.

K = in, N = out, G = groups, four bits, codes q and zero points z from 0 to 15. Of groups of 128 or more, of 64 and of
32, Z is G / 8 rounded up to whole 1, 2 and 4:

    gemv        qweight  int32    (N, K / 8)   codes along K, lowest bits first
                qzeros   int32    (N, Z)       z along the groups, lowest bits first; what is beyond G is nothing
                scales   float16  (N, 8 Z)     w = scales * (q - z)

    gemv_fast   qweight  int16    (N / 4, K)   codes of four rows in turns of 64 columns (``_turned``)
                qzeros   float16  (8 Z, N)     -(scales * z), rounded to float16
                scales   float16  (8 Z, N)     w = scales * q + qzeros

A word of gemv_fast holds four codes; 64 words one after the other are those of 4 rows and 64 columns. Of each 32
columns the four words of a place are the pairs (0, 1), (8, 9), (16, 17), (24, 25), and so on; among eight of those the
even places come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from llm_quantize.formats.bitpack import packed_words, unpack_bits
from llm_quantize.formats.packed import (
    FLOATS,
    Fields,
    Layout,
    PackedMatrix,
    Settings,
    Shapes,
    check_fields,
    check_matrix,
    check_present,
    flat_settings,
    held_integers,
    misfit,
    modules,
    values_of,
)
from llm_quantize.formats.packing import load_floats
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.qtypes.held import HeldRows

GEMV = Layout("awq_gemv", ("qweight", "qzeros", "scales"), (), "qweight", "scales")
FAST = Layout("awq_gemv_fast", ("qweight", "qzeros", "scales"), (), "qweight", "scales")
LAYOUTS: Mapping[str, Layout] = {"gemv": GEMV, "gemv_fast": FAST}
"""By the ``version`` of a configuration."""

BITS = 4
_STEPS = {64: 2, 32: 4}  # whole multiples of Z, by group
_ROWS, _COLUMNS = 4, 64  # of a turn


def _words(columns: int, group: int) -> int:
    """Z."""
    step = _STEPS.get(group, 1)
    words = -(-(columns // group) // 8)
    return -(-words // step) * step


def read(tensors: Mapping[str, TensorInfo], settings: Settings, layout: Layout) -> Iterator[PackedMatrix]:
    """As ``StoredFormat.read``."""
    for name, found in modules(tensors, layout):
        check_present(name, layout, found)
        main = found["qweight"]
        check_matrix(main)
        across, high = (main.shape[1], main.shape[0] * _ROWS) if layout is FAST else (8 * main.shape[1], main.shape[0])
        declared, asymmetric, _ = flat_settings(settings, BITS, "zero_point")
        group = across if declared < 1 else declared
        if across % group or (layout is FAST and across % _COLUMNS) or (group < 128 and group not in _STEPS):
            raise misfit(main, f"rows of whole groups of {group}, of 32, 64 or at least 128", main.shape)
        matrix = PackedMatrix(name, layout, high, across, BITS, group, not asymmetric, False, found)
        yield check_fields(matrix, _shapes(matrix))


def _shapes(packed: PackedMatrix) -> Shapes:
    rows, columns, words = packed.rows, packed.columns, _words(packed.columns, packed.group)
    if packed.layout is GEMV:
        return {
            "qweight": (("I32",), ((rows, columns // 8),)),
            "qzeros": (("I32",), ((rows, words),)),
            "scales": (FLOATS, ((rows, 8 * words),)),
        }
    return {
        "qweight": (("I16",), ((rows // _ROWS, columns),)),
        "qzeros": (FLOATS, ((8 * words, rows),)),
        "scales": (FLOATS, ((8 * words, rows),)),
    }


def codes(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """As ``StoredFormat.codes``, from 0."""
    stored = fields["qweight"]
    if packed.layout is GEMV:
        return unpack_bits(stored[first:last], BITS, packed.columns, 1).astype(np.int16)
    start, stop = first // _ROWS, -(-last // _ROWS)
    found = _turned(stored[start:stop])
    return found[first - start * _ROWS : last - start * _ROWS]


def _turned(words: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """int16 (4 n, K): the codes of words (n, K)."""
    count, columns = words.shape
    each = np.ascontiguousarray(words).view(np.uint16)
    fours = np.stack([each >> np.uint16(4 * place) & np.uint16(15) for place in range(4)], axis=-1)
    rows = fours.reshape(count, columns // _COLUMNS, _ROWS, _COLUMNS).transpose(0, 2, 1, 3)
    # of 32 columns: (four pairs' place, even or odd, which eight), each as the module says
    places = rows.reshape(count * _ROWS, columns // 32, 4, 2, 4).transpose(0, 1, 2, 4, 3)
    pairs = places.reshape(count * _ROWS, columns // 32, 4, 4, 2).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(pairs.reshape(count * _ROWS, columns)).astype(np.int16)


def zeros(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """As ``StoredFormat.zeros``; of gemv_fast those that its offsets were made of."""
    if packed.layout is GEMV:
        words = np.ascontiguousarray(fields["qzeros"][first:last, : packed_words(packed.groups, BITS)])
        return unpack_bits(words, BITS, packed.groups, 1).astype(np.int16)
    each, offsets = scales(packed, fields, first, last), _offsets(packed, fields, first, last)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.rint(-offsets / each)
    zero: npt.NDArray[np.int16] = np.clip(np.nan_to_num(found, nan=0.0), 0, 15).astype(np.int16)
    return zero


def _offsets(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    return load_floats(fields["qzeros"][: packed.groups, first:last].T)


def scales(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.scales``."""
    stored = fields["scales"]
    if packed.layout is GEMV:
        return load_floats(stored[first:last, : packed.groups])
    return load_floats(stored[: packed.groups, first:last].T)


def unpack(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.unpack``."""
    rows = (packed, fields, first, last)
    index = np.arange(packed.columns) // packed.group
    if packed.layout is GEMV:
        return values_of(codes(*rows), zeros(*rows), scales(*rows), index)
    with np.errstate(invalid="ignore", over="ignore"):
        values = codes(*rows).astype(np.float32) * scales(*rows)[:, index] + _offsets(*rows)[:, index]
    return np.ascontiguousarray(values, np.float32)


def held(packed: PackedMatrix, fields: Fields, first: int, last: int) -> HeldRows | None:
    """As ``StoredFormat.held``; of gemv_fast with offsets in the place of zero points."""
    rows = (packed, fields, first, last)
    places, each = codes(*rows).astype(np.uint8), scales(*rows)
    if packed.layout is GEMV:
        return held_integers(packed, fields, places, 0, each, zeros(*rows))
    return HeldRows(np.arange(16, dtype=np.float32), places, packed.group, each, packed.scale, offsets=-_offsets(*rows))
