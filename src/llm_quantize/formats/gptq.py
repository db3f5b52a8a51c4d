"""GPTQ checkpoints as AutoGPTQ began and GPTQModel, Transformers and vLLM read them.

K = in, N = out, G = groups, b = bits, codes q and zero points z from 0; w = scales * (q - z):

    qweight  int32    (K b / 32, N)   codes, packed along K, least significant bits first; 3 bits cross words
    qzeros   int32    (G, N b / 32)   zero points packed along N: z - 1 in format "gptq" (1), z in "gptq_v2"
    scales   float16  (G, N)
    g_idx    int32    (K,)            the group of each input channel: k // group, unless it is kept from a source that
                                      has another order; some leave it out, and have scales of another float type

*Zero points.* Symmetric grids have z = 2^(b-1) and are written in format 1, which everything reads. In format 1 a zero
point of 0 is stored as -1, all ones, and readers that add 1 to whole words carry it into the neighbour; and GPTQModel
takes asymmetric format 1 only from itself. So asymmetric grids are written in format 2, and a zero point of 0 is
refused in format 1.

*Order of activations.* The optimiser visits columns in the order of their importance on grids fixed before, so g_idx
stays sequential, no kernel has to permute anything, and ``desc_act`` is false in the file (static ordering). A file
that said true with this g_idx would mean the same, but vLLM refuses it, and others take a slower path for nothing;
so there is no option for it. What others quantized with groups that follow the order (act-order) is kept with its
g_idx, and then ``desc_act`` is true.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import llm_quantize
from llm_quantize.errors import UnsupportedError, printable
from llm_quantize.formats.base import Array, Coverage, Field, Mixes, Scheme, SchemeOptions
from llm_quantize.formats.bitpack import pack_bits, packed_words, unpack_bits
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
    declared_bits,
    flat_settings,
    group_index,
    group_size,
    groups_by_row,
    held_integers,
    held_words,
    in_order,
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
from llm_quantize.kernels.repack import INPUTS, Room, moved
from llm_quantize.qtypes.held import HeldRows, HeldWords
from llm_quantize.qtypes.integer import IntegerType

if TYPE_CHECKING:
    from llm_quantize.grids.grid import Grid

NAME = "gptq"
TITLE = "GPTQ"
LABEL = "GPTQ-{level}"
FORMS: Sequence[str] = ("gptq", "gptq_v2")
RESCALES = False
LAYOUT = Layout("gptq", ("qweight", "qzeros", "scales"), ("g_idx",), "qweight", "scales", "g_idx")
EXAMPLE = DEFAULT = "4bit"
TRANSFORM = "none"
SYMMETRIC = True
NEEDS = "optimum gptqmodel"
KERNEL = 'GPTQConfig(bits={bits}, backend="gptq_torch")'
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
ACT_ORDER = True
vllm_caution = no_caution
inputs = as_they_are
input_fields = no_fields
refuse = takes_any
groups = usual_groups
configured = with_quantization
_BITS = {"2bit": 2, "3bit": 3, "4bit": 4, "8bit": 8}
LEVELS: Sequence[str] = tuple(_BITS)
_LAYER = re.compile(r"\.(\d+)\.")


def scheme(level: str, options: SchemeOptions) -> Scheme:
    """Symmetric with groups of 128 unless the options say otherwise. Raises UsageError."""
    name, bits = parse_bits(level, NAME, _BITS)
    group = 128 if options.group_size is None else options.group_size
    symmetric = options.symmetric is not False
    grid = IntegerType(bits, group, symmetric, "float16")
    return Scheme(NAME, name, grid, "gptq" if symmetric else "gptq_v2")


def title(_scheme: Scheme) -> str:
    """Its name for people."""
    return TITLE


def fields(scheme: Scheme, rows: int, columns: int, *, name: str | None = None) -> tuple[Field, ...]:
    """The tensors of a matrix (rows, columns). Raises UsageError naming the module where it does not fit."""
    bits, groups = scheme.qtype.bits, check_group(scheme, columns, name)
    check_words("columns", columns, bits, name)
    check_words("rows", rows, bits, name)
    return (
        Field("qweight", "int32", (columns * bits // 32, rows)),
        Field("qzeros", "int32", (groups, rows * bits // 32)),
        Field("scales", "float16", (groups, rows)),
        Field("g_idx", "int32", (columns,)),
    )


def pack(scheme: Scheme, grid: Grid, codes: Any) -> list[Array]:
    """qweight, qzeros, scales, g_idx of ``codes`` uint8 (rows, columns) on ``grid``, which may have an index.

    Raises UnsupportedError for a zero point of 0 in format 1, NumericPolicyError for scales that are not finite,
    ValueError for a grid of another kind.
    """
    bits, first = scheme.qtype.bits, _first(scheme)
    scales, zeros = grid_numbers(scheme, grid, 0, (1 << bits) - 1 + first)
    if first and (zeros == 0).any():
        row, group = (int(index) for index in np.argwhere(zeros == 0)[0])
        raise UnsupportedError(
            "GPTQ's format 1 cannot store a zero point of 0: readers would carry it into the next row's",
            expected=f"zero points from 1 to {1 << bits}",
            found=f"0 at row {row}, group {group}",
            remedy="use a symmetric grid, or checkpoint_format gptq_v2",
        )
    packed = np.ascontiguousarray(pack_bits(np.ascontiguousarray(to_numpy(codes)), bits, 1).T)
    stored = (zeros - np.uint16(first)).astype(np.uint8)
    indices = np.arange(codes.shape[1], dtype=np.int32) // np.int32(grid.group)
    if grid.index is not None:
        indices = to_numpy(grid.index).astype(np.int32)
    return [
        packed,
        pack_bits(np.ascontiguousarray(stored.T), bits, 1),
        store_floats(np.ascontiguousarray(scales.T), scheme.qtype.scale),
        indices,
    ]


def _first(scheme: Scheme) -> int:
    """What is taken off zero points before they are stored."""
    return 0 if scheme.variant == "gptq_v2" else 1


def described(scheme: Scheme, rows: int, columns: int) -> PackedMatrix:
    """The description of a matrix (rows, columns) that ``pack`` made."""
    grid, minus_one = scheme.qtype, _first(scheme) == 1
    return PackedMatrix("", LAYOUT, rows, columns, grid.bits, grid.group(columns), grid.symmetric, minus_one)


def form_of(settings: Settings) -> tuple[str, bool]:
    """As ``StoredFormat.form_of``."""
    values = settings.values
    form = str(values.get("checkpoint_format") or values.get("format") or "gptq")
    return form, form in FORMS and values.get("pack_dtype", "int32") in ("int32", None)


def notes(settings: Settings) -> Iterator[str]:
    """None."""
    yield from ()


def read(tensors: Mapping[str, TensorInfo], settings: Settings, numbers: Numbers) -> Iterator[PackedMatrix]:
    """As ``StoredFormat.read``."""
    del numbers
    form, _ = form_of(settings)
    for name, found in modules(tensors, LAYOUT):
        check_present(name, LAYOUT, found)
        rows, columns, bits = _sizes(found, settings)
        declared, symmetric, varies = flat_settings(settings, bits, "sym")
        group = columns_of_group(declared, columns, groups_by_row(found["scales"]), varies=varies)
        ordered = settings.values.get("desc_act") is not True or settings.values.get("static_groups") is True
        matrix = PackedMatrix(name, LAYOUT, rows, columns, bits, group, symmetric, form == "gptq", found)
        matrix = replace(matrix, act_order=not ordered and matrix.groups > 1)
        if matrix.act_order:
            check_called_for(name, "g_idx", found, "desc_act true")
        n, k, g, across = matrix.rows, matrix.columns, matrix.groups, packed_words(rows, bits)
        yield check_fields(
            matrix,
            {
                "qweight": (("I32",), ((packed_words(k, bits), n),)),
                "qzeros": (("I32",), ((g, across),)),
                "scales": (FLOATS, ((g, n),)),
                "g_idx": (("I32",), ((k,), (0,))),
            },
        )


def _sizes(found: Mapping[str, TensorInfo], settings: Settings) -> tuple[int, int, int]:
    """(rows, columns, bits), as the shapes of the fields say."""
    main, scales, index = found["qweight"], found["scales"], found.get("g_idx")
    check_matrix(main)
    rows = scales.shape[-1] if len(scales.shape) == 2 else 0
    declared = declared_bits(settings)
    usual = max(1, declared[0] if declared else 4)
    columns = index.shape[0] if index is not None and len(index.shape) == 1 else 0
    if index is not None and columns and main.shape[0] != packed_words(columns, usual):
        _check_index_alone(index, found, settings, rows, usual)
    columns = columns or 32 * main.shape[0] // usual
    bits, rest = divmod(32 * main.shape[0], max(1, columns))
    if rest or not 2 <= bits <= 8 or not rows:
        raise misfit(main, f"codes of {rows} rows and {columns} columns in 2 to 8 bits", main.shape)
    return rows, columns, bits


def _check_index_alone(
    index: TensorInfo, found: Mapping[str, TensorInfo], settings: Settings, rows: int, bits: int
) -> None:
    """Raise IntegrityError for an ``index`` whose length fits neither codes nor scales, where zero points are of as
    many ``bits`` as the configuration says: else another field, or the configuration, would be blamed."""
    declared = group_size(settings.values.get("group_size", 128), settings.file)
    if found["qzeros"].shape[-1:] != (packed_words(rows, bits),) or declared < 1:
        return
    if index.shape[0] != declared * groups_by_row(found["scales"]):
        raise misfit(index, f"the group of each of {32 * found['qweight'].shape[0] // bits} columns", index.shape)


def codes(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """As ``StoredFormat.codes``, from 0."""
    return _places(packed, fields, first, last).astype(np.int16)


def _places(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.uint8]:
    """``codes``, uint8: words are turned, of which there are fewer than codes."""
    words = np.ascontiguousarray(fields["qweight"][:, first:last].T)
    return unpack_bits(words, packed.bits, packed.columns, 1)


def zeros(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """As ``StoredFormat.zeros``. All ones in format 1 are 2^b, although readers that add 1 to whole words carry it
    into the neighbour; ``check`` tells."""
    bits, n = packed.bits, last - first
    words = fields["qzeros"][:, first * bits // WORD : packed_words(last, bits)]
    found = unpack_bits(words, bits, n, 1).T.astype(np.int16)
    return found + np.int16(1) if packed.minus_one else found


def scales(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.scales``."""
    del packed
    return load_floats(fields["scales"][:, first:last].T)


def unpack(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.unpack``; g_idx may name groups in any order."""
    index, rows = group_index(packed, fields), (packed, fields, first, last)
    return values_of(codes(*rows), zeros(*rows), scales(*rows), index)


def held(packed: PackedMatrix, fields: Fields, first: int, last: int) -> HeldRows | None:
    """As ``StoredFormat.held``."""
    rows = (packed, fields, first, last)
    return held_integers(packed, fields, _places(*rows), 0, scales(*rows), zeros(*rows))


def words(packed: PackedMatrix, fields: Fields) -> HeldWords | None:
    """As ``StoredFormat.words``."""
    rows = (packed, fields, 0, packed.rows)
    return held_words(packed, fields, fields["qweight"], INPUTS, scales(*rows), zeros=zeros(*rows))


def repack(scheme: Scheme, held: HeldWords, room: Room) -> list[Array] | None:
    """As ``Packed.repack``."""
    bits, first = scheme.qtype.bits, _first(scheme)
    points = fits_words(scheme, held, first, (1 << bits) - 1 + first)
    if points is None:
        return None
    stored = (points - np.int16(first)).astype(np.uint8)
    columns = held.group * held.scales.shape[1]
    return [
        moved(held.words, held.layout, INPUTS, room).view(np.int32),
        pack_bits(np.ascontiguousarray(stored.T), bits, 1),
        store_floats(np.ascontiguousarray(held.scales.T), scheme.qtype.scale),
        np.arange(columns, dtype=np.int32) // np.int32(held.group),
    ]


def check(packed: PackedMatrix, settings: Settings, fields: Fields, first: int, last: int) -> Iterator[tuple[str, str]]:
    """As ``StoredFormat.check``: the order of columns, and zero points."""
    ordered = first > 0 or in_order(packed, fields)
    if not ordered and settings.values.get("desc_act") is False:
        yield "g_idx", "columns are not in the order of their groups, but the configuration says desc_act false"
    found, top = zeros(packed, fields, first, last), 1 << packed.bits
    if packed.minus_one and (found == top).any():
        row, group = (int(place) for place in np.argwhere(found == top)[0])
        yield (
            "qzeros",
            f"a zero point is stored as all ones (row {first + row}, group {group}): readers that add 1 to whole words "
            "carry it into the next row's",
        )
    if packed.symmetric and (found != top // 2).any():
        row, group = (int(place) for place in np.argwhere(found != top // 2)[0])
        yield (
            "qzeros",
            f"the zero point of row {first + row}, group {group} is {found[row, group]}, but the configuration says "
            f"sym, which is {top // 2}",
        )


def check_settings(settings: Settings, matrices: Mapping[str, PackedMatrix]) -> Iterator[str]:
    """As ``StoredFormat.check_settings``: the dynamic rules, and lm_head."""
    dynamic, names = settings.values.get("dynamic"), [matrix.name for matrix in matrices.values()]
    left_out = [rule for rule in dynamic if rule.startswith("-:")] if isinstance(dynamic, dict) else []
    matchers = ((rule, compiled(rule[2:], settings.file)) for rule in left_out)
    for rule, name in first_meant(matchers, names, settings.file):
        yield f"{name} is quantized, but the configuration's dynamic rules have {printable(rule, 200)}"
    if "lm_head.weight" in matrices and settings.values.get("lm_head") is False:
        yield "lm_head is quantized, but the configuration says lm_head false"


def layout_name(matrices: Collection[PackedMatrix]) -> str:
    """gptq, gptq_v2."""
    return "gptq" if all(matrix.minus_one for matrix in matrices) else "gptq_v2"


def level_of(matrices: Collection[PackedMatrix]) -> str:
    """4bit."""
    return f"{widths(matrices)}bit"


def config(scheme: Scheme, coverage: Coverage) -> dict[str, Any]:
    """quantization_config, with the names that GPTQModel writes.

    Linear modules of blocks that stay as they are get negative ``dynamic`` rules (GPTQModel, vLLM), and, where their
    names tell them apart in every block, ``modules_in_block_to_quantize`` names the others (Transformers).
    """
    found: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": scheme.qtype.bits,
        "group_size": scheme.qtype.group_size,
        "desc_act": scheme.act_order,
        "sym": scheme.qtype.symmetric,
        "checkpoint_format": scheme.variant,
        "lm_head": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"llm-quantize:{llm_quantize.__version__}"]},
    }
    left = [*coverage.kept, *coverage.outside]
    if left:
        found["dynamic"] = {rule: {} for rule in dict.fromkeys(map(_negative_rule, left))}
    apart = _suffixes(coverage)
    if coverage.kept and apart:
        found["modules_in_block_to_quantize"] = [apart]
    return found


def least_zero(scheme: Scheme) -> int:
    """The smallest zero point that can be stored: 1 in format 1, whose symmetric grids have none to choose."""
    return _first(scheme) if not scheme.qtype.symmetric else 0


def vllm_refusal(scheme: Scheme) -> str | None:
    """Why vLLM (0.32) refuses this scheme on every device; None where it has kernels."""
    if not scheme.qtype.symmetric:
        return "of GPTQ it takes symmetric grids only"
    if scheme.act_order:
        return "of GPTQ it takes act-order (desc_act) no longer"
    return None if scheme.qtype.bits in (4, 8) else "of GPTQ it takes 4 and 8 bits only"


def _negative_rule(name: str) -> str:
    """The rule that leaves out a module; for an expert, the whole mixture."""
    whole = mixture_of(name)
    end = r"(\..*)?$" if whole != name else "$"
    return f"-:^{re.escape(whole)}{end}"


def _suffixes(coverage: Coverage) -> list[str]:
    """The modules that are packed wherever a block has them, in its own terms; none where a module of such a name stays
    as it is, or where there are experts."""
    suffixes: dict[str, None] = {}
    for name in coverage.quantized:
        found = _LAYER.search(name)
        if found is None or mixture_of(name) != name:
            return []
        suffixes[name[found.end() :]] = None
    return [] if any(name.endswith(tuple(suffixes)) for name in coverage.kept) else list(suffixes)
