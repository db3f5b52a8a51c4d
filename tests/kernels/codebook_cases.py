"""What the tests of all codebook types share."""

from __future__ import annotations

import numpy as np

from llm_quantize import kernels
from llm_quantize.kernels import reference
from llm_quantize.qtypes import QTYPES

from .legacy_cases import IMPORTANCE, assert_equal, at_level, make_importance


def importances(qtype: str, columns: int) -> list[np.ndarray | None]:
    """Every kind of importance that the type takes."""
    made = [make_importance(kind, 11, columns) for kind in IMPORTANCE]
    return [one for one in made if one is not None or not QTYPES[qtype].needs_importance]


def assert_levels_agree(qtype: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """The numpy reference and every SIMD level give the same bytes."""
    expected = reference.QUANTIZE[qtype](rows, importance)
    for level in kernels.simd_levels():
        with at_level(level):
            assert_equal(kernels.quantize(qtype, rows, importance), expected, f"{level} {qtype}")
    return expected
