"""What a format is, and what the packed integer formats share: grids, the tensors that hold a matrix, the numbers.

A matrix W (N = out = rows, K = in = columns) has codes q (N, K), and per row and group of columns a scale s and a zero
point z: w = s * (q - z), with q and z counted from 0 whatever the grid's levels are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import NumericPolicyError, UsageError
from llm_quantize.formats.level_names import known_level
from llm_quantize.formats.packed import PackedMatrix, StoredFormat
from llm_quantize.kernels import widened
from llm_quantize.kernels.repack import Room
from llm_quantize.qtypes.held import HeldWords
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.qtypes.integer import GROUPS, WHOLE_ROW, IntegerType
from llm_quantize.qtypes.packed import PackedType, packed_type

if TYPE_CHECKING:
    import torch

    from llm_quantize.formats.keeping import Kept
    from llm_quantize.formats.recipe import Recipe
    from llm_quantize.grids.grid import Grid, GridType
    from llm_quantize.models.opening import Source
    from llm_quantize.options import Options
    from llm_quantize.plan import ArtifactPlan, MatrixPlan, TensorPlan

Array = npt.NDArray[Any]
ReadRows = Callable[["MatrixPlan", int, int], npt.NDArray[np.float32]]

NUMPY_TYPES: Mapping[str, type[np.generic]] = {
    "float8_e4m3": np.uint8,
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
    "int32": np.int32,
    "uint32": np.uint32,
    "int64": np.int64,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "float32": np.float32,
}
"""Numpy's type of each field dtype; bfloat16 and float8_e4m3 are kept as their bits."""

SAFETENSORS_TYPES: Mapping[str, str] = {
    "float8_e4m3": "F8_E4M3",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
}


@dataclass(frozen=True)
class SchemeOptions:
    """What a user may choose beside the level; None leaves it to the level. ``scale``: how the checkpoint stores its
    weights ("bfloat16" or "float16"), for formats whose scales follow it. ``double_quant``, ``compute_dtype``: of
    bitsandbytes."""

    group_size: int | None = None
    symmetric: bool | None = None
    scale: str = "bfloat16"
    double_quant: bool | None = None
    compute_dtype: str | None = None


@dataclass(frozen=True)
class Scheme:
    """How the matrices of one artifact are stored. ``variant``: GPTQ's checkpoint_format ("gptq", "gptq_v2"); the type
    that bitsandbytes computes in. ``act_order``: columns of a group do not stand side by side in some of them."""

    format: str
    level: str
    qtype: PackedType
    variant: str = ""
    act_order: bool = False

    def on(self, qtype: str) -> Scheme:
        """The same for a matrix on the grid ``qtype``, which a recipe may have given it."""
        return self if qtype == self.qtype.name else replace(self, qtype=packed_type(qtype, self.qtype.scale))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; :func:`scheme_from_dict` reads it back."""
        facts = {"format": self.format, "level": self.level, "qtype": self.qtype.name, "scale": self.qtype.scale}
        facts |= {"variant": self.variant} if self.variant else {}
        return facts | ({"act_order": True} if self.act_order else {})


def scheme_from_dict(facts: Mapping[str, Any]) -> Scheme:
    """The scheme that ``Scheme.to_dict`` described."""
    grid = packed_type(facts["qtype"], facts["scale"])
    return Scheme(facts["format"], facts["level"], grid, facts.get("variant", ""), facts.get("act_order", False))


def scheme_of(plan: ArtifactPlan) -> Scheme:
    """The scheme of a plan of a packed format; where a recipe mixes grids, of one of them."""
    return scheme_from_dict(plan.identity["scheme"])


@dataclass(frozen=True)
class Field:
    """One of the tensors that hold a matrix: MODULE.suffix, of a dtype of NUMPY_TYPES."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = np.dtype(NUMPY_TYPES[self.dtype]).itemsize
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Coverage:
    """Which modules of the model hold packed matrices, and which linear ones do not.

    ``quantized``: in the order of the checkpoint. ``kept``: linear modules of blocks that stay as they are: routers,
    and what the user ignored. ``outside``: linear modules outside of the decoder's blocks (vision towers, heads that
    predict several tokens). ``head``: the output matrix, whether stored or tied. ``mixed``: {qtype: the modules on it}
    where a recipe mixes them. ``cache``: what keys and values are kept as.
    """

    quantized: Sequence[str]
    kept: Sequence[str] = ()
    outside: Sequence[str] = ()
    head: str = "lm_head"
    mixed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    cache: InputGrid | None = None


class Importance(Protocol):
    """What a plan needs to know of the importance that a run has, or will have.

    ``file``: the name under which an artifact records it. ``names``: tensors of the map that it covers. ``datasets``
    and ``chunks``: of its text. ``sha256``: what decides its values, "" where they are still to be collected.
    ``silence``: {what it says nothing of, and what that means: which matrices} of a tensor of a row-major shape.
    ``rows``: its values, float32 (matrices, columns); None where it has none.
    ``tokens``: about how many its text has; 0 where its windows are full.
    """

    @property
    def file(self) -> str: ...
    @property
    def names(self) -> Collection[str]: ...
    @property
    def datasets(self) -> Sequence[str]: ...
    @property
    def chunks(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    def silence(self, name: str, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]: ...
    def rows(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32] | None: ...
    @property
    def tokens(self) -> int: ...


class Format(Protocol):
    """A format: a row of FORMATS (table.py).

    ``levels``: what may follow -q; ``example``: one of them; ``default``: the one that is meant without -q. ``method``,
    ``transform``: its own, where the user asks for none; the transform goes only with a method that reads text.
    ``weighs``: rounding uses importance where there is any. ``act_order``: it can say of each column which group it is
    in, so that those of a group need not stand side by side.
    """

    @property
    def name(self) -> str: ...
    @property
    def levels(self) -> Sequence[str]: ...
    @property
    def example(self) -> str: ...
    @property
    def default(self) -> str | None: ...
    @property
    def method(self) -> str: ...
    @property
    def transform(self) -> str: ...
    @property
    def weighs(self) -> bool: ...
    @property
    def act_order(self) -> bool: ...

    def plan(
        self, source: Source, levels: Sequence[str], stem: str, importance: Importance | None, options: Options
    ) -> list[ArtifactPlan]:
        """Every byte of each level's artifact, called STEM-LEVEL, from headers alone. What this format cannot hold is
        refused here (UnsupportedError, UsageError), and nothing else is."""

    def needs_importance(self, source: Source, level: str, options: Options) -> bool:
        """Whether the level cannot be made without importance."""

    def calibrated(self, level: str) -> bool:
        """Whether the level has codes that a method which reads text may choose."""

    def check_text(self, levels: Sequence[str], options: Options) -> None:
        """Raise UsageError where a level cannot be made without text, and the options read none."""

    def recipe_level(self, text: str) -> str:
        """The level that a recipe may build on, by its name. Raises UsageError for another, and where the format takes
        no recipes."""

    def recipe_type(self, text: str) -> str:
        """The qtype that a recipe may give to single tensors or matrices, by its name. Raises UsageError."""

    def keeping(self, source: Source, level: str | None, options: Options) -> Kept | None:
        """The level, or ``level`` itself, and what to ask with it, that hold the most of what ``source`` stores
        quantized; None where it has nothing of that kind to keep, or nothing is known of it. From headers alone."""

    def labels(self, source: Source) -> Collection[str]:
        """What would stand behind the name of an artifact of this format that stores what ``source`` does. From headers
        alone."""

    def store(self, plan: ArtifactPlan) -> Store:
        """How one of its artifacts keeps a matrix. Needs torch."""

    def texts_of(self, path: Path) -> Sequence[str] | None:
        """Names of the texts that the importance of its artifact at ``path`` was collected on; None where it does not
        say."""


@dataclass(frozen=True)
class Repacked:
    """The fields of a matrix, made of the words of another file, and what a reader of this format makes of them again:
    all codes and numbers (``back``), and float32 values of some of the first rows (``first``)."""

    fields: list[Array]
    back: HeldWords
    first: npt.NDArray[np.float32]


class Store(Protocol):
    """A format, seen from a method: from codes on a grid to the bytes of its fields, and back to values. Threads may
    share it."""

    @property
    def rounds(self) -> str:
        """How a matrix is rounded where no method chooses its codes: "plain", as the owner's encoder does, byte for
        byte; "fit", on the grid that fits it best."""

    @property
    def fits_unseen(self) -> bool:
        """Whether matrices that nothing observes are rounded on grids that fit, where others get a method's codes."""

    def grid_type(self, qtype: str) -> GridType | None:
        """The grids of ``qtype``; None where it has none of that form and can only be rounded plainly."""

    def grid_of(self, matrix: MatrixPlan, start: int, stop: int, read: ReadRows) -> GridType | None:
        """``grid_type`` for rows [start, stop) of ``matrix``, where what its rows share is settled first. ``read``:
        float32 rows of it."""

    def largest(self, qtype: str) -> float:
        """The largest magnitude that ``qtype`` holds."""

    def hold(
        self, matrix: MatrixPlan, grid: Grid, codes: torch.Tensor, *, exact: bool = True
    ) -> tuple[Grid, torch.Tensor] | None:
        """``codes`` of all rows of ``matrix`` on ``grid``, of whatever format, as ``piece`` takes them; None where this
        format cannot hold them: with ``exact`` as they are, else with numbers of groups that are rounded."""

    def repack(self, matrix: MatrixPlan, held: HeldWords) -> Repacked | None:
        """``matrix`` from the words of a source, where this format holds them as they stand; else None. Its fields may
        lie in memory that the next call in this thread writes over."""

    def blocks(self, matrix: MatrixPlan, read: Callable[[int, int], Array]) -> list[Array] | None:
        """The fields of ``matrix``, which a source stores in the very blocks (``Model.block_type``): ``read`` gives
        rows of them; None where this format has no such blocks."""

    def inputs(self, matrix: MatrixPlan) -> InputGrid | None:
        """What a runtime rounds the inputs of ``matrix`` to; None: nothing."""

    def numbers(self, matrix: MatrixPlan, inputs: InputGrid) -> list[Array]:
        """The fields, after those of ``join``, of what was calibrated of ``inputs``."""

    def piece(self, matrix: MatrixPlan, grid: Grid, codes: torch.Tensor) -> Any:
        """Some rows of ``matrix``, in whatever form ``join`` takes."""

    def plain(
        self, matrix: MatrixPlan, rows: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None
    ) -> Any:
        """Some rows rounded plainly, for a qtype without a grid."""

    def join(self, matrix: MatrixPlan, pieces: Sequence[Any]) -> list[Array]:
        """The fields of ``matrix`` of the pieces of all its rows, in order."""

    def typed(self, tensor: TensorPlan, data: npt.NDArray[np.uint8]) -> Array:
        """The bytes of a stored field as ``join`` gives it."""

    def decode(self, matrix: MatrixPlan, fields: list[Array]) -> npt.NDArray[np.float32]:
        """float32 (rows, columns): what a runtime will compute with."""

    def decoded(self, matrix: MatrixPlan, fields: list[Array]) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """``decode`` some rows at a time: (the first, values)."""


class Mixes(Protocol):
    """How a packed format keeps matrices on several grids in one directory."""

    def recipe_level(self, text: str) -> str:
        """The level that a recipe may build on, by its name. Raises UsageError."""

    def recipe_type(self, text: str) -> str:
        """The grid that a recipe calls so. Raises UsageError."""

    def check_head(self, recipe: Recipe, qtype: str) -> None:
        """Raise UsageError where ``recipe`` gives the output matrix a grid that runtimes have no kernel for."""

    def mixed_level(self, qtypes: Collection[str]) -> str:
        """What people call a directory with matrices on these grids."""

    def order(self, mixed: Mapping[str, Sequence[str]]) -> list[str]:
        """The grids in the order in which the configuration has them. ``mixed``: {grid: the modules on it}."""

    def cautions(self, mixed: Mapping[str, Sequence[str]]) -> Iterator[str]:
        """What Transformers reads otherwise than it stands in such a mix, a sentence each."""


class Packed(StoredFormat, Protocol):
    """A format of packed integers in a model directory: one module of this package for each.

    ``SYMMETRIC``: whether its grids are symmetric unless asked otherwise; None: the level says so. ``TITLE``: its name
    for people. ``NEEDS``: what Transformers needs installed; ``KERNEL``: what to name on a CPU, "" for nothing.
    ``DEFAULT_GROUP``: weights that share a scale unless asked otherwise. ``PACKS_EXPERTS``: whether anything reads
    packed experts of it. ``OWN_ROUNDING``: rounding without a method is the owner's, byte for byte. ``VLLM_STEPS``:
    (kernels, (rows, columns)) of which vLLM's want whole multiples. ``OFFSETS``: what asymmetric groups have, in words.
    ``EDGES``: embedding and output matrix are packed too. ``OPTIONS``: those that it takes beside what all take.
    ``UNNAMED``: (key of config.json, what it holds at least) of a configuration that names no quant_method.
    ``RUNTIME``: (name, how a directory NAME is loaded) of the one runtime that reads it, where Transformers and
    vLLM do not. ``MIXES``: how a recipe may put matrices on different grids; None: all have one. ``CACHES``: {name:
    what keys and values may be kept as}. ``ACT_ORDER``: see ``Format.act_order``.
    """

    NAME: str
    TITLE: str
    LABEL: str
    LEVELS: Sequence[str]
    EXAMPLE: str
    DEFAULT: str | None
    TRANSFORM: str
    SYMMETRIC: bool | None
    NEEDS: str
    KERNEL: str
    EXPERTS_IN_TRANSFORMERS: bool
    DEFAULT_GROUP: int
    PACKS_EXPERTS: bool
    OWN_ROUNDING: bool
    VLLM_STEPS: Sequence[tuple[str, tuple[int, int]]]
    OFFSETS: str
    EDGES: bool
    OPTIONS: Sequence[str]
    UNNAMED: tuple[str, Sequence[str]] | None
    RUNTIME: tuple[str, str] | None
    MIXES: Mixes | None
    CACHES: Mapping[str, InputGrid]
    ACT_ORDER: bool

    def scheme(self, level: str, options: SchemeOptions) -> Scheme: ...
    def groups(self, scheme: Scheme) -> Sequence[int]:
        """The groups that a level of ``scheme`` may have where nobody asks for any, largest first, its default in
        front; none where its grid is fixed."""

    def title(self, scheme: Scheme) -> str: ...
    def fields(self, scheme: Scheme, rows: int, columns: int, *, name: str | None = None) -> tuple[Field, ...]: ...
    def pack(self, scheme: Scheme, grid: Grid, codes: Any) -> list[Array]: ...
    def repack(self, scheme: Scheme, held: HeldWords, room: Room) -> list[Array] | None:
        """What ``pack`` makes of the same codes and numbers, from the words of another file, the codes in ``room`` or
        where they are; None where they are not the scheme's own as they stand, of the same width, groups and type of
        scales."""

    def described(self, scheme: Scheme, rows: int, columns: int) -> PackedMatrix: ...
    def inputs(self, scheme: Scheme) -> InputGrid | None: ...
    def input_fields(self, scheme: Scheme) -> tuple[Field, ...]: ...
    def config(self, scheme: Scheme, coverage: Coverage) -> dict[str, Any]: ...
    def vllm_refusal(self, scheme: Scheme) -> str | None: ...
    def vllm_caution(self, schemes: Sequence[Scheme], *, head: bool) -> str | None:
        """What was not tried of vLLM with matrices of ``schemes``, or it does on some devices only; None: nothing.
        ``head``: the output matrix is among them."""

    def least_zero(self, scheme: Scheme) -> int: ...
    def refuse(self, source: Source, names: Sequence[str]) -> None:
        """Raise UnsupportedError for a model, or modules ``names`` of it, that nothing would read packed so."""

    def configured(self, source: Source, config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """config.json: the source's ``config``, which says nothing of quantization, and ``own`` where runtimes look."""


def as_they_are(scheme: Scheme) -> None:
    """``Packed.inputs`` of a format whose runtimes multiply inputs as they come, or in a way that is not followed."""
    del scheme


def no_fields(scheme: Scheme) -> tuple[Field, ...]:
    """``Packed.input_fields`` of such a format."""
    del scheme
    return ()


def takes_any(source: Source, names: Sequence[str]) -> None:
    """``Packed.refuse`` of a format that has nothing to refuse."""
    del source, names


def no_repacking(scheme: Scheme, held: HeldWords, room: Room) -> None:
    """``Packed.repack`` of a format that takes no words over."""
    del scheme, held, room


def fits_words(scheme: Scheme, held: HeldWords, least: int, most: int) -> npt.NDArray[np.int16] | None:
    """The zero points of ``held``, on the count of places, where ``scheme`` has its integers, its groups and its type
    of scales, all scales are finite, and zero points lie in ``least`` .. ``most``; else None."""
    grid, zeros = scheme.qtype, held.zeros
    if not isinstance(grid, IntegerType) or zeros is None or (grid.bits, grid.scale) != (held.bits, held.storage):
        return None
    if grid.group(held.group * held.scales.shape[1]) != held.group or not np.isfinite(held.scales).all():
        return None
    if grid.symmetric:
        return zeros if (zeros == 1 << (grid.bits - 1)).all() else None
    return zeros if ((zeros >= least) & (zeros <= most)).all() else None


def no_caution(schemes: Sequence[Scheme], *, head: bool) -> str | None:
    """``Packed.vllm_caution`` of a format that has nothing to say."""
    del schemes, head
    return None


def with_quantization(source: Source, config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``Packed.configured`` as Transformers reads it."""
    del source
    return {**config, "quantization_config": own}


def usual_groups(scheme: Scheme) -> Sequence[int]:
    """``Packed.groups`` of packed integers."""
    del scheme
    return GROUPS


def fixed_groups(scheme: Scheme) -> Sequence[int]:
    """``Packed.groups`` of grids that are as they are."""
    del scheme
    return ()


NO_CACHES: Mapping[str, InputGrid] = {}
"""``Packed.CACHES`` of a format whose configuration says nothing of keys and values."""

MARLIN_STEPS = (("CPU", (32, 32)), ("CUDA (Marlin)", (64, 128)))
"""VLLM_STEPS of packed integers."""

_EXPERT = re.compile(r"(\.experts)\.\d+\..*$")


def mixture_of(name: str) -> str:
    """The mixture that the expert module ``name`` belongs to, which is one module in vLLM; other names as they are."""
    return _EXPERT.sub(r"\1", name)


def parse_bits(level: str, form: str, choices: Mapping[str, int]) -> tuple[str, int]:
    """The level of ``choices`` that a user means, in any case or by its bits alone, and its bits. Raises UsageError."""
    usual = {bits: name for name, bits in reversed(tuple(choices.items()))}
    found = known_level(level, form, tuple(choices), usual=usual)
    return found, choices[found]


def check_group(scheme: Scheme, columns: int, name: str | None, *, fixed: bool = False) -> int:
    """Groups of a row of ``columns``. ``fixed``: the level has these groups alone. Raises UsageError naming the
    module."""
    size = scheme.qtype.group_size
    if size != WHOLE_ROW and columns % size:
        raise odd_groups(scheme, (size,), columns, name, fixed=fixed)
    return scheme.qtype.groups(columns)


def odd_groups(
    scheme: Scheme, tried: Sequence[int], columns: int, name: str | None, *, fixed: bool = False
) -> UsageError:
    """The error for rows of ``columns`` weights, which are whole groups of none of ``tried`` (in falling order)."""
    before, least = ", ".join(map(str, tried[:-1])), tried[-1]
    known = [] if fixed else [size for size in GROUPS if size < least and columns % size == 0]
    if not fixed and isinstance(scheme.qtype, IntegerType):
        known.append(WHOLE_ROW)
    without = "--ignore with an expression that finds this module"
    return UsageError(
        f"rows of {columns} weights are not whole groups of {' or '.join(filter(None, [before, str(least)]))}",
        tensor=name,
        expected=f"a multiple of {least}",
        found=columns,
        remedy=f"--group-size {known[0]}, or --ignore with an expression that finds this module" if known else without,
    )


def check_words(what: str, count: int, bits: int, name: str | None) -> None:
    """Raise UsageError unless ``count`` values of ``bits`` bits fill whole words of 32 bits."""
    if count * bits % 32:
        step = next(n for n in range(1, 33) if n * bits % 32 == 0)
        raise UsageError(
            f"{count} {what} of {bits} bits do not fill whole words of 32 bits",
            tensor=name,
            expected=f"a multiple of {step}",
            found=count,
            remedy="--ignore with an expression that finds this module leaves it as it is; compressed-tensors pads",
        )


def to_numpy(values: Any) -> Array:
    """A numpy array of a torch tensor (on any device) or of an array."""
    return np.asarray(values.detach().cpu().numpy() if hasattr(values, "detach") else values)


def grid_numbers(scheme: Scheme, grid: Grid, least: int, most: int) -> tuple[npt.NDArray[np.float32], Array]:
    """(scales float32 (rows, groups), zero points uint16 (rows, groups), counted from the lowest code).

    Raises NumericPolicyError for scales that are not finite, and ValueError for a grid that the scheme cannot store:
    levels that are not consecutive, offsets, other groups, zero points outside of ``least`` .. ``most``.
    """
    wanted = scheme.qtype
    columns = grid.shape[1]
    if not grid.uniform or grid.m is not None or int(grid.levels.shape[0]) != 1 << wanted.bits:
        raise ValueError(f"a grid of this kind cannot be stored as {wanted.name}")
    if grid.group != wanted.group(columns):
        raise ValueError(f"a grid with groups of {grid.group} cannot be stored as {wanted.name}")
    scales = to_numpy(grid.scale()).astype(np.float32, copy=False)
    if not np.isfinite(scales).all():
        row, group = (int(index) for index in np.argwhere(~np.isfinite(scales))[0])
        raise NumericPolicyError(
            "a scale is NaN or infinite",
            expected="finite scales",
            found=f"{scales[row, group]} at row {row}, group {group}",
            remedy="check the weights and the calibration of this matrix; --ignore leaves it as it is",
        )
    lowest = float(grid.levels[0])
    zeros = np.zeros(scales.shape, np.float32) if grid.z is None else to_numpy(grid.z)
    zeros = zeros - lowest
    if (zeros != np.rint(zeros)).any() or (zeros < least).any() or (zeros > most).any():
        raise ValueError(
            f"zero points from {zeros.min()} to {zeros.max()}; whole numbers from {least} to {most} can be"
        )
    if wanted.symmetric and (zeros != 1 << (wanted.bits - 1)).any():
        raise ValueError(f"{wanted.name} has one zero point only, {1 << (wanted.bits - 1)}")
    return scales, zeros.astype(np.uint16)


def store_floats(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """``values``, already rounded to ``dtype``, as stored there (bfloat16 as bits). ValueError if they are not."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        stored: Array = (bits >> np.uint32(16)).astype(np.uint16)
    else:
        stored = values.astype(NUMPY_TYPES[dtype])
    if not np.array_equal(load_floats(stored), values):
        raise ValueError(f"the scales are not rounded to {dtype}")
    return stored


def are_stored(values: npt.NDArray[np.float32], dtype: str) -> bool:
    """Whether ``values`` are as they are after having been stored as ``dtype``."""
    if dtype == "bfloat16":
        return not (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFF)).any()
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(NUMPY_TYPES[dtype]), values)


def load_floats(values: Array) -> npt.NDArray[np.float32]:
    """Float32 values of stored floats; uint16 means bfloat16 bits."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return widened(values) if values.dtype == np.float16 else values.astype(np.float32, copy=False)
