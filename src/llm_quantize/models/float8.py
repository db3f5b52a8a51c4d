"""FP8 weights with their scales: which scale belongs to which weight, and the float32 values they mean.

E4M3 (Micikevicius et al. 2022, section 3; the "FN" form: no infinities, S.1111.111 is NaN) times a scale, in one
float32 multiplication. That is what llama.cpp's converter computes before it rounds to its output type, so
quantizing our values equals quantizing its F32 conversion.

Scale shapes, for a weight of shape (..., N, K) and blocks (bn, bk) of ``quantization_config.weight_block_size``
(DeepSeek-V3): (..., ceil(N/bn), ceil(K/bk)) per block; (..., N, 1) or (..., N) per row; (...) or (..., 1, 1) per
matrix; one value per tensor. A scale of the type F8_E8M0 is 2^(code - 127).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import MalformedInputError, UnsupportedError, printable
from llm_quantize.formats import float_codes
from llm_quantize.formats.packing import load_floats
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.qtypes.codebook import CODEBOOKS
from llm_quantize.qtypes.held import HeldRows

SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0")
_POWERS = "F8_E8M0"
_STORED: Mapping[str, type[np.generic]] = {
    **{"F32": np.float32, "F16": np.float16},
    **{"BF16": np.uint16, _POWERS: np.uint8},
}
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
_ACTIVATION_SUFFIXES = (
    *(".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale", ".input_scale_ub"),
)
_FORMS: Mapping[str, tuple[str, tuple[str, ...]] | None] = {
    "fp8": None,
    "fbgemm_fp8": None,
    "finegrained_fp8": None,
    "auto-round": ("packing_format", ("auto_round:fp8_static",)),
    "compressed-tensors": ("format", ("float-quantized",)),
    "modelopt": ("quant_algo", ("FP8",)),
}
"""Names of FP8 methods in configurations, and (key, values) of what they must say beside it, if anything."""


def _e4m3_values() -> npt.NDArray[np.float32]:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    magnitude[code & 127 == 127] = np.nan
    values: npt.NDArray[np.float32] = np.where(code & 128, -magnitude, magnitude).astype(np.float32)
    return values


E4M3 = _e4m3_values()
"""float32 (256,): the value of each E4M3 code."""


@dataclass(frozen=True)
class ScaleLayout:
    """How a weight's scale lies over it: ``rows`` x ``columns`` scales per matrix of N x K weights, each for
    ``block_rows`` x ``block_columns`` of them; ``matrices`` = 1 where one scale serves all of them."""

    name: str
    rows: int
    columns: int
    block_rows: int
    block_columns: int
    per_tensor: bool

    def decode(
        self,
        codes: npt.NDArray[np.uint8],
        first_row: int,
        matrix_rows: int,
        scale: npt.NDArray[np.float32],
    ) -> npt.NDArray[np.float32]:
        """float32 (R, K) of E4M3 ``codes`` (R, K), rows from ``first_row`` of the flattened weight, whose
        matrices have ``matrix_rows`` rows; ``scale`` is float32 (all scale rows, ``columns``)."""
        values = E4M3[codes]
        if self.per_tensor:
            values *= scale[0, 0]
            return values
        row = np.arange(first_row, first_row + len(codes))
        index = row // matrix_rows * self.rows + row % matrix_rows // self.block_rows
        for at in np.unique(index):
            factors = np.repeat(scale[at], self.block_columns)[: codes.shape[1]]
            here = np.flatnonzero(index == at)
            values[here[0] : here[-1] + 1] *= factors
        return values

    @property
    def qtype(self) -> str:
        """The grid of a matrix of two dimensions, by its name; "" for blocks of other sizes."""
        if self.per_tensor or (self.rows, self.columns) == (1, 1):
            return "e4m3_whole"
        if self.block_rows == 1 and self.columns == 1:
            return "e4m3"
        return "e4m3_b128_rows128" if (self.block_rows, self.block_columns) == (128, 128) else ""

    def held(
        self, codes: npt.NDArray[np.uint8], first_row: int, scale: npt.NDArray[np.float32], storage: str
    ) -> HeldRows | None:
        """``codes`` (R, K) of a matrix of two dimensions, from ``first_row``, with its ``scale``, which is stored as
        ``storage``; None for codes that are no numbers, and blocks that go beyond the last column."""
        columns = codes.shape[1]
        across = 1 if self.per_tensor else self.columns
        if columns % across or (across > 1 and columns // across != self.block_columns):
            return None
        if (codes & np.uint8(127) == 127).any():
            return None
        index = np.zeros(len(codes), np.int64)
        if not self.per_tensor:
            index = np.arange(first_row, first_row + len(codes)) // self.block_rows
        places = _PLACES[codes].astype(np.uint8)
        return HeldRows(_LEVELS, places, columns // across, scale[index][:, :across], storage)


_LEVELS = np.array(CODEBOOKS["e4m3"], np.float32)
_PLACES = np.array([127 + code if code < 128 else 254 - code for code in range(256)], np.int16)
"""By code: its place among the levels; of a code that is no number, none of them."""


def scales(raw: memoryview, dtype: str) -> npt.NDArray[np.float32]:
    """float32 (n,): the scales that the bytes ``raw`` of a tensor of ``dtype`` (of SCALE_DTYPES) hold."""
    stored = np.frombuffer(raw, _STORED[dtype])
    if dtype == _POWERS:
        return float_codes.POWERS[stored]
    return load_floats(stored)


def are_powers(dtype: str) -> bool:
    """Whether scales of this type are powers of two."""
    return dtype == _POWERS


def says_powers(quantization: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` says that scales are powers of two, whatever type they are stored in, as
    DeepSeek-V3.1's does."""
    return quantization.get("scale_fmt") == "ue8m0"


def is_scaled_float8(quantization: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is one of the FP8 forms that are decoded on reading."""
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in _FORMS:
        return False
    beside = _FORMS[method]
    return beside is None or quantization.get(beside[0]) in beside[1]


def has_scales(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether some FP8 weight has a scale, whatever the configuration says."""
    weights = (name.removesuffix(suffix) for suffix in _SCALE_SUFFIXES for name in tensors if name.endswith(suffix))
    return any(name in tensors and tensors[name].dtype == "F8_E4M3" for name in weights)


def block_size(quantization: Mapping[str, Any], file: Path) -> tuple[int, int] | None:
    """``weight_block_size`` (or compressed-tensors' ``block_structure``) as (rows, columns), None if absent."""
    value = quantization.get("weight_block_size")
    if value is None:
        groups = quantization.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            value = weights.get("block_structure") if isinstance(weights, dict) else None
            if value is not None:
                break
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int and 1 <= n <= 1 << 20 for n in value)):
        raise MalformedInputError(
            "quantization_config's block size must be two positive whole numbers",
            file=file,
            expected="[128, 128]",
            found=printable(repr(value), 80),
            remedy="fetch config.json again",
        )
    return value[0], value[1]


def pair_scales(
    tensors: Mapping[str, TensorInfo], blocks: tuple[int, int] | None
) -> tuple[dict[str, ScaleLayout], dict[str, str], dict[str, str]]:
    """Every FP8 weight's scale.

    Returns ({weight: layout}, {scale: weight} folded into it, {name: reason} left out). Raises MalformedInputError
    where a weight has no scale, or one of the wrong shape; UnsupportedError for the scale's element type.
    """
    layouts: dict[str, ScaleLayout] = {}
    folded: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name in tensors:
        if name.endswith(_ACTIVATION_SUFFIXES):
            left_out[name] = "scale of activations in FP8, not of weights"
            continue
        for suffix in _SCALE_SUFFIXES:
            weight = tensors.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
            if weight is not None and weight.dtype == "F8_E4M3":
                layouts[weight.name] = _layout(weight, tensors[name], blocks)
                folded[name] = weight.name
                break
    for name, tensor in tensors.items():
        if tensor.dtype == "F8_E4M3" and name not in layouts:
            raise MalformedInputError(
                "an FP8 weight has no scale, so its values are unknown",
                file=tensor.file,
                tensor=name,
                offset=tensor.offset,
                expected=f"a tensor {printable(name, 120)}_scale_inv or {printable(name, 120)}_scale",
                found="neither",
                remedy="fetch all shards of the model again",
            )
    return layouts, folded, left_out


def _layout(weight: TensorInfo, scale: TensorInfo, blocks: tuple[int, int] | None) -> ScaleLayout:
    if scale.dtype not in SCALE_DTYPES:
        raise UnsupportedError(
            "this element type is not read as the scale of FP8 weights",
            file=scale.file,
            tensor=scale.name,
            offset=scale.offset,
            expected=", ".join(SCALE_DTYPES),
            found=scale.dtype,
            remedy="use the BF16 form of this model",
        )
    if scale.elements == 1:
        return ScaleLayout(scale.name, 1, 1, 1, 1, True)
    if len(weight.shape) >= 2:
        *lead, rows, columns = weight.shape
        head = tuple(lead)
        if blocks is not None:
            down, across = math.ceil(rows / blocks[0]), math.ceil(columns / blocks[1])
            if scale.shape == (*head, down, across):
                return ScaleLayout(scale.name, down, across, blocks[0], blocks[1], False)
        if scale.shape in ((*head, rows), (*head, rows, 1)):
            return ScaleLayout(scale.name, rows, 1, 1, columns, False)
        if scale.shape in (head, (*head, 1), (*head, 1, 1)):
            return ScaleLayout(scale.name, 1, 1, rows, columns, False)
    raise MalformedInputError(
        "the scale of an FP8 weight does not fit it",
        file=scale.file,
        tensor=scale.name,
        offset=scale.offset,
        expected=f"one value per tensor, row or block {blocks} of {weight.shape}",
        found=str(scale.shape),
        remedy="check weight_block_size in config.json, or fetch the model again",
    )
