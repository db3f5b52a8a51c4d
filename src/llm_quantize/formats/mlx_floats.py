"""MLX's modes of floats, as mlx 0.32 decodes and mlx_lm 0.32.2 loads them: no offsets, scales of 8 bits.

N = out, K = in, g weights in a group, b bits a code:

    weight   uint32  (N, K b / 32)  codes one after the other, the first in the lowest bits
    scales   uint8   (N, K / g)     mxfp4, mxfp8: w = level * 2^(scale - 127); nvfp4: the scale is an e4m3

    mxfp4    e2m1, g = 32           mxfp8    e4m3, g = 32           nvfp4    e2m1, g = 16

nvfp4 has no scale for the matrix in layers that are no experts: scales below 2^-6 are subnormal e4m3, few and far
between, and that is where those of most models lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import UsageError
from llm_quantize.formats import float_codes
from llm_quantize.formats.base import Array, Field, Scheme
from llm_quantize.formats.packed import Fields, Layout, PackedMatrix, check_fields, contradicts
from llm_quantize.formats.packing import check_group, to_numpy
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.qtypes.codebook import CODEBOOKS, SCALES, CodebookType, codebook_type
from llm_quantize.qtypes.held import HeldRows

if TYPE_CHECKING:
    from pathlib import Path

    from llm_quantize.formats.base import SchemeOptions
    from llm_quantize.grids.grid import Grid

MODES: Mapping[str, str] = {
    "mxfp4": "e2m1_b32_e8m0up",
    "nvfp4": "e2m1_b16_e4m3alone",
    "mxfp8": "e4m3_b32_e8m0up",
}
"""{mode: its grid}. A mode is a level by the same name."""

_LAYOUTS: Mapping[str, Layout] = {
    mode: Layout(mode, ("weight", "scales"), (), telling="scales", scales="scales") for mode in MODES
}
_BY_GRID = {name: mode for mode, name in MODES.items()}
_VALUES = {name: float_codes.values(name) for name in ("e2m1", "e4m3")}


def grid_of(mode: str) -> CodebookType:
    """The grid of a mode."""
    return codebook_type(MODES[mode])


def scheme(form: str, mode: str, options: SchemeOptions) -> Scheme:
    """The scheme of a mode. Raises UsageError for options that would change its grid."""
    grid = grid_of(mode)
    if options.symmetric is False or options.group_size not in (None, grid.group_size):
        raise UsageError(
            f"the grid of {mode} is fixed",
            expected=f"symmetric, groups of {grid.group_size}",
            found="--asym" if options.symmetric is False else f"--group-size {options.group_size}",
            remedy="leave --group-size and --asym out, or take one of 2bit to 8bit",
        )
    return Scheme(form, mode, grid)


def fields(scheme: Scheme, rows: int, columns: int, *, name: str | None = None) -> tuple[Field, ...]:
    """As ``Packed.fields``."""
    groups = check_group(scheme, columns, name)
    words = columns * scheme.qtype.bits // 32
    return Field("weight", "uint32", (rows, words)), Field("scales", "uint8", (rows, groups))


def pack(kind: CodebookType, grid: Grid, codes: Any) -> list[Array]:
    """As ``Packed.pack``; ``codes``: places in the order of levels."""
    found = to_numpy(codes)
    if grid.ladder is None or grid.group != kind.group(found.shape[1]):
        raise ValueError(f"a grid of this kind cannot be stored as {kind.name}")
    stored = float_codes.stored(kind.codebook, found)
    packed = float_codes.halves_joined(stored) if kind.bits == 4 else stored
    return [np.ascontiguousarray(packed).view(np.uint32), to_numpy(grid.ladder.codes)]


def described(kind: CodebookType, rows: int, columns: int) -> PackedMatrix:
    """As ``Packed.described``."""
    layout = _LAYOUTS[_BY_GRID[kind.name]]
    return PackedMatrix("", layout, rows, columns, kind.bits, kind.group(columns), True, grid=kind.name)


def matrix(name: str, mode: str, said: tuple[int, int], found: Mapping[str, TensorInfo], file: Path) -> PackedMatrix:
    """One module in ``mode``, of which ``file`` has ``said`` (bits, group size). Raises IntegrityError."""
    grid = grid_of(mode)
    if said != (grid.bits, grid.group_size):
        raise contradicts(
            file, f"{said[0]} bits, groups of {said[1]} in {name}", f"{mode}, {grid.bits} bits, {grid.group_size}"
        )
    rows, groups = found["scales"].shape
    columns = groups * grid.group_size
    packed = PackedMatrix(
        *(name, _LAYOUTS[mode], rows, columns, grid.bits, grid.group_size, True, False), found, grid.name
    )
    return check_fields(
        packed,
        {"weight": (("U32",), ((rows, columns * grid.bits // 32),)), "scales": (("U8",), ((rows, groups),))},
    )


def is_floats(packed: PackedMatrix) -> bool:
    """Whether a matrix is in one of MODES."""
    return packed.layout.name in MODES


def codes(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """As ``StoredFormat.codes``: a place among the magnitudes, with the sign."""
    return float_codes.signed(codebook_type(packed.grid).codebook, _stored(packed, fields, first, last))


def _stored(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.uint8]:
    """uint8 (n, K)."""
    some = np.ascontiguousarray(fields["weight"][first:last]).view(np.uint8)
    return float_codes.halves_apart(some) if packed.bits == 4 else some


def scales(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.scales``; NaN for the codes that are no number."""
    stored = fields["scales"][first:last]
    return (_VALUES["e4m3"] if codebook_type(packed.grid).nested == "e4m3alone" else float_codes.POWERS)[stored]


def held(packed: PackedMatrix, fields: Fields, first: int, last: int) -> HeldRows | None:
    """As ``StoredFormat.held``; None for codes and scales that are no numbers."""
    kind = codebook_type(packed.grid)
    places, rungs = (
        float_codes.places(kind.codebook, _stored(packed, fields, first, last)),
        fields["scales"][first:last],
    )
    if places is None or (rungs >= len(SCALES[kind.nested])).any():
        return None
    levels, table = np.array(CODEBOOKS[kind.codebook], np.float32), np.array(SCALES[kind.nested], np.float32)
    steps, each = np.ones((1, 1), np.float32), scales(packed, fields, first, last)
    return HeldRows(levels, places, packed.group, each, "float32", rungs=rungs, rung_levels=table, steps=steps)


def unpack(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.unpack``."""
    levels = _VALUES[codebook_type(packed.grid).codebook][_stored(packed, fields, first, last)]
    with np.errstate(invalid="ignore", over="ignore"):
        values = levels.reshape(last - first, packed.groups, -1) * scales(packed, fields, first, last)[:, :, None]
    return np.ascontiguousarray(values.reshape(last - first, packed.columns), np.float32)
