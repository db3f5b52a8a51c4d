"""bitsandbytes checkpoints as Transformers saves and reads them: NF4 and FP4 in blocks, and LLM.int8.

N = out, K = in, B = N K / block, all in the order of rows; codes stand for the levels of qtypes/codebook.py:

    weight                              uint8    (N K / 2, 1)   two codes a byte, the first one in the high half
    weight.absmax                       float32  (B,)           s of each block: w = s * level
                                        uint8    (B,)           double quantization: s = map[code] * nested + offset
    weight.quant_map                    float32  (16,)          the levels by code
    weight.nested_absmax                float32  (B / 256,)     of 256 scales each
    weight.nested_quant_map             float32  (256,)         the map of scales
    weight.quant_state.bitsandbytes__T  uint8    (n,)           JSON: quant_type T, blocksize, dtype, shape, and of
                                                                double quantization nested_offset and two more

    weight                              int8     (N, K)         LLM.int8: w = SCB * q / 127, q from -127
    SCB                                 float32  (N,)
    weight_format                       uint8    ()             0: in the order of rows

Read from bitsandbytes 0.50 and Transformers 5.23. FP4's codes are bit patterns, not in the order of their levels. The
JSON is padded with spaces, so that its size is known before the offset is. Kernels know the levels by the name of the
type; the scales are free numbers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import NumericPolicyError, UnsupportedError, UsageError, printable
from llm_quantize.formats.base import Array, Coverage, Field, Scheme, SchemeOptions
from llm_quantize.formats.expressions import Meaning, first_meant
from llm_quantize.formats.level_names import known_level
from llm_quantize.formats.packed import (
    Fields,
    Layout,
    Numbers,
    PackedMatrix,
    Settings,
    check_fields,
    check_matrix,
    check_present,
    misfit,
    modules,
    no_words,
    wrong_form,
)
from llm_quantize.formats.packing import (
    NO_CACHES,
    as_they_are,
    check_group,
    fixed_groups,
    no_caution,
    no_fields,
    no_repacking,
    takes_any,
    to_numpy,
    with_quantization,
)
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.qtypes.codebook import BLOCKS, CODEBOOKS, NESTED_BLOCK, CodebookType
from llm_quantize.qtypes.held import HeldRows
from llm_quantize.qtypes.integer import WHOLE_ROW

if TYPE_CHECKING:
    from llm_quantize.grids.grid import Grid

NAME = "bitsandbytes"
TITLE = "bitsandbytes"
LABEL = "BNB-{level}"
EXAMPLE = "NF4"
DEFAULT: str | None = None
TRANSFORM = "none"
SYMMETRIC = None
NEEDS = "bitsandbytes"
KERNEL = ""
EXPERTS_IN_TRANSFORMERS = False
PACKS_EXPERTS = False
OWN_ROUNDING = True
VLLM_STEPS: Sequence[tuple[str, tuple[int, int]]] = ()
OFFSETS = "zero points"
OPTIONS: Sequence[str] = ("--double-quant", "--compute-dtype")
EDGES = False
UNNAMED = None
RUNTIME = None
MIXES = None
CACHES = NO_CACHES
ACT_ORDER = False
vllm_caution = no_caution
words = no_words
repack = no_repacking
inputs = as_they_are
input_fields = no_fields
refuse = takes_any
groups = fixed_groups
configured = with_quantization
RESCALES = False
LEVELS: Sequence[str] = ("NF4", "FP4", "INT8")
DEFAULT_GROUP = 64
THRESHOLD = 6.0
"""Inputs beyond this are multiplied in 16 bit (LLM.int8): the library's default."""

_KEYS = ("load_in_4bit", "load_in_8bit")
FORMS: Sequence[str] = _KEYS
_STATE = "weight.quant_state.bitsandbytes__"
_BLOCKS4 = {
    kind: Layout(
        kind,
        ("weight", "weight.absmax", "weight.quant_map", f"{_STATE}{kind}"),
        ("weight.nested_absmax", "weight.nested_quant_map"),
        telling=f"{_STATE}{kind}",
        scales="weight.absmax",
    )
    for kind in ("nf4", "fp4")
}
_ROWS8 = Layout("row8", ("weight", "SCB"), ("weight_format",), telling="SCB", scales="SCB")
_PATTERNS: Mapping[str, tuple[int, ...]] = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}
"""The stored code of each level, in the order of levels."""
_ZERO = {"nf4": 7, "fp4": 7, "row8": 127}
_OFFSET_ROOM = 24
_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class State:
    """What the JSON of a matrix says."""

    shape: tuple[int, int]
    block: int
    offset: float | None


def scheme(level: str, options: SchemeOptions) -> Scheme:
    """NF4 or FP4 in blocks of 64 with float32 scales, or LLM.int8, unless the options say otherwise.

    Raises UsageError.
    """
    level = known_level(level, NAME, LEVELS, usual={4: "NF4", 8: "INT8"})
    compute = options.compute_dtype or options.scale
    if compute not in _DTYPES:
        raise UsageError("bitsandbytes does not compute in this type", expected=", ".join(_DTYPES), found=compute)
    if options.symmetric is False:
        raise UsageError(f"{NAME} has no zero points", remedy="leave --asym out")
    if level != "INT8":
        block = DEFAULT_GROUP if options.group_size is None else options.group_size
        return Scheme(NAME, level, CodebookType(level.lower(), block, "dq" if options.double_quant else ""), compute)
    if options.group_size not in (None, WHOLE_ROW) or options.double_quant:
        raise UsageError(
            "LLM.int8 has one float32 scale for each row", remedy="leave --blocksize and --double-quant out"
        )
    return Scheme(NAME, level, CodebookType("row8", WHOLE_ROW), compute)


def title(_scheme: Scheme) -> str:
    """Its name for people."""
    return TITLE


def fields(scheme: Scheme, rows: int, columns: int, *, name: str | None = None) -> tuple[Field, ...]:
    """The tensors of a matrix (rows, columns). Raises UsageError naming the module where blocks do not divide it."""
    grid = _grid(scheme)
    if grid.codebook == "row8":
        return (
            Field("weight", "int8", (rows, columns)),
            Field("SCB", "float32", (rows,)),
            Field("weight_format", "uint8", ()),
        )
    blocks = rows * check_group(scheme, columns, name)
    found = [
        Field("weight", "uint8", (rows * columns // 2, 1)),
        Field("weight.absmax", "uint8" if grid.nested else "float32", (blocks,)),
        Field("weight.quant_map", "float32", (16,)),
    ]
    if grid.nested:
        found += [
            Field("weight.nested_absmax", "float32", (-(-blocks // NESTED_BLOCK),)),
            Field("weight.nested_quant_map", "float32", (256,)),
        ]
    state = Field(f"{_STATE}{grid.codebook}", "uint8", (len(_state(scheme, rows, columns, 0.0)),))
    return (*found, state)


def _grid(scheme: Scheme) -> CodebookType:
    if not isinstance(scheme.qtype, CodebookType):
        raise ValueError(f"{scheme.qtype.name} is no grid of {NAME}")
    return scheme.qtype


def _state(scheme: Scheme, rows: int, columns: int, offset: float) -> bytes:
    """The JSON of a matrix, of one size whatever the offset."""
    grid = _grid(scheme)
    facts: dict[str, Any] = {
        "quant_type": grid.codebook,
        "blocksize": grid.group_size,
        "dtype": scheme.variant,
        "shape": [rows, columns],
    }
    if not grid.nested:
        return json.dumps(facts).encode()
    facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(facts)
    return (text + " " * (_OFFSET_ROOM - len(repr(offset)))).encode()


def pack(scheme: Scheme, grid: Grid, codes: Any) -> list[Array]:
    """The fields of ``codes`` uint8 (rows, columns), levels in their order, on ``grid``, as ``fields`` lists them.

    Raises NumericPolicyError for scales that are not finite, ValueError for a grid of another kind.
    """
    kind = _grid(scheme)
    rows, columns = codes.shape
    scales, found = to_numpy(grid.d).astype(np.float32, copy=False), to_numpy(codes)
    if grid.group != kind.group(columns) or (grid.ladder is not None) != bool(kind.nested):
        raise ValueError(f"a grid of this kind cannot be stored as {kind.name}")
    if not np.isfinite(scales).all():
        row, block = (int(index) for index in np.argwhere(~np.isfinite(scales))[0])
        raise NumericPolicyError(
            "a scale is NaN or infinite",
            expected="finite scales",
            found=f"{scales[row, block]} at row {row}, block {block}",
        )
    if kind.codebook == "row8":
        return [(found.astype(np.int16) - 127).astype(np.int8), scales.reshape(-1), np.zeros((), np.uint8)]
    stored = np.array(_PATTERNS[kind.codebook], np.uint8)[found].reshape(-1)
    weight = ((stored[::2] << 4) | stored[1::2]).reshape(-1, 1)
    if grid.ladder is None:
        state = _state(scheme, rows, columns, 0.0)
        return [weight, scales.reshape(-1), _map(kind.codebook), np.frombuffer(state, np.uint8)]
    state = _state(scheme, rows, columns, grid.ladder.base)
    return [
        weight,
        to_numpy(grid.ladder.codes).reshape(-1),
        _map(kind.codebook),
        np.ascontiguousarray(to_numpy(grid.ladder.steps).reshape(-1)[::NESTED_BLOCK]),
        to_numpy(grid.ladder.levels),
        np.frombuffer(state, np.uint8),
    ]


def _map(codebook: str) -> npt.NDArray[np.float32]:
    """float32 (16,): the levels by code."""
    found = np.empty(16, np.float32)
    found[list(_PATTERNS[codebook])] = np.array(CODEBOOKS[codebook], np.float32)
    return found


def described(scheme: Scheme, rows: int, columns: int) -> PackedMatrix:
    """The description of a matrix (rows, columns) that ``pack`` made."""
    grid = _grid(scheme)
    layout = _ROWS8 if grid.codebook == "row8" else _BLOCKS4[grid.codebook]
    return PackedMatrix("", layout, rows, columns, grid.bits, grid.group(columns), True, grid=grid.name)


def form_of(settings: Settings) -> tuple[str, bool]:
    """As ``StoredFormat.form_of``."""
    said = [key for key in _KEYS if settings.values.get(key) is True]
    return " and ".join(said), len(said) == 1


def notes(settings: Settings) -> Iterator[str]:
    """As ``StoredFormat.notes``."""
    if settings.values.get("load_in_8bit") is True:
        yield "a runtime rounds activations too (LLM.int8); only its weights are measured here"


def read(tensors: Mapping[str, TensorInfo], settings: Settings, numbers: Numbers) -> Iterator[PackedMatrix]:
    """As ``StoredFormat.read``."""
    for kind, layout in _BLOCKS4.items():
        for name, found in modules(tensors, layout):
            check_present(name, layout, found)
            yield _blocks(name, kind, layout, found, settings, numbers)
    for name, found in modules(tensors, _ROWS8):
        check_present(name, _ROWS8, found)
        check_matrix(found["weight"])
        rows, columns = found["weight"].shape
        matrix = PackedMatrix(name, _ROWS8, rows, columns, 8, columns, True, False, found, "row8")
        yield check_fields(
            matrix,
            {"weight": (("I8",), ((rows, columns),)), "SCB": (("F32",), ((rows,),)), "weight_format": (("U8",), ((),))},
        )


def _blocks(
    name: str, kind: str, layout: Layout, found: Mapping[str, TensorInfo], settings: Settings, numbers: Numbers
) -> PackedMatrix:
    if found["weight"].dtype != "U8":
        raise UnsupportedError(
            "this way of quantizing is not decoded by this version",
            file=found["weight"].file,
            tensor=found["weight"].name,
            expected="codes in U8 (bnb_4bit_quant_storage uint8)",
            found=found["weight"].dtype,
            remedy="use the model that it was made from, in BF16 or F16 (its model card names it)",
        )
    state = _read_state(found[layout.telling], settings, numbers)
    rows, columns = state.shape
    blocks, nested = -(-rows * columns // state.block), "weight.nested_absmax" in found
    if nested != (state.offset is not None) or nested != ("weight.nested_quant_map" in found):
        raise misfit(found[layout.telling], "the fields of double quantization, or none of them", ())
    group = state.block if columns % state.block == 0 else 1
    qtype = f"{kind}_b{state.block}{'_dq' if nested else ''}"
    matrix = PackedMatrix(name, layout, rows, columns, 4, group, True, False, found, qtype)
    size = found[layout.telling].shape
    return check_fields(
        matrix,
        {
            "weight": (("U8",), ((-(-rows * columns // 2), 1),)),
            "weight.absmax": (("U8",) if nested else ("F32",), ((blocks,),)),
            "weight.quant_map": (("F32",), ((16,),)),
            "weight.nested_absmax": (("F32",), ((-(-blocks // NESTED_BLOCK),),)),
            "weight.nested_quant_map": (("F32",), ((256,),)),
            layout.telling: (("U8",), (size,)),
        },
    )


def _read_state(info: TensorInfo, settings: Settings, numbers: Numbers) -> State:
    """What the JSON of a matrix says. Raises IntegrityError for what makes no sense."""
    if info.dtype != "U8" or len(info.shape) != 1 or info.shape[0] > 4096:
        raise misfit(info, "a short text in U8", info.shape)
    try:
        facts = json.loads(bytes(numbers(info)))
        shape, block, offset = facts["shape"], facts["blocksize"], facts.get("nested_offset")
    except (ValueError, LookupError, TypeError) as error:
        raise misfit(info, "JSON with shape and blocksize", info.shape) from error
    sizes = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 40 for n in shape)
    if not sizes or block not in BLOCKS or not (offset is None or isinstance(offset, int | float)):
        raise wrong_form(settings.file, info.name, "a shape of two sizes and a block that kernels know", facts)
    if offset is not None and facts.get("nested_blocksize") != NESTED_BLOCK:
        raise wrong_form(settings.file, info.name, f"nested_blocksize {NESTED_BLOCK}", facts)
    return State((shape[0], shape[1]), block, None if offset is None else float(offset))


def codes(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """As ``StoredFormat.codes``: places in the order of levels, counted from zero's."""
    zero = _ZERO[packed.layout.name]
    if packed.layout is _ROWS8:
        return fields["weight"][first:last].astype(np.int16)
    place = np.empty(16, np.int16)
    place[list(_PATTERNS[packed.layout.name])] = np.arange(16, dtype=np.int16)
    found = place[_stored(packed, fields, first, last)] - zero
    return np.where(found == 1, 0, found) if packed.layout.name == "fp4" else found


def _stored(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.uint8]:
    """uint8 (n, K): codes as they are stored."""
    begin, end = first * packed.columns, last * packed.columns
    some = fields["weight"].reshape(-1)[begin // 2 : -(-end // 2)]
    halves = np.stack([some >> 4, some & 15], axis=1).reshape(-1)
    return halves[begin % 2 : begin % 2 + end - begin].reshape(last - first, packed.columns)


def zeros(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16] | None:
    """As ``StoredFormat.zeros``: there are none."""
    del packed, fields, first, last
    return None


def scales(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.scales``: one for each block; for each weight where blocks do not end with rows."""
    if packed.layout is _ROWS8:
        return np.asarray(fields["SCB"], np.float32)[first:last, None]
    block = _block_of(packed)
    begin, end = first * packed.columns, last * packed.columns
    some = _block_scales(packed, fields, begin // block, -(-end // block))
    if packed.group == block:
        return some.reshape(last - first, -1)
    index = np.arange(begin, end) // block - begin // block
    return some[index].reshape(last - first, packed.columns)


def _block_of(packed: PackedMatrix) -> int:
    return int(packed.grid.partition("_b")[2].removesuffix("_dq"))


def _block_scales(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """float32: the scales of blocks [first, last)."""
    stored = fields["weight.absmax"][first:last]
    if "weight.nested_absmax" not in fields:
        return np.asarray(stored, np.float32)
    facts = json.loads(bytes(fields[packed.layout.telling]))
    steps = fields["weight.nested_absmax"][np.arange(first, last) // NESTED_BLOCK]
    found = fields["weight.nested_quant_map"][stored] * steps + np.float32(facts["nested_offset"])
    return np.asarray(found, np.float32)


def unpack(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.unpack``."""
    each = scales(packed, fields, first, last)
    if packed.layout is _ROWS8:
        return fields["weight"][first:last].astype(np.float32) * (each * np.float32(1 / 127))
    levels = fields["weight.quant_map"][_stored(packed, fields, first, last)]
    grouped = levels.reshape(last - first, -1, packed.group) * each[:, :, None]
    return np.ascontiguousarray(grouped.reshape(last - first, packed.columns), np.float32)


def held(packed: PackedMatrix, fields: Fields, first: int, last: int) -> HeldRows | None:
    """As ``StoredFormat.held``; None where blocks do not end with rows, or the code is -128, which is no level."""
    if packed.layout is _ROWS8:
        stored = fields["weight"][first:last]
        if (stored == -128).any():
            return None
        levels, unit = np.array(CODEBOOKS["row8"], np.float32), float(np.float32(1 / 127))
        places = (stored.astype(np.int16) + 127).astype(np.uint8)
        return HeldRows(levels, places, packed.columns, scales(packed, fields, first, last), "float32", unit)
    order = list(_PATTERNS[packed.layout.name])
    levels = np.asarray(fields["weight.quant_map"], np.float32)[order]
    if packed.group != _block_of(packed) or (np.diff(levels) < 0).any():
        return None
    place = np.empty(16, np.uint8)
    place[order] = np.arange(16, dtype=np.uint8)
    places, each = place[_stored(packed, fields, first, last)], scales(packed, fields, first, last)
    found = HeldRows(levels, places, packed.group, each, "float32")
    if "weight.nested_absmax" not in fields:
        return found
    block = np.arange(first * packed.groups, last * packed.groups)
    rungs = np.asarray(fields["weight.absmax"], np.uint8)[block].reshape(each.shape)
    steps = np.asarray(fields["weight.nested_absmax"], np.float32)[block // NESTED_BLOCK].reshape(each.shape)
    table = np.asarray(fields["weight.nested_quant_map"], np.float32)
    base = float(json.loads(bytes(fields[packed.layout.telling]))["nested_offset"])
    return replace(found, rungs=rungs, rung_levels=table, steps=steps, base=base)


def check(packed: PackedMatrix, settings: Settings, fields: Fields, first: int, last: int) -> Iterator[tuple[str, str]]:
    """As ``StoredFormat.check``: levels other than those that kernels have, and orders of codes that are read wrong."""
    del settings, last
    if first:
        return
    if packed.layout is _ROWS8:
        if int(fields.get("weight_format", np.zeros((), np.uint8))) != 0:
            yield "weight_format", "the codes are not in the order of rows"
    elif not np.allclose(fields["weight.quant_map"], _map(packed.layout.name), rtol=0, atol=1e-6):
        yield "weight.quant_map", f"its levels are not those of {packed.layout.name}, which kernels compute with"


def check_settings(settings: Settings, matrices: Mapping[str, PackedMatrix]) -> Iterator[str]:
    """As ``StoredFormat.check_settings``: the type, and modules that are said not to be quantized."""
    said = settings.values.get("bnb_4bit_quant_type")
    for matrix in matrices.values():
        if matrix.layout is not _ROWS8 and said is not None and said != matrix.layout.name:
            yield f"{matrix.name} is {matrix.layout.name}, but the configuration says {printable(repr(said), 40)}"
    skipped, names = settings.values.get("llm_int8_skip_modules"), [matrix.name for matrix in matrices.values()]
    rules = [rule for rule in skipped if isinstance(rule, str)] if isinstance(skipped, list) else []
    within = ((rule, _module_of(rule)) for rule in dict.fromkeys(rules))
    for rule, name in first_meant(within, names, settings.file):
        yield f"{name} is quantized, but llm_int8_skip_modules has {printable(rule, 200)}"


def _module_of(rule: str) -> Meaning:
    """Whether a module is the one that ``rule`` names, or a part of it."""
    return lambda name: name == rule or name.endswith(f".{rule}") or name.startswith(f"{rule}.")


def layout_name(matrices: Collection[PackedMatrix]) -> str:
    """nf4, fp4, row8."""
    return "+".join(sorted({matrix.layout.name for matrix in matrices}))


def level_of(matrices: Collection[PackedMatrix]) -> str:
    """NF4, FP4, INT8."""
    return "+".join(sorted({"INT8" if matrix.layout is _ROWS8 else matrix.layout.name.upper() for matrix in matrices}))


def config(scheme: Scheme, coverage: Coverage) -> dict[str, Any]:
    """quantization_config, key for key as Transformers writes it; llm_int8_skip_modules names what is not packed."""
    grid = _grid(scheme)
    four = grid.codebook != "row8"
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": scheme.variant if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": grid.codebook if four else "fp4",
        "bnb_4bit_use_double_quant": bool(grid.nested),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": [*coverage.kept, *coverage.outside, coverage.head],
        "llm_int8_threshold": THRESHOLD,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": NAME,
    }


def least_zero(_scheme: Scheme) -> int:
    """There are no zero points."""
    return 0


def vllm_refusal(_scheme: Scheme) -> str | None:
    """vLLM (0.32) has a loader for all of it, on CUDA."""
    return None
