"""A CTranslate2 model as an artifact: its variables as they are stored, rows of any as float32, and the same under the
names of the checkpoint that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import inverse, matrix_shape, read_output_rows, to_float32, weights_of
from llm_quantize.errors import IntegrityError, UsageError
from llm_quantize.formats.ctranslate2.levels import CODES, VARIABLE_TYPES
from llm_quantize.formats.ctranslate2.network import Network, Source, Weight, network_of
from llm_quantize.io.ctranslate2_file import MODEL_FILE, Entry, read_model_file
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.paths import inside, read_range
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.models.files import CONFIG_LIMIT
from llm_quantize.qtypes.codebook import CODEBOOKS
from llm_quantize.qtypes.held import HeldRows

if TYPE_CHECKING:
    import torch

    from llm_quantize.grids.grid import Grid

Floats = npt.NDArray[np.float32]

_LEVELS = np.array(CODEBOOKS["line8"], np.float32)
_NUMPY = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "i1", "int16": "<i2", "int32": "<i4"}
GRIDS: Mapping[str, str] = {
    **{word: grid for grid, word in CODES.items()},
    **{word: name for name, word in VARIABLE_TYPES.items()},
}
"""What a variable's element type says of it: a grid, or a type of floats."""


def is_ctranslate2(path: Path) -> bool:
    """Whether ``path`` is the directory of a CTranslate2 model: its model.bin begins with a small number, as no pickle
    does. Raises AccessError for a link that leads outside, and what reading raises."""
    if not (path / MODEL_FILE).is_file() or any(path.glob("*.safetensors")):
        return False
    file = inside(path, MODEL_FILE)
    return file.stat().st_size >= 4 and 0 < int.from_bytes(read_range(file, 0, 4), "little") < 256


class CTranslate2Directory:
    """The model in the directory ``path``. Threads may share it. ``variables``: those that hold data, by name; an alias
    is found by ``find``. ``method``: the name of its format.

    Raises UsageError (no such directory), MalformedInputError (damaged files).
    """

    method = "ctranslate2"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UsageError("no such directory", file=self.path, remedy="check the path")
        self.config = read_json_object(inside(self.path, "config.json"), limit_bytes=CONFIG_LIMIT)
        self.file = read_model_file(inside(self.path, MODEL_FILE))
        self.variables = {name: one for name, one in self.file.variables.items() if self.file.is_data(one)}

    @property
    def size(self) -> int:
        """Bytes of the file of weights."""
        return self.file.size

    @property
    def weights(self) -> int:
        """How many it holds: scales are none."""
        return sum(weights_of(one.shape) for name, one in self.variables.items() if not self.is_scale(name))

    @property
    def label(self) -> str:
        """What people call its level: CT2-int8."""
        matrices = [one.dtype for one in self.variables.values() if len(one.shape) > 1]
        return f"CT2-{max(set(matrices), key=matrices.count)}" if matrices else "CT2"

    def is_scale(self, name: str) -> bool:
        """Whether the variable ``name`` is the scale of another."""
        return name.endswith("_scale") and name.removesuffix("_scale") in self.variables

    def find(self, name: str) -> Entry | None:
        """The variable that ``name`` is, or stands for."""
        return self.file.find(name)

    def values(self, entry: Entry, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop) as they are stored: (rows, columns), bfloat16 as uint16 bits."""
        columns = matrix_shape(entry.shape)[1]
        each = columns * np.dtype(_NUMPY[entry.dtype]).itemsize
        data = read_range(self.file.path, entry.offset + start * each, (stop - start) * each)
        return np.frombuffer(data, _NUMPY[entry.dtype]).reshape(stop - start, columns)

    def scales(self, entry: Entry, start: int, stop: int) -> Floats | None:
        """float32 (rows, 1), or (1, 1) where there is one for the matrix; None: it has none."""
        found = self.file.variables.get(f"{entry.name}_scale")
        if found is None or entry.dtype not in ("int8", "int16"):
            return None
        values: Floats = self.values(found, 0, 1).astype(np.float32).reshape(-1, 1)
        return values if len(values) == 1 else values[start:stop]

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows [start, stop) of the variable ``name`` as the runtime computes with them: float32 (rows, columns)."""
        entry = self.find(name)
        if entry is None:
            raise KeyError(name)
        values, scales = self.values(entry, start, stop), self.scales(entry, start, stop)
        with np.errstate(divide="ignore", invalid="ignore"):
            return to_float32(values) if scales is None else values.astype(np.float32) / scales

    def held_grid(
        self, name: str, start: int, stop: int, *, transpose: bool = False
    ) -> tuple[Grid, torch.Tensor] | None:
        """As ``Model.held_grid``, of a variable of int8; None for a code that is no level, and scales that have no
        inverse."""
        from llm_quantize.grids.held import grid_of

        if transpose:
            return None
        entry = self.find(name)
        codes, scales = (None, None) if entry is None else (self.values(entry, start, stop), self._scales(entry))
        if codes is None or scales is None or codes.dtype != np.int8 or (codes == -128).any():
            return None
        with np.errstate(divide="ignore", over="ignore"):
            factors = (1 / scales[start:stop].astype(np.float64)).astype(np.float32)
        if not np.isfinite(factors).all():
            return None
        places = (codes.astype(np.int16) + 127).astype(np.uint8)
        return grid_of(HeldRows(_LEVELS, places, codes.shape[1], factors, "float32"))

    def block_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """uint8 (rows, bytes of the codes + 4): codes as they are stored, then the scale of the row in float32. Raises
        ValueError for a variable without."""
        entry = self.find(name)
        scales = None if entry is None else self._scales(entry)
        if entry is None or scales is None:
            raise ValueError(f"{name} has no scales")
        codes = self.values(entry, start, stop).view(np.uint8)
        each = np.ascontiguousarray(scales[start:stop], "<f4").view(np.uint8)
        return np.concatenate([codes, each], axis=1)

    def _scales(self, entry: Entry) -> Floats | None:
        """float32 (rows, 1): of every row, its own or the matrix's; None: it has none."""
        rows = matrix_shape(entry.shape)[0]
        found = self.scales(entry, 0, rows)
        return None if found is None else np.broadcast_to(found, (rows, 1))

    # as rows of an artifact (architectures.rows.RowSource)

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        """(rows, columns) of a variable, exchanged with ``transpose``."""
        entry = self.find(name)
        rows, columns = matrix_shape(entry.shape if entry is not None else ())
        return (columns, rows) if transpose else (rows, columns)

    def read_rows(
        self, name: str, start: int, stop: int, *, transpose: bool = False, buffer: Any = None, digest: Any = None
    ) -> Floats:
        """``rows``; with ``transpose`` of the variable the other way round, which is decoded whole."""
        del buffer, digest
        if transpose:
            return np.ascontiguousarray(self.rows(name, 0, self.matrix(name)[0]).T[start:stop])
        return self.rows(name, start, stop)

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> CTranslate2Directory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class StoredBlocks:
    """Variables as they are stored, row by row (``architectures.rows.RowSource``)."""

    directory: CTranslate2Directory

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        """As ``CTranslate2Directory.matrix``."""
        return self.directory.matrix(name, transpose=transpose)

    def read_rows(
        self, name: str, start: int, stop: int, *, transpose: bool = False, buffer: Any = None, digest: Any = None
    ) -> npt.NDArray[np.uint8]:
        """``CTranslate2Directory.block_rows``."""
        if transpose:
            raise ValueError(f"{name} is read by columns")
        del buffer, digest
        return self.directory.block_rows(name, start, stop)


class SourceRows:
    """What a CTranslate2 model holds under the names and in the shapes of ``source``'s checkpoint (``base.Rows``), all
    of it float32. ``tensors``: a dtype is line8, line16, f32, f16 or bf16. ``network``: as the source would have it.
    ``stored``: the model.

    Raises IntegrityError where it was made from another model, UnsupportedError for a source that has no such network.
    """

    def __init__(self, directory: CTranslate2Directory, source: Source) -> None:
        self.stored, self.network = directory, network_of(source)
        _check(directory, self.network, source)
        used = {piece.source for weight in self.network.weights for piece in weight.output.pieces}
        shapes = {name: info.shape for name, info in source.checkpoint.tensors.items() if name in used}
        outputs = [weight.output for weight in self.network.weights]
        self._made = inverse(shapes, outputs)
        self.tensors = {name: self._info(made) for name, made in self._made.items()}

    def _info(self, made: OutputTensor) -> TensorInfo:
        entry = self.stored.find(made.pieces[0].source)
        if entry is None:
            raise KeyError(made.name)
        scale = self.stored.file.variables.get(f"{entry.name}_scale")
        nbytes = entry.nbytes + (0 if scale is None else scale.nbytes)
        share = weights_of(made.shape) / max(1, weights_of(entry.shape))
        dtype = GRIDS.get(entry.dtype, entry.dtype)
        return TensorInfo(made.name, dtype, made.shape, self.stored.file.path, entry.offset, round(nbytes * share))

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        """As ``Rows.matrix``."""
        shape = self.tensors[name].shape
        return matrix_shape((*shape[:-2], shape[-1], shape[-2]) if transpose else shape)

    def read_rows(
        self, name: str, start: int, stop: int, *, transpose: bool = False, buffer: Any = None, digest: Any = None
    ) -> Floats:
        """As ``Rows.read_rows``, float32."""
        del buffer, digest
        made = self._made[name]
        if not transpose:
            return to_float32(read_output_rows(self.stored, made, start, stop))
        (piece, *others) = made.pieces
        if piece.transpose and not others and piece.order is None and piece.columns is None:
            return self.stored.rows(piece.source, start, stop)
        whole = to_float32(read_output_rows(self.stored, made, 0, self.matrix(name)[0]))
        return np.ascontiguousarray(whole.T[start:stop])


def _check(directory: CTranslate2Directory, network: Network, source: Source) -> None:
    def misfit(tensor: str, expected: object, found: object) -> IntegrityError:
        return IntegrityError(
            "the artifact was not made from this reference model",
            file=directory.file.path,
            tensor=tensor,
            expected=f"{expected} (the reference: {source.checkpoint.directory})",
            found=f"{found} (the artifact)",
            remedy="give the model that the artifact was made from with --reference",
        )

    wanted: dict[str, Weight] = {weight.output.name: weight for weight in network.weights}
    for name, weight in wanted.items():
        entry = directory.find(name)
        found = None if entry is None else entry.shape
        if found != weight.output.shape:
            raise misfit(name, list(weight.output.shape), "no such variable" if found is None else list(found))
    for name in directory.variables:
        known = name in wanted or name.removesuffix("_scale") in wanted
        if not known and not any(directory.file.aliases.get(one) == name for one in wanted):
            raise misfit(name, "no such variable", list(directory.variables[name].shape))
