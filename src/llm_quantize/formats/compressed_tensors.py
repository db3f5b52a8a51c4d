"""compressed-tensors: its ``pack-quantized`` and ``int-quantized`` forms, as the package of that name (0.20) writes
and checks them. Its forms of floats are in compressed_floats.py.

N = out, K = in, G = groups, b = bits, codes q and zero points z from 0; w = weight_scale * (q - z):

    weight_packed      int32  (N, ceil(K b / 32))   codes, dense along K, any b; 32 values in b words
    weight_scale       bf16 or f16 (N, G)           in the type of the checkpoint's weights
    weight_shape       int64  (2,)                  N, K
    weight_zero_point  int32  (ceil(N b / 32), G)   zero points packed along N; only where the grid is asymmetric
    weight_g_idx       int32  (K,)                  the group of each column (actorder "group"): read, and not written,
                                                    as the package refuses it since 0.20

    weight             int8   (N, K)                int-quantized: signed codes, with weight_scale (N, 1); others also
                                                    (N, G) or one for all, and perhaps weight_zero_point int8 (N, G)

The package counts codes from -2^(b-1) and adds 2^(b-1) before packing, to zero points too: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import UnsupportedError, UsageError, printable
from llm_quantize.formats import compressed_floats as floats
from llm_quantize.formats import compressed_levels as levels
from llm_quantize.formats import compressed_mixed as mixed
from llm_quantize.formats import kv_cache
from llm_quantize.formats.base import Array, Field, Mixes, Scheme
from llm_quantize.formats.bitpack import pack_bits, packed_words, unpack_bits
from llm_quantize.formats.compressed_groups import Groups, weights_of
from llm_quantize.formats.compressed_inputs import FIELDS as INPUT_FIELDS
from llm_quantize.formats.compressed_inputs import SHAPES as INPUT_SHAPES
from llm_quantize.formats.compressed_inputs import InputsOf
from llm_quantize.formats.compressed_inputs import field_of as inputs_field
from llm_quantize.formats.compressed_levels import (
    LEVELS,
    NAME,
    PACKED_FORM,
    PLAIN_FORM,
    config,
    inputs,
    is_fixed,
    is_plain,
    scheme,
    vllm_caution,
    vllm_refusal,
)
from llm_quantize.formats.expressions import compiled, first_meant
from llm_quantize.formats.packed import (
    FLOATS,
    WORD,
    Fields,
    Layout,
    Numbers,
    PackedMatrix,
    Settings,
    check_called_for,
    check_fields,
    check_matrix,
    check_present,
    columns_of_group,
    contradicts,
    declared_bits,
    group_index,
    group_size,
    held_integers,
    held_words,
    misfit,
    modules,
    values_of,
    weights_of_groups,
    wrong_form,
)
from llm_quantize.formats.packing import (
    MARLIN_STEPS,
    check_group,
    fits_words,
    fixed_groups,
    grid_numbers,
    load_floats,
    store_floats,
    takes_any,
    to_numpy,
    usual_groups,
    with_quantization,
)
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.kernels.repack import ROWS, Room, moved
from llm_quantize.qtypes.codebook import CodebookType
from llm_quantize.qtypes.held import HeldRows, HeldWords
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.qtypes.integer import WHOLE_ROW

if TYPE_CHECKING:
    from llm_quantize.grids.grid import Grid

__all__ = ["LEVELS", "NAME", "config", "inputs", "scheme", "vllm_caution", "vllm_refusal"]

TITLE = "compressed-tensors (pack-quantized)"
LABEL = "{level}"
EXAMPLE = "W4A16"
DEFAULT: str | None = None
TRANSFORM = "none"
SYMMETRIC = None
NEEDS = "compressed-tensors"
KERNEL = ""
EXPERTS_IN_TRANSFORMERS = True
DEFAULT_GROUP = 128
PACKS_EXPERTS = True
OWN_ROUNDING = False
VLLM_STEPS = MARLIN_STEPS
OFFSETS = "zero points"
OPTIONS: Sequence[str] = ("--kv-cache",)
EDGES = False
UNNAMED = None
RUNTIME = None
MIXES: Mixes | None = mixed
CACHES: Mapping[str, InputGrid] = {"fp8": InputGrid("e4m3", static=True)}
ACT_ORDER = False
refuse = takes_any
configured = with_quantization
FORMS: Sequence[str] = (PACKED_FORM, PLAIN_FORM, *(layout.name for layout in floats.LAYOUTS.values()))
RESCALES = True
PACKED = Layout(
    PACKED_FORM,
    ("weight_packed", "weight_scale", "weight_shape"),
    ("weight_zero_point", "weight_g_idx", *INPUT_FIELDS),
    telling="weight_packed",
    scales="weight_scale",
    index="weight_g_idx",
)
PLAIN = Layout(
    PLAIN_FORM,
    ("weight", "weight_scale"),
    ("weight_zero_point", *INPUT_FIELDS),
    telling="weight_scale",
    scales="weight_scale",
)


def groups(scheme: Scheme) -> Sequence[int]:
    """As ``Packed.groups``: W2A16 to W8A16 have a choice."""
    return fixed_groups(scheme) if is_fixed(scheme) else usual_groups(scheme)


def title(scheme: Scheme) -> str:
    """Its name for people, with the form of its matrices."""
    return f"{NAME} ({levels.form_of(scheme)})"


def fields(scheme: Scheme, rows: int, columns: int, *, name: str | None = None) -> tuple[Field, ...]:
    """The tensors of a matrix (rows, columns). Raises UsageError naming the module where groups do not divide it."""
    _check_inputs(scheme, columns, name)
    return (*_weight_fields(scheme, rows, columns, name), *input_fields(scheme))


def _check_inputs(scheme: Scheme, columns: int, name: str | None) -> None:
    """Raise UsageError where inputs are not whole groups: the package refuses to compute with them."""
    grid = inputs(scheme)
    if grid is not None and grid.group_size != WHOLE_ROW and columns % grid.group_size:
        raise UsageError(
            f"{columns} inputs are not whole groups of {grid.group_size}, in which {scheme.level} rounds them",
            tensor=name,
            expected=f"a multiple of {grid.group_size}",
            found=columns,
            remedy="a level with a scale for each row, as FP8_DYNAMIC, or --ignore with an expression that finds this "
            "module",
        )


def _weight_fields(scheme: Scheme, rows: int, columns: int, name: str | None) -> tuple[Field, ...]:
    if isinstance(scheme.qtype, CodebookType):
        return floats.fields(scheme, rows, columns, name=name)
    if is_plain(scheme):
        return Field("weight", "int8", (rows, columns)), Field("weight_scale", scheme.qtype.scale, (rows, 1))
    bits, groups = scheme.qtype.bits, check_group(scheme, columns, name, fixed=is_fixed(scheme))
    found = (
        Field("weight_packed", "int32", (rows, packed_words(columns, bits))),
        Field("weight_scale", scheme.qtype.scale, (rows, groups)),
        Field("weight_shape", "int64", (2,)),
    )
    if scheme.qtype.symmetric:
        return found
    return (*found, Field("weight_zero_point", "int32", (packed_words(rows, bits), groups)))


def pack(scheme: Scheme, grid: Grid, codes: Any) -> list[Array]:
    """weight_packed, weight_scale, weight_shape and, for an asymmetric grid, weight_zero_point of ``codes`` uint8
    (rows, columns) on ``grid``.

    Raises NumericPolicyError for scales that are not finite, ValueError for a grid of another kind.
    """
    if isinstance(scheme.qtype, CodebookType):
        return floats.pack(scheme, grid, codes)
    bits = scheme.qtype.bits
    scales, zeros = grid_numbers(scheme, grid, 0, (1 << bits) - 1)
    if is_plain(scheme):
        signed = to_numpy(codes).astype(np.int16) - (1 << (bits - 1))
        return [signed.astype(np.int8), store_floats(scales, scheme.qtype.scale)]
    found: list[Array] = [
        pack_bits(np.ascontiguousarray(to_numpy(codes)), bits, 1),
        store_floats(scales, scheme.qtype.scale),
        np.array(codes.shape, np.int64),
    ]
    return found if scheme.qtype.symmetric else [*found, pack_bits(zeros.astype(np.uint8), bits, 0)]


def input_fields(scheme: Scheme) -> tuple[Field, ...]:
    """The field of what is calibrated of a matrix's inputs; none where nothing is."""
    grid = inputs(scheme)
    if grid is None or not grid.static:
        return ()
    return (Field(inputs_field(grid), "float32" if grid.nested else scheme.qtype.scale, (1,)),)


def described(scheme: Scheme, rows: int, columns: int) -> PackedMatrix:
    """The description of a matrix (rows, columns) that ``pack`` made."""
    grid = scheme.qtype
    if isinstance(grid, CodebookType):
        return floats.described(scheme, rows, columns)
    layout = PLAIN if is_plain(scheme) else PACKED
    return PackedMatrix("", layout, rows, columns, grid.bits, grid.group(columns), grid.symmetric)


def form_of(settings: Settings) -> tuple[str, bool]:
    """As ``StoredFormat.form_of``."""
    groups = settings.values.get("config_groups", {})
    if not isinstance(groups, dict):
        raise wrong_form(settings.file, "config_groups", "an object", groups)
    inner = [one.get("format") for one in groups.values() if isinstance(one, dict)]
    kinds = {str(one) for one in (settings.values.get("format"), *inner) if one not in (None, "mixed-precision")}
    return ", ".join(sorted(kinds)), bool(kinds) and kinds <= {*FORMS, "naive-quantized"}


def notes(settings: Settings) -> Iterator[str]:
    """As ``StoredFormat.notes``."""
    if InputsOf(Groups(settings)).unknown:
        yield (
            "a runtime rounds activations too, in a way that is not followed here; of matrices whose activations it "
            "rounds so, only the weights are measured"
        )
    cache = settings.values.get("kv_cache_scheme")
    if isinstance(cache, dict) and kv_cache.grid_of(cache) is None:
        yield f"a runtime keeps keys and values as {kv_cache.words(cache)}; here they are measured as they are"


def read(tensors: Mapping[str, TensorInfo], settings: Settings, numbers: Numbers) -> Iterator[PackedMatrix]:
    """As ``StoredFormat.read``."""
    groups = Groups(settings)
    found = list(_read(tensors, settings, numbers, groups))
    grids = InputsOf(groups).of([matrix.name for matrix in found])
    for matrix in found:
        grid = grids[matrix.name]
        field = inputs_field(grid) if grid is not None and grid.static else ""
        if field:
            check_called_for(matrix.name, field, matrix.fields, "input_activations that are not dynamic")
        yield replace(matrix, inputs=grid, inputs_at=field)


def _read(
    tensors: Mapping[str, TensorInfo], settings: Settings, numbers: Numbers, groups: Groups
) -> Iterator[PackedMatrix]:
    claimed: set[str] = set()
    names = [name for layout in (PACKED, PLAIN) for name, _ in modules(tensors, layout)] if groups.mixed else []

    def group_of(name: str) -> Mapping[str, Any] | None:
        group = groups.of(name, names)
        return None if group is None else weights_of(group)

    for layout in (PACKED, PLAIN):
        for name, found in modules(tensors, layout):
            if name not in claimed:
                claimed.add(name)
                fields = {word: tensors[f"{name}.{word}"] for word in _SUFFIXES if f"{name}.{word}" in tensors}
                of_floats = floats.layout_of(fields)
                check_present(name, of_floats or layout, fields)
                if of_floats is None:
                    yield _matrix(name, layout, found, settings, numbers, group_of)
                else:
                    words = (*of_floats.required, *of_floats.optional)
                    yield floats.matrix(name, of_floats, {word: fields[word] for word in words if word in fields})


_SUFFIXES = dict.fromkeys(
    word for one in (PACKED, PLAIN, *floats.LAYOUTS.values()) for word in (*one.required, *one.optional)
)


def _matrix(
    name: str,
    layout: Layout,
    found: Mapping[str, TensorInfo],
    settings: Settings,
    numbers: Numbers,
    group_of: Callable[[str], Mapping[str, Any] | None],
) -> PackedMatrix:
    n, k, fitting = _sizes(layout, found, settings, numbers)
    if fitting[0] < 2:
        main = found[layout.required[0]]
        raise UnsupportedError(
            "codes of one bit are not decoded by this version",
            file=main.file,
            tensor=main.name,
            expected="2 to 8 bits",
            found=f"{fitting[0]} bit",
            remedy="start from the model it was made from",
        )
    scale = found["weight_scale"]
    each = scale.shape[-1] if len(scale.shape) == 2 else 1
    candidates = _candidates(settings, fitting)
    weights = candidates[0]
    if any(other != weights for other in candidates):
        weights = _of_module(name, candidates, settings, group_of(name), lambda one: _groups_of(one, k) == each)
    bits, declared = next(bits for bits in fitting if bits == weights["num_bits"]), _group_size(settings, weights)
    _check_called_for(name, layout, found, weights)
    group = columns_of_group(declared, k, each, varies=False)
    matrix = PackedMatrix(name, layout, n, k, bits, group, "weight_zero_point" not in found, False, found)
    g = matrix.groups
    matrix = replace(matrix, act_order=layout is PACKED and g > 1 and weights.get("actorder") in _BY_GROUP)
    by_row = {"weight_zero_point": (("I8",), ((n, g), (1,), (1, 1), *(((n,),) if g == 1 else ())))}
    packed_zeros = {"weight_zero_point": (("I32",), ((packed_words(n, bits), g),))}
    return check_fields(
        matrix,
        {
            **(by_row if layout is PLAIN else packed_zeros),
            "weight_packed": (("I32",), ((n, packed_words(k, bits)),)),
            "weight": (("I8",), ((n, k),)),
            "weight_scale": (FLOATS, ((n, g), *(((n,), (1,), (1, 1), ()) if g == 1 else ()))),
            "weight_shape": (("I64", "I32"), ((2,),)),
            "weight_g_idx": (("I32",), ((k,),)),
            **INPUT_SHAPES,
        },
    )


def _check_called_for(name: str, layout: Layout, found: Mapping[str, TensorInfo], weights: Mapping[str, Any]) -> None:
    """Raise IntegrityError where a field is absent that the module's group calls for."""
    if weights.get("symmetric", True) is False:
        check_called_for(name, "weight_zero_point", found, "symmetric false")
    if layout is PACKED and weights.get("actorder") in _BY_GROUP:
        check_called_for(name, "weight_g_idx", found, "actorder group")


_BY_GROUP = ("group", "dynamic", True)
"""actorder of weights whose groups follow the order, in the words of versions before 0.20."""


def _sizes(
    layout: Layout, found: Mapping[str, TensorInfo], settings: Settings, numbers: Numbers
) -> tuple[int, int, tuple[int, ...]]:
    """(rows, columns, the widths that fit the shapes of the fields, those that the configuration names first)."""
    main, declared = found[layout.required[0]], declared_bits(settings)
    check_matrix(main)
    if layout is PLAIN:
        return main.shape[0], main.shape[1], tuple(sorted(declared, reverse=True)) or (8,)
    info = found["weight_shape"]
    if (info.dtype, info.shape) not in (("I64", (2,)), ("I32", (2,))):
        raise misfit(info, "two whole numbers, int64", info.shape)
    rows, columns = map(int, numbers(info))
    if not (0 < rows < 1 << 40 and 0 < columns < 1 << 40):
        raise misfit(info, "two positive sizes", (rows, columns))
    fitting = [bits for bits in range(1, 9) if main.shape == (rows, packed_words(columns, bits))]
    if not fitting:
        raise misfit(main, f"codes of {rows} rows and {columns} columns", main.shape)
    return rows, columns, tuple(sorted(fitting, key=lambda bits: bits not in declared))


def _candidates(settings: Settings, fitting: Sequence[int]) -> list[Mapping[str, Any]]:
    """What groups of one of the widths ``fitting`` say of weights, those of integers where there are any. Raises
    IntegrityError where there is none."""
    found = [weights for weights in weights_of_groups(settings.values) if weights.get("num_bits") in fitting]
    if not found:
        known = ", ".join(map(str, declared_bits(settings))) or "no"
        raise contradicts(settings.file, f"{known} bits", f"{fitting[0]} bits")
    return [weights for weights in found if weights.get("type", "int") == "int"] or found


def _of_module(
    name: str,
    candidates: Sequence[Mapping[str, Any]],
    settings: Settings,
    meant: Mapping[str, Any] | None,
    fits: Callable[[Mapping[str, Any]], bool],
) -> Mapping[str, Any]:
    """What the module's own group, ``meant``, says of weights. Where no target means the module, as its reader has
    another name for it, the one whose groups fit its scales.

    Raises IntegrityError where its group is none of ``candidates``, or where it cannot be told.
    """
    if meant is not None:
        fitting = [meant] if meant in candidates else []
    else:
        fitting = [weights for weights in candidates if fits(weights)]
    if not fitting or any(_grid(weights) != _grid(fitting[0]) for weights in fitting):
        widths = sorted({str(weights.get("num_bits")) for weights in candidates})
        raise contradicts(
            settings.file,
            f"a group of {' or '.join(widths)} bits for {printable(name, 120)}",
            "no target that means it" if meant is None else f"its group is of {meant.get('num_bits')} bits",
        )
    return fitting[0]


def _grid(weights: Mapping[str, Any]) -> tuple[Any, ...]:
    return weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")


def _groups_of(weights: Mapping[str, Any], columns: int) -> int:
    """Scales of a row of ``columns`` by these words; 0 for words of no sense."""
    size = weights.get("group_size") if weights.get("strategy") == "group" else columns
    return -(-columns // size) if type(size) is int and size > 0 else 0


def _group_size(settings: Settings, weights: Mapping[str, Any]) -> int:
    """As a configuration says it, -1 for a whole row. Raises MalformedInputError for values of no sense,
    UnsupportedError for other ways of quantizing."""
    if weights.get("type", "int") != "int" or weights.get("strategy") not in ("group", "channel", "tensor"):
        words = f"weights of type {weights.get('type')!r}, strategy {weights.get('strategy')!r}"
        raise UnsupportedError(
            "this way of quantizing is not decoded by this version",
            file=settings.file,
            expected="integer weights with a scale for each group, channel or tensor",
            found=printable(words, 200),
        )
    return group_size(weights.get("group_size") if weights["strategy"] == "group" else -1, settings.file)


def codes(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """As ``StoredFormat.codes``, signed."""
    if packed.grid:
        return floats.codes(packed, fields, first, last)
    if packed.layout is PLAIN:
        return fields["weight"][first:last].astype(np.int16)
    found = unpack_bits(fields["weight_packed"][first:last], packed.bits, packed.columns, 1)
    return found.astype(np.int16) - _half(packed)


def zeros(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16] | None:
    """As ``StoredFormat.zeros``, signed."""
    stored = fields.get("weight_zero_point")
    if stored is None:
        return None
    if packed.layout is PLAIN:
        return _by_row(packed, stored)[first:last].astype(np.int16)
    bits = packed.bits
    words = stored[first * bits // WORD : packed_words(last, bits)]
    return unpack_bits(words, bits, last - first, 0).astype(np.int16) - _half(packed)


def scales(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.scales``."""
    if packed.grid:
        return floats.scales(packed, fields, first, last)
    return load_floats(_by_row(packed, fields["weight_scale"])[first:last])


def _by_row(packed: PackedMatrix, stored: Array) -> Array:
    """(rows, groups) of numbers that may be stored once for a row, or for all."""
    whole = stored.reshape(-1, packed.groups) if stored.size > 1 else stored.reshape(1, 1)
    return np.broadcast_to(whole, (packed.rows, packed.groups))


def _half(packed: PackedMatrix) -> np.int16:
    """What is added to signed numbers before they are packed."""
    return np.int16(1 << (packed.bits - 1))


def unpack(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.unpack``."""
    if packed.grid:
        return floats.unpack(packed, fields, first, last)
    rows = (packed, fields, first, last)
    return values_of(codes(*rows), zeros(*rows), scales(*rows), group_index(packed, fields))


def held(packed: PackedMatrix, fields: Fields, first: int, last: int) -> HeldRows | None:
    """As ``StoredFormat.held``; None where whole bytes hold codes that are not of so few bits."""
    if packed.grid:
        return floats.held(packed, fields, first, last)
    lowest, rows = -int(_half(packed)), (packed, fields, first, last)
    if packed.layout is PACKED:
        places = unpack_bits(fields["weight_packed"][first:last], packed.bits, packed.columns, 1)
    else:
        wide = codes(*rows) - np.int16(lowest)
        if (wide >> packed.bits).any():
            return None
        places = wide.astype(np.uint8)
    return held_integers(packed, fields, places, lowest, scales(*rows), zeros(*rows))


def words(packed: PackedMatrix, fields: Fields) -> HeldWords | None:
    """As ``StoredFormat.words``, of codes in words."""
    if packed.grid or packed.layout is not PACKED:
        return None
    rows = (packed, fields, 0, packed.rows)
    signed, each = zeros(*rows), scales(*rows)
    points = np.full(each.shape, _half(packed)) if signed is None else signed + _half(packed)
    return held_words(packed, fields, fields["weight_packed"], ROWS, each, zeros=points)


def repack(scheme: Scheme, held: HeldWords, room: Room) -> list[Array] | None:
    """As ``Packed.repack``, of codes in words."""
    bits = scheme.qtype.bits
    points = fits_words(scheme, held, 0, (1 << bits) - 1)
    if points is None or is_plain(scheme):
        return None
    shape = (len(held.scales), held.group * held.scales.shape[1])
    found: list[Array] = [
        moved(held.words, held.layout, ROWS, room).view(np.int32),
        store_floats(held.scales, scheme.qtype.scale),
        np.array(shape, np.int64),
    ]
    return found if scheme.qtype.symmetric else [*found, pack_bits(points.astype(np.uint8), bits, 0)]


def check(packed: PackedMatrix, settings: Settings, fields: Fields, first: int, last: int) -> Iterator[tuple[str, str]]:
    """As ``StoredFormat.check``: codes of few bits in whole bytes, and calibrated scales of inputs."""
    if packed.inputs_at and first == 0:
        (whole,) = load_floats(fields[packed.inputs_at]).reshape(-1)
        if not (np.isfinite(whole) and whole > 0):
            yield packed.inputs_at, "the scale of its inputs is not a positive number"
    if packed.layout is PLAIN and packed.bits < 8:
        found, half = codes(packed, fields, first, last), _half(packed)
        if (found < -half).any() or (found >= half).any():
            yield "weight", f"codes of rows {first} to {last} are not in {packed.bits} bits"


def check_settings(settings: Settings, matrices: Mapping[str, PackedMatrix]) -> Iterator[str]:
    """As ``StoredFormat.check_settings``: the ignore list, and which module is of which group."""
    ignored, names = settings.values.get("ignore"), {matrix.name for matrix in matrices.values()}
    rules = [rule for rule in ignored if isinstance(rule, str)] if isinstance(ignored, list) else []
    found = [(rule, rule) for rule in dict.fromkeys(rules) if rule in names]
    expressions = [rule for rule in dict.fromkeys(rules) if rule.startswith("re:")]
    matchers = ((rule, compiled(rule[3:], settings.file)) for rule in expressions)
    for rule, name in (*found, *first_meant(matchers, sorted(names), settings.file)):
        yield f"{name} is quantized, but the configuration's ignore list has {printable(rule, 200)}"
    yield from mixed.contradictions(Groups(settings), list(matrices.values()))


def layout_name(matrices: Collection[PackedMatrix]) -> str:
    """pack-quantized, int-quantized."""
    return "+".join(sorted({matrix.layout.name for matrix in matrices}))


def level_of(matrices: Collection[PackedMatrix]) -> str:
    """W4A16, W4A16_ASYM, W2-8A16, W8A8, W4AFP8, FP8, NVFP4A16."""
    named = sorted({floats.level_name(matrix) for matrix in matrices if matrix.grid})
    if named:
        return "+".join(named)
    inputs = sorted({_A_WORDS.get(matrix.inputs.codes, "") for matrix in matrices if matrix.inputs is not None})
    return mixed.mixed_level({matrix.qtype for matrix in matrices}, "+".join(inputs) or "16")


_A_WORDS = {**{f"int{bits}": str(bits) for bits in range(2, 9)}, "e4m3": "FP8", "e2m1": "FP4"}


def least_zero(_scheme: Scheme) -> int:
    """Every code can be a zero point."""
    return 0
