"""AWQ checkpoints in AutoAWQ's "gemm" layout, which llm-awq's kernels want. Its other layouts are in awq_gemv.py.

K = in, N = out, G = groups, codes q and zero points z from 0 to 15; w = scales * (q - z):

    qweight  int32    (K, N / 8)   nibble i of word c, lowest first, is column 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    qzeros   int32    (G, N / 8)   z as it is, in the same order
    scales   float16  (G, N)

Every reader of this layout takes its zero points from qzeros, so a symmetric grid is stored with z = 8 and
``zero_point`` true all the same: with false, AutoAWQ and vLLM have no kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import UnsupportedError, printable
from llm_quantize.formats import awq_gemv as gemv
from llm_quantize.formats.base import Array, Coverage, Field, Mixes, Scheme, SchemeOptions
from llm_quantize.formats.bitpack import packed_words
from llm_quantize.formats.expressions import Meaning, first_meant
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
    columns_of_group,
    flat_settings,
    group_index,
    groups_by_row,
    held_integers,
    held_words,
    misfit,
    modules,
    values_of,
    widths,
)
from llm_quantize.formats.packing import (
    MARLIN_STEPS,
    NO_CACHES,
    as_they_are,
    check_group,
    check_words,
    fits_words,
    grid_numbers,
    load_floats,
    mixture_of,
    no_caution,
    no_fields,
    parse_bits,
    store_floats,
    takes_any,
    to_numpy,
    usual_groups,
    with_quantization,
)
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.kernels.repack import INTERLEAVED, Room, moved
from llm_quantize.qtypes.held import HeldRows, HeldWords
from llm_quantize.qtypes.integer import IntegerType

if TYPE_CHECKING:
    from llm_quantize.grids.grid import Grid

NAME = "awq"
TITLE = "AWQ"
LABEL = "AWQ-{level}"
FORMS: Sequence[str] = ("gemm", *gemv.LAYOUTS)
RESCALES = True
LAYOUT = Layout("awq", ("qweight", "qzeros", "scales"), (), "qweight", "scales")
LAYOUTS = (LAYOUT, *gemv.LAYOUTS.values())
EXAMPLE = DEFAULT = "4bit"
TRANSFORM = "awq"
SYMMETRIC = False
NEEDS = "gptqmodel"
KERNEL = 'AwqConfig(bits={bits}, backend="torch_awq")'
EXPERTS_IN_TRANSFORMERS = False
DEFAULT_GROUP = 128
PACKS_EXPERTS = True
OWN_ROUNDING = False
VLLM_STEPS = MARLIN_STEPS
OFFSETS = "zero points"
OPTIONS: Sequence[str] = ()
EDGES = False
UNNAMED = None
RUNTIME = None
MIXES: Mixes | None = None
CACHES = NO_CACHES
ACT_ORDER = False
vllm_caution = no_caution
inputs = as_they_are
input_fields = no_fields
refuse = takes_any
groups = usual_groups
configured = with_quantization
LEVELS: Sequence[str] = ("4bit",)
BITS = 4
_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


def scheme(level: str, options: SchemeOptions) -> Scheme:
    """With zero points and groups of 128 unless the options say otherwise. Raises UsageError."""
    parse_bits(level, NAME, {"4bit": BITS})
    group = 128 if options.group_size is None else options.group_size
    return Scheme(NAME, "4bit", IntegerType(BITS, group, options.symmetric is True, "float16"))


def title(_scheme: Scheme) -> str:
    """Its name for people."""
    return TITLE


def fields(scheme: Scheme, rows: int, columns: int, *, name: str | None = None) -> tuple[Field, ...]:
    """The tensors of a matrix (rows, columns). Raises UsageError naming the module where it does not fit."""
    groups = check_group(scheme, columns, name)
    check_words("rows", rows, BITS, name)
    return (
        Field("qweight", "int32", (columns, rows // 8)),
        Field("qzeros", "int32", (groups, rows // 8)),
        Field("scales", "float16", (groups, rows)),
    )


def pack(scheme: Scheme, grid: Grid, codes: Any) -> list[Array]:
    """qweight, qzeros, scales of ``codes`` uint8 (rows, columns) on ``grid``.

    Raises NumericPolicyError for scales that are not finite, ValueError for a grid of another kind.
    """
    scales, zeros = grid_numbers(scheme, grid, 0, (1 << BITS) - 1)
    return [
        _pack(to_numpy(codes)),
        _pack(zeros.astype(np.uint8)),
        store_floats(np.ascontiguousarray(scales.T), scheme.qtype.scale),
    ]


def _pack(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """(rows, n) as words (n, rows / 8)."""
    rows, count = values.shape
    apart = values.reshape(rows // 8, 8, count)
    words = np.zeros((rows // 8, count), np.uint32)
    for place, row in enumerate(_ORDER):
        words |= apart[:, row].astype(np.uint32) << np.uint32(BITS * place)
    return np.ascontiguousarray(words.T).view(np.int32)


def _unpack(words: npt.NDArray[np.int32]) -> npt.NDArray[np.int16]:
    """(n, rows / 8) words as (rows, n)."""
    return _places(words).astype(np.int16)


def _places(words: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    turned = np.ascontiguousarray(words.T).view(np.uint32)
    values = np.empty((len(turned), 8, turned.shape[1]), np.uint8)
    for place, row in enumerate(_ORDER):
        values[:, row] = (turned >> np.uint32(BITS * place)) & np.uint32(15)
    return values.reshape(-1, turned.shape[1])


def described(scheme: Scheme, rows: int, columns: int) -> PackedMatrix:
    """The description of a matrix (rows, columns) that ``pack`` made."""
    grid = scheme.qtype
    return PackedMatrix("", LAYOUT, rows, columns, BITS, grid.group(columns), grid.symmetric)


def form_of(settings: Settings) -> tuple[str, bool]:
    """As ``StoredFormat.form_of``."""
    form = str(settings.values.get("version") or settings.values.get("format") or "gemm").lower()
    return form, form in FORMS


def notes(settings: Settings) -> Iterator[str]:
    """None."""
    yield from ()


def read(tensors: Mapping[str, TensorInfo], settings: Settings, numbers: Numbers) -> Iterator[PackedMatrix]:
    """As ``StoredFormat.read``."""
    del numbers
    other = gemv.LAYOUTS.get(form_of(settings)[0])
    if other is not None:
        yield from gemv.read(tensors, settings, other)
        return
    for name, found in modules(tensors, LAYOUT):
        check_present(name, LAYOUT, found)
        rows, columns = _sizes(found)
        declared, asymmetric, varies = flat_settings(settings, BITS, "zero_point")
        group = columns_of_group(declared, columns, groups_by_row(found["scales"]), varies=varies)
        matrix = PackedMatrix(name, LAYOUT, rows, columns, BITS, group, not asymmetric, False, found)
        words = packed_words(rows, BITS)
        yield check_fields(
            matrix,
            {
                "qweight": (("I32",), ((columns, words),)),
                "qzeros": (("I32",), ((matrix.groups, words),)),
                "scales": (FLOATS, ((matrix.groups, rows),)),
            },
        )


def _sizes(found: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """(rows, columns), as the shapes of the fields say."""
    main, scales = found["qweight"], found["scales"]
    check_matrix(main)
    rows = scales.shape[-1] if len(scales.shape) == 2 else 0
    bits, rest = divmod(32 * main.shape[1], max(1, rows))
    if not rest and 2 <= bits <= 8 and bits != BITS:
        raise UnsupportedError(
            "AWQ is decoded in 4 bits only",
            file=main.file,
            tensor=main.name,
            expected="4 bits",
            found=f"{bits} bits",
        )
    if rest or bits != BITS or not rows:
        raise misfit(main, f"codes of {rows} rows and {main.shape[0]} columns in 2 to 8 bits", main.shape)
    return rows, main.shape[0]


def codes(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """As ``StoredFormat.codes``, from 0."""
    if packed.layout is not LAYOUT:
        return gemv.codes(packed, fields, first, last)
    return _unpack(fields["qweight"][:, first // 8 : -(-last // 8)])


def zeros(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """As ``StoredFormat.zeros``."""
    if packed.layout is not LAYOUT:
        return gemv.zeros(packed, fields, first, last)
    return _unpack(fields["qzeros"][:, first // 8 : -(-last // 8)])


def scales(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.scales``."""
    if packed.layout is not LAYOUT:
        return gemv.scales(packed, fields, first, last)
    return load_floats(fields["scales"][:, first:last].T)


def unpack(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.unpack``."""
    rows = (packed, fields, first, last)
    if packed.layout is not LAYOUT:
        return gemv.unpack(*rows)
    return values_of(codes(*rows), zeros(*rows), scales(*rows), group_index(packed, fields))


def held(packed: PackedMatrix, fields: Fields, first: int, last: int) -> HeldRows | None:
    """As ``StoredFormat.held``."""
    if packed.layout is not LAYOUT:
        return gemv.held(packed, fields, first, last)
    places = _places(fields["qweight"][:, first // 8 : -(-last // 8)])
    rows = (packed, fields, first, last)
    return held_integers(packed, fields, places, 0, scales(*rows), zeros(*rows))


def words(packed: PackedMatrix, fields: Fields) -> HeldWords | None:
    """As ``StoredFormat.words``."""
    rows = (packed, fields, 0, packed.rows)
    if packed.layout is not LAYOUT:
        return None
    return held_words(packed, fields, fields["qweight"], INTERLEAVED, scales(*rows), zeros=zeros(*rows))


def repack(scheme: Scheme, held: HeldWords, room: Room) -> list[Array] | None:
    """As ``Packed.repack``."""
    points = fits_words(scheme, held, 0, (1 << BITS) - 1)
    if points is None:
        return None
    return [
        moved(held.words, held.layout, INTERLEAVED, room).view(np.int32),
        _pack(points.astype(np.uint8)),
        store_floats(np.ascontiguousarray(held.scales.T), scheme.qtype.scale),
    ]


def check(packed: PackedMatrix, settings: Settings, fields: Fields, first: int, last: int) -> Iterator[tuple[str, str]]:
    """As ``StoredFormat.check``: nothing, as every value of every field is one that readers understand."""
    yield from ()


def check_settings(settings: Settings, matrices: Mapping[str, PackedMatrix]) -> Iterator[str]:
    """As ``StoredFormat.check_settings``: modules that are not to be converted."""
    left, names = settings.values.get("modules_to_not_convert"), [matrix.name for matrix in matrices.values()]
    rules = [rule for rule in left if isinstance(rule, str)] if isinstance(left, list) else []
    within = ((rule, _part_of(rule)) for rule in dict.fromkeys(rules))
    for rule, name in first_meant(within, names, settings.file):
        told = printable(rule, 200)
        yield f"{name} is quantized, but the configuration's modules_to_not_convert has {told}"


def _part_of(rule: str) -> Meaning:
    return lambda name: rule in name


def layout_name(matrices: Collection[PackedMatrix]) -> str:
    """gemm, gemv, gemv_fast."""
    names = {layout: name for name, layout in gemv.LAYOUTS.items()}
    return "+".join(sorted({names.get(matrix.layout, FORMS[0]) for matrix in matrices}))


def level_of(matrices: Collection[PackedMatrix]) -> str:
    """4bit."""
    return f"{widths(matrices)}bit"


def config(scheme: Scheme, coverage: Coverage) -> dict[str, Any]:
    """quantization_config, with the names that AutoAWQ writes.

    ``modules_to_not_convert`` stays null where only the output matrix is left: readers know it, and vLLM then takes
    the rest from the headers.
    """
    left = list(dict.fromkeys(map(mixture_of, [*coverage.kept, *coverage.outside])))
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": scheme.qtype.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [*left, coverage.head] if left else None,
    }


def least_zero(_scheme: Scheme) -> int:
    """Every code can be a zero point."""
    return 0


def vllm_refusal(_scheme: Scheme) -> str | None:
    """Nothing: vLLM (0.32) has kernels for every scheme of this form."""
    return None
