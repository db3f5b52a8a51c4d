"""A model directory whose weights are in files of ``torch.save`` (pytorch_model.bin): read without unpickling.

What the files say, io/torch_file.py reads; from there on they are read by position as safetensors are. Where both forms
lie in a directory, safetensors are the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import UnsupportedError
from llm_quantize.io.paths import inside
from llm_quantize.io.safetensors_file import Header, TensorInfo
from llm_quantize.io.state_dict_pickle import SAVE_AGAIN
from llm_quantize.io.torch_file import View, read_torch_file
from llm_quantize.models.base import writable
from llm_quantize.models.files import check_weights, read_configuration, read_indexed
from llm_quantize.models.hub.locate import Place
from llm_quantize.models.safetensors import READABLE_DTYPES, STORED, Checkpoint, described
from llm_quantize.models.weight_sets import PICKLED_INDEX, pickled_set, refuse_adapter, weight_map


@dataclass
class PickledCheckpoint(Checkpoint):
    """A checkpoint in files of torch.save. ``views``: {tensor: how it lies}, of those whose elements do not stand one
    after another: rows of a wider matrix, or a matrix the other way round."""

    views: Mapping[str, View] = field(default_factory=lambda: MappingProxyType({}))

    def raw_rows(self, name: str, start: int, stop: int, *, buffer: Any = None) -> memoryview:
        """As ``Checkpoint.raw_rows``; of a view, the bytes that ``contiguous()`` would give it."""
        if name not in self.views:
            return super().raw_rows(name, start, stop, buffer=buffer)
        rows = self._view_rows(name, start, stop, transpose=False)
        view = writable(buffer, rows.nbytes)
        view[:] = rows.reshape(-1).view(np.uint8).data
        return view

    def _columns(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        if name not in self.views:
            return super()._columns(name, start, stop)
        return self._view_rows(name, start, stop, transpose=True)

    def _view_rows(self, name: str, start: int, stop: int, *, transpose: bool) -> npt.NDArray[Any]:
        """Rows [start, stop) of a view, of each leading index some, in its stored type."""
        self.check_readable(name)
        view = self.views[name]
        dtype = np.dtype(STORED[self.tensors[name].dtype])
        shape, strides = _two(view)
        if transpose:
            shape, strides = (*shape[:-2], shape[-1], shape[-2]), (*strides[:-2], strides[-1], strides[-2])
        total, columns = self.matrix(name, transpose=transpose)
        if not 0 <= start <= stop <= total:
            raise ValueError(f"rows {start}..{stop} are not inside {name}, which has {total}")
        result = np.empty((stop - start, columns), dtype)
        at = start
        while at < stop:
            which, first = divmod(at, shape[-2])
            count = min(stop - at, shape[-2] - first)
            leading = np.unravel_index(which, shape[:-2]) if shape[:-2] else ()
            base = sum(int(index) * stride for index, stride in zip(leading, strides[:-2], strict=True))
            base += first * strides[-2]
            part = result[at - start : at - start + count]
            if strides[-1] == 1 or columns == 1:
                self._read_strided(view.info, base, strides[-2], part)
            else:
                turned = np.empty((columns, count), dtype)
                self._read_strided(view.info, base, strides[-1], turned)
                part[:] = turned.T
            at += count
        return result

    def _read_strided(self, info: TensorInfo, base: int, stride: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` with its rows, which begin ``stride`` elements after one another, from element ``base`` on."""
        rows, width = out.shape
        size = out.dtype.itemsize
        extent = ((rows - 1) * stride + width) * size if rows else 0
        span = TensorInfo(info.name, info.dtype, (extent // size,), info.file, info.offset + base * size, extent)
        flat = out.view(np.uint8).reshape(rows, width * size)
        if rows > 1:
            self._reader.read_columns(span, 0, rows - 1, stride * size, 0, flat[:-1])
        if rows:
            self._reader.read(span, (rows - 1) * stride * size, flat[-1].data)


def _two(view: View) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a view with at least two dimensions."""
    shape, strides = view.info.shape, view.strides
    missing = max(0, 2 - len(shape))
    return (1,) * missing + shape, (0,) * missing + strides


def check_view(view: View, scaled: bool) -> None:
    """Raise UnsupportedError for weights that do not lie in rows, or overlap, or are ``scaled`` (FP8)."""
    info = view.info
    shape, strides = _two(view)
    rows, columns = shape[-2:]
    upright = (strides[-1] == 1 or columns == 1) and (strides[-2] >= columns or rows == 1)
    turned = (strides[-2] == 1 or rows == 1) and strides[-1] >= rows
    if scaled or (info.dtype in READABLE_DTYPES and not upright and not turned):
        raise UnsupportedError(
            "a tensor is stored as a view that is not read by rows",
            file=info.file,
            tensor=info.name,
            offset=info.offset,
            expected="rows one after another, or a matrix transposed; of FP8 and its scales, no view",
            found=f"shape {list(info.shape)}, strides {list(view.strides)}",
            remedy=SAVE_AGAIN,
        )


def sniff(path: Path) -> bool:
    """Whether ``path`` is a model directory with pickled weights and no safetensors."""
    return path.is_dir() and os.path.lexists(path / "config.json") and _named(path) is not None


def _named(directory: Path) -> str | None:
    return pickled_set(entry.name for entry in directory.iterdir())


def open_at(place: Place, model: str, *, headers_only: bool = False) -> PickledCheckpoint:
    """The model that lies at ``place``. Raises what ``read_torch_file``, ``read_indexed`` and reading the configuration
    raise; UnsupportedError for views that are not read by rows."""
    configuration = read_configuration(place.path, model)
    refuse_adapter(place.path, partial(_lies, place.path))
    name = _named(place.path)
    if name is None:
        raise ValueError(f"{place.path} holds no pickled weights")
    file = inside(place.path, name)
    views: dict[str, View] = {}

    def read(path: Path) -> Header:
        found = read_torch_file(path)
        views.update(found.views)
        return found.header

    if name == PICKLED_INDEX:
        headers, tensors = read_indexed(place.path, file, weight_map(file, ".bin"), read)
    else:
        header = read(file)
        headers, tensors = (header,), header.tensors
    check_weights(tensors, file)
    checkpoint = described(PickledCheckpoint, place, configuration, headers, tensors, headers_only=headers_only)
    for view in views.values():
        check_view(view, view.info.name in checkpoint.folded or view.info.dtype == "F8_E4M3")
    checkpoint.views = views
    return checkpoint


def _lies(directory: Path, name: str) -> bool:
    return os.path.lexists(directory / name)
