"""The levels of compressed-tensors by the names of the package, and the configuration of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_quantize.errors import UsageError
from llm_quantize.formats.base import Coverage, Scheme, SchemeOptions
from llm_quantize.formats.compressed_floats import LAYOUTS
from llm_quantize.formats.compressed_inputs import read_inputs
from llm_quantize.formats.level_names import known_level
from llm_quantize.qtypes.codebook import CodebookType
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.qtypes.integer import WHOLE_ROW, IntegerType
from llm_quantize.qtypes.packed import packed_type

NAME = "compressed-tensors"
PACKAGE_VERSION = "0.20.0"
PACKED_FORM, PLAIN_FORM = "pack-quantized", "int-quantized"

_BITS = {f"W{bits}A16{end}": bits for end in ("", "_ASYM") for bits in range(2, 9)}


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
LEVELS: Sequence[str] = (*_BITS, *_OTHERS)


def scheme(level: str, options: SchemeOptions) -> Scheme:
    """The package's preset of that name (groups of 128), changed as the options say. Raises UsageError."""
    known = known_level(level, NAME, LEVELS, usual={bits: f"W{bits}A16" for bits in _BITS.values()})
    if known in _OTHERS:
        return _other(known, options)
    bits, asked = _BITS[known], not known.endswith("_ASYM")
    symmetric = asked if options.symmetric is None else options.symmetric
    group = 128 if options.group_size is None else options.group_size
    name = f"W{bits}A16{'' if symmetric else '_ASYM'}"
    return Scheme(NAME, name, IntegerType(bits, group, symmetric, options.scale))


def _other(level: str, options: SchemeOptions) -> Scheme:
    """A level whose grid is fixed. Raises UsageError for options that would change it."""
    grid = packed_type(_OTHERS[level].grid, options.scale)
    if options.symmetric is False or options.group_size not in (None, grid.group_size):
        groups = "one scale for each row" if grid.group_size == WHOLE_ROW else f"groups of {grid.group_size}"
        raise UsageError(
            f"the grid of {level} is fixed",
            expected=f"symmetric, {groups}",
            found=f"--group-size {options.group_size}" if options.group_size is not None else "--asym",
            remedy="leave --group-size and --asym out, or take one of W2A16 to W8A16",
        )
    return Scheme(NAME, level, grid)


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

    Those outside of the decoder are found by how their names end: readers put them under other parents.
    """
    grid, group = scheme.qtype, scheme.qtype.group_size
    form = form_of(scheme)
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
        "quant_method": "compressed-tensors",
        "version": PACKAGE_VERSION,
        "format": form,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "sparsity_config": {},
        "transform_config": {},
        "ignore": [*coverage.kept, *(rf"re:.*\b{re.escape(name)}$" for name in coverage.outside), coverage.head],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": _activations(scheme),
                "output_activations": None,
                "format": form,
            }
        },
    }


_IN_COMMON: Mapping[str, Mapping[str, Any]] = {
    "rows128": {"strategy": "block", "group_size": None, "block_structure": [128, 128]},
    "whole": {"strategy": "tensor"},
}
"""What is said of weights with scales that rows have in common."""


def vllm_refusal(scheme: Scheme) -> str | None:
    """Why vLLM (0.32) refuses this scheme on every device; None where it has kernels."""
    taken = scheme.qtype.bits in (4, 8) or scheme.level in _OTHERS
    return None if taken else "of packed integers it takes 4 and 8 bits only"
