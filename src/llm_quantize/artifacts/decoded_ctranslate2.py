"""A CTranslate2 model under the names and shapes of its source's checkpoint."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from llm_quantize.artifacts.decoded_directory import DecodedRows
from llm_quantize.io.ctranslate2_file import Variable
from llm_quantize.io.paths import read_range
from llm_quantize.models.ctranslate2 import CTranslate2Directory, SourceRows

_FORMS = {"int8": "<b", "int16": "<h", "int32": "<i", "float32": "<f"}


class DecodedCTranslate2(DecodedRows):
    """The weights of the model in the directory ``path``, which was made from ``source``, in float32. ``differs``:
    where what its network is told is not what the source says, in words.

    Raises UsageError (no such directory), MalformedInputError (damaged files), IntegrityError (made from another
    model), UnsupportedError (a source that CTranslate2 has no network for).
    """

    packed: CTranslate2Directory

    def _open(self) -> None:
        self.packed = CTranslate2Directory(self.path)
        rows = SourceRows(self.packed, self._source)
        self._rows, self._infos = rows, rows.tensors
        self.size, self.weights = self.packed.size, self.packed.weights
        self.network = rows.network
        self.differs = self.notes = tuple(self._differing(rows.network.scalars))
        self._held = {output.name: output for output in self._source.tensors.outputs}
        used = {piece.source: piece for output in self._held.values() for piece in output.pieces}
        for name, piece in used.items():
            self._uses[name] = self._as_it_stands(name, name, piece.transpose)

    def _differing(self, scalars: tuple[Variable, ...]) -> Iterator[str]:
        for wanted in scalars:
            entry = self.packed.find(wanted.name)
            if entry is None:
                yield f"{wanted.name} is not in the artifact, {_number(wanted, wanted.value)} in the reference"
                continue
            found = read_range(self.packed.file.path, entry.offset, entry.nbytes)
            if (entry.dtype, entry.shape) != (wanted.dtype, ()) or found != wanted.value:
                shown = _number(wanted, found) if entry.dtype == wanted.dtype and not entry.shape else entry.dtype
                yield f"{wanted.name} is {shown} in the artifact, {_number(wanted, wanted.value)} in the reference"


def _number(like: Variable, value: bytes | None) -> float:
    found: float = struct.unpack(_FORMS[like.dtype], value or b"")[0]
    return found
