"""A quantized model directory (GPTQ, AWQ, compressed-tensors; ours, or a peer's) opened: which stored tensors hold
which matrix, proved to fit each other from headers alone, and rows of any matrix as float32.

What the fields mean is each format's own matter (``formats/``): here is what they have in common.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.architectures import open_architecture
from llm_quantize.errors import IntegrityError, NumericPolicyError, UsageError
from llm_quantize.formats import kv_cache
from llm_quantize.formats.foreign import SAID_IN
from llm_quantize.formats.kv_cache import stored_scales
from llm_quantize.formats.packed import (
    AGAIN,
    ALIGNED,
    PackedMatrix,
    Settings,
    check_index,
    in_order,
    is_even,
    wrong_form,
)
from llm_quantize.formats.packed_formats import format_of, read_format, said_of, unquantized
from llm_quantize.formats.packing import load_floats
from llm_quantize.io.gguf_file import MetaValue
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.io.tensor_reader import TensorReader
from llm_quantize.kernels import widened
from llm_quantize.kernels.repack import Room
from llm_quantize.models.base import Digest, Opened, Values
from llm_quantize.models.files import read_config, read_generation_config
from llm_quantize.models.float8 import is_scaled_float8
from llm_quantize.models.hub.locate import Place
from llm_quantize.models.packed_rows import PackedRows, zero_biases
from llm_quantize.models.safetensors import NoWeights, without_weights
from llm_quantize.models.stored import StoredDirectory
from llm_quantize.models.weight_sets import left_lying
from llm_quantize.qtypes.held import UNEVEN, Held, HeldRows, HeldWords
from llm_quantize.qtypes.inputs import InputGrid

if TYPE_CHECKING:
    import torch

    from llm_quantize.grids.grid import Grid

_STEPS = 16 << 20
_STORED: dict[str, type[np.generic]] = {
    **{"I8": np.int8, "I16": np.int16, "I32": np.int32, "U32": np.uint32, "I64": np.int64},
    **{"U8": np.uint8, "F8_E4M3": np.uint8, "F8_E8M0": np.uint8},
    **{"F16": np.float16, "BF16": np.uint16, "F32": np.float32},
}


def is_packed_directory(path: Path) -> bool:
    """Whether ``path`` is a model directory whose configuration says that it is quantized. Raises what reading the
    configuration raises."""
    if not path.is_dir() or not (path / "config.json").is_file():
        return False
    return said_of(read_config(path)) is not None


def is_stored_directory(path: Path) -> bool:
    """Whether an artifact at ``path`` is a model directory, and not GGUF files that lie beside a configuration. Raises
    what reading the configuration raises."""
    return is_packed_directory(path) or ((path / "config.json").is_file() and not any(path.glob("*.gguf")))


def quantization_of(config: Mapping[str, Any], file: Path) -> Settings:
    """The quantization_config. Raises UsageError where there is none, MalformedInputError where it is no object."""
    found = said_of(config)
    if found is None:
        raise UsageError(
            "this model is not quantized",
            file=file,
            expected="a quantization_config",
            found="none",
            remedy="give the directory of a GPTQ, AWQ or compressed-tensors model",
        )
    if not isinstance(found, dict):
        raise wrong_form(file, "quantization_config", "an object", found)
    return Settings(found, file)


def open_directory(path: Path) -> StoredDirectory:
    """The Hugging Face model in the directory ``path``, quantized or not. Raises what ``PackedDirectory`` raises."""
    return PackedDirectory(path) if is_packed_directory(path) else StoredDirectory(path)


class PackedDirectory(StoredDirectory):
    """The quantized model in ``path``. Threads may share it; each keeps the packed bytes of one matrix.

    ``format``: of its matrices; ``method``: its name. Raises, beside what ``StoredDirectory`` raises, UsageError (not
    quantized), MalformedInputError (a configuration of the wrong form), UnsupportedError (a method or layout that is
    not decoded here), IntegrityError (fields of a matrix that do not fit each other or the configuration).
    """

    packs = True

    def _understand(self) -> None:
        self.settings = quantization_of(self.config, self.file)
        self.format = format_of(self.settings)
        self.method = self.format.NAME

    def _read_matrices(self) -> Mapping[str, PackedMatrix]:
        self._reader = NoWeights(self.headers) if self.hollow else TensorReader(self.headers)
        self._local = threading.local()
        self._grids: dict[str, Held] = {}
        self._stamps: dict[str, bytes] = {}
        self._stamping: dict[str, threading.Lock] = {}
        self.notes = (*self.beside(), *self.format.notes(self.settings))
        try:
            found = self.format.read(self.tensors, self.settings, self._stored)
            return {matrix.weight: matrix for matrix in found}
        except BaseException:
            self._reader.close()
            raise

    def beside(self) -> Iterator[str]:
        """Where its settings stand, if not in config.json."""
        if SAID_IN in self.settings.values:
            name = self.settings.values[SAID_IN]
            yield f"what its codes mean stands in {name} alone, where neither Transformers nor vLLM look by themselves"

    def _read_caches(self, taken: Collection[str]) -> Mapping[str, TensorInfo]:
        return stored_scales(self.tensors, taken)

    @property
    def cache_text(self) -> str:
        """As ``StoredDirectory.cache_text``."""
        scheme = self.settings.values.get("kv_cache_scheme")
        return kv_cache.words(scheme) if isinstance(scheme, dict) else ""

    @property
    def cache_grid(self) -> InputGrid | None:
        """As ``StoredDirectory.cache_grid``."""
        return kv_cache.grid_of(self.settings.values.get("kv_cache_scheme"))

    def cache_scales(self, name: str) -> npt.NDArray[np.float32]:
        """float32 (n,): one of ``caches``."""
        return load_floats(self._stored(self.caches[name])).reshape(-1)

    @property
    def layout_name(self) -> str:
        """The form of the method: gptq, gptq_v2, gemm, pack-quantized, int-quantized."""
        return self.format.layout_name(self.matrices.values())

    @property
    def label(self) -> str:
        """What people call its level: GPTQ-4bit, AWQ-4bit, W4A16."""
        return self.format.LABEL.format(level=self.format.level_of(self.matrices.values()))

    @property
    def misread(self) -> tuple[str, ...]:
        """What Transformers would read otherwise than it stands, a sentence each."""
        if self.format.MIXES is None:
            return ()
        mixed: dict[str, list[str]] = {}
        for matrix in self.matrices.values():
            if not matrix.grid:
                mixed.setdefault(matrix.qtype, []).append(matrix.name)
        return tuple(self.format.MIXES.cautions(mixed))

    @property
    def rescales(self) -> bool:
        """As ``StoredDirectory.rescales``."""
        return self.format.RESCALES

    @property
    def scratch(self) -> int:
        """Bytes that a thread holds while it decodes rows: the largest matrix as it is stored, scales in float32, and
        the steps of some rows."""
        return 2 * max((matrix.nbytes for matrix in self.matrices.values()), default=0) + _STEPS

    def close(self) -> None:
        """Close every file."""
        self._reader.close()
        super().close()

    def __enter__(self) -> PackedDirectory:
        return self

    def field(self, matrix: PackedMatrix, suffix: str) -> npt.NDArray[Any]:
        """One field whole, in its shape; bfloat16 and float16 as float32."""
        return _in_float32(self._stored(matrix.fields[suffix]), matrix.fields[suffix].dtype)

    def _room(self) -> Room:
        if not hasattr(self._local, "room"):
            self._local.room = Room()
        room: Room = self._local.room
        return room

    def _stored(self, info: TensorInfo, room: Room | None = None) -> npt.NDArray[Any]:
        kind = _STORED[info.dtype]
        stored = np.empty(info.shape, kind) if room is None else room.words(*info.shape).view(kind)
        self._reader.read(info, 0, stored.reshape(-1).view(np.uint8).data)
        return stored

    def fields(self, matrix: PackedMatrix, *, again: bool = False) -> dict[str, npt.NDArray[Any]]:
        """All fields of a matrix, as this thread keeps them until it asks for another's; ``again``: its codes may lie
        in memory that those of the last one lay in that was asked for so."""
        kept: tuple[PackedMatrix, dict[str, npt.NDArray[Any]]] | None = getattr(self._local, "fields", None)
        if kept is None or kept[0] is not matrix:
            self._local.fields = self._local.stored = None
            room = self._room() if again and matrix.main.dtype in ("I32", "U32") else None
            stored = {
                suffix: self._stored(info, room if info is matrix.main else None)
                for suffix, info in matrix.fields.items()
            }
            kept = matrix, {suffix: _in_float32(stored[suffix], info.dtype) for suffix, info in matrix.fields.items()}
            check_index(matrix, kept[1])
            self._local.fields, self._local.stored = kept, stored
        return kept[1]

    def stamp(self, matrix: PackedMatrix) -> bytes:
        """As ``Rows.stamp``; the first thread that asks makes it, all share it."""
        with self._stamping.setdefault(matrix.weight, threading.Lock()):
            if matrix.weight not in self._stamps:
                self.fields(matrix)
                stored: dict[str, npt.NDArray[Any]] = self._local.stored
                digest = hashlib.sha256()
                for suffix, values in sorted(stored.items()):
                    digest.update(f"{suffix}\0{values.nbytes}\0".encode())
                    digest.update(values.reshape(-1).view(np.uint8).data)
                self._stamps[matrix.weight] = digest.digest()
            return self._stamps[matrix.weight]

    def inputs(self, name: str) -> InputGrid | None:
        """As ``StoredDirectory.inputs``."""
        matrix = self.matrices.get(name)
        if matrix is None or matrix.inputs is None or not matrix.inputs.static:
            return None if matrix is None else matrix.inputs
        info = matrix.fields[matrix.inputs_at]
        whole = float(self.field(matrix, matrix.inputs_at).reshape(-1)[0])
        return replace(matrix.inputs, whole=_positive(whole, info, "the scale of a matrix's inputs is of no sense"))

    def cache(self, layer: str) -> tuple[InputGrid, InputGrid] | None:
        """As ``StoredDirectory.cache``. A scale that is not stored is 1, as for vLLM (0.32)."""
        grid = self.cache_grid
        if grid is None:
            return None
        keys, values = (replace(grid, whole=self._cache_scale(layer, letter)) for letter in "kv")
        return keys, values

    def _cache_scale(self, layer: str, letter: str) -> float:
        for name in kv_cache.scale_names(layer, letter):
            if name in self.caches:
                found = float(self.cache_scales(name).max())
                return _positive(found, self.caches[name], "a scale of keys or values is of no sense")
        return 1.0

    def rows(self, name: str, start: int, stop: int, *, transpose: bool = False) -> npt.NDArray[np.float32]:
        """As ``StoredDirectory.rows``."""
        matrix = self.matrices.get(name)
        if matrix is None:
            return super().rows(name, start, stop, transpose=transpose)
        fields = self.fields(matrix)
        first, last = start // ALIGNED * ALIGNED, min(-(-stop // ALIGNED) * ALIGNED, matrix.rows)
        return self.format.unpack(matrix, fields, first, last)[start - first : stop - first]

    def grid(self, matrix: PackedMatrix) -> Held:
        """As ``StoredDirectory.grid``: which columns share a scale is read, but where only headers are here, and the
        configuration has to be believed."""
        if matrix.name not in self._grids:
            self._grids[matrix.name] = self._grid(matrix)
        return self._grids[matrix.name]

    def _grid(self, matrix: PackedMatrix) -> Held:
        info = matrix.fields.get(matrix.layout.index)
        if matrix.groups > 1 and matrix.columns % matrix.group:
            return Held(UNEVEN, matrix.scale)
        if self.hollow or info is None or not info.elements:
            return Held(matrix.qtype, matrix.scale, act_order=matrix.act_order)
        fields = {matrix.layout.index: self._stored(info)}
        check_index(matrix, fields)
        if in_order(matrix, fields):
            return Held(matrix.qtype, matrix.scale)
        return Held(matrix.qtype if is_even(matrix, fields) else UNEVEN, matrix.scale, act_order=True)

    def held(self, matrix: PackedMatrix, start: int, stop: int) -> HeldRows | None:
        """As ``StoredDirectory.held``."""
        first, last = start // ALIGNED * ALIGNED, min(-(-stop // ALIGNED) * ALIGNED, matrix.rows)
        found = self.format.held(matrix, self.fields(matrix), first, last)
        return None if found is None else found.cut(start - first, stop - first)

    def words(self, matrix: PackedMatrix) -> HeldWords | None:
        """As ``StoredDirectory.words``."""
        return self.format.words(matrix, self.fields(matrix, again=True))


def _in_float32(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Floats of 16 bits in float32; all else as it is stored."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return widened(stored) if dtype == "F16" else stored


def _positive(value: float, info: TensorInfo, problem: str) -> float:
    if math.isfinite(value) and value > 0:
        return value
    raise NumericPolicyError(
        problem, file=info.file, tensor=info.name, expected="a positive number", found=value, remedy=AGAIN
    )


class QuantizedModel(PackedRows, Opened):
    """A quantized directory as a model to start from (``base.Model``): its weights are the values that runtimes compute
    with, so what is made of it has its errors too. ``folded``: every field, with the weight that it is part of.

    Raises what ``PackedRows`` and ``open_architecture`` raise."""

    metadata: Mapping[str, MetaValue] | None = None

    def __init__(self, packed: PackedDirectory, place: Place, generation: dict[str, Any] | None, headers_only: bool):
        self.config = unquantized(packed.config)
        architecture = open_architecture(self.config, file=packed.file)
        forms = {name: architecture.form_of(name) for name in packed.matrices}
        super().__init__(packed, {name for name, form in forms.items() if form is not None and form.transpose})
        zero = zero_biases(packed, lambda name: architecture.form_of(name) is not None)
        self.left_out: Mapping[str, str] = dict.fromkeys(zero, "a bias of zeros, where the model has none")
        for name in zero:
            del self.tensors[name]
        biases = (f"{len(zero)} biases that this model does not have are left out, all zeros",) if zero else ()
        self.notes = (*left_lying(place.path, packed.headers), *packed.beside(), *biases)
        self.directory, self.name, self.revision = place.path, place.name, place.revision
        self.temporary, self.headers_only = place.temporary, headers_only
        self.headers, self.generation_config, self.kind = packed.headers, generation, packed.label
        self.folded = {info.name: name for name, matrix in packed.matrices.items() for info in matrix.fields.values()}

    @property
    def scratch(self) -> int:
        """As ``Model.scratch``: a matrix that is read the other way round is decoded whole."""
        turned = (self.packed.matrices[name] for name in self._transposed)
        return self.packed.scratch + 4 * max((matrix.rows * matrix.columns for matrix in turned), default=0)

    def raw_rows(self, name: str, start: int, stop: int, *, buffer: Any = None) -> memoryview:
        """As ``Rows.raw_rows``."""
        self._check_here(name)
        return super().raw_rows(name, start, stop, buffer=buffer)

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
        """As ``Rows.read_rows``."""
        self._check_here(name)
        return super().read_rows(name, start, stop, transpose=transpose, buffer=buffer, digest=digest)

    def held_grid(
        self, name: str, start: int, stop: int, *, transpose: bool = False
    ) -> tuple[Grid, torch.Tensor] | None:
        """As ``Model.held_grid``."""
        self._check_here(name)
        return super().held_grid(name, start, stop, transpose=transpose)

    def held_words(self, name: str) -> HeldWords | None:
        """As ``Model.held_words``."""
        self._check_here(name)
        return super().held_words(name)

    def stamp(self, name: str) -> bytes:
        """As ``Rows.stamp``."""
        self._check_here(name)
        return super().stamp(name)

    def _check_here(self, name: str) -> None:
        if self.headers_only:
            raise without_weights(self.tensors[name])

    def close(self) -> None:
        """As ``Rows.close``; removes the temporary directory if there is one."""
        super().close()
        if self.temporary is not None:
            self.temporary.cleanup()


def sniff(path: Path) -> bool:
    """Whether ``path`` is a directory whose configuration names a quant_method of a format that is read here.

    Raises what reading the configuration raises.
    """
    if not os.path.lexists(path / "config.json"):
        return False
    found = said_of(read_config(path))
    if not isinstance(found, dict) or is_scaled_float8(found):
        return False
    return read_format(found.get("quant_method")) is not None


def open_at(place: Place, model: str, *, headers_only: bool = False) -> QuantizedModel:
    """The quantized model that lies at ``place``. Raises what ``PackedDirectory`` raises, and IntegrityError where
    nothing in it is quantized."""
    del model
    packed = PackedDirectory(place.path, hollow=place.temporary is not None)
    try:
        if not packed.matrices:
            raise IntegrityError(
                "the configuration says that this model is quantized, but none of its tensors is",
                file=packed.file,
                expected=f"matrices of {packed.method}",
                found=f"{len(packed.tensors)} tensors of other kinds",
                remedy=AGAIN,
            )
        return QuantizedModel(packed, place, read_generation_config(place.path), headers_only)
    except BaseException:
        packed.close()
        raise
