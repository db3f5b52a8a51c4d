"""compressed-tensors' matrices of floats, as the package (0.20) writes and checks them: FP8, NVFP4, MXFP4.

N = out, K = in:

    float-quantized         weight               F8_E4M3  (N, K)
                            weight_scale         bf16, f16 or f32 (N, 1), (1,) or (ceil(N / 128), ceil(K / 128))
    nvfp4-pack-quantized    weight_packed        U8       (N, K / 2)    two codes a byte, the first in the low half
                            weight_scale         F8_E4M3  (N, K / 16)
                            weight_global_scale  F32      (1,)          w = level * weight_scale / weight_global_scale
    mxfp4-pack-quantized    weight_packed        U8       (N, K / 2)
                            weight_scale         U8       (N, K / 32)   w = level * 2^(weight_scale - 127)

A code of four bits is a sign and a place among 0, 0.5, 1, 1.5, 2, 3, 4, 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.formats import float_codes
from llm_quantize.formats.base import Array, Field, Scheme
from llm_quantize.formats.compressed_inputs import FIELDS as INPUTS
from llm_quantize.formats.compressed_inputs import SHAPES as INPUT_SHAPES
from llm_quantize.formats.packed import FLOATS, Fields, Layout, PackedMatrix, check_fields, check_matrix
from llm_quantize.formats.packing import check_group, load_floats, store_floats, to_numpy
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.qtypes.codebook import CODEBOOKS, IN_COMMON, SCALES, CodebookType, codebook_type
from llm_quantize.qtypes.held import HeldRows

if TYPE_CHECKING:
    from llm_quantize.grids.grid import Grid

FP8 = Layout("float-quantized", ("weight", "weight_scale"), INPUTS, telling="weight_scale", scales="weight_scale")
NVFP4 = Layout(
    "nvfp4-pack-quantized",
    ("weight_packed", "weight_scale", "weight_global_scale"),
    INPUTS,
    telling="weight_packed",
    scales="weight_scale",
)
MXFP4 = Layout(
    "mxfp4-pack-quantized",
    ("weight_packed", "weight_scale"),
    INPUTS,
    telling="weight_packed",
    scales="weight_scale",
)
BLOCKS, WHOLE = "e4m3_b128_rows128", "e4m3_whole"
LAYOUTS: Mapping[str, Layout] = {"e4m3": FP8, BLOCKS: FP8, WHOLE: FP8, "e2m1_b16_e4m3": NVFP4, "e2m1_b32_e8m0": MXFP4}
"""By grid."""


def grid_of(scheme: Scheme) -> CodebookType:
    """The grid of a scheme of floats."""
    if not isinstance(scheme.qtype, CodebookType):
        raise ValueError(f"{scheme.qtype.name} is no grid of floats")
    return scheme.qtype


def fields(scheme: Scheme, rows: int, columns: int, *, name: str | None = None) -> tuple[Field, ...]:
    """As ``Packed.fields``."""
    grid, groups = grid_of(scheme), check_group(scheme, columns, name, fixed=True)
    if grid.codebook == "e4m3":
        shape = {BLOCKS: (-(-rows // 128), groups), WHOLE: (1,)}.get(grid.name, (rows, 1))
        return Field("weight", "float8_e4m3", (rows, columns)), Field("weight_scale", grid.scale, shape)
    packed = Field("weight_packed", "uint8", (rows, columns // 2))
    if grid.nested == "e8m0":
        return packed, Field("weight_scale", "uint8", (rows, groups))
    return packed, Field("weight_scale", "float8_e4m3", (rows, groups)), Field("weight_global_scale", "float32", (1,))


def pack(scheme: Scheme, grid: Grid, codes: Any) -> list[Array]:
    """As ``Packed.pack``; ``codes``: places in the order of levels."""
    kind, found = grid_of(scheme), to_numpy(codes)
    if grid.group != kind.group(codes.shape[1]) or bool(grid.ladder) != bool(kind.nested):
        raise ValueError(f"a grid of this kind cannot be stored as {kind.name}")
    stored = float_codes.stored(kind.codebook, found)
    if kind.codebook == "e4m3":
        return [stored, store_floats(_scales_once(kind, to_numpy(grid.d).astype(np.float32, copy=False)), kind.scale)]
    if grid.ladder is None:
        raise ValueError(f"a grid with scales of floats cannot be stored as {kind.name}")
    packed, scales = float_codes.halves_joined(stored), to_numpy(grid.ladder.codes)
    if kind.nested == "e8m0":
        return [packed, scales]
    step = float(grid.ladder.steps.reshape(-1)[0])
    return [packed, scales, np.array([1 / step], np.float32)]


def _scales_once(kind: CodebookType, scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What is stored of the scales (rows, groups) of every row."""
    if kind.nested not in IN_COMMON:
        return scales
    step = IN_COMMON[kind.nested] or len(scales)
    once = scales[::step]
    if not np.array_equal(np.repeat(once, step, axis=0)[: len(scales)], scales):
        raise ValueError(f"rows do not have the scales in common that {kind.name} stores")
    return once if IN_COMMON[kind.nested] else once.reshape(-1)


def described(scheme: Scheme, rows: int, columns: int) -> PackedMatrix:
    """As ``Packed.described``."""
    kind = grid_of(scheme)
    group = kind.group(columns)
    return PackedMatrix("", LAYOUTS[kind.name], rows, columns, kind.bits, group, True, grid=kind.name)


def layout_of(fields: Mapping[str, TensorInfo]) -> Layout | None:
    """The layout that a module's tensors have; None: one of integers."""
    packed, weight = fields.get("weight_packed"), fields.get("weight")
    if packed is not None and packed.dtype == "U8":
        return NVFP4 if "weight_global_scale" in fields else MXFP4
    return FP8 if weight is not None and weight.dtype == "F8_E4M3" else None


def matrix(name: str, layout: Layout, found: Mapping[str, TensorInfo]) -> PackedMatrix:
    """As one of ``StoredFormat.read``. Raises IntegrityError."""
    main, scale = found[layout.required[0]], found["weight_scale"]
    check_matrix(main)
    rows = main.shape[0]
    if layout is FP8:
        columns = main.shape[1]
        across = scale.shape[1] if len(scale.shape) == 2 else 1
        group = columns if across == 1 else -(-columns // across)
        group = 128 if across > 1 and -(-columns // 128) == across else group
        down = -(-rows // 128)
        shapes: tuple[tuple[int, ...], ...] = ((rows, 1), (rows,), (1,), (1, 1), (), (down, -(-columns // 128)))
        blocks = scale.shape == shapes[-1] and scale.shape != (rows, 1) and scale.elements > 1
        kind = BLOCKS if blocks else WHOLE if scale.elements == 1 and rows > 1 else "e4m3"
        return check_fields(
            PackedMatrix(name, layout, rows, columns, 8, group, True, False, found, kind),
            {"weight": (("F8_E4M3",), ((rows, columns),)), "weight_scale": (FLOATS, shapes), **INPUT_SHAPES},
        )
    grid = codebook_type(next(name for name, one in LAYOUTS.items() if one is layout))
    columns = 2 * main.shape[1]
    groups = columns // grid.group_size
    return check_fields(
        PackedMatrix(name, layout, rows, columns, 4, grid.group_size, True, False, found, grid.name),
        {
            "weight_packed": (("U8",), ((rows, columns // 2),)),
            "weight_scale": (("F8_E4M3",) if layout is NVFP4 else ("U8",), ((rows, groups),)),
            "weight_global_scale": (("F32",), ((1,), ())),
            **INPUT_SHAPES,
        },
    )


def codes(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """As ``StoredFormat.codes``: a place among the magnitudes, with the sign."""
    return float_codes.signed("e4m3" if packed.layout is FP8 else "e2m1", _stored(packed, fields, first, last))


def _stored(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.uint8]:
    """uint8 (n, K)."""
    if packed.layout is FP8:
        return np.asarray(fields["weight"], np.uint8)[first:last]
    return float_codes.halves_apart(np.asarray(fields["weight_packed"], np.uint8)[first:last])


def scales(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.scales``."""
    stored = fields["weight_scale"]
    if packed.layout is FP8:
        return _rows_of_scales(packed, load_floats(np.asarray(stored)), first, last)
    some = stored[first:last]
    if packed.layout is MXFP4:
        return float_codes.POWERS[np.asarray(some, np.uint8)]
    whole = np.asarray(fields["weight_global_scale"], np.float32).reshape(-1)[0]
    return np.asarray(_E4M3[some] / whole, np.float32)


def _rows_of_scales(
    packed: PackedMatrix, stored: npt.NDArray[np.float32], first: int, last: int
) -> npt.NDArray[np.float32]:
    """float32 (n, groups) of scales for each row, for all, or for blocks of 128 rows."""
    if stored.size == 1:
        return np.full((last - first, 1), stored.reshape(-1)[0], np.float32)
    if stored.shape[0] == packed.rows:
        return stored.reshape(packed.rows, -1)[first:last]
    return stored[np.arange(first, last) // 128]


def unpack(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.unpack``."""
    table = _E4M3 if packed.layout is FP8 else _E2M1
    each = scales(packed, fields, first, last)
    index = np.arange(packed.columns) // packed.group if each.shape[1] > 1 else np.zeros(packed.columns, np.intp)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.ascontiguousarray(table[_stored(packed, fields, first, last)] * each[:, index], np.float32)


def held(packed: PackedMatrix, fields: Fields, first: int, last: int) -> HeldRows | None:
    """As ``StoredFormat.held``; None for codes and scales that are no numbers, and blocks beyond the last column."""
    kind = codebook_type(packed.grid)
    places = float_codes.places(kind.codebook, _stored(packed, fields, first, last))
    each = scales(packed, fields, first, last)
    if places is None or packed.columns % each.shape[1]:
        return None
    levels, group = np.array(CODEBOOKS[kind.codebook], np.float32), packed.columns // each.shape[1]
    if packed.layout is FP8:
        fits = each.shape[1] == 1 or group == packed.group
        return HeldRows(levels, places, group, each, packed.scale) if fits else None
    rungs = np.asarray(fields["weight_scale"], np.uint8)[first:last]
    if (rungs >= len(SCALES[kind.nested])).any():
        return None
    whole = fields.get("weight_global_scale")
    steps = np.ones((1, 1), np.float32) if whole is None else 1 / np.asarray(whole, np.float64).reshape(1, 1)
    table = np.array(SCALES[kind.nested], np.float32)
    return HeldRows(levels, places, group, each, "float32", rungs=rungs, rung_levels=table, steps=steps)


def level_name(packed: PackedMatrix) -> str:
    """What people call its level."""
    if packed.layout is not FP8:
        return ("NVFP4" if packed.layout is NVFP4 else "MXFP4") + ("" if packed.inputs else "A16")
    if packed.inputs is None or packed.inputs.static:
        return "FP8"
    return "FP8_BLOCK" if packed.grid == BLOCKS else "FP8_DYNAMIC"


_E2M1, _E4M3 = float_codes.values("e2m1"), float_codes.values("e4m3")
