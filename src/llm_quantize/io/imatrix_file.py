"""Importance matrices of llama.cpp: the GGUF kind and the older binary ``.dat``.

Legend: for a weight W (out, in) with inputs x (tokens, in), s = sum over tokens of x^2 (in,), n = number of tokens;
importance = s / n, float32, one row per matrix (an expert tensor has one row for each expert).

GGUF (owner: llama.cpp, tools/imatrix): ``general.type`` is "imatrix"; ``imatrix.datasets``, ``imatrix.chunk_count`` and
``imatrix.chunk_size`` say where it comes from; for each weight, F32 tensors ``NAME.in_sum2`` (matrices, in) = s and
``NAME.counts`` (matrices, 1) = n. An expert that saw no token gets ones.
Legacy, little-endian: i32 entries; each i32 length, name, i32 calls, i32 values, float32 values = s / n * calls; then,
where the file has not ended, i32 chunks, i32 length, name of the data set.
The divisions are those of llama-quantize, float32 by float32, so the values are the same to the bit.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import MalformedInputError, ResourceError, printable
from llm_quantize.io.gguf_file import GgufFile, TensorEntry, read_gguf
from llm_quantize.io.paths import open_argument, read_failure
from llm_quantize.kernels.weighing import Weighed, weigh
from llm_quantize.qtypes.ggml_types import GgmlType

Floats = npt.NDArray[np.float32]

# The largest models known have some 100,000 expert matrices in some 1,000 tensors, and an importance below 1 GB.
MAX_ENTRIES = 100_000
MAX_BYTES = 4 << 30
MAX_NAME_BYTES = 1024
_REMEDY = "make it again with llama-imatrix, or download it again"
# llama-quantize lets these two be of another size, because they are looked up, not multiplied.
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")

ZERO = "its importance is zero: it was rounded without, every channel weighs the same"
UNREACHED = "no token reached it when importance was collected: every channel weighs the same"
PARTLY = "the importance of whole blocks of its channels is zero: those weigh as much as the mean of the others"


@dataclass(frozen=True)
class Imatrix:
    """``values``: GGUF tensor name to float32 (matrices, columns), the mean square of each input.

    ``datasets`` and ``chunks`` are what the file says of its text; ``sha256`` is of the file's bytes. A legacy file
    does not say how many matrices a tensor has: there all values stand in one row. ``unreached``: matrices of which the
    file says that no token reached them; they have ones.
    """

    path: Path
    values: Mapping[str, Floats]
    datasets: tuple[str, ...]
    chunks: int
    sha256: str
    unreached: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    _weighed: dict[tuple[str, int], Weighed] = field(default_factory=dict, repr=False, compare=False)

    @property
    def file(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def names(self) -> Collection[str]:
        """The tensors that it covers."""
        return self.values.keys()

    @property
    def tokens(self) -> int:
        """See ``formats.base.Importance``: its windows were full."""
        return 0

    def rows(self, name: str, shape: tuple[int, ...]) -> Floats | None:
        """The importance of a tensor of row-major ``shape``: float32 (matrices, shape[-1]), or None without one.

        Mended where the file's values would erase weights (kernels/weighing.py); a matrix of which the file says
        nothing has zeros. Raises MalformedInputError where the file holds another number of values than the tensor has
        inputs.
        """
        weighed = self._weigh(name, shape)
        return None if weighed is None else weighed.rows

    def silence(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """What of a tensor of row-major ``shape`` this file says nothing of: {what that means: matrices}. Raises as
        ``rows``."""
        weighed = self._weigh(name, shape)
        if weighed is None:
            return {}
        told = {ZERO: weighed.silent, UNREACHED: self.unreached.get(name, ()), PARTLY: weighed.partly}
        return {text: matrices for text, matrices in told.items() if matrices}

    def _weigh(self, name: str, shape: tuple[int, ...]) -> Weighed | None:
        found = self.values.get(name)
        if found is None:
            return None
        matrices, columns = math.prod(shape[:-2]), shape[-1]
        if found.size == matrices * columns:
            key = (name, matrices)
            if key not in self._weighed:
                self._weighed[key] = weigh(found.reshape(matrices, columns))
            return self._weighed[key]
        if name in _EMBEDDINGS:
            return None
        raise MalformedInputError(
            "the importance matrix does not belong to this model",
            file=self.path,
            tensor=name,
            expected=f"{matrices} x {columns} values",
            found=f"{found.size} values",
            remedy="give the importance matrix that was made from this model",
        )


def read_imatrix(path: str | Path) -> Imatrix:
    """Read an importance matrix of either kind.

    Raises UsageError (no such file), AccessError, ResourceError (larger than any importance matrix) and
    MalformedInputError (what, tensor, offset) before more memory is taken than the file has bytes.
    """
    path = Path(path)
    try:
        with _open(path) as file:
            digest = hashlib.sha256()
            while piece := file.read(1 << 20):
                digest.update(piece)
            file.seek(0)
            if file.read(4) == b"GGUF":
                values, datasets, chunks, unreached = _read_gguf(read_gguf(path), file)
            else:
                file.seek(0)
                values, datasets, chunks = _read_legacy(path, file)
                unreached = {}
    except OSError as error:
        raise read_failure(error, path) from error
    return Imatrix(path, values, datasets, chunks, digest.hexdigest(), unreached)


def _open(path: Path) -> BinaryIO:
    """The file, if it is a regular one of sensible size: a pipe or a device would block or never end."""
    descriptor, size = open_argument(path, "importance matrix")
    if size > MAX_BYTES:
        os.close(descriptor)
        raise ResourceError(
            "the file is larger than any importance matrix",
            file=path,
            expected=f"at most {MAX_BYTES} bytes",
            found=f"{size} bytes",
            remedy="check that this is an importance matrix",
        )
    return os.fdopen(descriptor, "rb")


def _read_gguf(
    header: GgufFile, file: BinaryIO
) -> tuple[dict[str, Floats], tuple[str, ...], int, dict[str, tuple[int, ...]]]:
    """Values, datasets, chunks, and which matrices no token reached."""
    path = header.path
    kind = header.metadata.get("general.type")
    if kind is not None and kind.value != "imatrix":
        raise MalformedInputError(
            "this GGUF file is not an importance matrix",
            file=path,
            expected="general.type imatrix",
            found=printable(str(kind.value)),
            remedy="give the file that llama-imatrix made",
        )
    datasets = _metadata(header, "imatrix.datasets", list)
    chunks = _metadata(header, "imatrix.chunk_count", int)
    _metadata(header, "imatrix.chunk_size", int)
    pairs: dict[str, dict[str, TensorEntry]] = {}
    for entry in header.tensors:
        name, dot, part = entry.name.rpartition(".")
        if dot and part in ("in_sum2", "counts"):
            pairs.setdefault(name, {})[part] = entry
    if not pairs or len(pairs) > MAX_ENTRIES:
        raise MalformedInputError(
            "the importance matrix has no entries" if not pairs else "the importance matrix has too many entries",
            file=path,
            found=len(pairs),
            remedy=_REMEDY,
        )
    values, unreached = {}, {}
    for name, pair in pairs.items():
        values[name], unseen = _mean_squares(path, file, name, pair)
        if unseen:
            unreached[name] = unseen
    return values, tuple(str(name) for name in datasets), chunks, unreached


def _metadata(header: GgufFile, key: str, kind: type) -> Any:
    value = header.metadata.get(key)
    if value is None or not isinstance(value.value, kind):
        raise MalformedInputError(
            f"the importance matrix does not say its {key}",
            file=header.path,
            expected=kind.__name__,
            found="nothing" if value is None else printable(repr(value.value)),
            remedy=_REMEDY,
        )
    return value.value


def _mean_squares(
    path: Path, file: BinaryIO, name: str, pair: Mapping[str, TensorEntry]
) -> tuple[Floats, tuple[int, ...]]:
    """s / n of one tensor: float32 (matrices, columns); and the matrices whose n is 0."""
    if len(pair) < 2 or any(entry.type != GgmlType.F32 for entry in pair.values()):
        raise MalformedInputError(
            "an entry of the importance matrix is not a pair of F32 tensors",
            file=path,
            tensor=name,
            expected="in_sum2 F32, counts F32",
            found=", ".join(f"{part} {entry.type.name}" for part, entry in pair.items()),
            remedy=_REMEDY,
        )
    sums = _floats(path, file, name, pair["in_sum2"].offset, pair["in_sum2"].nbytes)
    counts = _floats(path, file, name, pair["counts"].offset, pair["counts"].nbytes)
    if not counts.size or not sums.size or sums.size % counts.size:
        raise MalformedInputError(
            "an entry of the importance matrix has sums and counts that do not fit together",
            file=path,
            tensor=name,
            offset=pair["in_sum2"].offset,
            expected=f"a multiple of {counts.size} sums, one row for each count",
            found=f"{sums.size} sums",
            remedy=_REMEDY,
        )
    # llama.cpp rounds counts to integers, halves away from zero; they are not negative here.
    counts = np.floor(counts.astype(np.float64) + 0.5).astype(np.float32)
    means = sums.reshape(counts.size, -1)
    seen = counts > 0
    means[seen] /= counts[seen, None]
    means[~seen] = 1.0
    return means, tuple(int(matrix) for matrix in np.flatnonzero(~seen))


def _floats(path: Path, file: BinaryIO, name: str, offset: int, nbytes: int) -> Floats:
    """``nbytes`` bytes at ``offset`` as float32, refused where one is not finite or is negative (no sum of squares)."""
    file.seek(offset)
    data = file.read(nbytes)
    if len(data) < nbytes:
        raise MalformedInputError(
            "the importance matrix is truncated",
            file=path,
            tensor=name,
            offset=offset,
            expected=f"{nbytes} bytes",
            found=f"{len(data)} bytes",
            remedy=_REMEDY,
        )
    values = np.frombuffer(bytearray(data), "<f4").astype(np.float32, copy=False)
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        first = int(np.argmax(bad))
        raise MalformedInputError(
            "the importance matrix holds a value that no mean of squares can have",
            file=path,
            tensor=name,
            offset=offset + 4 * first,
            expected="finite, not negative",
            found=float(values[first]),
            remedy=_REMEDY,
        )
    return values


class _Legacy:
    """Reads a legacy file piece by piece; every failure names the file, the offset and the entry."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.entry = ""

    def fail(self, what: str, offset: int, expected: object, found: object) -> MalformedInputError:
        return MalformedInputError(
            what,
            file=self.path,
            tensor=self.entry or None,
            offset=offset,
            expected=expected,
            found=found,
            remedy=_REMEDY,
        )

    def left(self) -> int:
        return self.size - self.file.tell()

    def number(self, meaning: str, least: int, most: int) -> int:
        offset = self.file.tell()
        data = self.file.read(4)
        if len(data) < 4:
            raise self.fail(f"the importance matrix ends inside {meaning}", offset, "4 bytes", f"{len(data)} bytes")
        number = int(struct.unpack("<i", data)[0])
        if not least <= number <= most:
            raise self.fail(
                f"this is not an importance matrix, or a damaged one: {meaning} cannot be",
                offset,
                f"{least} to {most}",
                number,
            )
        return number

    def text(self, meaning: str, length: int) -> str:
        offset = self.file.tell()
        data = self.file.read(length)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{meaning} is not UTF-8", offset, "text", printable(repr(data[:40]))) from error
        if len(data) < length or "\0" in text:
            raise self.fail(f"{meaning} is cut short", offset, f"{length} bytes of text", printable(repr(data[:40])))
        return text


def _read_legacy(path: Path, file: BinaryIO) -> tuple[dict[str, Floats], tuple[str, ...], int]:
    reader = _Legacy(path, file)
    # An entry has at least a length, one byte of name, a number of calls, a number of values and one value.
    entries = reader.number("the number of entries", 1, min(MAX_ENTRIES, reader.left() // 17))
    values: dict[str, Floats] = {}
    for _ in range(entries):
        reader.entry = ""
        offset = file.tell()
        name = reader.text("a name", reader.number("the length of a name", 1, min(MAX_NAME_BYTES, reader.left())))
        reader.entry = name
        if name in values:
            raise reader.fail("an entry stands twice in the importance matrix", offset, "each name once", name)
        calls = reader.number("the number of calls", -(1 << 31), (1 << 31) - 1)
        count = reader.number("the number of values", 1, max(1, (reader.left() - 4) // 4))
        found = _floats(path, file, name, file.tell(), 4 * count)
        if calls > 0:
            found /= np.float32(calls)
        values[name] = found.reshape(1, -1)
    reader.entry = ""
    if reader.left() == 0:
        return values, (), 0
    chunks = reader.number("the number of chunks", -(1 << 31), (1 << 31) - 1)
    length = reader.number("the length of the data set's name", 0, reader.left() - 4)
    datasets = (reader.text("the data set's name", length),) if length else ()
    return values, datasets, max(0, chunks)
