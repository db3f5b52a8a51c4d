"""A quantized model directory (GPTQ, AWQ, compressed-tensors; ours, or a peer's) opened: which stored tensors hold
which matrix, proved to fit each other from headers alone, and rows of any matrix as float32.

N = out = rows, K = in = columns, G = groups, b = bits. The fields of a matrix of module M are the tensors M.SUFFIX:

    gptq                qweight int32 (K b/32, N), qzeros int32 (G, N b/32), scales (G, N), g_idx int32 (K) or none
    awq (gemm)          qweight int32 (K, N b/32), qzeros int32 (G, N b/32), scales (G, N)
    pack-quantized      weight_packed int32 (N, ceil(K b/32)), weight_scale (N, G), weight_shape int64 (2), perhaps
                        weight_zero_point int32 (ceil(N b/32), G) and weight_g_idx int32 (K)
    int-quantized       weight int8 (N, K), weight_scale (N, G), perhaps weight_zero_point int8 (N, G)

Formats: AutoGPTQ and GPTQModel (gptq, gptq_v2), AutoAWQ (gemm), vllm-project's compressed-tensors. What the numbers
in the fields mean is in unpacking.py.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import IntegrityError, UnsupportedError, UsageError
from llm_quantize.formats import unpacking
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.paths import inside
from llm_quantize.io.safetensors_file import Header, TensorInfo
from llm_quantize.io.tensor_reader import TensorReader
from llm_quantize.models.files import CONFIG_LIMIT, read_headers
from llm_quantize.models.quantized_config import (
    AGAIN,
    declared_bits,
    method_of,
    notes_of,
    quantization_of,
    weight_settings,
)
from llm_quantize.models.safetensors import Checkpoint

ALIGNED = 32
"""Rows are unpacked in multiples of this: so many codes of any width fill whole words."""

_STEPS = 16 << 20
_FLOATS = ("F16", "BF16", "F32")
_STORED: dict[str, type[np.generic]] = {
    **{"I8": np.int8, "I32": np.int32, "I64": np.int64},
    **{"F16": np.float16, "BF16": np.uint16, "F32": np.float32},
}
_REQUIRED = {
    "gptq": ("qweight", "qzeros", "scales"),
    "awq": ("qweight", "qzeros", "scales"),
    "pack-quantized": ("weight_packed", "weight_scale", "weight_shape"),
    "int-quantized": ("weight", "weight_scale"),
}
_OPTIONAL = {
    "gptq": ("g_idx",),
    "awq": (),
    "pack-quantized": ("weight_zero_point", "weight_g_idx"),
    "int-quantized": ("weight_zero_point",),
}
_ALONE = {"gptq": "qweight", "awq": "qweight", "pack-quantized": "weight_packed", "int-quantized": "weight_scale"}


@dataclass(frozen=True)
class Packed:
    """One quantized matrix (rows, columns). ``layout``: a key of the table above. ``group``: columns that share a
    scale (the last group may be shorter). ``minus_one``: stored zero points are one too small (GPTQ's first format).
    ``fields``: {suffix: stored tensor}."""

    name: str
    layout: str
    rows: int
    columns: int
    bits: int
    group: int
    symmetric: bool
    minus_one: bool
    fields: Mapping[str, TensorInfo]

    @property
    def groups(self) -> int:
        """Scales of one row."""
        return -(-self.columns // self.group)

    @property
    def qtype(self) -> str:
        """The grid in one word: int4_g128, int8, int4_g128_asym."""
        group = "" if self.group >= self.columns else f"_g{self.group}"
        return f"int{self.bits}{group}{'' if self.symmetric else '_asym'}"

    @property
    def nbytes(self) -> int:
        """Bytes of all its fields."""
        return sum(field.nbytes for field in self.fields.values())


class PackedDirectory:
    """The quantized model in ``path``. Threads may share it; each keeps the packed bytes of one matrix.

    ``method``: gptq, awq or compressed-tensors. ``matrices``: {the weight's name in an unquantized model: Packed}.
    ``plain``: every other tensor, as it is stored. ``tensors``: all that are stored. ``notes``: what a reader should
    know. Close it, or use it as a context manager.

    Raises UsageError (no such directory), MalformedInputError (files that break their format, a configuration of the
    wrong form), UnsupportedError (a method or layout that is not decoded here), IntegrityError (fields of a matrix
    that do not fit each other or the configuration).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UsageError("no such directory", file=self.path, remedy="check the path")
        self.file = self.path / "config.json"
        self.config = read_json_object(inside(self.path, "config.json"), limit_bytes=CONFIG_LIMIT)
        self.quantization = quantization_of(self.config, self.file)
        self.method, self.layouts = method_of(self.quantization, self.file)
        self.headers: tuple[Header, ...]
        self.headers, self.tensors = read_headers(self.path, str(path), packed=True)
        self._reader = TensorReader(self.headers)
        self._local = threading.local()
        self.notes: tuple[str, ...] = tuple(notes_of(self.quantization))
        try:
            fields = _collect(self.tensors, self.layouts)
            self.matrices = {f"{name}.weight": self._matrix(name, *found) for name, found in fields.items()}
        except BaseException:
            self.close()
            raise
        taken = {field.name for matrix in self.matrices.values() for field in matrix.fields.values()}
        self.plain = {name: info for name, info in self.tensors.items() if name not in taken}
        self._floats = Checkpoint(self.path, self.path.name, self.config, None, None, self.headers, dict(self.plain))

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        return sum(header.file_size for header in self.headers)

    @property
    def layout_name(self) -> str:
        """The form of the method: gptq, gptq_v2, gemm, pack-quantized, int-quantized."""
        if self.method == "awq":
            return "gemm"
        if self.method == "gptq":
            return "gptq" if all(matrix.minus_one for matrix in self.matrices.values()) else "gptq_v2"
        return "+".join(sorted({matrix.layout for matrix in self.matrices.values()}))

    @property
    def label(self) -> str:
        """What people call its level: GPTQ-4bit, AWQ-4bit, W4A16."""
        bits = sorted({matrix.bits for matrix in self.matrices.values()})
        width = "+".join(map(str, bits)) or "none"
        if self.method in ("gptq", "awq"):
            return f"{self.method.upper()}-{width}bit"
        asymmetric = any(not matrix.symmetric for matrix in self.matrices.values())
        return f"W{width}A16{'_ASYM' if asymmetric else ''}"

    @property
    def scratch(self) -> int:
        """Bytes that a thread holds while it decodes rows: the largest matrix as it is stored, scales in float32, and
        the steps of some rows."""
        return 2 * max((matrix.nbytes for matrix in self.matrices.values()), default=0) + _STEPS

    def close(self) -> None:
        """Close every file."""
        self._reader.close()
        if hasattr(self, "_floats"):
            self._floats.close()

    def __enter__(self) -> PackedDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def field(self, matrix: Packed, suffix: str) -> npt.NDArray[Any]:
        """One field whole, in its shape; bfloat16 and float16 as float32."""
        info = matrix.fields[suffix]
        stored = np.empty(info.shape, _STORED[info.dtype])
        self._reader.read(info, 0, stored.reshape(-1).view(np.uint8).data)
        if info.dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32) if info.dtype == "F16" else stored

    def fields(self, matrix: Packed) -> dict[str, npt.NDArray[Any]]:
        """All fields of a matrix, as this thread keeps them until it asks for another's."""
        kept: tuple[Packed, dict[str, npt.NDArray[Any]]] | None = getattr(self._local, "fields", None)
        if kept is None or kept[0] is not matrix:
            self._local.fields = None
            kept = matrix, {suffix: self.field(matrix, suffix) for suffix in matrix.fields}
            self._check_order(matrix, kept[1])
            self._local.fields = kept
        return kept[1]

    def forget(self) -> None:
        """Give back what this thread keeps."""
        self._local.fields = None

    def rows(self, name: str, start: int, stop: int, *, transpose: bool = False) -> npt.NDArray[np.float32]:
        """Rows [start, stop) of the weight ``name`` (of ``matrices`` or ``plain``): float32 (stop - start, columns);
        ``transpose``: of a plain one whose last two dimensions are exchanged.

        Raises IntegrityError (a group index outside the groups; the file changed), UnsupportedError (integers in the
        place of weights), ResourceError.
        """
        matrix = self.matrices.get(name)
        if matrix is None:
            values = self._floats.read_rows(name, start, stop, transpose=transpose)
            if values.dtype == np.uint16:
                return (values.astype(np.uint32) << 16).view(np.float32)
            return values.astype(np.float32)
        fields = self.fields(matrix)
        first, last = start // ALIGNED * ALIGNED, min(-(-stop // ALIGNED) * ALIGNED, matrix.rows)
        return unpacking.rows(matrix, fields, first, last)[start - first : stop - first]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight as an unquantized model has it."""
        matrix = self.matrices.get(name)
        return self.plain[name].shape if matrix is None else (matrix.rows, matrix.columns)

    def _check_order(self, matrix: Packed, fields: Mapping[str, npt.NDArray[Any]]) -> None:
        for suffix in ("g_idx", "weight_g_idx"):
            index = fields.get(suffix)
            if index is None or not index.size:
                continue
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= matrix.groups:
                at = int(np.flatnonzero((index < 0) | (index >= matrix.groups))[0])
                info = matrix.fields[suffix]
                raise IntegrityError(
                    "a column belongs to a group that does not exist",
                    file=info.file,
                    tensor=info.name,
                    offset=info.offset + at * index.itemsize,
                    expected=f"0 to {matrix.groups - 1}",
                    found=int(index[at]),
                    remedy=AGAIN,
                )

    def _matrix(self, name: str, layout: str, fields: Mapping[str, TensorInfo]) -> Packed:
        for suffix in _REQUIRED[layout]:
            if suffix not in fields:
                raise IntegrityError(
                    "a field of a quantized matrix is absent",
                    file=next(iter(fields.values())).file,
                    tensor=f"{name}.{suffix}",
                    expected=", ".join(_REQUIRED[layout]),
                    found=", ".join(sorted(fields)),
                    remedy=AGAIN,
                )
        rows, columns, bits = self._sizes(layout, fields)
        settings = weight_settings(self.quantization, self.file, layout, bits)
        group = columns if settings.group in (-1, 0) else settings.group
        scales = fields["weight_scale" if "weight_scale" in fields else "scales"]
        by_row = layout in ("gptq", "awq")
        found = scales.shape[0 if by_row else -1] if len(scales.shape) == 2 else 1
        if settings.varies and found and found != -(-columns // group) and columns % found == 0:
            group = columns // found
        symmetric = "weight_zero_point" not in fields if not by_row else settings.symmetric
        matrix = Packed(name, layout, rows, columns, bits, group, symmetric, settings.minus_one, fields)
        _check_fields(matrix)
        return matrix

    def _sizes(self, layout: str, fields: Mapping[str, TensorInfo]) -> tuple[int, int, int]:
        """(rows, columns, bits), as the shapes of the fields say."""
        main = fields[_REQUIRED[layout][0]]
        if len(main.shape) != 2:
            raise _misfit(main, "a matrix", main.shape)
        if layout == "int-quantized":
            declared = declared_bits(self.quantization)
            return main.shape[0], main.shape[1], 8 if 8 in declared or not declared else declared[0]
        if layout == "pack-quantized":
            rows, columns = self._weight_shape(fields["weight_shape"])
            fitting = [b for b in range(1, 9) if main.shape == (rows, -(-columns * b // 32))]
            if not fitting or not columns:
                raise _misfit(main, f"codes of {rows} rows and {columns} columns", main.shape)
            likely = [b for b in fitting if b in declared_bits(self.quantization)]
            return rows, columns, (likely or fitting)[0]
        scales = fields["scales"]
        rows = scales.shape[-1] if len(scales.shape) == 2 else 0
        if layout == "awq":
            bits, rest = divmod(32 * main.shape[1], max(1, rows))
            columns = main.shape[0]
        else:
            index = fields.get("g_idx")
            declared_width = declared_bits(self.quantization)
            columns = index.shape[0] if index is not None and len(index.shape) == 1 else 0
            columns = columns or 32 * main.shape[0] // max(1, declared_width[0] if declared_width else 4)
            bits, rest = divmod(32 * main.shape[0], max(1, columns))
        if layout == "awq" and not rest and bits in (2, 3, 8):
            raise UnsupportedError(
                "AWQ is decoded in 4 bits only",
                file=main.file,
                tensor=main.name,
                expected="4 bits",
                found=f"{bits} bits",
            )
        if rest or not 2 <= bits <= 8 or not rows:
            raise _misfit(main, f"codes of {rows} rows and {columns} columns in 2 to 8 bits", main.shape)
        return rows, columns, bits

    def _weight_shape(self, info: TensorInfo) -> tuple[int, int]:
        if (info.dtype, info.shape) not in (("I64", (2,)), ("I32", (2,))):
            raise _misfit(info, "two whole numbers, int64", info.shape)
        stored = np.empty(2, _STORED[info.dtype])
        self._reader.read(info, 0, stored.view(np.uint8).data)
        rows, columns = map(int, stored)
        if not (0 < rows < 1 << 40 and 0 < columns < 1 << 40):
            raise _misfit(info, "two positive sizes", (rows, columns))
        return rows, columns


def _collect(
    tensors: Mapping[str, TensorInfo], layouts: tuple[str, ...]
) -> dict[str, tuple[str, dict[str, TensorInfo]]]:
    """{module: (layout, its fields)} of every module that has the layout's telling field."""
    found: dict[str, tuple[str, dict[str, TensorInfo]]] = {}
    for layout in layouts:
        for name in tensors:
            module, dot, suffix = name.rpartition(".")
            if suffix != _ALONE[layout] or not dot or module in found:
                continue
            words = (*_REQUIRED[layout], *_OPTIONAL[layout])
            fields = {word: tensors[f"{module}.{word}"] for word in words if f"{module}.{word}" in tensors}
            found[module] = layout, fields
    return found


def _check_fields(matrix: Packed) -> None:
    """Raise IntegrityError unless every field has the shape and type that rows, columns, bits and group ask for."""
    n, k, g, b = matrix.rows, matrix.columns, matrix.groups, matrix.bits
    across, down = (-(-n * b // 32), -(-k * b // 32))
    shapes: dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]] = {
        "qweight": (("I32",), ((down, n) if matrix.layout == "gptq" else (k, across),)),
        "qzeros": (("I32",), ((g, across),)),
        "scales": (_FLOATS, ((g, n),)),
        "g_idx": (("I32",), ((k,), (0,))),
        "weight_g_idx": (("I32",), ((k,),)),
        "weight_packed": (("I32",), ((n, down),)),
        "weight": (("I8",), ((n, k),)),
        "weight_scale": (_FLOATS, ((n, g), *(((n,), (1,), (1, 1), ()) if g == 1 else ()))),
        "weight_shape": (("I64", "I32"), ((2,),)),
        "weight_zero_point": (
            (("I32",), ((across, g),)) if matrix.layout == "pack-quantized" else (("I8",), ((n, g), (n,), (1,), (1, 1)))
        ),
    }
    for suffix, info in matrix.fields.items():
        dtypes, fitting = shapes[suffix]
        if info.dtype not in dtypes or info.shape not in fitting:
            raise _misfit(info, f"{' or '.join(dtypes)} {list(fitting[0])}", info.shape)


def _misfit(info: TensorInfo, expected: str, found: tuple[int, ...]) -> IntegrityError:
    return IntegrityError(
        "a field of a quantized matrix does not fit the others, or the configuration",
        file=info.file,
        tensor=info.name,
        offset=info.offset,
        expected=expected,
        found=f"{info.dtype} {list(found)}",
        remedy=AGAIN,
    )
