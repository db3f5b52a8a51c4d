"""What packed formats share: the usual answers to what a ``Packed`` is asked, checks of groups and words, and grids as
the numbers that are stored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import NumericPolicyError, UsageError
from llm_quantize.formats.base import NUMPY_TYPES, Array, Field, Scheme
from llm_quantize.formats.level_names import known_level
from llm_quantize.kernels import widened
from llm_quantize.kernels.repack import Room
from llm_quantize.qtypes.held import HeldWords
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.qtypes.integer import GROUPS, WHOLE_ROW, IntegerType

if TYPE_CHECKING:
    from llm_quantize.grids.grid import Grid
    from llm_quantize.models.opening import Source


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
