"""Codes of floats of 4 and 8 bits as files hold them: a sign in the highest bit, below it a place among magnitudes.

A grid numbers its levels in ascending order, the negative zero among them (qtypes/codebook.py): for e2m1, place 7 is
-0 and place 8 is 0, and the code 8 + k of a file is place 7 - k.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llm_quantize.qtypes.codebook import CODEBOOKS, SCALES, CodebookType
from llm_quantize.qtypes.held import HeldRows

_MAGNITUDES = {"e2m1": 8, "e4m3": 127}
_SIGN = {"e2m1": 8, "e4m3": 128}


POWERS: npt.NDArray[np.float32] = np.append(np.exp2(np.arange(255, dtype=np.float32) - 127), np.float32(np.nan))
"""float32 (256,): what each code of e8m0 stands for; the last is no number."""


def stored(codebook: str, places: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8, the codes of a file, one a byte, for ``places`` in the order of levels."""
    half = _MAGNITUDES[codebook]
    return np.where(places < half, (half - 1 - places) | _SIGN[codebook], places - half).astype(np.uint8)


def places(codebook: str, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8] | None:
    """uint8, the place in the order of levels of each of a file's ``codes``, the inverse of ``stored``; None where one
    is no number."""
    half, sign = _MAGNITUDES[codebook], _SIGN[codebook]
    magnitudes = np.arange(2 * sign) & (sign - 1)
    if half < sign and (codes & np.uint8(sign - 1) >= half).any():
        return None
    table = np.where(np.arange(2 * sign) < sign, half + magnitudes, half - 1 - magnitudes)
    return table.astype(np.uint8)[codes]


def signed(codebook: str, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16]:
    """int16: the place of each code among the magnitudes, with its sign."""
    place = (codes & (_SIGN[codebook] - 1)).astype(np.int16)
    return np.where(codes & _SIGN[codebook], -place, place)


def values(codebook: str) -> npt.NDArray[np.float32]:
    """float32 (16,) or (256,): what each code stands for; NaN where it is no number."""
    half, sign = _MAGNITUDES[codebook], _SIGN[codebook]
    levels = np.array(CODEBOOKS[codebook], np.float32)
    found = np.full(2 * sign, np.nan, np.float32)
    found[:half], found[sign : sign + half] = levels[half:], levels[half - 1 :: -1]
    return found


def held(
    kind: CodebookType,
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    storage: str,
    *,
    rungs: npt.NDArray[np.uint8] | None = None,
    step: npt.NDArray[np.float32] | None = None,
) -> HeldRows | None:
    """Rows of a file's ``codes`` uint8 (n, K) with ``scales`` float32 (n, G), stored as ``storage``, or as ``rungs``
    uint8 (n, G), times ``step`` (1, 1) where there is one. None for codes and scales that are no numbers, and where the
    last group is shorter."""
    found = places(kind.codebook, codes)
    if found is None or codes.shape[1] % scales.shape[1]:
        return None
    levels, group = np.array(CODEBOOKS[kind.codebook], np.float32), codes.shape[1] // scales.shape[1]
    if rungs is None:
        return HeldRows(levels, found, group, scales, storage)
    table = np.array(SCALES[kind.nested], np.float32)
    if (rungs >= len(table)).any():
        return None
    steps = np.ones((1, 1), np.float32) if step is None else step
    return HeldRows(levels, found, group, scales, "float32", rungs=rungs, rung_levels=table, steps=steps)


def halves_joined(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8 (n, K / 2): two codes of 4 bits a byte, the first in the low half."""
    return np.ascontiguousarray(codes[:, ::2] | (codes[:, 1::2] << 4))


def halves_apart(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8 (n, K): the codes of 4 bits of (n, K / 2) bytes."""
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
