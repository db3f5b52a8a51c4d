"""A directory of packed matrices under the names and in the shapes of an unquantized model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_quantize.architectures.rows import matrix_shape
from llm_quantize.errors import IntegrityError
from llm_quantize.formats.packed import (
    AGAIN,
)
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.models.base import Digest, Values
from llm_quantize.models.stored import StoredDirectory
from llm_quantize.qtypes.held import Held, HeldWords

if TYPE_CHECKING:
    import torch

    from llm_quantize.grids.grid import Grid


def zero_biases(packed: StoredDirectory, known: Callable[[str], bool]) -> list[str]:
    """Some tools give every matrix that they quantize a bias, of zeros where the model has none (``known``: whether it
    has the tensor of a name): which those are. Where weights are not here, zeros are taken for granted."""
    found = []
    for name, info in packed.plain.items():
        weight = f"{name.removesuffix('.bias')}.weight"
        if not name.endswith(".bias") or weight not in packed.matrices or known(name) or len(info.shape) != 1:
            continue
        if packed.floats.is_readable(name) and (packed.hollow or not packed.rows(name, 0, 1).any()):
            found.append(name)
    return found


class PackedRows:
    """The tensors of a directory under the names and in the shapes of an unquantized model (``base.Rows``).

    What is quantized is float32, its dtype the name of its grid; all else is as it is stored. ``transposed``: weights
    that an unquantized model stores (in, out). Raises IntegrityError for a matrix that is there twice.
    """

    def __init__(self, packed: StoredDirectory, transposed: Collection[str] = ()) -> None:
        self.packed, self._transposed = packed, transposed
        self.tensors: dict[str, TensorInfo] = dict(packed.plain)
        for name, matrix in packed.matrices.items():
            first = next(iter(matrix.fields.values()))
            if name in self.tensors:
                raise IntegrityError(
                    "a matrix is there twice, quantized and not",
                    file=first.file,
                    tensor=name,
                    expected="one of them",
                    found="both",
                    remedy=AGAIN,
                )
            *lead, rows, columns = matrix.shape
            shape = (*lead, columns, rows) if name in transposed else matrix.shape
            self.tensors[name] = TensorInfo(name, matrix.qtype, shape, first.file, first.offset, matrix.nbytes)

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        """As ``Rows.matrix``."""
        shape = self.tensors[name].shape
        return matrix_shape((*shape[:-2], shape[-1], shape[-2]) if transpose else shape)

    def check_readable(self, name: str) -> None:
        """As ``Rows.check_readable``."""
        if name not in self.packed.matrices:
            self.packed.floats.check_readable(name)

    def is_readable(self, name: str) -> bool:
        """As ``Rows.is_readable``."""
        return name in self.packed.matrices or self.packed.floats.is_readable(name)

    def stored_dtype(self, name: str) -> np.dtype[Any]:
        """As ``Rows.stored_dtype``: float32 for what is quantized."""
        return np.dtype(np.float32) if name in self.packed.matrices else self.packed.floats.stored_dtype(name)

    def raw_rows(self, name: str, start: int, stop: int, *, buffer: Any = None) -> memoryview:
        """As ``Rows.raw_rows``."""
        if name not in self.packed.matrices:
            return self.packed.floats.raw_rows(name, start, stop, buffer=buffer)
        return self.read_rows(name, start, stop).reshape(-1).view(np.uint8).data

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
        """As ``Rows.read_rows``; ``digest`` is updated with the values of what is quantized."""
        if name not in self.packed.matrices:
            return self.packed.floats.read_rows(name, start, stop, transpose=transpose, buffer=buffer, digest=digest)
        if transpose == (name in self._transposed):
            values = self.packed.rows(name, start, stop)
        else:
            matrix = self.packed.matrices[name]
            whole = self.packed.rows(name, 0, matrix.rows).reshape(matrix.shape).swapaxes(-1, -2)
            values = np.ascontiguousarray(whole.reshape(-1, whole.shape[-1])[start:stop])
        if digest is not None:
            digest.update(values.reshape(-1).view(np.uint8).data)
        return values

    def is_stamped(self, name: str) -> bool:
        """As ``Rows.is_stamped``."""
        return name in self.packed.matrices

    def stamp(self, name: str) -> bytes:
        """As ``Rows.stamp``."""
        if not self.is_stamped(name):
            raise ValueError(f"{name} has no fields of a packed matrix")
        return self.packed.stamp(self.packed.matrices[name])

    def held(self, name: str, *, transpose: bool = False) -> Held | None:
        """As ``Model.held``: by the rows that are packed, which an unquantized model may store the other way round."""
        matrix = self.packed.matrices.get(name)
        return None if matrix is None or transpose != (name in self._transposed) else self.packed.grid(matrix)

    def held_grid(
        self, name: str, start: int, stop: int, *, transpose: bool = False
    ) -> tuple[Grid, torch.Tensor] | None:
        """As ``Model.held_grid``."""
        if name not in self.packed.matrices or transpose != (name in self._transposed):
            return None
        from llm_quantize.grids.held import grid_of

        found = self.packed.held(self.packed.matrices[name], start, stop)
        return None if found is None else grid_of(found)

    def held_words(self, name: str) -> HeldWords | None:
        """As ``Model.held_words``."""
        if self.held(name) is None:
            return None
        return self.packed.words(self.packed.matrices[name])

    def close(self) -> None:
        """Close every file."""
        self.packed.close()
