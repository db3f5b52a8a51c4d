"""A GGUF file as a model to start from: its weights under the names and in the shapes of the checkpoint that it holds.

What it is, architectures/from_gguf.py derives from its metadata; rows are read through the inverse of the map, a few at
a time, exactly as the file has them. What is made of a quantized one has its errors too; ``kind`` says so.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gguf.constants import Keys

from llm_quantize.architectures.base import OutputTensor, Piece
from llm_quantize.architectures.from_gguf import Contents, Derived, derive
from llm_quantize.architectures.rows import (
    Shaped,
    chunk_rows,
    held_output_rows,
    inverse,
    matrix_shape,
    read_output_rows,
    to_float32,
)
from llm_quantize.errors import MalformedInputError, UnsupportedError
from llm_quantize.formats.gguf.levels import LEVELS
from llm_quantize.formats.gguf.scales import INPUT_SCALE, Scales, companions, decode
from llm_quantize.io.artifact_files import artifact_files
from llm_quantize.io.gguf_file import GgufFile, MetaValue, read_gguf
from llm_quantize.io.paths import opened, pread_into
from llm_quantize.io.safetensors_file import Header, TensorInfo
from llm_quantize.io.tensor_reader import TensorReader
from llm_quantize.models.base import Digest, FileFact, Opened, Values, fingerprint, writable
from llm_quantize.models.hub.locate import Place
from llm_quantize.models.safetensors import without_weights
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.held import Held, move_whole

if TYPE_CHECKING:
    import torch

    from llm_quantize.grids.grid import Grid

Bytes = npt.NDArray[np.uint8]

_MAGIC = b"GGUF"
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FLOATS: Mapping[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_SCALED, _SCALED_GRID = "nvfp4", "e2m1_b16_e4m3"
"""The type whose scales beside it have a place in grids, and the grid that it is on with them."""
_GRIDS: Mapping[str, str] = {
    **dict.fromkeys(("tq1_0", "tq2_0"), "int2_g128"),
    **{"q2_0": "int2_g64_asym", "q4_0": "int4_g32", "q5_0": "int5_g32", "q8_0": "int8_g32"},
    **{"q4_1": "affine4_g32", "q5_1": "affine5_g32", "mxfp4": "e2m1_b32_e8m0", "nvfp4": "e2m1_b16_e4m3alone"},
    **{name: name for name in ("q1_0", "iq4_nl", "iq4_xs", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")},
}
"""Types that are grids, by the name that formats of directories have for the grid; their own where none has it. Ternary
blocks are two groups of the size that kernels know, and never as low as two bits go."""
_OF_INPUTS = "a scale of the inputs of a matrix, for runtimes that round them to 4 bits: weights do not depend on it"


class StoredRows:
    """Rows of the tensors of a file, by their own names (``architectures.rows.RowSource``); threads may share it.

    ``scales``: those that whole matrices have beside them, which are not among ``tensors``: rows are read times them.
    Raises MalformedInputError for a scale of a wrong form.
    """

    def __init__(self, headers: Sequence[Header]) -> None:
        held = {name: info for header in headers for name, info in header.tensors.items()}
        self.scales = Scales(held, self._whole)
        self.tensors = {name: info for name, info in held.items() if name not in self.scales.weights}
        self._reader = TensorReader(headers)
        self._shaped = Shaped({name: info.shape for name, info in self.tensors.items()})

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        """(rows, columns) of a tensor; see ``Rows.matrix``."""
        return self._shaped.matrix(name, transpose=transpose)

    def read_rows(
        self,
        name: str,
        start: int,
        stop: int,
        *,
        transpose: bool = False,
        buffer: Any = None,
        digest: Digest | None = None,
    ) -> Values:
        """Rows as ``Rows.read_rows`` has them; ``digest`` is updated with the bytes that were read."""
        if transpose:
            rows = self.matrix(name)[0]
            return _turned(self.read_rows(name, 0, rows, digest=digest), self.tensors[name].shape, start, stop)
        info = self.tensors[name]
        rows, columns = self.matrix(name)
        row_bytes = info.nbytes // rows
        plain = _FLOATS.get(info.dtype)
        size = (stop - start) * row_bytes
        view = writable(None if plain is None else buffer, size)
        self._reader.read(info, start * row_bytes, view)
        if digest is not None:
            digest.update(view)
        scales = self.scales.of_rows(name, info.shape, start, stop - start)
        if digest is not None and scales is not None:
            digest.update(scales.data)
        if plain is None:
            return decode(info.dtype, np.frombuffer(view, np.uint8).reshape(stop - start, row_bytes), columns, scales)
        stored: npt.NDArray[Any] = np.frombuffer(view, plain).reshape(stop - start, columns)
        return stored if scales is None else to_float32(stored) * scales

    def held(self, name: str, *, transpose: bool = False) -> Held | None:
        """As ``Model.held``."""
        dtype, scaled = self.tensors[name].dtype, self.scales.info(name) is not None
        if transpose or dtype not in _GRIDS or (scaled and dtype != _SCALED):
            return None
        return Held(_SCALED_GRID if scaled else _GRIDS[dtype], "float16")

    def block_rows(self, name: str, start: int, stop: int) -> Bytes:
        """uint8 (stop - start, row_bytes): rows as they are stored."""
        info = self.tensors[name]
        row_bytes = info.nbytes // self.matrix(name)[0]
        packed = np.empty((stop - start, row_bytes), np.uint8)
        self._reader.read(info, start * row_bytes, packed.reshape(-1).data)
        return packed

    def held_grid(
        self, name: str, start: int, stop: int, *, transpose: bool = False
    ) -> tuple[Grid, torch.Tensor] | None:
        """As ``Model.held_grid``."""
        if self.held(name, transpose=transpose) is None:
            return None
        from llm_quantize.grids import ggml_held

        info, columns = self.tensors[name], self.matrix(name)[1]
        scales = self.scales.of_rows(name, info.shape, start, stop - start)
        return ggml_held.held(info.dtype, self.block_rows(name, start, stop), columns, scales)

    def _whole(self, info: TensorInfo) -> bytes:
        """The bytes of a small tensor."""
        found = bytearray(info.nbytes)
        self._reader.read(info, 0, memoryview(found))
        return bytes(found)

    def close(self) -> None:
        """Close every file."""
        self._reader.close()


class _BlockSource:
    """Rows of a file as they are stored (``architectures.rows.RowSource``)."""

    def __init__(self, stored: StoredRows) -> None:
        self._stored = stored

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        """(rows, bytes of one)."""
        rows = self._stored.matrix(name, transpose=transpose)[0]
        return rows, self._stored.tensors[name].nbytes // rows

    def read_rows(
        self, name: str, start: int, stop: int, *, transpose: bool = False, buffer: Any = None, digest: Any = None
    ) -> Bytes:
        """uint8 (stop - start, row_bytes)."""
        if transpose:
            raise ValueError(f"{name} is read by columns")
        del buffer, digest
        return self._stored.block_rows(name, start, stop)


class GgufModel(Opened):
    """An opened GGUF file, or all parts of a split one (``base.Model``). ``stored``: its tensors by their own names."""

    revision: str | None = None
    generation_config: dict[str, Any] | None = None
    temporary: tempfile.TemporaryDirectory[str] | None = None

    def __init__(
        self, name: str, metadata: Mapping[str, MetaValue], headers: Sequence[Header], derived: Derived, hollow: bool
    ) -> None:
        self.name, self.headers, self.headers_only = name, tuple(headers), hollow
        self.directory = headers[0].path
        self.metadata: Mapping[str, MetaValue] | None = metadata
        self.stored = StoredRows(headers)
        self.config: dict[str, Any] = {**derived.config, "dtype": _dtype(self.stored.tensors.values())}
        self._rows = inverse(derived.shapes, derived.outputs)
        self.tensors: dict[str, TensorInfo] = {name: self._info(tensor) for name, tensor in self._rows.items()}
        held = {piece.source: name for name, tensor in self._rows.items() for piece in tensor.pieces}
        scales = self.stored.scales.weights
        self.folded: Mapping[str, str] = {
            scale: held[weight] for scale, weight in scales.items() if not scale.endswith(INPUT_SCALE)
        }
        self.left_out: Mapping[str, str] = {scale: _OF_INPUTS for scale in scales if scale.endswith(INPUT_SCALE)}
        self.kind = _kind(metadata, self.stored.tensors.values())

    def _info(self, tensor: OutputTensor) -> TensorInfo:
        """A tensor as it is stored: of several types, each is named, and its values are float32."""
        parts = [self.stored.tensors[piece.source] for piece in tensor.pieces]
        bits = sum(part.nbytes * _share(piece.count, part) for piece, part in zip(tensor.pieces, parts, strict=True))
        words = "+".join(dict.fromkeys(part.dtype for part in parts))
        return TensorInfo(tensor.name, words, tensor.shape, parts[0].file, parts[0].offset, round(bits))

    @property
    def config_file(self) -> Path:
        """As ``Model.config_file``: its configuration is in the file itself."""
        return self.directory

    def fingerprint(self) -> list[FileFact]:
        """As ``Model.fingerprint``."""
        return fingerprint(self.directory.parent, self.headers)

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        """As ``Rows.matrix``."""
        shape = self.tensors[name].shape
        return matrix_shape((*shape[:-2], shape[-1], shape[-2]) if transpose else shape)

    def check_readable(self, name: str) -> None:
        """As ``Rows.check_readable``."""
        for piece in self._rows[name].pieces:
            info = self.stored.tensors[piece.source]
            if info.dtype not in _FLOATS and info.dtype not in QTYPES:
                raise UnsupportedError(
                    f"tensors of type {info.dtype} cannot be decoded",
                    file=info.file,
                    tensor=info.name,
                    offset=info.offset,
                    expected=", ".join(QTYPES),
                    found=info.dtype,
                    remedy="start from the original model",
                )

    def is_readable(self, name: str) -> bool:
        """As ``Rows.is_readable``."""
        words = self.tensors[name].dtype.split("+")
        return all(word in _FLOATS or word in QTYPES for word in words)

    def stored_dtype(self, name: str) -> np.dtype[Any]:
        """As ``Rows.stored_dtype``: float32 for what is quantized, offset, scaled, or of several types."""
        self.check_readable(name)
        pieces = self._rows[name].pieces
        offset = any(piece.altered or self.stored.scales.info(piece.source) is not None for piece in pieces)
        return np.dtype(np.float32 if offset else _FLOATS.get(self.tensors[name].dtype, np.float32))

    def raw_rows(self, name: str, start: int, stop: int, *, buffer: Any = None) -> memoryview:
        """As ``Rows.raw_rows``: the values, in the type of ``stored_dtype``."""
        columns = self.matrix(name)[1]
        row_bytes = columns * self.stored_dtype(name).itemsize
        size = (stop - start) * row_bytes
        view = writable(buffer, size)
        step = chunk_rows(columns)
        for first in range(start, stop, step):
            last = min(stop, first + step)
            rows = self.read_rows(name, first, last)
            view[(first - start) * row_bytes : (last - start) * row_bytes] = rows.reshape(-1).view(np.uint8).data
        return view

    def read_rows(
        self,
        name: str,
        start: int,
        stop: int,
        *,
        transpose: bool = False,
        buffer: Any = None,
        digest: Digest | None = None,
    ) -> Values:
        """As ``Rows.read_rows``; ``digest`` is updated with the bytes of the file that were read."""
        if self.headers_only:
            raise without_weights(self.tensors[name])
        tensor = self._rows[name]
        (piece, *others) = tensor.pieces
        if transpose and piece.transpose and not others:
            tensor = OutputTensor(name, tensor.shape, (_upright(piece),))
        elif transpose:
            whole = self.read_rows(name, 0, self.matrix(name)[0], digest=digest)
            return _turned(whole, tensor.shape, start, stop)
        if start == stop:
            nothing: npt.NDArray[Any] = np.empty(
                (0, self.matrix(name, transpose=transpose)[1]), self.stored_dtype(name)
            )
            return nothing
        values: npt.NDArray[Any] = read_output_rows(self.stored, tensor, start, stop, buffer=buffer, digest=digest)
        return values if values.dtype == self.stored_dtype(name) else to_float32(values)

    def held(self, name: str, *, transpose: bool = False) -> Held | None:
        """As ``Model.held``: nothing of what the file stores by columns, with something added, or in an order of
        columns that parts blocks."""
        pieces = self._rows[name].pieces
        found = {self.stored.held(piece.source) for piece in pieces}
        moves = not transpose and all(map(self._moves_whole, pieces))
        return found.pop() if len(found) == 1 and moves else None

    def _moves_whole(self, piece: Piece) -> bool:
        if piece.transpose or piece.altered:
            return False
        if piece.columns is None:
            return True
        kind = QTYPES.get(self.stored.tensors[piece.source].dtype)
        return kind is not None and kind.block_size < len(piece.columns) and move_whole(piece.columns, kind.block_size)

    def _by_rows(self, name: str, *, transpose: bool = False) -> OutputTensor | None:
        """How the tensor's rows are rows of the file, as they stand; None where they are not."""
        tensor = self._rows[name]
        if transpose:
            (piece, *others) = tensor.pieces
            if others or not piece.transpose:
                return None
            tensor = OutputTensor(name, tensor.shape, (_upright(piece),))
        turned = any(piece.transpose or piece.columns is not None or piece.altered for piece in tensor.pieces)
        return None if turned else tensor

    def block_type(self, name: str, *, transpose: bool = False) -> str | None:
        """As ``Model.block_type``; None for what has a scale beside it."""
        tensor = self._by_rows(name, transpose=transpose)
        sources = [] if tensor is None else [piece.source for piece in tensor.pieces]
        found = {self.stored.tensors[one].dtype for one in sources}
        if len(found) != 1 or any(self.stored.scales.info(one) is not None for one in sources):
            return None
        dtype = found.pop()
        return dtype if dtype in QTYPES else None

    def block_rows(self, name: str, start: int, stop: int, *, transpose: bool = False) -> Bytes:
        """As ``Model.block_rows``."""
        if self.headers_only:
            raise without_weights(self.tensors[name])
        tensor = self._by_rows(name, transpose=transpose)
        if tensor is None or self.block_type(name, transpose=transpose) is None:
            return super().block_rows(name, start, stop)
        found: Bytes = read_output_rows(_BlockSource(self.stored), tensor, start, stop)
        return found

    def held_grid(
        self, name: str, start: int, stop: int, *, transpose: bool = False
    ) -> tuple[Grid, torch.Tensor] | None:
        """As ``Model.held_grid``."""
        if self.headers_only:
            raise without_weights(self.tensors[name])
        return (
            None
            if self.held(name, transpose=transpose) is None
            else held_output_rows(self.stored, self._rows[name], start, stop)
        )

    def close(self) -> None:
        """As ``Rows.close``."""
        self.stored.close()


def _turned(whole: Values, shape: tuple[int, ...], start: int, stop: int) -> Values:
    """Rows [start, stop) of a tensor whose last two dimensions are exchanged, from all its rows."""
    seen = whole.reshape(shape).swapaxes(-1, -2)
    turned: npt.NDArray[Any] = np.ascontiguousarray(seen.reshape(matrix_shape(seen.shape))[start:stop])
    return turned


def sniff(path: Path) -> bool:
    """Whether ``path`` is a GGUF file, or a directory of them without other weights."""
    if path.is_dir():
        return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors*"))
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def open_at(place: Place, model: str, *, headers_only: bool = False) -> GgufModel:
    """The GGUF model that lies at ``place``.

    Raises UsageError (a part of a split model is absent; a directory holds several), MalformedInputError (a damaged or
    truncated file, parts of two models), UnsupportedError (an architecture, a type or a tensor that is not known here;
    an adapter, a projector, an importance matrix).
    """
    del model
    paths = artifact_files(place.path)
    files = [read_gguf(path) for path in paths]
    _check_parts(files)
    metadata = files[0].metadata
    headers = [_header(file) for file in files]
    shapes = {name: info.shape for header in headers for name, info in header.tensors.items()}
    shapes = {name: shape for name, shape in shapes.items() if name not in companions(shapes.keys())}

    def values(name: str) -> npt.NDArray[np.float32]:
        stored = StoredRows(headers)
        try:
            return to_float32(stored.read_rows(name, 0, 1)).reshape(-1)
        finally:
            stored.close()

    derived = derive(Contents(paths[0], metadata, shapes, values))
    return GgufModel(place.called or _name(paths[0]), metadata, headers, derived, headers_only)


def _check_parts(files: Sequence[GgufFile]) -> None:
    """Raise MalformedInputError unless the files are all parts of one model, each tensor once."""
    numbers = [getattr(file.metadata.get(Keys.Split.LLM_KV_SPLIT_NO), "value", 0) for file in files]
    counts = [getattr(file.metadata.get(Keys.Split.LLM_KV_SPLIT_COUNT), "value", 1) or 1 for file in files]
    held = Counter(tensor.name for file in files for tensor in file.tensors)
    doubled = next((name for name, times in held.items() if times > 1), None)
    if counts != [len(files)] * len(files) or numbers != list(range(len(files))) or doubled is not None:
        raise MalformedInputError(
            "parts of a split model are missing or mixed",
            file=files[0].path,
            tensor=doubled,
            expected=f"{counts[0]} parts, numbered from 0" if doubled is None else "each tensor in one part",
            found=f"{len(files)} files, of numbers {numbers} and counts {counts}",
            remedy="put all parts of one model beside each other, named NAME-0000i-of-0000n.gguf",
        )


def _header(file: GgufFile) -> Header:
    """The facts of a GGUF file as those of any file of weights."""
    front = bytearray(file.data_start)
    with opened(file.path) as descriptor:
        facts = os.fstat(descriptor)
        pread_into(descriptor, memoryview(front), 0, file.path)
    tensors = {
        entry.name: TensorInfo(entry.name, _word(entry.type.name), entry.shape, file.path, entry.offset, entry.nbytes)
        for entry in file.tensors
    }
    times = (facts.st_mtime_ns, facts.st_dev, facts.st_ino)
    return Header(file.path, tensors, {}, file.data_start, file.file_size, *times, hashlib.sha256(front).hexdigest())


def _word(name: str) -> str:
    """The dtype of a ggml type: safetensors' word for floats, the qtype for what is quantized."""
    return name if name in _FLOATS else name.lower()


def _share(count: int | None, part: TensorInfo) -> float:
    return 1.0 if count is None else count / matrix_shape(part.shape)[0]


def _upright(piece: Piece) -> Piece:
    """A transposed piece of the same tensor seen the other way round."""
    return replace(piece, transpose=False, order=piece.columns, columns=piece.order)


def _dtype(tensors: Iterable[TensorInfo]) -> str:
    """The type that a model of these weights is run in, in torch's word: that of most; bfloat16 where they are
    quantized, which holds every magnitude."""
    weights: Counter[str] = Counter()
    for info in tensors:
        weights[info.dtype] += math.prod(info.shape)
    return _DTYPES.get(weights.most_common(1)[0][0], "bfloat16")


def _kind(metadata: Mapping[str, MetaValue], tensors: Iterable[TensorInfo]) -> str:
    """What was done to the weights: "" where all are floats; else the level that the file says, or most have."""
    weights: Counter[str] = Counter()
    for info in tensors:
        weights[info.dtype] += math.prod(info.shape)
    quantized = Counter({dtype: count for dtype, count in weights.items() if dtype not in _FLOATS})
    if not quantized:
        return ""
    said = getattr(metadata.get(Keys.General.FILE_TYPE), "value", None)
    level = next((level.name for level in LEVELS.values() if level.file_type == said), None)
    if level is None or level in _FLOATS:
        level = quantized.most_common(1)[0][0].upper()
    return f"GGUF {level}"


def _name(file: Path) -> str:
    """What to call the model: the name of the file without the number of its part and without its level."""
    stem = os.fsencode(_PART.sub("", file.name.removesuffix(".gguf"))).decode("utf-8", "replace")
    for level in sorted(LEVELS, key=len, reverse=True):
        bare = re.sub(rf"(?i)[-_.]{level}$", "", stem)
        if bare and bare != stem:
            return bare
    return stem or "model"
