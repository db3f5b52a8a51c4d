"""What a format is, and what the packed integer formats share: grids, the tensors that hold a matrix, the numbers.

A matrix W (N = out = rows, K = in = columns) has codes q (N, K), and per row and group of columns a scale s and a zero
point z: w = s * (q - z), with q and z counted from 0 whatever the grid's levels are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from llm_quantize.formats.packed import PackedMatrix, StoredFormat
from llm_quantize.kernels.repack import Room
from llm_quantize.qtypes.held import HeldWords
from llm_quantize.qtypes.inputs import InputGrid
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
