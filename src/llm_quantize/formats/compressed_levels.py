"""The levels of compressed-tensors by the names of the package, and the configuration of each."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_quantize.errors import UsageError
from llm_quantize.formats.base import Coverage, Scheme, SchemeOptions
from llm_quantize.formats.compressed_floats import LAYOUTS
from llm_quantize.formats.compressed_groups import EXPRESSION
from llm_quantize.formats.compressed_inputs import read_inputs
from llm_quantize.formats.kv_cache import args_of
from llm_quantize.formats.level_names import known_level
from llm_quantize.qtypes.codebook import CodebookType
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.qtypes.integer import WHOLE_ROW, IntegerType
from llm_quantize.qtypes.packed import packed_type

NAME = "compressed-tensors"
PACKAGE_VERSION = "0.20.0"
PACKED_FORM, PLAIN_FORM = "pack-quantized", "int-quantized"

BITS = {f"W{bits}A16{end}": bits for end in ("", "_ASYM") for bits in range(2, 9)}


@dataclass(frozen=True)
class _Level:
    """A level that is not integer weights alone. ``grid``: a qtype. ``inputs``: what the configuration says of
    activations, beside what all of them have; None: 16 bits."""

    grid: str
    inputs: Mapping[str, Any] | None = None


_INT8_TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "group_size": None, "scale_dtype": None}
_FP8_TOKENS = {**_INT8_TOKENS, "type": "float"}
_FP8_TENSOR = {**_FP8_TOKENS, "strategy": "tensor", "dynamic": False}
_FP8_GROUPS = {**_FP8_TOKENS, "strategy": "group", "group_size": 128}
_NVFP4_GROUPS = {
    **{"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    **{"scale_dtype": "torch.float8_e4m3fn", "dynamic": "local"},
}
_MXFP4_GROUPS = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
_OTHERS: Mapping[str, _Level] = {
    "W8A8": _Level("int8", _INT8_TOKENS),
    "W4AFP8": _Level("int4_g128", _FP8_TOKENS),
    "FP8_DYNAMIC": _Level("e4m3", _FP8_TOKENS),
    "FP8_BLOCK": _Level("e4m3_b128_rows128", _FP8_GROUPS),
    "FP8": _Level("e4m3_whole", _FP8_TENSOR),
    "NVFP4": _Level("e2m1_b16_e4m3", _NVFP4_GROUPS),
    "NVFP4A16": _Level("e2m1_b16_e4m3"),
    "MXFP4A16": _Level("e2m1_b32_e8m0"),
    "MXFP4": _Level("e2m1_b32_e8m0", _MXFP4_GROUPS),
}
LEVELS: Sequence[str] = (*BITS, *_OTHERS)

_SHARED = {"whole": "one scale for each matrix", "rows128": "blocks of 128 rows and 128 columns"}
"""What has a scale, in words, where rows have scales in common."""


def scheme(level: str, options: SchemeOptions) -> Scheme:
    """The package's preset of that name (groups of 128), changed as the options say. Raises UsageError."""
    known = known_level(level, NAME, LEVELS, usual={bits: f"W{bits}A16" for bits in BITS.values()})
    if known in _OTHERS:
        return _other(known, options)
    bits, asked = BITS[known], not known.endswith("_ASYM")
    symmetric = asked if options.symmetric is None else options.symmetric
    group = 128 if options.group_size is None else options.group_size
    name = f"W{bits}A16{'' if symmetric else '_ASYM'}"
    return Scheme(NAME, name, IntegerType(bits, group, symmetric, options.scale))


def _other(level: str, options: SchemeOptions) -> Scheme:
    """A level whose grid is fixed. Raises UsageError for options that would change it."""
    grid = packed_type(_OTHERS[level].grid, options.scale)
    if options.symmetric is False or options.group_size not in (None, grid.group_size):
        groups = "one scale for each row" if grid.group_size == WHOLE_ROW else f"groups of {grid.group_size}"
        nested = grid.nested if isinstance(grid, CodebookType) else ""
        raise UsageError(
            f"the grid of {level} is fixed",
            expected=f"symmetric, {_SHARED.get(nested, groups)}",
            found="--asym" if options.symmetric is False else f"--group-size {options.group_size}",
            remedy="leave --group-size and --asym out, or take one of W2A16 to W8A16",
        )
    return Scheme(NAME, level, grid)


def is_fixed(scheme: Scheme) -> bool:
    """Whether the level fixes its groups."""
    return scheme.level in _OTHERS


def inputs(scheme: Scheme) -> InputGrid | None:
    """What runtimes round the inputs of its matrices to; None: nothing."""
    return read_inputs(_activations(scheme) or {})


def _activations(scheme: Scheme) -> dict[str, Any] | None:
    """input_activations of the configuration."""
    known = _OTHERS.get(scheme.level)
    own = None if known is None else known.inputs
    return None if own is None else {"symmetric": True, "dynamic": True, **own}


def is_plain(scheme: Scheme) -> bool:
    """Whether codes stand in whole bytes (int-quantized)."""
    return scheme.level in _OTHERS and scheme.qtype.group_size == WHOLE_ROW


def form_of(scheme: Scheme) -> str:
    """What the package calls the way in which matrices are stored."""
    if isinstance(scheme.qtype, CodebookType):
        return LAYOUTS[scheme.qtype.name].name
    return PLAIN_FORM if is_plain(scheme) else PACKED_FORM


def config(scheme: Scheme, coverage: Coverage) -> dict[str, Any]:
    """quantization_config, field for field as the package writes it; ``ignore`` names every linear module left.

    Those outside of the decoder are found by how their names end: readers put them under other parents. Where
    ``coverage`` mixes grids, each has a group that names its modules.
    """
    kinds = [(scheme.on(qtype), targets(names)) for qtype, names in coverage.mixed.items()] or [(scheme, ["Linear"])]
    return {
        "quant_method": "compressed-tensors",
        "version": PACKAGE_VERSION,
        "format": form_of(scheme),
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None if coverage.cache is None else args_of(coverage.cache.codes),
        "moe_sparsity_config": None,
        "sparsity_config": {},
        "transform_config": {},
        "ignore": [
            *coverage.kept,
            *(rf"{EXPRESSION}.*\b{re.escape(name.removeprefix('model.'))}$" for name in coverage.outside),
            *(() if coverage.head in coverage.quantized else (coverage.head,)),
        ],
        "config_groups": {f"group_{number}": _group(kind, found) for number, (kind, found) in enumerate(kinds)},
    }


def _group(scheme: Scheme, found: list[str]) -> dict[str, Any]:
    """The config group of the modules that ``found`` names, all on the grid of ``scheme``."""
    grid, group = scheme.qtype, scheme.qtype.group_size
    nested = grid.nested if isinstance(grid, CodebookType) else ""
    weights = {
        "num_bits": grid.bits,
        "type": "float" if isinstance(grid, CodebookType) else "int",
        "symmetric": grid.symmetric,
        "group_size": None if group == WHOLE_ROW else group,
        "strategy": "channel" if group == WHOLE_ROW else "tensor_group" if nested == "e4m3" else "group",
        "dynamic": False,
    }
    weights |= _IN_COMMON.get(nested, {})
    if isinstance(grid, CodebookType) and grid.coded:
        weights["scale_dtype"] = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}[nested]
    return {
        "targets": found,
        "weights": weights,
        "input_activations": _activations(scheme),
        "output_activations": None,
        "format": form_of(scheme),
    }


def targets(names: Iterable[str]) -> list[str]:
    """What finds exactly these modules, whatever parents a reader puts their layers under: an expression for each kind
    of module, with the numbers of its layers. Numbers of experts are left open, as all of a layer are alike."""
    layers: dict[tuple[str, str], set[int]] = defaultdict(set)
    whole = []
    for name in names:
        parts = name.split(".")
        at = next((index for index, part in enumerate(parts) if index and part.isdecimal()), None)
        if at is None or at + 1 == len(parts):
            whole.append(rf"{EXPRESSION}.*\b{re.escape(parts[-1])}$")
        else:
            layers[parts[at - 1], _pattern(parts[at + 1 :])].add(int(parts[at]))
    return [*whole, *(_expression(parent, found, tail) for (parent, tail), found in layers.items())]


def _pattern(parts: Sequence[str]) -> str:
    """What finds the end of a name: its parts as they are, but any number of an expert."""
    before = ("", *parts)
    return r"\.".join(
        r"\d+" if part.isdecimal() and last == "experts" else re.escape(part)
        for part, last in zip(parts, before, strict=False)
    )


def _expression(parent: str, layers: Collection[int], tail: str) -> str:
    numbers = "|".join(map(str, sorted(layers)))
    one = numbers if len(layers) == 1 else f"(?:{numbers})"
    return rf"{EXPRESSION}.*\b{re.escape(parent)}\.{one}\.{tail}$"


_IN_COMMON: Mapping[str, Mapping[str, Any]] = {
    "rows128": {"strategy": "block", "group_size": None, "block_structure": [128, 128]},
    "whole": {"strategy": "tensor"},
}
"""What is said of weights with scales that rows have in common."""


_PACKED_HEAD = "a packed output matrix"


def vllm_refusal(scheme: Scheme) -> str | None:
    """Why vLLM (0.32) refuses this scheme on every device; None where it has kernels."""
    del scheme
    return None


def vllm_caution(schemes: Sequence[Scheme], *, head: bool) -> str | None:
    """Of what vLLM (0.32) does with integers of other widths than 4 and 8 bits, and with a packed head, nothing
    was run here."""
    bits = {one.qtype.bits for one in schemes if one.level not in _OTHERS} - {4, 8}
    told = f"weights of {', '.join(map(str, sorted(bits)))} bits by its Humming kernels" if bits else ""
    if head:
        told = f"{told} and a packed output matrix" if told else _PACKED_HEAD
    if not told:
        return None
    return (
        f"by its code vLLM 0.32 takes {told} on CUDA devices of 7.5 or newer, which was read and not run here; on a "
        "CPU it takes matrices of blocks in 4 bits only"
    )
