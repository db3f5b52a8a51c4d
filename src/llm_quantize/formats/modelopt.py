"""Directories of NVIDIA's ModelOpt (0.47), as its ``export_hf_checkpoint`` writes them. They are read and not written.

N = out, K = in; what a module's tensors hold follows from their types:

    NVFP4   weight          U8       (N, K / 2)   two codes a byte, the first in the low half
            weight_scale    F8_E4M3  (N, K / 16)
            weight_scale_2  F32      ()           w = level * (weight_scale * weight_scale_2)
    MXFP4   weight          U8       (N, K / 2)
            weight_scale    U8       (N, K / 32)  w = level * 2^(weight_scale - 127)
    MXFP8   weight          F8_E4M3  (N, K)
            weight_scale    U8       (N, K / 32)
    FP8     weight          F8_E4M3  (N, K)
            weight_scale    F32      () or (N,)   w = level * weight_scale

``input_scale`` is the calibrated scale of a module's inputs; of the values of the weights it says nothing.
``pre_quant_scale`` (K,), any float: a module multiplies its inputs by it, where AWQ's scales could not be folded into
the norm before it; here column k of the weight is w * pre_quant_scale[k], which is the same function.
``svdquant_lora_a`` and ``_b`` add a product to what a module computes; such directories are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import UnsupportedError
from llm_quantize.formats import float_codes
from llm_quantize.formats.packed import (
    Fields,
    Layout,
    Numbers,
    PackedMatrix,
    Settings,
    check_called_for,
    check_fields,
    check_matrix,
    check_present,
    misfit,
    modules,
    no_words,
)
from llm_quantize.formats.packing import load_floats
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.qtypes.codebook import codebook_type
from llm_quantize.qtypes.held import HeldRows

if TYPE_CHECKING:
    from llm_quantize.formats.base import Mixes

NAME = "modelopt"
METHODS: Sequence[str] = ("modelopt", "modelopt_fp4", "modelopt_mixed")
LABEL = "{level}"
words = no_words
RESCALES = True
MIXES: Mixes | None = None
FORMS: Sequence[str] = (
    *("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "NVFP4_AWQ", "MXFP4", "W4A8_MXFP4_FP8", "MXFP8", "FP8"),
    *("FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION"),
)
"""The values of ``quant_algo`` that are decoded."""

_BEFORE = "pre_quant_scale"
_OPTIONAL = ("weight_scale_2", "input_scale", _BEFORE)
_WHOLE = "e4m3_whole"
_LAYOUTS: Mapping[str, Layout] = {
    grid: Layout(name, ("weight", "weight_scale"), _OPTIONAL, telling="weight_scale", scales="weight_scale")
    for grid, name in {
        "e2m1_b16_e4m3": "NVFP4",
        "e2m1_b32_e8m0": "MXFP4",
        "e4m3_b32_e8m0up": "MXFP8",
        "e4m3": "FP8",
        _WHOLE: "FP8",
    }.items()
}
"""By grid."""

_CHANGES = (".svdquant_lora_a", ".svdquant_lora_b")
_CODES = ("F8_E4M3", "U8", "I8")
_ONE = ("F32", "F16", "BF16")
_LEVELS = {name: float_codes.values(name) for name in ("e2m1", "e4m3")}


def form_of(settings: Settings) -> tuple[str, bool]:
    """As ``StoredFormat.form_of``."""
    form = str(settings.values.get("quant_algo"))
    return form, form in FORMS


def notes(settings: Settings) -> Iterator[str]:
    """As ``StoredFormat.notes``."""
    if not form_of(settings)[0].startswith("W4A16"):
        yield "a runtime rounds activations too, which is not followed here; only the weights are measured"


def read(tensors: Mapping[str, TensorInfo], settings: Settings, numbers: Numbers) -> Iterator[PackedMatrix]:
    """As ``StoredFormat.read``."""
    del numbers
    changed = next((info for name, info in tensors.items() if name.endswith(_CHANGES)), None)
    if changed is not None:
        raise UnsupportedError(
            "a module adds a product of two small matrices to its outputs (SVDQuant), which is not decoded",
            file=changed.file,
            tensor=changed.name,
            offset=changed.offset,
            expected="matrices alone",
            found=changed.name.rpartition(".")[2],
            remedy="start from the model it was made from, in BF16 or F16 (its model card names it)",
        )
    told = _LAYOUTS[_WHOLE]
    for name, found in modules(tensors, told):
        check_present(name, told, found)
        yield _matrix(name, found, settings)
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        if module != name and info.dtype in _CODES and f"{module}.weight_scale" not in tensors:
            check_present(module, told, {"weight": info})


def _matrix(name: str, found: Mapping[str, TensorInfo], settings: Settings) -> PackedMatrix:
    main, scale = found["weight"], found["weight_scale"]
    if len(main.shape) == 3:
        raise UnsupportedError(
            "experts that ModelOpt keeps in one tensor are not decoded",
            file=main.file,
            tensor=main.name,
            offset=main.offset,
            expected="a matrix for each expert",
            found=f"{main.dtype} {list(main.shape)}",
            remedy="start from the model it was made from, in BF16 or F16 (its model card names it)",
        )
    check_matrix(main)
    kind = _kind(main, scale)
    grid = codebook_type(kind)
    rows, columns = main.shape[0], main.shape[1] * (8 // grid.bits)
    group = columns if grid.group_size < 1 else grid.group_size
    matrix = PackedMatrix(name, _LAYOUTS[kind], rows, columns, grid.bits, group, True, False, found, kind)
    scales: tuple[tuple[int, ...], ...] = ((rows, -(-columns // group)),)
    if not grid.coded:
        scales = ((rows,), (rows, 1), (), (1,), (1, 1))
    elif columns % group:
        raise misfit(main, f"rows of whole groups of {group}", main.shape)
    if grid.nested == "e4m3":
        check_called_for(name, "weight_scale_2", found, f"quant_algo {form_of(settings)[0]}")
    return check_fields(
        matrix,
        {
            "weight": ((main.dtype,), (main.shape,)),
            "weight_scale": ((scale.dtype,) if grid.coded else _ONE, scales),
            "weight_scale_2": (("F32",), ((), (1,))),
            "input_scale": (_ONE, ((), (1,))),
            _BEFORE: (_ONE, ((columns,),)),
        },
    )


def _kind(main: TensorInfo, scale: TensorInfo) -> str:
    """The grid that the types of the fields mean. Raises UnsupportedError."""
    known = {("U8", "F8_E4M3"): "e2m1_b16_e4m3", ("U8", "U8"): "e2m1_b32_e8m0", ("F8_E4M3", "U8"): "e4m3_b32_e8m0up"}
    if main.dtype == "F8_E4M3" and scale.dtype in _ONE:
        return _WHOLE if scale.elements == 1 else "e4m3"
    if (main.dtype, scale.dtype) not in known:
        raise UnsupportedError(
            "these types of a weight and its scales are not decoded",
            file=main.file,
            tensor=main.name,
            offset=main.offset,
            expected="NVFP4, MXFP4, MXFP8 or FP8",
            found=f"{main.dtype} with scales of {scale.dtype}",
            remedy="start from the model it was made from, in BF16 or F16 (its model card names it)",
        )
    return known[main.dtype, scale.dtype]


def codes(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """As ``StoredFormat.codes``: a place among the magnitudes, with the sign."""
    return float_codes.signed(codebook_type(packed.grid).codebook, _stored(packed, fields, first, last))


def _stored(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.uint8]:
    """uint8 (n, K)."""
    some = np.asarray(fields["weight"], np.uint8)[first:last]
    return float_codes.halves_apart(some) if packed.bits == 4 else some


def zeros(packed: PackedMatrix, fields: Fields, first: int, last: int) -> None:
    """As ``StoredFormat.zeros``: none."""
    del packed, fields, first, last


def scales(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.scales``; NaN for codes of scales that are no number."""
    stored, nested = fields["weight_scale"], codebook_type(packed.grid).nested
    if nested == "e4m3":
        whole = np.asarray(fields["weight_scale_2"], np.float32).reshape(-1)[0]
        return np.asarray(_LEVELS["e4m3"][stored[first:last]] * whole, np.float32)
    if nested.startswith("e8m0"):
        return float_codes.POWERS[np.asarray(stored[first:last], np.uint8)]
    each = np.broadcast_to(load_floats(np.asarray(stored)).reshape(-1, 1), (packed.rows, 1))
    return np.ascontiguousarray(each[first:last])


def unpack(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.unpack``."""
    levels = _LEVELS[codebook_type(packed.grid).codebook][_stored(packed, fields, first, last)]
    each = scales(packed, fields, first, last)
    with np.errstate(invalid="ignore", over="ignore"):
        values = (levels.reshape(last - first, each.shape[1], -1) * each[:, :, None]).reshape(levels.shape)
        if _BEFORE in packed.fields:
            values = values * load_floats(np.asarray(fields[_BEFORE]))
    return np.ascontiguousarray(values, np.float32)


def held(packed: PackedMatrix, fields: Fields, first: int, last: int) -> HeldRows | None:
    """As ``StoredFormat.held``; None for codes and scales that are no numbers, and columns with scales of their own."""
    if _BEFORE in packed.fields:
        return None
    kind, stored = codebook_type(packed.grid), _stored(packed, fields, first, last)
    each = scales(packed, fields, first, last)
    rungs = np.asarray(fields["weight_scale"], np.uint8)[first:last] if kind.coded else None
    whole = fields.get("weight_scale_2")
    step = None if whole is None else np.asarray(whole, np.float32).reshape(1, 1)
    return float_codes.held(kind, stored, each, packed.scale, rungs=rungs, step=step)


def check(packed: PackedMatrix, settings: Settings, fields: Fields, first: int, last: int) -> Iterator[tuple[str, str]]:
    """As ``StoredFormat.check``: the scale of the whole matrix, and codes that are no number."""
    del settings
    if first == 0 and "weight_scale_2" in packed.fields:
        whole = float(np.asarray(fields["weight_scale_2"], np.float32).reshape(-1)[0])
        if not (np.isfinite(whole) and whole > 0):
            yield "weight_scale_2", "the scale of the matrix is not a positive number"
    if packed.bits == 8 and np.isnan(_LEVELS["e4m3"][_stored(packed, fields, first, last)]).any():
        yield "weight", f"codes of rows {first} to {last} are no numbers"


def check_settings(settings: Settings, matrices: Mapping[str, PackedMatrix]) -> Iterator[str]:
    """As ``StoredFormat.check_settings``: nothing, as the types of the tensors say all."""
    del settings, matrices
    yield from ()


def layout_name(matrices: Collection[PackedMatrix]) -> str:
    """NVFP4, MXFP4, MXFP8, FP8."""
    return "+".join(sorted({matrix.layout.name for matrix in matrices}))


def level_of(matrices: Collection[PackedMatrix]) -> str:
    """As ``layout_name``."""
    return layout_name(matrices)
