"""A quantized model directory (GPTQ, AWQ, compressed-tensors; ours, or a peer's) opened: which stored tensors hold
which matrix, proved to fit each other from headers alone, and rows of any matrix as float32.

What the fields mean is each format's own matter (``formats/``): here is what they have in common.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import UsageError
from llm_quantize.formats.packed import ALIGNED, PackedMatrix, Settings, check_index, wrong_form
from llm_quantize.formats.packed_formats import format_of
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.paths import inside
from llm_quantize.io.safetensors_file import Header, TensorInfo
from llm_quantize.io.tensor_reader import TensorReader
from llm_quantize.models.files import CONFIG_LIMIT, read_headers
from llm_quantize.models.safetensors import Checkpoint

_STEPS = 16 << 20
_STORED: dict[str, type[np.generic]] = {
    **{"I8": np.int8, "I32": np.int32, "I64": np.int64},
    **{"F16": np.float16, "BF16": np.uint16, "F32": np.float32},
}


def is_packed_directory(path: Path) -> bool:
    """Whether ``path`` is a model directory whose configuration says that it is quantized. Raises what reading the
    configuration raises."""
    if not path.is_dir() or not (path / "config.json").is_file():
        return False
    config = read_json_object(inside(path, "config.json"), limit_bytes=CONFIG_LIMIT)
    return any(isinstance(where, dict) and (where.get(key) is not None) for where, key in _places(config))


def quantization_of(config: Mapping[str, Any], file: Path) -> Settings:
    """The quantization_config. Raises UsageError where there is none, MalformedInputError where it is no object."""
    found = next((where[key] for where, key in _places(config) if where.get(key) is not None), None)
    if found is None:
        raise UsageError(
            "this model is not quantized",
            file=file,
            expected="a quantization_config",
            found="none",
            remedy="give a GGUF file, or the directory of a GPTQ, AWQ or compressed-tensors model",
        )
    if not isinstance(found, dict):
        raise wrong_form(file, "quantization_config", "an object", found)
    return Settings(found, file)


def _places(config: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    text = config.get("text_config")
    wheres = [config] + ([text] if isinstance(text, dict) else [])
    return [(where, key) for where in wheres for key in ("quantization_config", "compression_config")]


class PackedDirectory:
    """The quantized model in ``path``. Threads may share it; each keeps the packed bytes of one matrix.

    ``method``: gptq, awq or compressed-tensors. ``matrices``: {the weight's name in an unquantized model: matrix}.
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
        self.settings = quantization_of(self.config, self.file)
        self.format = format_of(self.settings)
        self.method = self.format.NAME
        self.headers: tuple[Header, ...]
        self.headers, self.tensors = read_headers(self.path, str(path), packed=True)
        self._reader = TensorReader(self.headers)
        self._local = threading.local()
        self.notes: tuple[str, ...] = tuple(self.format.notes(self.settings))
        try:
            found = self.format.read(self.tensors, self.settings, self._stored)
            self.matrices = {f"{matrix.name}.weight": matrix for matrix in found}
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
        return self.format.layout_name(self.matrices.values())

    @property
    def label(self) -> str:
        """What people call its level: GPTQ-4bit, AWQ-4bit, W4A16."""
        return self.format.LABEL.format(level=self.format.level_of(self.matrices.values()))

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

    def field(self, matrix: PackedMatrix, suffix: str) -> npt.NDArray[Any]:
        """One field whole, in its shape; bfloat16 and float16 as float32."""
        info = matrix.fields[suffix]
        stored = self._stored(info)
        if info.dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32) if info.dtype == "F16" else stored

    def _stored(self, info: TensorInfo) -> npt.NDArray[Any]:
        stored = np.empty(info.shape, _STORED[info.dtype])
        self._reader.read(info, 0, stored.reshape(-1).view(np.uint8).data)
        return stored

    def fields(self, matrix: PackedMatrix) -> dict[str, npt.NDArray[Any]]:
        """All fields of a matrix, as this thread keeps them until it asks for another's."""
        kept: tuple[PackedMatrix, dict[str, npt.NDArray[Any]]] | None = getattr(self._local, "fields", None)
        if kept is None or kept[0] is not matrix:
            self._local.fields = None
            kept = matrix, {suffix: self.field(matrix, suffix) for suffix in matrix.fields}
            check_index(matrix, kept[1])
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
        return self.format.unpack(matrix, fields, first, last)[start - first : stop - first]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight as an unquantized model has it."""
        matrix = self.matrices.get(name)
        return self.plain[name].shape if matrix is None else (matrix.rows, matrix.columns)
