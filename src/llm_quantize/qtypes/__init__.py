"""The number grids of GGUF tensors: one row per type that this version writes.

Sizes come from the owner of the format (``ggml_types``); the layouts themselves are in
``llm_quantize.kernels.reference``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import UsageError
from llm_quantize.qtypes.ggml_types import BLOCK_SIZES, GgmlType
from llm_quantize.qtypes.range import FACTORS, HALF

__all__ = ["QTYPES", "QType"]


@dataclass(frozen=True)
class QType:
    """One number grid.

    ``name`` is ggml's name in lower case; ``block_size`` counts weights, ``block_bytes`` bytes.
    ``uses_importance``: an imatrix row changes the codes; ``needs_importance``: there are no codes without one.
    ``half_offsets``: where a block's float16 numbers stand, in bytes, if each is in one piece (see half_exponents).
    """

    name: str
    ggml_type: GgmlType
    block_size: int
    block_bytes: int
    needs_importance: bool
    uses_importance: bool
    half_offsets: tuple[int, ...] = ()

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of ``columns`` weights. UsageError if it is not whole blocks."""
        if columns < 0 or columns % self.block_size:
            raise UsageError(
                f"A row of {columns} weights cannot be stored as {self.name}",
                expected=f"a multiple of {self.block_size}",
                found=columns,
                remedy="use a type with a smaller block for this tensor",
            )
        return columns // self.block_size * self.block_bytes

    @property
    def half_exponents(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Of each float16 number of a block, (byte, mask) of its exponent bits: infinite or NaN where all are set."""
        if self.name == "iq1_m":  # four bits in each of the last four words
            return (((53, 0xC0), (55, 0x70)),)
        return tuple(((offset + 1, 0x7C),) for offset in self.half_offsets)

    @property
    def largest(self) -> float:
        """The largest magnitude that it holds; infinite where that is every finite float32."""
        return HALF * FACTORS[self.name] if self.name in FACTORS else math.inf

    def infinite_blocks(self, packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
        """Blocks in which a float16 scale (or value) is infinite or NaN: it poisons the whole block in silence."""
        blocks = packed.reshape(-1, self.block_bytes)
        found = [
            np.flatnonzero(np.logical_and.reduce([(blocks[:, byte] & mask) == mask for byte, mask in exponent]))
            for exponent in self.half_exponents
        ]
        return np.unique(np.concatenate(found)) if any(part.size for part in found) else np.empty(0, np.intp)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight, scales included."""
        return 8 * self.block_bytes / self.block_size


_PLAIN = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "mxfp4", "nvfp4", "q1_0", "q2_0")
_WEIGHTED = (
    *("q4_0", "q4_1", "q5_0", "q5_1"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
    *("iq4_nl", "iq4_xs"),
    *("iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs"),
    *("iq1_m", "iq1_s"),
)
# ggml_quantize_requires_imatrix: no codes without one.
_NEEDING = ("iq2_xs", "iq2_xxs", "iq1_s")


_HALVES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("f16", "q8_0", "q4_0", "q5_0", "iq4_nl", "iq4_xs"), (0,)),
    **dict.fromkeys(("iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_s"), (0,)),
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2)),
    **{"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,), "tq1_0": (52,), "tq2_0": (64,)},
    **dict.fromkeys(("q1_0", "q2_0"), (0,)),
}


def _row(name: str, *, uses_importance: bool) -> QType:
    ggml_type = GgmlType[name.upper()]
    block_size, block_bytes = BLOCK_SIZES[ggml_type]
    return QType(name, ggml_type, block_size, block_bytes, name in _NEEDING, uses_importance, _HALVES.get(name, ()))


QTYPES: dict[str, QType] = {
    **{name: _row(name, uses_importance=False) for name in _PLAIN},
    **{name: _row(name, uses_importance=True) for name in _WEIGHTED},
}
