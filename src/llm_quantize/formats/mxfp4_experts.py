"""MXFP4 as OpenAI ships gpt-oss: the experts of a layer in two tensors, everything else in bfloat16. It is read and not
written.

E = experts, N = out, K = in, G = K / 32:

    NAME_blocks   U8  (E, N, G, 16)   two codes a byte, the first in the low half
    NAME_scales   U8  (E, N, G)       w = level * 2^(scale - 127)

NAME is ``gate_up_proj`` or ``down_proj`` of a module; the weight has the same name, and transformers keeps it
(E, in, out), so it is the one that the experts of the tensors are, turned. A code is a sign and a place among 0, 0.5,
1, 1.5, 2, 3, 4, 6 (transformers 5.23, integrations/mxfp4.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import IntegrityError
from llm_quantize.formats import float_codes
from llm_quantize.formats.packed import (
    AGAIN,
    Fields,
    Layout,
    Numbers,
    PackedMatrix,
    Settings,
    check_fields,
    misfit,
    no_words,
)
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.qtypes.codebook import codebook_type
from llm_quantize.qtypes.held import HeldRows

if TYPE_CHECKING:
    from llm_quantize.formats.base import Mixes

NAME = "mxfp4"
METHODS: Sequence[str] = ("mxfp4",)
LABEL = "MXFP4"
words = no_words
RESCALES = False
MIXES: Mixes | None = None
FORMS: Sequence[str] = ("blocks",)
GROUP = 32
GRID = "e2m1_b32_e8m0"
_LAYOUT = Layout(NAME, ("blocks", "scales"), (), telling="blocks", scales="scales")
_LEVELS = float_codes.values("e2m1")


def form_of(settings: Settings) -> tuple[str, bool]:
    """As ``StoredFormat.form_of``: there is one."""
    del settings
    return FORMS[0], True


def notes(settings: Settings) -> Iterator[str]:
    """None."""
    del settings
    yield from ()


def read(tensors: Mapping[str, TensorInfo], settings: Settings, numbers: Numbers) -> Iterator[PackedMatrix]:
    """As ``StoredFormat.read``."""
    del settings, numbers
    for name, main in tensors.items():
        if not name.endswith("_blocks"):
            continue
        weight = name.removesuffix("_blocks")
        scales = tensors.get(f"{weight}_scales")
        if scales is None:
            raise IntegrityError(
                "a field of a quantized matrix is absent",
                file=main.file,
                tensor=f"{weight}_scales",
                expected="blocks and scales",
                found="blocks",
                remedy=AGAIN,
            )
        if len(main.shape) != 4 or 0 in main.shape or main.shape[3] != GROUP // 2:
            raise misfit(main, f"U8 (experts, rows, groups, {GROUP // 2})", main.shape)
        experts, rows, groups, _ = main.shape
        matrix = PackedMatrix(
            *(weight, _LAYOUT, experts * rows, groups * GROUP, 4, GROUP, True, False),
            {"blocks": main, "scales": scales},
            grid=GRID,
            experts=experts,
            parameter=weight,
        )
        yield check_fields(
            matrix, {"blocks": (("U8",), (main.shape,)), "scales": (("U8",), ((experts, rows, groups),))}
        )


def codes(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """As ``StoredFormat.codes``: a place among the magnitudes, with the sign."""
    return float_codes.signed("e2m1", _stored(packed, fields, first, last))


def _stored(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.uint8]:
    """uint8 (n, K)."""
    return float_codes.halves_apart(fields["blocks"].reshape(packed.rows, -1)[first:last])


def zeros(packed: PackedMatrix, fields: Fields, first: int, last: int) -> None:
    """As ``StoredFormat.zeros``: none."""
    del packed, fields, first, last


def scales(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.scales``; NaN for the code that is no number."""
    return float_codes.POWERS[fields["scales"].reshape(packed.rows, -1)[first:last]]


def unpack(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.unpack``."""
    levels = _LEVELS[_stored(packed, fields, first, last)].reshape(last - first, -1, GROUP)
    with np.errstate(invalid="ignore", over="ignore"):
        values = levels * scales(packed, fields, first, last)[:, :, None]
    return np.ascontiguousarray(values.reshape(last - first, packed.columns), np.float32)


def held(packed: PackedMatrix, fields: Fields, first: int, last: int) -> HeldRows | None:
    """As ``StoredFormat.held``; None for scales that are no numbers."""
    rows = (packed, fields, first, last)
    rungs = fields["scales"].reshape(packed.rows, -1)[first:last]
    return float_codes.held(codebook_type(GRID), _stored(*rows), scales(*rows), "float32", rungs=rungs)


def check(packed: PackedMatrix, settings: Settings, fields: Fields, first: int, last: int) -> Iterator[tuple[str, str]]:
    """As ``StoredFormat.check``: nothing but what the scales say."""
    del packed, settings, fields, first, last
    yield from ()


def check_settings(settings: Settings, matrices: Mapping[str, PackedMatrix]) -> Iterator[str]:
    """As ``StoredFormat.check_settings``: nothing; what is left in bfloat16 is told by its tensors."""
    del settings, matrices
    yield from ()


def layout_name(matrices: Collection[PackedMatrix]) -> str:
    """blocks."""
    del matrices
    return FORMS[0]


def level_of(matrices: Collection[PackedMatrix]) -> str:
    """None beside the name."""
    del matrices
    return ""
