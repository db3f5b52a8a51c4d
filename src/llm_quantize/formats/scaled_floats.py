"""FP8 directories as DeepSeek, Mistral, FBGEMM and transformers write them, seen as artifacts: matrices of E4M3 with
scales. (As a model to start from, such a directory is read by models/float8.py, experts in one tensor and all.)

N = out, K = in:

    weight                            F8_E4M3  (N, K)
    weight_scale_inv or weight_scale  floats   one for all, (N,), (N, 1), or (ceil(N / 128), ceil(K / 128))
                                      F8_E8M0  the same shapes: 2^(code - 127) (DeepSeek-V3.1 and later)
    input_scale, activation_scale     floats   one: the calibrated scale of the inputs

w = level * scale, whichever the scale is called.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import UnsupportedError
from llm_quantize.formats import float_codes
from llm_quantize.formats.packed import (
    FLOATS,
    Fields,
    Layout,
    Numbers,
    PackedMatrix,
    Settings,
    check_fields,
    check_matrix,
    check_present,
    modules,
    no_words,
)
from llm_quantize.formats.packing import load_floats
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.qtypes.codebook import codebook_type
from llm_quantize.qtypes.held import HeldRows

if TYPE_CHECKING:
    from llm_quantize.formats.base import Mixes

NAME = "fp8"
METHODS: Sequence[str] = ("fp8", "fbgemm_fp8", "finegrained_fp8")
LABEL = "FP8{level}"
words = no_words
RESCALES = True
MIXES: Mixes | None = None
FORMS: Sequence[str] = ("e4m3",)
BLOCK = 128
_KNOWN = [BLOCK, BLOCK]
_POWERS = "F8_E8M0"
_INPUTS = ("input_scale", "activation_scale", "input_scale_ub")
LAYOUTS = tuple(
    Layout(NAME, ("weight", scale), _INPUTS, telling=scale, scales=scale)
    for scale in ("weight_scale_inv", "weight_scale")
)
_GRIDS = {"blocks": "e4m3_b128_rows128", "whole": "e4m3_whole", "rows": "e4m3"}
_LEVELS = float_codes.values("e4m3")


def form_of(settings: Settings) -> tuple[str, bool]:
    """As ``StoredFormat.form_of``."""
    form = str(settings.values.get("fmt") or "e4m3").lower()
    return form, form in FORMS


def notes(settings: Settings) -> Iterator[str]:
    """As ``StoredFormat.notes``."""
    del settings
    yield "a runtime rounds activations too, which is not followed here; only the weights are measured"


def read(tensors: Mapping[str, TensorInfo], settings: Settings, numbers: Numbers) -> Iterator[PackedMatrix]:
    """As ``StoredFormat.read``."""
    del numbers
    for layout in LAYOUTS:
        for name, found in modules(tensors, layout):
            if "weight" in found:
                yield _matrix(name, layout, found, settings)
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        scales = (f"{module}.{layout.scales}" for layout in LAYOUTS)
        if module != name and info.dtype == "F8_E4M3" and not any(scale in tensors for scale in scales):
            check_present(module, LAYOUTS[0], {"weight": info})


def _matrix(name: str, layout: Layout, found: Mapping[str, TensorInfo], settings: Settings) -> PackedMatrix:
    main, scale = found["weight"], found[layout.scales]
    if len(main.shape) == 3:
        raise _refused(main, "a matrix for each expert", f"{main.dtype} {list(main.shape)}")
    check_matrix(main)
    rows, columns = main.shape
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    by_row = scale.shape in ((rows,), (rows, 1))
    kind = "whole" if scale.elements == 1 and rows > 1 else "rows" if by_row else "blocks"
    said = settings.values.get("weight_block_size")
    if kind == "blocks" and said not in (None, _KNOWN):
        raise _refused(main, f"blocks of {BLOCK} by {BLOCK}", said)
    group = BLOCK if kind == "blocks" else columns
    matrix = PackedMatrix(name, layout, rows, columns, 8, group, True, False, found, _GRIDS[kind])
    one = (FLOATS, ((), (1,), (1, 1)))
    return check_fields(
        matrix,
        {
            "weight": (("F8_E4M3",), (main.shape,)),
            layout.scales: ((*FLOATS, _POWERS), (blocks, (rows,), (rows, 1), (), (1,), (1, 1))),
            **dict.fromkeys(_INPUTS, one),
        },
    )


def _refused(main: TensorInfo, expected: str, found: object) -> UnsupportedError:
    return UnsupportedError(
        "this form of FP8 can be a MODEL to start from, but not an artifact that is verified or measured",
        file=main.file,
        tensor=main.name,
        offset=main.offset,
        expected=expected,
        found=found,
        remedy="give it as MODEL (info, plan, quantize), and verify or measure what is made of it",
    )


def codes(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """As ``StoredFormat.codes``: a place among the magnitudes, with the sign."""
    del packed
    return float_codes.signed("e4m3", np.asarray(fields["weight"], np.uint8)[first:last])


def zeros(packed: PackedMatrix, fields: Fields, first: int, last: int) -> None:
    """As ``StoredFormat.zeros``: none."""
    del packed, fields, first, last


def scales(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.scales``."""
    name = packed.layout.scales
    stored = np.asarray(fields[name])
    powers = packed.fields[name].dtype == _POWERS
    found = float_codes.POWERS[stored.astype(np.uint8)] if powers else load_floats(stored)
    if packed.grid == _GRIDS["blocks"]:
        return np.ascontiguousarray(found[np.arange(first, last) // BLOCK])
    return np.ascontiguousarray(np.broadcast_to(found.reshape(-1, 1), (packed.rows, 1))[first:last])


def unpack(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.unpack``."""
    each, group = scales(packed, fields, first, last), np.arange(packed.columns) // packed.group
    with np.errstate(invalid="ignore", over="ignore"):
        values = _LEVELS[np.asarray(fields["weight"], np.uint8)[first:last]] * each[:, group]
    return np.ascontiguousarray(values, np.float32)


def held(packed: PackedMatrix, fields: Fields, first: int, last: int) -> HeldRows | None:
    """As ``StoredFormat.held``; None for codes that are no numbers, and where the last block is narrower."""
    if packed.columns % packed.group:
        return None
    stored = np.asarray(fields["weight"], np.uint8)[first:last]
    return float_codes.held(codebook_type(packed.grid), stored, scales(packed, fields, first, last), packed.scale)


def check(packed: PackedMatrix, settings: Settings, fields: Fields, first: int, last: int) -> Iterator[tuple[str, str]]:
    """As ``StoredFormat.check``: codes that are no numbers."""
    del packed, settings
    if np.isnan(_LEVELS[np.asarray(fields["weight"], np.uint8)[first:last]]).any():
        yield "weight", f"codes of rows {first} to {last} are no numbers"


def check_settings(settings: Settings, matrices: Mapping[str, PackedMatrix]) -> Iterator[str]:
    """As ``StoredFormat.check_settings``: blocks that the configuration says and no matrix has, or the reverse."""
    said = settings.values.get("weight_block_size")
    held = any(matrix.grid == _GRIDS["blocks"] for matrix in matrices.values())
    if said is not None and matrices and not held:
        yield "the configuration has a weight_block_size, but no matrix has a scale for each block"


def layout_name(matrices: Collection[PackedMatrix]) -> str:
    """blocks, rows, whole."""
    kinds = {grid: kind for kind, grid in _GRIDS.items()}
    return "+".join(sorted({kinds[matrix.grid] for matrix in matrices}))


def level_of(matrices: Collection[PackedMatrix]) -> str:
    """_BLOCK where scales are for blocks."""
    return "_BLOCK" if any(matrix.grid == _GRIDS["blocks"] for matrix in matrices) else ""
