"""The largest magnitude that a type holds, and the refusal of a weight beyond it: one for all formats.

A block's value is a float16 scale times a level (and, in superblocks, times an integer of the sub-block); ``FACTORS``
is the largest such product for a scale of 1. Beyond it the scale becomes infinite, or the search for it meets sums
that float32 cannot hold and takes 0: either way the whole block is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import NumericPolicyError

__all__ = ["DIVIDED", "FACTORS", "HALF", "first_beyond", "refusal"]

HALF = 65504.0
FACTORS: Mapping[str, float] = {
    **{"f16": 1, "q8_0": 127, "q4_0": 8, "q4_1": 16, "q5_0": 16, "q5_1": 32},
    **{"q2_k": 15 * 3 + 15, "q3_k": 32 * 4, "q4_k": 63 * 15 + 63, "q5_k": 63 * 31 + 63, "q6_k": 128 * 32},
    **{"iq4_nl": 127, "iq4_xs": 32 * 127, "iq3_s": 31 * 15, "iq3_xxs": 15.5 * 31},
    **dict.fromkeys(("iq2_s", "iq2_xs", "iq2_xxs"), 15.5 * 10.75),
    **dict.fromkeys(("iq1_s", "iq1_m"), 15 * 1.125),
    **dict.fromkeys(("tq1_0", "tq2_0", "q1_0", "q2_0"), 1),
    "nvfp4": 448 * 6 / HALF,  # its scales are no float16: 448 is the largest
}
"""Types that are not here hold every finite float32."""

DIVIDED = frozenset(("f16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "tq1_0", "tq2_0", "q2_0"))
"""Types whose scale, without importance, is the largest weight (or the range) divided: what they cannot hold always
shows as an infinite scale. The others search, and may take any scale where their sums overflow."""

Rows = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]


def first_beyond(rows: Rows, limit: float) -> int:
    """Flat index of the first finite value of ``rows`` (float32, float16, or uint16 holding bfloat16 bits) whose
    magnitude is above ``limit``; -1 where there is none."""
    if not rows.size or not math.isfinite(limit) or limit >= _most(rows):
        return -1
    wide = rows.dtype == np.float32
    # Magnitudes are ordered as their bits are: two reductions over what lies there, and no copy.
    bits = rows.view(np.uint32) if wide else rows.view(np.uint16)
    sign = 0x8000_0000 if wide else 0x8000
    top = int(np.float32(limit).view(np.uint32)) >> (0 if wide else 16)
    most, least = int(bits.view(np.int32 if wide else np.int16).max()), int(bits.max())
    if most < top and (least < sign or least - sign < top):
        return -1
    values = np.abs(rows if wide else (rows.astype(np.uint32) << 16).view(np.float32)).reshape(-1)
    beyond = np.isfinite(values) & (values > limit)
    return int(np.argmax(beyond)) if beyond.any() else -1


def _most(rows: Rows) -> float:
    """The largest finite value that ``rows`` can hold, as far as it matters."""
    return HALF if rows.dtype == np.float16 else math.inf


def refusal(tensor: str, qtype: str, row: int, column: int, value: float, *, limit: float, remedy: str) -> Exception:
    """The error for ``value`` at [row, column] of ``tensor``, which ``qtype`` cannot hold. ``limit``: the largest
    magnitude that it can. ``remedy`` may name TENSOR."""
    return NumericPolicyError(
        f"a weight is too large for {qtype}: a float16 scale overflows",
        tensor=tensor,
        expected=f"magnitudes up to {limit:.4g}, and blocks whose scale stays below {HALF:.0f}",
        found=f"{value:.6g} at row {row}, column {column}",
        remedy=remedy.replace("TENSOR", tensor),
    )
