"""compressed-tensors' ``pack-quantized`` form, as the package of that name (0.20) writes and checks it.

N = out, K = in, G = groups, b = bits, codes q and zero points z from 0; w = weight_scale * (q - z):

    weight_packed      int32  (N, ceil(K b / 32))   codes, dense along K, any b; 32 values in b words
    weight_scale       bf16 or f16 (N, G)           in the type of the checkpoint's weights
    weight_shape       int64  (2,)                  N, K
    weight_zero_point  int32  (ceil(N b / 32), G)   zero points packed along N; only where the grid is asymmetric

The package counts codes from -2^(b-1) and adds 2^(b-1) before packing, to zero points too: the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.formats.base import (
    Array,
    Coverage,
    Field,
    Scheme,
    SchemeOptions,
    check_group,
    dequantize,
    grid_numbers,
    load_floats,
    parse_bits,
    store_floats,
    to_numpy,
)
from llm_quantize.formats.bitpack import pack_bits, packed_words, unpack_bits
from llm_quantize.qtypes.integer import WHOLE_ROW, IntegerType

if TYPE_CHECKING:
    from llm_quantize.grids.grid import Grid

NAME = "compressed-tensors"
TITLE = "compressed-tensors (pack-quantized)"
LABEL = "{level}"
EXAMPLE = "W4A16"
TRANSFORM = "none"
SYMMETRIC = None
NEEDS = "compressed-tensors"
KERNEL = ""
EXPERTS_IN_TRANSFORMERS = True
PACKAGE_VERSION = "0.20.0"
FORM = "pack-quantized"
_BITS = {f"W{bits}A16{end}": bits for end in ("", "_ASYM") for bits in range(2, 9)}
LEVELS: Sequence[str] = tuple(_BITS)


def scheme(level: str, options: SchemeOptions) -> Scheme:
    """The package's preset of that name (groups of 128), changed as the options say. Raises UsageError."""
    bits = parse_bits(level, NAME, _BITS)
    asked = not level.upper().endswith("_ASYM")
    symmetric = asked if options.symmetric is None else options.symmetric
    group = 128 if options.group_size is None else options.group_size
    name = f"W{bits}A16{'' if symmetric else '_ASYM'}"
    return Scheme(NAME, name, IntegerType(bits, group, symmetric, options.scale))


def fields(scheme: Scheme, rows: int, columns: int, *, name: str | None = None) -> tuple[Field, ...]:
    """The tensors of a matrix (rows, columns). Raises UsageError naming the module where groups do not divide it."""
    bits, groups = scheme.qtype.bits, check_group(scheme, columns, name)
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
    bits = scheme.qtype.bits
    scales, zeros = grid_numbers(scheme, grid, 0, (1 << bits) - 1)
    found: list[Array] = [
        pack_bits(np.ascontiguousarray(to_numpy(codes)), bits, 1),
        store_floats(scales, scheme.qtype.scale),
        np.array(codes.shape, np.int64),
    ]
    return found if scheme.qtype.symmetric else [*found, pack_bits(zeros.astype(np.uint8), bits, 0)]


def unpack(scheme: Scheme, arrays: Mapping[str, Array]) -> npt.NDArray[np.float32]:
    """float32 (rows, columns) of the fields' arrays."""
    bits = scheme.qtype.bits
    rows, columns = (int(size) for size in arrays["weight_shape"])
    codes = unpack_bits(arrays["weight_packed"], bits, columns, 1)
    scales = load_floats(arrays["weight_scale"])
    zeros: Array = np.full(scales.shape, 1 << (bits - 1), np.uint8)
    if not scheme.qtype.symmetric:
        zeros = unpack_bits(arrays["weight_zero_point"], bits, rows, 0)
    return dequantize(codes, scales, zeros, columns // scales.shape[1])


def config(scheme: Scheme, coverage: Coverage) -> dict[str, Any]:
    """quantization_config, field for field as the package writes it; ``ignore`` names every linear module left.

    Those outside of the decoder are found by how their names end: readers put them under other parents.
    """
    group = scheme.qtype.group_size
    weights = {
        "num_bits": scheme.qtype.bits,
        "type": "int",
        "symmetric": scheme.qtype.symmetric,
        "group_size": None if group == WHOLE_ROW else group,
        "strategy": "channel" if group == WHOLE_ROW else "group",
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "version": PACKAGE_VERSION,
        "format": FORM,
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
                "input_activations": None,
                "output_activations": None,
                "format": FORM,
            }
        },
    }


def vllm_refusal(scheme: Scheme) -> str | None:
    """Why vLLM (0.32) refuses this scheme on every device; None where it has kernels."""
    return None if scheme.qtype.bits in (4, 8) else "of packed integers it takes 4 and 8 bits only"
