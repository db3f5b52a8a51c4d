"""Scales of whole matrices beside their weights in GGUF, as llama.cpp (b11549) reads them.

    NAME.scale         F32 (1,), or (experts,) beside a stack of experts: the product with NAME.weight is multiplied
                       with it
    NAME.input_scale   F32, likewise: what a runtime that rounds inputs to 4 bits scales these with; weights do not
                       depend on it

A weight is the value of its blocks times the scale, in float32. Matrices of blocks and the output matrix can have them;
an embedding cannot. The loader takes the tensors for every family, but the graphs of many do not multiply with those of
the feed-forward matrices: HEEDED has the families whose graphs do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from llm_quantize import kernels
from llm_quantize.errors import MalformedInputError, NumericPolicyError
from llm_quantize.io.gguf_file import GgufFile
from llm_quantize.io.paths import read_range
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.kernels.reference.mxfp4 import half_of_e4m3

SCALE, INPUT_SCALE = ".scale", ".input_scale"
AGAIN = "fetch or make the file again; it is damaged, or of a form that this version does not know"

_SCALED = re.compile(r"(blk\.\d+\.\w+|output)(?:\.scale|\.input_scale)")

HEEDED = frozenset(("llama", "qwen3", "qwen3moe", "cohere2", "mistral3"))
"""Architectures whose graphs multiply with the scales of every matrix; others with those of attention and output only
(llama.cpp b11549; a test runs each family)."""

_GROUPS, _GROUP, _BLOCK, _ONE = 4, 16, 36, 0x38  # of NVFP4: groups of a block, weights of one; bytes; the scale 1

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def beside(name: str, suffix: str = SCALE) -> str:
    """What the scale of the tensor ``name`` is called."""
    return name.removesuffix(".weight") + suffix


def companions(names: Collection[str]) -> dict[str, str]:
    """{scale: the weight that it belongs to} of the tensors of a file. One without its weight is none."""
    found = {}
    for name in names:
        parts = _SCALED.fullmatch(name)
        if parts is not None and f"{parts[1]}.weight" in names:
            found[name] = f"{parts[1]}.weight"
    return found


def is_heeded(name: str, arch: str) -> bool:
    """Whether llama.cpp multiplies with the scale of the weight ``name`` in models of ``arch``."""
    return arch in HEEDED or ".ffn_" not in name


def count_of(shape: tuple[int, ...]) -> int:
    """How many scales a weight of row-major ``shape`` has: one for each matrix of a stack."""
    return shape[0] if len(shape) > 2 else 1


class Scales:
    """The scales in the files of one model. Threads may share it.

    ``weights``: {scale of either kind: its weight}. Raises MalformedInputError for one of another form than its weight
    asks for.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], read: Callable[[TensorInfo], bytes]) -> None:
        self.weights: Mapping[str, str] = companions(tensors.keys())
        self._tensors, self._read = tensors, read
        self._kept: dict[str, Floats] = {}
        for name, weight in self.weights.items():
            _check(tensors[name], tensors[weight])

    @classmethod
    def of_files(cls, files: Sequence[GgufFile]) -> Scales:
        """Those of opened GGUF files, which are read again where a value is asked for."""
        tensors = {
            entry.name: TensorInfo(entry.name, entry.type.name, entry.shape, file.path, entry.offset, entry.nbytes)
            for file in files
            for entry in file.tensors
        }
        return cls(tensors, lambda info: read_range(info.file, info.offset, info.nbytes))

    def info(self, weight: str, suffix: str = SCALE) -> TensorInfo | None:
        """Where a scale of ``weight`` lies; None where there is none."""
        name = beside(weight, suffix)
        return self._tensors[name] if name in self.weights else None

    def of(self, weight: str, suffix: str = SCALE) -> Floats | None:
        """float32 (1,) or (experts,): a scale of ``weight``; None where there is none. Raises NumericPolicyError for
        one that is no positive number, and what reading raises."""
        info = self.info(weight, suffix)
        if info is None:
            return None
        if info.name not in self._kept:
            self._kept[info.name] = _positive(np.frombuffer(self._read(info), "<f4").astype(np.float32), info)
        return self._kept[info.name]

    def of_rows(self, weight: str, shape: tuple[int, ...], start: int, count: int) -> Floats | None:
        """float32 (count, 1): the scale of each of ``count`` rows from ``start`` on of ``weight``, of row-major
        ``shape``; None where it has none. Raises what ``of`` raises."""
        scales = self.of(weight)
        if scales is None:
            return None
        each = np.arange(start, start + count) // shape[-2] if len(shape) > 2 else np.zeros(count, np.intp)
        return scales[each][:, None]


def decode(qtype: str, packed: Bytes, columns: int, scales: Floats | None) -> Floats:
    """float32 (n, columns) of ``packed`` uint8 (n, row_bytes), with the ``scales`` (n, 1) of its rows, if there are.

    The scales of NVFP4's groups are multiplied first, as compressed-tensors does with its own; other blocks have no
    scale that could be, and their values are.
    """
    if scales is None:
        return kernels.dequantize(qtype, packed, columns)
    with np.errstate(over="ignore", invalid="ignore"):
        if qtype != "nvfp4":
            return np.asarray(kernels.dequantize(qtype, packed, columns) * scales, np.float32)
        blocks = packed.reshape(len(packed), -1, _BLOCK)
        alone = blocks.copy()
        alone[:, :, :_GROUPS] = _ONE
        levels = kernels.dequantize(qtype, alone.reshape(packed.shape), columns).reshape(len(packed), -1, _GROUP)
        groups = 2 * half_of_e4m3(blocks[:, :, :_GROUPS].reshape(len(packed), -1)) * scales
        return np.asarray(levels * groups[:, :, None], np.float32).reshape(len(packed), columns)


def _check(scale: TensorInfo, weight: TensorInfo) -> None:
    """Raise MalformedInputError unless ``scale`` has the form of a scale of ``weight``."""
    wanted = count_of(weight.shape)
    if scale.dtype != "F32" or scale.elements != wanted:
        raise MalformedInputError(
            "the scale of a matrix has the wrong form",
            file=scale.file,
            tensor=scale.name,
            offset=scale.offset,
            expected=f"F32 [{wanted}], as {weight.name} is {list(weight.shape)}",
            found=f"{scale.dtype} {list(scale.shape)}",
            remedy=AGAIN,
        )


def _positive(values: Floats, info: TensorInfo) -> Floats:
    """``values`` of the scale ``info``. Raises NumericPolicyError unless all are positive numbers."""
    right = np.isfinite(values) & (values > 0)
    if not right.all():
        at = int(np.flatnonzero(~right)[0])
        raise NumericPolicyError(
            "the scale of a matrix is of no sense",
            file=info.file,
            tensor=info.name,
            offset=info.offset + 4 * at,
            expected="a positive number",
            found=float(values[at]),
            remedy=AGAIN,
        )
    return values
