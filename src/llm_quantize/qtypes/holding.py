"""Whether a number grid holds what another one stores, told from their names alone.

Scales decide too, and those only files know: what is called SURELY here may still come out rounded where a scale does
not fit the type in which the target stores it. CODES says that the codes are kept and the scales rounded, but for luck;
PERHAPS, that it hangs on the numbers.
"""

from __future__ import annotations

from llm_quantize.errors import UsageError
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.affine import AffineType
from llm_quantize.qtypes.blocks import fits, may_fit
from llm_quantize.qtypes.codebook import OF_127, CodebookType
from llm_quantize.qtypes.integer import WHOLE_ROW, IntegerType
from llm_quantize.qtypes.packed import PackedType, packed_type

__all__ = ["CODES", "NEVER", "PERHAPS", "SURELY", "holds"]

NEVER, PERHAPS, CODES, SURELY = 0, 1, 2, 3

_DIVIDED = "line8"
"""The grid whose scales divide: as factors they are rounded."""
_POWERS = "e8m0up"

_SCALES_FROM = {
    "": ("", "whole", "dq"),
    "dq": ("dq",),
    "whole": ("whole",),
    "rows128": ("rows128", "whole"),
    "e4m3": ("e4m3", "e4m3alone"),
    "e4m3alone": ("e4m3alone",),
    "e8m0": ("e8m0", "e8m0up"),
    "e8m0up": ("e8m0up", "e8m0"),
}
"""{how a target keeps scales: how sources do whose scales it holds}, among grids of one table of levels."""


def holds(target: str, source: str, *, powers: bool = False) -> int:
    """NEVER, PERHAPS, CODES or SURELY: whether a matrix on the grid ``source`` can be put on the grid ``target`` as it
    is. ``powers``: scales of the source that are floats are powers of two, as its headers say."""
    if target in QTYPES:
        found = SURELY if fits(target, source) else PERHAPS if may_fit(target, source) else NEVER
        return CODES if found == SURELY and _of_127(source) else found
    try:
        taking, given = packed_type(target), packed_type(source)
    except UsageError:
        return NEVER  # a type of ggml, or one of floats
    if _of_127(source) and not isinstance(taking, CodebookType):
        return _whole_numbers(taking, given)
    if isinstance(taking, CodebookType) and isinstance(given, CodebookType):
        return _levels(taking, given, powers=powers)
    if isinstance(taking, CodebookType) or isinstance(given, CodebookType):
        return NEVER
    if taking.bits < given.bits or not _divides(taking.group_size, given.group_size):
        return NEVER
    if isinstance(taking, AffineType):
        return SURELY if isinstance(given, AffineType) or given.symmetric else PERHAPS
    if isinstance(given, AffineType):
        return PERHAPS
    return _integers(taking, given)


def _of_127(source: str) -> bool:
    return source in OF_127


def _whole_numbers(taking: PackedType, given: PackedType) -> int:
    """Of the whole numbers from -127 with a scale for each row."""
    if taking.bits < given.bits:
        return NEVER
    exact = isinstance(taking, IntegerType) and given.name != _DIVIDED
    return SURELY if exact else CODES


def _divides(taking: int, given: int) -> bool:
    """Whether groups of ``given`` weights are whole groups of ``taking``."""
    if WHOLE_ROW in (taking, given):
        return given == WHOLE_ROW
    return given % taking == 0


def _integers(taking: IntegerType, given: IntegerType) -> int:
    if given.symmetric or not taking.symmetric:
        return SURELY
    return SURELY if taking.bits > given.bits else PERHAPS


def _levels(taking: CodebookType, given: CodebookType, *, powers: bool) -> int:
    if taking.codebook != given.codebook:
        return CODES if {taking.codebook, given.codebook} <= set(OF_127) else NEVER
    same = taking.group_size == given.group_size
    if not same and (taking.nested == "dq" or not _divides(taking.group_size, given.group_size)):
        return NEVER
    if given.nested in _SCALES_FROM[taking.nested] or (taking.nested == _POWERS and powers and not given.coded):
        return SURELY
    return PERHAPS if given.nested.startswith("e8m0") and taking.nested.startswith("e4m3") else NEVER
