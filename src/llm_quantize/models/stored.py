"""A model directory as an artifact: its configuration and its tensors as they are stored, rows of any as float32.

A quantized one is a subclass (quantized.py), which knows of some tensors that together they hold a matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import UsageError
from llm_quantize.formats.foreign import check_config
from llm_quantize.formats.packed import PackedMatrix
from llm_quantize.io.safetensors_file import Header, TensorInfo
from llm_quantize.models.files import read_config, read_headers
from llm_quantize.models.safetensors import Checkpoint
from llm_quantize.qtypes.held import Held, HeldRows, HeldWords
from llm_quantize.qtypes.inputs import InputGrid


class StoredDirectory:
    """The model in the directory ``path``, of which nothing is quantized. Threads may share it.

    ``method``: the name of its format. ``matrices``: {the weight's name in an unquantized model: what is quantized}.
    ``caches``: scales of keys and values. ``plain``: every other tensor, as it is stored; ``floats`` reads those.
    ``tensors``: all that are stored.
    ``hollow``: only the headers of its files are here. ``notes``: what a reader should know. ``packs``: whether codes
    of integers are expected. Close it, or use it as a context manager.

    Raises UsageError (no such directory), MalformedInputError (files that break their format), UnsupportedError
    (packed codes without a configuration that says what they are).
    """

    method = "safetensors"
    notes: tuple[str, ...] = ()
    packs = False

    def __init__(self, path: str | Path, *, hollow: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UsageError("no such directory", file=self.path, remedy="check the path")
        self.file = self.path / "config.json"
        self.config = read_config(self.path)
        self._understand()
        self.headers: tuple[Header, ...]
        self.headers, self.tensors = read_headers(self.path, str(path), packed=self.packs)
        self.hollow = hollow
        self.matrices = self._read_matrices()
        taken = {field.name for matrix in self.matrices.values() for field in matrix.fields.values()}
        self.caches = self._read_caches(taken)
        self.plain = {
            name: info for name, info in self.tensors.items() if name not in taken and name not in self.caches
        }
        facts = (self.path, self.path.name, self.config, None, None, self.headers, dict(self.plain))
        self.floats = Checkpoint(*facts, headers_only=hollow)

    def _understand(self) -> None:
        """What the configuration says of quantization, before any weight is looked for."""
        check_config(self.config, self.file)

    def _read_matrices(self) -> Mapping[str, PackedMatrix]:
        """``matrices``."""
        return {}

    def _read_caches(self, taken: Collection[str]) -> Mapping[str, TensorInfo]:
        """``caches``; ``taken``: the tensors of matrices."""
        del taken
        return {}

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        return sum(header.file_size for header in self.headers)

    @property
    def weights(self) -> int:
        """How many it holds, those of matrices counted once."""
        packed = sum(matrix.rows * matrix.columns for matrix in self.matrices.values())
        return packed + sum(info.elements for info in self.plain.values())

    @property
    def label(self) -> str:
        """What people call its level: BF16; of several types the one that most weights have."""
        weights: Counter[str] = Counter()
        for info in self.plain.values():
            weights[info.dtype] += info.elements
        return weights.most_common(1)[0][0]

    @property
    def rescales(self) -> bool:
        """Whether what writes this format may have moved scales between tensors."""
        return False

    @property
    def scratch(self) -> int:
        """Bytes that a thread holds while it reads rows, beside them."""
        return 0

    def close(self) -> None:
        """Close every file."""
        self.floats.close()

    def __enter__(self) -> StoredDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def inputs_text(self) -> str:
        """What a runtime rounds the inputs of its matrices to, in words; "" where it does not, as far as is known."""
        grids = [matrix.inputs for matrix in self.matrices.values() if matrix.inputs is not None]
        return "; ".join(dict.fromkeys(grid.text for grid in grids))

    def inputs(self, name: str) -> InputGrid | None:
        """What a runtime rounds the inputs of the weight ``name`` to; None: nothing, or nothing that is followed here.

        Raises NumericPolicyError for a stored scale that is not a positive number."""
        del name
        return None

    @property
    def cache_text(self) -> str:
        """What a runtime keeps keys and values as, in words; "" where it keeps them as they come."""
        return ""

    @property
    def cache_grid(self) -> InputGrid | None:
        """How a runtime rounds keys and values, but for their scales; None: not at all, or not in a way that is
        followed here."""
        return None

    def cache(self, layer: str) -> tuple[InputGrid, InputGrid] | None:
        """What a runtime rounds the keys and the values of the attention module ``layer`` to, before it keeps them;
        None: nothing, or nothing that is followed here.

        Raises NumericPolicyError for a stored scale that is not a positive number."""
        del layer
        return None

    def grid(self, matrix: PackedMatrix) -> Held:
        """The grid of a matrix; see ``Model.held``. Raises IntegrityError for columns of groups that do not exist."""
        return Held(matrix.qtype, matrix.scale)

    def held(self, matrix: PackedMatrix, start: int, stop: int) -> HeldRows | None:
        """Rows [start, stop) of a matrix as they are stored; see ``StoredFormat.held``. None: nothing is packed."""
        del matrix, start, stop
        return None

    def words(self, matrix: PackedMatrix) -> HeldWords | None:
        """All of a matrix as it is stored; see ``StoredFormat.words``. None: nothing is packed."""
        del matrix
        return None

    def stamp(self, matrix: PackedMatrix) -> bytes:
        """As ``Rows.stamp``. Raises ValueError: nothing is packed."""
        raise ValueError(f"{matrix.name} has no fields of a packed matrix")

    def rows(self, name: str, start: int, stop: int, *, transpose: bool = False) -> npt.NDArray[np.float32]:
        """Rows [start, stop) of the weight ``name`` (of ``matrices`` or ``plain``): float32 (stop - start, columns);
        ``transpose``: of a plain one whose last two dimensions are exchanged.

        Raises IntegrityError (a group index outside the groups; the file changed), UnsupportedError (integers in the
        place of weights), ResourceError.
        """
        values = self.floats.read_rows(name, start, stop, transpose=transpose)
        if values.dtype == np.uint16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)
