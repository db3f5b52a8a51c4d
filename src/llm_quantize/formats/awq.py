"""AWQ checkpoints in AutoAWQ's "gemm" layout, which llm-awq's kernels want.

K = in, N = out, G = groups, codes q and zero points z from 0 to 15; w = scales * (q - z):

    qweight  int32    (K, N / 8)   nibble i of word c, lowest first, is column 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    qzeros   int32    (G, N / 8)   z as it is, in the same order
    scales   float16  (G, N)

Every reader of this layout takes its zero points from qzeros, so a symmetric grid is stored with z = 8 and
``zero_point`` true all the same: with false, AutoAWQ and vLLM have no kernel.
"""

from __future__ import annotations

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
    check_words,
    dequantize,
    grid_numbers,
    load_floats,
    mixture_of,
    parse_bits,
    store_floats,
    to_numpy,
)
from llm_quantize.formats.bitpack import pack_bits, unpack_bits
from llm_quantize.qtypes.integer import IntegerType

if TYPE_CHECKING:
    from llm_quantize.grids.grid import Grid

NAME = "awq"
TITLE = "AWQ"
LABEL = "AWQ-{level}"
EXAMPLE = "4bit"
TRANSFORM = "awq"
SYMMETRIC = False
NEEDS = "gptqmodel"
KERNEL = 'AwqConfig(bits={bits}, backend="torch_awq")'
EXPERTS_IN_TRANSFORMERS = False
LEVELS: Sequence[str] = ("4bit",)
BITS = 4
_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


def scheme(level: str, options: SchemeOptions) -> Scheme:
    """With zero points and groups of 128 unless the options say otherwise. Raises UsageError."""
    parse_bits(level, NAME, {"4bit": BITS})
    group = 128 if options.group_size is None else options.group_size
    return Scheme(NAME, "4bit", IntegerType(BITS, group, options.symmetric is True, "float16"))


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
    turned = values.T.reshape(count, rows // 8, 8)[:, :, _ORDER]
    return pack_bits(np.ascontiguousarray(turned.reshape(count, rows)), BITS, 1)


def _unpack(words: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """(n, rows / 8) words as (rows, n)."""
    count, rows = words.shape[0], words.shape[1] * 8
    turned = unpack_bits(words, BITS, rows, 1).reshape(count, -1, 8)
    values = np.empty_like(turned)
    values[:, :, _ORDER] = turned
    return np.ascontiguousarray(values.reshape(count, rows).T)


def unpack(scheme: Scheme, arrays: Mapping[str, Array]) -> npt.NDArray[np.float32]:
    """float32 (rows, columns) of qweight, qzeros, scales."""
    codes = _unpack(arrays["qweight"])
    scales = np.ascontiguousarray(load_floats(arrays["scales"]).T)
    return dequantize(codes, scales, _unpack(arrays["qzeros"]), codes.shape[1] // scales.shape[1])


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


def vllm_refusal(_scheme: Scheme) -> str | None:
    """Nothing: vLLM (0.32) has kernels for every scheme of this form."""
    return None
