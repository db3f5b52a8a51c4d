"""A source model: every header read and cross-checked first, then rows of one tensor at a time.

``open_checkpoint`` takes a directory as transformers' ``save_pretrained`` writes it, or a hub id. Nothing from the
repository is executed or unpickled, and nothing outside its directory is opened.
"""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from llm_quantize.architectures.rows import matrix_shape
from llm_quantize.errors import NumericPolicyError, UnsupportedError, UsageError
from llm_quantize.events import EventSink
from llm_quantize.io.gguf_file import MetaValue
from llm_quantize.io.safetensors_file import Header, TensorInfo
from llm_quantize.io.tensor_reader import TensorReader
from llm_quantize.models import float8
from llm_quantize.models.base import Digest, Opened, Values, writable
from llm_quantize.models.files import Configuration, read_configuration, read_headers
from llm_quantize.models.hub.locate import Place, locate
from llm_quantize.models.weight_sets import left_lying
from llm_quantize.qtypes.held import Held

if TYPE_CHECKING:
    import torch

    from llm_quantize.grids.grid import Grid

READABLE_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3")
"""Element types whose values can be read; others may lie in a checkpoint as long as nobody needs them."""

STORED: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "F8_E4M3": np.uint8,
}
"""The numpy types of READABLE_DTYPES as they are stored: bfloat16 and FP8 as their bits."""
_SCALES_KEPT = 16
_SCALE_WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E8M0": "bfloat16"}


@dataclass
class Checkpoint(Opened):
    """An opened model. ``tensors`` in file order (FP8 scales are not among them: see ``folded``).

    ``folded``: {scale tensor: the weight that is decoded with it}. ``left_out``: {tensor: why it is not in
    ``tensors``}. ``revision``: the hub commit, None for a directory. ``files``: the weight files. Threads may share
    one checkpoint. Close it, or use it as a context manager.

    ``headers_only``: reading rows is refused. ``temporary``: ``directory`` is a copy without weights, gone at close.
    """

    directory: Path
    name: str
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    revision: str | None
    headers: tuple[Header, ...]
    tensors: dict[str, TensorInfo]
    folded: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    _layouts: Mapping[str, float8.ScaleLayout] = field(default_factory=dict)
    _scale_tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    _powers: bool = False
    headers_only: bool = False
    kind: str = ""
    metadata: Mapping[str, MetaValue] | None = None
    notes: tuple[str, ...] = ()
    temporary: tempfile.TemporaryDirectory[str] | None = None

    def __post_init__(self) -> None:
        self._reader = NoWeights(self.headers) if self.headers_only else TensorReader(self.headers)
        self._scales: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        """(rows, columns) of the tensor as ``read_rows`` sees it: leading dimensions flattened, 1-D is one row,
        a scalar is (1, 1). With ``transpose`` the last two dimensions are exchanged first."""
        shape = self.tensors[name].shape
        if transpose:
            if len(shape) < 2:
                raise ValueError(f"{name} has {len(shape)} dimensions; only two or more can be transposed")
            shape = (*shape[:-2], shape[-1], shape[-2])
        return matrix_shape(shape)

    def check_readable(self, name: str) -> None:
        """Raise UnsupportedError unless the tensor's element type can be read as weights."""
        tensor = self.tensors[name]
        if tensor.dtype not in READABLE_DTYPES:
            raise UnsupportedError(
                f"weights of type {tensor.dtype} cannot be quantized",
                file=tensor.file,
                tensor=name,
                offset=tensor.offset,
                expected=", ".join(READABLE_DTYPES),
                found=tensor.dtype,
                remedy="use the BF16, F16 or F32 form of this model",
            )

    def is_readable(self, name: str) -> bool:
        """Whether the tensor's element type is a weight's."""
        return self.tensors[name].dtype in READABLE_DTYPES

    def stored_dtype(self, name: str) -> np.dtype[Any]:
        """The numpy element type that ``read_rows`` returns for this tensor (bfloat16 as uint16 bits)."""
        self.check_readable(name)
        kept = ("F16", "BF16")
        dtype = self.tensors[name].dtype
        return np.dtype(STORED[dtype] if dtype in kept else np.float32)

    def raw_rows(self, name: str, start: int, stop: int, *, buffer: Any = None) -> memoryview:
        """The stored bytes of rows [start, stop), as they lie in the file (FP8 without its scales)."""
        self.check_readable(name)
        rows, columns = self.matrix(name)
        _check_range(name, start, stop, rows)
        row_bytes = columns * np.dtype(STORED[self.tensors[name].dtype]).itemsize
        view = writable(buffer, (stop - start) * row_bytes)
        self._reader.read(self.tensors[name], start * row_bytes, view)
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
        """Rows [start, stop) of the tensor seen as ``matrix`` says: (stop - start, columns), C-contiguous.

        F32, F16 and BF16 (as uint16 bits) unconverted; F64 rounded to float32; FP8 decoded with its scale to
        float32. ``buffer`` (writable bytes, large enough) is reused where nothing is converted: the result then
        lies in it. ``digest`` is updated with the stored bytes in the order of the result, for FP8 followed by the
        tensor's whole scale as float32. Raises UnsupportedError (integers), IntegrityError
        (file changed or truncated meanwhile), ResourceError (device failed), NumericPolicyError (an F64 value
        beyond float32).
        """
        stored: npt.NDArray[Any]
        if transpose:
            stored = self._columns(name, start, stop)
        else:
            raw = self.raw_rows(name, start, stop, buffer=buffer)
            dtype = np.dtype(STORED[self.tensors[name].dtype]).newbyteorder("<")
            stored = np.frombuffer(raw, dtype).reshape(stop - start, self.matrix(name)[1])
        if digest is not None:
            digest.update(stored.reshape(-1).view(np.uint8).data)
            if (layout := self._layouts.get(name)) is not None:
                digest.update(self._scale(layout).data)
        return self._converted(name, start, stored)

    def held(self, name: str, *, transpose: bool = False) -> Held | None:
        """As ``Model.held``: FP8 matrices with a scale for each row, for all, or for blocks of 128 by 128."""
        layout, info = self._layouts.get(name), self.tensors[name]
        if layout is None or not layout.qtype or len(info.shape) != 2 or transpose:
            return None
        stored = self._scale_tensors[layout.name].dtype
        return Held(layout.qtype, _SCALE_WORDS[stored], float8.are_powers(stored) or self._powers)

    def held_grid(
        self, name: str, start: int, stop: int, *, transpose: bool = False
    ) -> tuple[Grid, torch.Tensor] | None:
        """As ``Model.held_grid``."""
        found = self.held(name, transpose=transpose)
        if found is None:
            return None
        from llm_quantize.grids.held import grid_of

        codes = np.frombuffer(self.raw_rows(name, start, stop), np.uint8).reshape(stop - start, -1)
        layout = self._layouts[name]
        rows = layout.held(codes, start, self._scale(layout), found.scale)
        return None if rows is None else grid_of(rows)

    def _columns(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop) of the transposed tensor, in its stored type; bounded extra memory."""
        self.check_readable(name)
        tensor = self.tensors[name]
        if tensor.dtype == "F8_E4M3":
            raise UnsupportedError(
                "FP8 weights stored (in, out) are not supported",
                file=tensor.file,
                tensor=name,
                remedy="use the BF16 form of this model",
            )
        total, inputs = self.matrix(name, transpose=True)
        _check_range(name, start, stop, total)
        outputs = tensor.shape[-1]
        dtype = np.dtype(STORED[tensor.dtype])
        result = np.empty((stop - start, inputs), dtype)
        row_bytes = outputs * dtype.itemsize
        at = start
        while at < stop:
            which, first = divmod(at, outputs)
            count = min(stop - at, outputs - first)
            block = np.empty((inputs, count * dtype.itemsize), np.uint8)
            self._reader.read_columns(
                tensor, which * inputs * row_bytes, inputs, row_bytes, first * dtype.itemsize, block
            )
            result[at - start : at - start + count] = block.view(dtype).T
            at += count
        return result

    def _converted(self, name: str, start: int, stored: npt.NDArray[Any]) -> Values:
        dtype = self.tensors[name].dtype
        if dtype == "F64":
            return self._narrowed(name, stored)
        if dtype != "F8_E4M3":
            return stored
        layout = self._layouts.get(name)
        if layout is None:
            plain: npt.NDArray[np.float32] = float8.E4M3[stored]
            return plain
        shape = self.tensors[name].shape
        matrix_rows = shape[-2] if len(shape) >= 2 else 1
        return layout.decode(stored, start, max(1, matrix_rows), self._scale(layout))

    def _narrowed(self, name: str, stored: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = stored.astype(np.float32)
        lost = np.isinf(narrow) & np.isfinite(stored)
        if lost.any():
            row, column = np.argwhere(lost)[0]
            raise NumericPolicyError(
                f"{int(lost.sum())} float64 weights are beyond float32",
                file=self.tensors[name].file,
                tensor=name,
                offset=self.tensors[name].offset,
                expected="magnitudes up to 3.4e38",
                found=stored[row, column],
                remedy="save the model in float32 or bfloat16",
            )
        return narrow

    def _scale(self, layout: float8.ScaleLayout) -> npt.NDArray[np.float32]:
        """The scale tensor as float32 (all its rows, layout.columns); the last few are kept."""
        with self._lock:
            scale = self._scales.pop(layout.name, None)
        if scale is None:
            tensor = self._scale_tensors[layout.name]
            raw = memoryview(bytearray(tensor.nbytes))
            self._reader.read(tensor, 0, raw)
            scale = float8.scales(raw, tensor.dtype).reshape(-1, layout.columns)
        with self._lock:
            self._scales[layout.name] = scale
            while len(self._scales) > _SCALES_KEPT:
                self._scales.popitem(last=False)
        return scale

    def close(self) -> None:
        """Close all file handles; remove the temporary directory if there is one."""
        self._reader.close()
        if self.temporary is not None:
            self.temporary.cleanup()


class NoWeights(TensorReader):
    """Reads nothing: behind the headers there may be holes, whose zeros must never be taken for weights."""

    def read(self, tensor: TensorInfo, start: int, view: memoryview) -> NoReturn:
        raise without_weights(tensor, start)


def without_weights(tensor: TensorInfo, start: int = 0) -> UsageError:
    """The error for reading weights of a model that was opened for its headers."""
    return UsageError(
        "this model was opened for its headers only; its weights are not here",
        file=tensor.file,
        tensor=tensor.name,
        offset=tensor.offset + start,
        remedy="open it without headers_only to read weights",
    )


Opening = TypeVar("Opening", bound=Checkpoint)


def open_checkpoint(
    model: str, *, revision: str | None = None, on_event: EventSink | None = None, headers_only: bool = False
) -> Checkpoint:
    """Open the model in directory ``model``, or the hub's ``model`` at ``revision`` (branch, tag or commit).

    Reads config.json, generation_config.json, the index and every header; no tensor data. Raises UsageError (no
    such model), MalformedInputError, UnsupportedError (pickled weights, an adapter, an already quantized model),
    AccessError (names that lead outside), NetworkError, ResourceError.

    With ``headers_only``, weights that are not here are not fetched from the hub, and ``read_rows`` refuses
    (UsageError) wherever the model came from.
    """
    place = locate(model, revision, on_event, headers_only=headers_only)
    try:
        return open_at(place, str(model), headers_only=headers_only)
    except BaseException:
        if place.temporary is not None:
            place.temporary.cleanup()
        raise


def sniff(path: Path) -> bool:
    """Whatever no other reader knows is for this one, which says what is wrong with it."""
    del path
    return True


def open_at(place: Place, model: str, *, headers_only: bool = False) -> Checkpoint:
    """The model that lies at ``place``; see ``open_checkpoint``. Raises UsageError for a file."""
    if not place.path.is_dir():
        raise UsageError(
            "MODEL must be a directory, a GGUF file or a hub id",
            file=place.path,
            found="a file of another kind",
            remedy="give the directory that holds config.json and the .safetensors files",
        )
    configuration = read_configuration(place.path, model)
    headers, tensors = read_headers(place.path, model)
    notes = left_lying(place.path, headers)
    return described(Checkpoint, place, configuration, headers, tensors, headers_only=headers_only, notes=notes)


def described(
    kind: type[Opening],
    place: Place,
    configuration: Configuration,
    headers: tuple[Header, ...],
    tensors: Mapping[str, TensorInfo],
    *,
    headers_only: bool,
    notes: tuple[str, ...] = (),
) -> Opening:
    """The checkpoint at ``place``, of a ``kind``, from what its files say: FP8 weights find their scales. Raises what
    finding those raises."""
    config, generation, quantization = configuration
    layouts: dict[str, float8.ScaleLayout] = {}
    folded: dict[str, str] = {}
    left_out: dict[str, str] = {}
    if quantization is not None or float8.has_scales(tensors):  # ModelOpt says it in a file beside
        blocks = float8.block_size(quantization or {}, place.path / "config.json")
        layouts, folded, left_out = float8.pair_scales(tensors, blocks)
    kept = {name: info for name, info in tensors.items() if name not in folded and name not in left_out}
    scales = {name: tensors[name] for name in folded}
    return kind(
        place.path,
        place.name,
        config,
        generation,
        place.revision,
        headers,
        kept,
        folded,
        left_out,
        layouts,
        scales,
        float8.says_powers(quantization or {}),
        headers_only,
        temporary=place.temporary,
        notes=notes,
    )


def _check_range(name: str, start: int, stop: int, rows: int) -> None:
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"rows {start}..{stop} are not inside {name}, which has {rows}")
