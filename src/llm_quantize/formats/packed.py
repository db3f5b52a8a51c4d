"""A quantized matrix as a model directory holds it, whoever wrote it; what the formats share in reading one.

N = out = rows, K = in = columns, G = groups, b = bits. Each format's module has the table of its fields. There

    q   codes (n, K)            z   zero points (n, G), or none
    s   scales (n, G)           value = s (q - z), in float32, of the group of each column: column // group, or as an
                                index field says
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import IntegrityError, MalformedInputError, printable
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.qtypes.held import HeldRows, HeldWords
from llm_quantize.qtypes.inputs import InputGrid

if TYPE_CHECKING:
    from llm_quantize.formats.base import Mixes

AGAIN = "fetch or make the model again; its files are damaged or of different versions"
ALIGNED = 32
"""Rows are unpacked in multiples of this: so many codes of any width fill whole words."""
WORD = 32
FLOATS = ("F16", "BF16", "F32")
STORED_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}

Fields = Mapping[str, npt.NDArray[Any]]
Numbers = Callable[[TensorInfo], npt.NDArray[Any]]
Shapes = Mapping[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]]


@dataclass(frozen=True)
class Layout:
    """The tensors MODULE.SUFFIX that hold one matrix. ``required``: the codes first. ``telling``: a module that has
    this one is quantized. ``scales``, ``index``: the suffixes of scales and of the group of each column ("": none)."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    telling: str
    scales: str
    index: str = ""


@dataclass(frozen=True)
class Settings:
    """A quantization_config and the file that it stands in."""

    values: Mapping[str, Any]
    file: Path


@dataclass(frozen=True)
class PackedMatrix:
    """One quantized matrix (rows, columns) of the module ``name``. ``group``: columns that share a scale (the last
    group may be shorter). ``minus_one``: stored zero points are one too small (GPTQ's first format). ``fields``:
    {suffix: stored tensor}; none of a matrix that is not in a file yet. ``grid``: the name of a grid that is not one of
    integers. ``inputs``: what a runtime rounds its inputs to; None: nothing, or nothing that is followed here;
    ``inputs_at``: the field that the calibrated number of it stands in. ``experts``: how many matrices of equal height
    lie in it one below the other. ``parameter``: the name of its weight in an unquantized model, "" for NAME.weight.
    ``act_order``: the configuration says that columns of a group do not stand side by side."""

    name: str
    layout: Layout
    rows: int
    columns: int
    bits: int
    group: int
    symmetric: bool
    minus_one: bool = False
    fields: Mapping[str, TensorInfo] = field(default_factory=dict)
    grid: str = ""
    inputs: InputGrid | None = None
    inputs_at: str = ""
    experts: int = 0
    parameter: str = ""
    act_order: bool = False

    @property
    def weight(self) -> str:
        """The name of its weight in an unquantized model."""
        return self.parameter or f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns), or (experts, rows of each, columns)."""
        return (self.experts, self.rows // self.experts, self.columns) if self.experts else (self.rows, self.columns)

    @property
    def groups(self) -> int:
        """Scales of one row."""
        return -(-self.columns // self.group)

    @property
    def qtype(self) -> str:
        """The grid in one word: int4_g128, int8, int4_g128_asym, nf4_b64."""
        if self.grid:
            return self.grid
        group = "" if self.group >= self.columns else f"_g{self.group}"
        return f"int{self.bits}{group}{'' if self.symmetric else '_asym'}"

    @property
    def scale(self) -> str:
        """How scales are stored that are floats."""
        return STORED_FLOATS.get(self.fields[self.layout.scales].dtype, "float32")

    @property
    def nbytes(self) -> int:
        """Bytes of all its fields."""
        return sum(info.nbytes for info in self.fields.values())

    @property
    def main(self) -> TensorInfo:
        """The field of its codes."""
        return self.fields[self.layout.required[0]]


class StoredFormat(Protocol):
    """A format as it is read, whoever wrote it. ``NAME``: its name, and the quant_method of its configurations;
    ``LABEL``: what people call a level of it. ``FORMS``: the names under which configurations know what is decoded.
    ``RESCALES``: what writes it may have moved scales between tensors, as AWQ does. ``MIXES``: how matrices on
    different grids may lie in one directory; None: nothing is to be said of that."""

    NAME: str
    LABEL: str
    MIXES: Mixes | None
    FORMS: Sequence[str]
    RESCALES: bool

    def form_of(self, settings: Settings) -> tuple[str, bool]:
        """What the configuration says of the form, and whether that is decoded here. Raises MalformedInputError."""

    def notes(self, settings: Settings) -> Iterator[str]:
        """What a reader of figures should know."""

    def read(self, tensors: Mapping[str, TensorInfo], settings: Settings, numbers: Numbers) -> Iterator[PackedMatrix]:
        """The quantized matrices that ``tensors`` hold, proved to fit each other from headers; ``numbers`` reads a
        field. Raises IntegrityError, MalformedInputError, UnsupportedError."""

    def codes(self, packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
        """q of rows [first, last), int16 (n, K); ``first`` is a multiple of 32."""

    def zeros(self, packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16] | None:
        """z of rows [first, last), int16 (n, G), on the count of ``codes``; ``first`` as there. None: all zero."""

    def scales(self, packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
        """s of rows [first, last), float32 (n, G)."""

    def unpack(self, packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
        """Values of rows [first, last), float32 (n, K); ``first`` is a multiple of 32, ``last`` too, or the last row.
        ``fields``: {suffix: array}, floats as they are stored (bfloat16 as bits) or in float32."""

    def held(self, packed: PackedMatrix, fields: Fields, first: int, last: int) -> HeldRows | None:
        """Rows [first, last) as they are stored, ``first`` and ``last`` as in ``unpack``; None where they are not of
        that form."""

    def words(self, packed: PackedMatrix, fields: Fields) -> HeldWords | None:
        """The whole matrix with its codes in the words of the file, where it is of integers in whole words, columns in
        the order of their groups, and ``unpack`` decodes it as ``HeldWords`` says; else None."""

    def check(
        self, packed: PackedMatrix, settings: Settings, fields: Fields, first: int, last: int
    ) -> Iterator[tuple[str, str]]:
        """(suffix of a field, what is wrong with it) of rows [first, last): what only this format can get wrong."""

    def check_settings(self, settings: Settings, matrices: Mapping[str, PackedMatrix]) -> Iterator[str]:
        """What readers take from the configuration and not from the tensors, where it contradicts the tensors.
        ``matrices``: by the names of their weights. Raises MalformedInputError for expressions that cannot be matched
        (expressions.py)."""

    def layout_name(self, matrices: Collection[PackedMatrix]) -> str:
        """The form that the matrices have, in the format's own words."""

    def level_of(self, matrices: Collection[PackedMatrix]) -> str:
        """The level that people would call this, for the format's LABEL."""


def widths(matrices: Collection[PackedMatrix]) -> str:
    """The bits of matrices in one word: 4, 4+8."""
    return "+".join(map(str, sorted({matrix.bits for matrix in matrices}))) or "none"


def modules(tensors: Mapping[str, TensorInfo], layout: Layout) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    """(module, its fields) of every module that has the layout's telling field, in file order."""
    for name in tensors:
        if not name.endswith(f".{layout.telling}"):
            continue
        module = name.removesuffix(f".{layout.telling}")
        words = (*layout.required, *layout.optional)
        fields = {word: tensors[f"{module}.{word}"] for word in words if f"{module}.{word}" in tensors}
        yield module, fields


def check_present(name: str, layout: Layout, fields: Mapping[str, TensorInfo]) -> None:
    """Raise IntegrityError unless every required field of module ``name`` is there."""
    for suffix in layout.required:
        if suffix not in fields:
            raise IntegrityError(
                "a field of a quantized matrix is absent",
                file=next(iter(fields.values())).file,
                tensor=f"{name}.{suffix}",
                expected=", ".join(layout.required),
                found=", ".join(sorted(fields)),
                remedy=AGAIN,
            )


def check_called_for(name: str, suffix: str, fields: Mapping[str, TensorInfo], why: str) -> None:
    """Raise IntegrityError where module ``name`` lacks a field, or has an empty one, that its configuration calls for:
    ``why`` says by what. Readers would take the values without it for the model's."""
    if suffix in fields and fields[suffix].elements:
        return
    raise IntegrityError(
        "a field of a quantized matrix is absent that the configuration calls for",
        file=next(iter(fields.values())).file,
        tensor=f"{name}.{suffix}",
        expected=f"{suffix}, as the configuration says {why}",
        found=", ".join(sorted(key for key, info in fields.items() if info.elements)),
        remedy=AGAIN,
    )


def check_matrix(info: TensorInfo) -> None:
    """Raise IntegrityError unless a field has two dimensions, and values in it."""
    if len(info.shape) != 2 or 0 in info.shape:
        raise misfit(info, "a matrix with at least one row and one column", info.shape)


def groups_by_row(scales: TensorInfo) -> int:
    """Scales of one row of a matrix whose ``scales`` are (G, N)."""
    return scales.shape[0] if len(scales.shape) == 2 else 1


def check_fields(packed: PackedMatrix, shapes: Shapes) -> PackedMatrix:
    """``packed``, whose fields have the shapes and types of ``shapes``: {suffix: (types, shapes)}. IntegrityError."""
    for suffix, info in packed.fields.items():
        dtypes, fitting = shapes[suffix]
        if info.dtype not in dtypes or info.shape not in fitting:
            raise misfit(info, f"{' or '.join(dtypes)} {list(fitting[0])}", info.shape)
    return packed


def check_index(packed: PackedMatrix, fields: Fields) -> None:
    """Raise IntegrityError where a column belongs to a group that there is not."""
    index = fields.get(packed.layout.index)
    if index is None or not index.size:
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= packed.groups:
        at = int(np.flatnonzero((index < 0) | (index >= packed.groups))[0])
        info = packed.fields[packed.layout.index]
        raise IntegrityError(
            "a column belongs to a group that does not exist",
            file=info.file,
            tensor=info.name,
            offset=info.offset + at * index.itemsize,
            expected=f"0 to {packed.groups - 1}",
            found=int(index[at]),
            remedy=AGAIN,
        )


def group_index(packed: PackedMatrix, fields: Fields) -> npt.NDArray[np.int64]:
    """int64 (K,): the group of each column."""
    stored = fields.get(packed.layout.index)
    if stored is None or not stored.size:
        return np.arange(packed.columns, dtype=np.int64) // packed.group
    return stored.astype(np.int64)


def in_order(packed: PackedMatrix, fields: Fields) -> bool:
    """Whether the columns of each group stand side by side, the groups one after the other."""
    stored = fields.get(packed.layout.index)
    return stored is None or not stored.size or np.array_equal(stored, np.arange(packed.columns) // packed.group)


def is_even(packed: PackedMatrix, fields: Fields) -> bool:
    """Whether all groups have as many columns. Every index is one of a group (``check_index``)."""
    counts = np.bincount(group_index(packed, fields), minlength=packed.groups)
    return bool((counts == counts[0]).all())


def values_of(
    codes: npt.NDArray[np.int16],
    zeros: npt.NDArray[np.int16] | None,
    scales: npt.NDArray[np.float32],
    index: npt.NDArray[np.int64],
) -> npt.NDArray[np.float32]:
    """s (q - z), float32 (n, K): the difference of the integers first, then one product, as the runtimes do.

    A runtime that works in 16 bit rounds this once more.
    """
    values = np.ascontiguousarray(codes, np.float32)
    groups = scales.shape[1]
    if values.shape[1] % groups == 0 and np.array_equal(index, np.arange(len(index)) // (values.shape[1] // groups)):
        seen = values.reshape(len(values), groups, -1)  # groups one after the other

        def each(numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return numbers[:, :, None]
    else:
        seen = values

        def each(numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return numbers[:, index]

    if zeros is not None:
        seen -= each(zeros.astype(np.float32))
    with np.errstate(invalid="ignore", over="ignore"):
        seen *= each(scales)
    return values


def held_integers(
    packed: PackedMatrix,
    fields: Fields,
    places: npt.NDArray[np.uint8],
    lowest: int,
    scales: npt.NDArray[np.float32],
    zeros: npt.NDArray[np.int16] | None,
) -> HeldRows | None:
    """As ``StoredFormat.held`` of integers. ``places``: uint8 (n, K), the code less ``lowest``; ``zeros`` on the count
    of codes. None where one group has fewer columns than another."""
    if packed.columns % packed.groups or (packed.groups > 1 and packed.columns % packed.group):
        return None
    group, index = packed.columns // packed.groups, None
    if not in_order(packed, fields):
        if not is_even(packed, fields):
            return None
        index = group_index(packed, fields)
    levels = np.arange(lowest, lowest + (1 << packed.bits), dtype=np.float32)
    return HeldRows(levels, places, group, scales, packed.scale, zeros=zeros, index=index)


def no_words(packed: PackedMatrix, fields: Fields) -> HeldWords | None:
    """As ``StoredFormat.words`` of a format that has none."""
    del packed, fields
    return None


def held_words(
    packed: PackedMatrix,
    fields: Fields,
    words: npt.NDArray[Any],
    layout: str,
    scales: npt.NDArray[np.float32],
    *,
    zeros: npt.NDArray[np.int16] | None = None,
    offsets: npt.NDArray[np.float32] | None = None,
) -> HeldWords | None:
    """As ``StoredFormat.words``. ``words``: int32 or uint32; ``zeros`` on the count of places."""
    if packed.columns * packed.bits % WORD or packed.columns % packed.groups:
        return None
    if packed.groups > 1 and packed.columns % packed.group:
        return None
    group = packed.columns // packed.groups
    stored = fields.get(packed.layout.index)
    if stored is not None and stored.size and not np.array_equal(stored, np.arange(packed.columns) // group):
        return None
    storage = packed.scale if packed.layout.scales in packed.fields else ""
    plain = np.ascontiguousarray(words).view(np.uint32)
    return HeldWords(plain, layout, packed.bits, group, np.ascontiguousarray(scales), storage, zeros, offsets)


def group_size(value: Any, file: Path) -> int:
    """A group size of a configuration, -1 or 0 for a whole row. Raises MalformedInputError."""
    if type(value) is not int or not (value in (-1, 0) or 1 <= value < 1 << 30):
        raise wrong_form(file, "group_size", "-1, or a positive whole number", value)
    return value


def columns_of_group(declared: int, columns: int, found: int, *, varies: bool) -> int:
    """Columns that share a scale, in a matrix with ``found`` scales in a row. ``varies``: modules may differ from what
    is declared."""
    group = columns if declared in (-1, 0) else declared
    if varies and found and found != -(-columns // group) and columns % found == 0:
        return columns // found
    return group


def declared_bits(settings: Settings) -> tuple[int, ...]:
    """Every width that the configuration names, the usual one first."""
    values = settings.values
    found = [values.get("bits"), values.get("w_bit"), *(one.get("num_bits") for one in weights_of_groups(values))]
    return tuple(dict.fromkeys(bits for bits in found if type(bits) is int and 1 <= bits <= 8))


def weights_of_groups(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What compressed-tensors' config_groups say of weights."""
    groups = values.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights


def flat_settings(settings: Settings, bits: int, flag: str) -> tuple[int, bool, bool]:
    """(group size, the value of ``flag``, whether modules may differ) of a configuration without groups of modules, for
    matrices of ``bits`` bits. Raises MalformedInputError for values of no sense, IntegrityError for another width."""
    values, declared = settings.values, declared_bits(settings)
    for key in ("bits", "w_bit"):
        if key in values and values[key] not in declared:
            raise wrong_form(settings.file, key, "a whole number from 1 to 8", values[key])
    varies = bool(values.get("dynamic"))
    if declared and bits not in declared and not varies:
        raise contradicts(settings.file, f"{declared[0]} bits", f"{bits} bits")
    found = values.get(flag, True)
    if not isinstance(found, bool):
        raise wrong_form(settings.file, flag, "true or false", found)
    return group_size(values.get("group_size", values.get("q_group_size", 128)), settings.file), found, varies


def misfit(info: TensorInfo, expected: str, found: tuple[int, ...]) -> IntegrityError:
    """The error for a field of another shape or type."""
    return IntegrityError(
        "a field of a quantized matrix does not fit the others, or the configuration",
        file=info.file,
        tensor=info.name,
        offset=info.offset,
        expected=expected,
        found=f"{info.dtype} {list(found)}",
        remedy=AGAIN,
    )


def wrong_form(file: Path, name: str, expected: str, found: object) -> MalformedInputError:
    """The error for a setting that is of no sense."""
    return MalformedInputError(
        f"{name} in the quantization's configuration has the wrong form",
        file=file,
        expected=expected,
        found=printable(repr(found), 80),
        remedy="fetch config.json again",
    )


def contradicts(file: Path, expected: str, found: str) -> IntegrityError:
    """The error for weights of another width than the configuration says."""
    return IntegrityError(
        "the weights are not what the quantization's configuration says",
        file=file,
        expected=expected,
        found=found,
        remedy=AGAIN,
    )
