"""Our file of calibration statistics, read: proved before anything is taken from it. Layout: statistics_layout.py."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import IntegrityError, MalformedInputError, UnsupportedError, UsageError, printable
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.json_file import parse_json
from llm_quantize.io.paths import open_argument
from llm_quantize.io.safetensors_file import Header, TensorInfo, read_header
from llm_quantize.io.statistics_layout import (
    ARRAYS,
    CONTENT,
    FORMAT,
    KINDS,
    NUMPY_TYPES,
    VERSION,
    StatisticsIdentity,
    StatisticsLayout,
    array_shapes,
    check_kinds,
    layout_statistics,
)
from llm_quantize.io.tensor_reader import TensorReader
from llm_quantize.io.whole_file import write_file

__all__ = [
    "KINDS",
    "StatisticsFile",
    "StatisticsIdentity",
    "StatisticsLayout",
    "StoredTap",
    "check_kinds",
    "layout_statistics",
    "merge_statistics",
    "merged_identity",
    "read_statistics",
    "refuse_other_model",
]

MAX_COLUMNS = 1 << 22
MAX_MATRICES = 1 << 16
_REMEDY = "make the statistics again with `llm-quantize analyze importance`"


@dataclass(frozen=True)
class StoredTap:
    """A tap as the file names it. ``tensors``: checkpoint tensor -> which matrix it uses, None = all, in order."""

    name: str
    block: int
    columns: int
    matrices: int
    tensors: Mapping[str, int | None]


@dataclass(frozen=True)
class StatisticsFile:
    """An opened file; arrays are read when they are asked for, and checked then. Threads may share it.

    Every method that takes a tap takes its name, and raises KeyError for one that the file does not have, UsageError
    for a kind that was not collected, IntegrityError for bytes that are not those that were written,
    MalformedInputError for values that no statistics can have.
    """

    path: Path
    identity: StatisticsIdentity
    kinds: tuple[str, ...]
    taps: Mapping[str, StoredTap]
    n_blocks: int
    _header: Header
    _reader: TensorReader = field(repr=False)
    _digests: Mapping[str, Sequence[bytes]] = field(repr=False)

    @property
    def content_sha256(self) -> str:
        """SHA-256 of the hashes of all arrays, Hessians too: what any use of these statistics depends on."""
        digest = hashlib.sha256()
        for name, digests in self._digests.items():
            digest.update(name.encode() + b"\0" + b"".join(digests))
        return digest.hexdigest()

    def counts(self, tap: str) -> npt.NDArray[np.int64]:
        """Tokens that each matrix saw: int64 (matrices,)."""
        return self._read(tap, "counts")

    def sum_squares(self, tap: str) -> npt.NDArray[np.float64]:
        """Sum over tokens of x^2: float64 (matrices, columns)."""
        return self._read(tap, "sum_squares")

    def sums(self, tap: str) -> npt.NDArray[np.float64]:
        """Sum over tokens of x: float64 (matrices, columns)."""
        return self._read(tap, "sums")

    def absmax(self, tap: str) -> npt.NDArray[np.float32]:
        """Largest |x|: float32 (matrices, columns); zeros where nothing was seen."""
        return self._read(tap, "absmax")

    def hessian(self, tap: str, matrix: int = 0) -> npt.NDArray[np.float32]:
        """X^T X of one matrix: float32 (columns, columns), not divided by the number of tokens."""
        return self._read(tap, "hessian", matrix)

    def array(self, tap: str, suffix: str) -> npt.NDArray[Any]:
        """A whole array by its name in the file, hessians of all matrices too."""
        return self._read(tap, suffix)

    def blocks(self) -> list[list[StoredTap]]:
        """The taps of each block, in file order."""
        found: list[list[StoredTap]] = [[] for _ in range(self.n_blocks)]
        for tap in self.taps.values():
            found[tap.block].append(tap)
        return found

    def _read(self, tap: str, suffix: str, matrix: int | None = None) -> npt.NDArray[Any]:
        stored = self.taps[tap]
        kind, dtype, dimensions = ARRAYS[suffix]
        if kind is not None and kind not in self.kinds:
            raise UsageError(
                f"these statistics hold no {suffix}",
                file=self.path,
                expected=f"the kind {kind}",
                found=", ".join(self.kinds),
                remedy=f"collect it: llm-quantize analyze importance --collect {','.join((*self.kinds, kind))}",
            )
        info = self._header.tensors[f"{tap}.{suffix}"]
        shape: tuple[int, ...] = (*([stored.columns] * dimensions),)
        first = 0 if matrix is None else range(stored.matrices)[matrix] * math.prod(shape) * NUMPY_TYPES[dtype].itemsize
        values: npt.NDArray[Any] = np.empty(
            shape if matrix is not None else (stored.matrices, *shape), NUMPY_TYPES[dtype]
        )
        self._reader.read(info, first, values.reshape(-1).view(np.uint8).data)
        self._check_digests(info, values if matrix is None else values[None], first, matrix or 0)
        _check_values(info, suffix, values, first)
        if suffix == "counts" and stored.matrices == 1 and not values[0]:
            raise MalformedInputError(
                "these statistics say that an input saw no token, though every token goes through it",
                file=self.path,
                tensor=info.name,
                offset=info.offset,
                expected="1 token or more",
                found=0,
                remedy=_REMEDY,
            )
        return values

    def _check_digests(self, info: TensorInfo, matrices: npt.NDArray[Any], first: int, number: int) -> None:
        """Raise IntegrityError unless ``matrices``, read from byte ``first`` on, are what was written. ``number``: of
        the first."""
        for index, values in enumerate(matrices):
            known, found = self._digests[info.name][number + index], hashlib.sha256(values.data).digest()
            if known != found:
                raise IntegrityError(
                    "these statistics were changed since they were written",
                    file=self.path,
                    tensor=info.name,
                    offset=info.offset + first + index * values.nbytes,
                    expected=f"SHA-256 {known.hex()} of the {values.nbytes} bytes there",
                    found=found.hex(),
                    remedy=_REMEDY,
                )

    def close(self) -> None:
        """Close the file; later reads raise ValueError."""
        self._reader.close()

    def __enter__(self) -> StatisticsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_values(info: TensorInfo, suffix: str, values: npt.NDArray[Any], first: int) -> None:
    flat = values.reshape(-1)
    signed = suffix in ("sums", "hessian")
    for start in range(0, flat.size, 1 << 22):
        part = flat[start : start + (1 << 22)]
        bad = ~np.isfinite(part) if signed else ~(np.isfinite(part) & (part >= 0))
        if bad.any():
            at = start + int(np.argmax(bad))
            raise MalformedInputError(
                "the statistics hold a value that cannot be",
                file=info.file,
                tensor=info.name,
                offset=info.offset + first + at * flat.itemsize,
                expected="finite" if signed else "finite, not negative",
                found=flat[at],
                remedy=_REMEDY,
            )


def read_statistics(path: str | Path) -> StatisticsFile:
    """Open a file of statistics: header, metadata and the place of every array are proved; no array is read.

    Raises MalformedInputError (not such a file, damaged or truncated), UnsupportedError (of another version),
    IntegrityError (its header is not the one that was written), UsageError (no such file), AccessError.
    """
    path = Path(path)
    os.close(open_argument(path, "file of statistics")[0])
    header = read_header(path)
    found = header.metadata
    if found.get("format") != FORMAT:
        raise MalformedInputError(
            "this file does not hold calibration statistics",
            file=path,
            expected=FORMAT,
            found=printable(found.get("format", "a safetensors file of another kind"), 80),
            remedy="give the file that `llm-quantize analyze importance` wrote",
        )
    if found.get("format_version") != str(VERSION):
        raise UnsupportedError(
            "these statistics are of another version of the format",
            file=path,
            expected=VERSION,
            found=printable(found.get("format_version", "none"), 80),
            remedy=f"{_REMEDY}; earlier versions could not tell every damage, or a model from its fine-tune",
        )
    model, text, kinds, n_blocks, taps = (
        _field(found, path, key) for key in ("model", "text", "kinds", "blocks", "taps")
    )
    for name, value in (("model", model), ("text", text)):
        if not isinstance(value, dict) or not isinstance(value.get("sha256"), str):
            raise _refuse(path, f"{name} has no sha256", value)
    datasets = text.get("datasets")
    if not isinstance(datasets, list) or not all(isinstance(entry, str) for entry in datasets):
        raise _refuse(path, "text does not name its datasets", datasets)
    for key in ("windows", "tokens", "length"):
        if type(text.get(key)) is not int or not 0 <= text[key] < 1 << (53 if key == "tokens" else 31):
            raise _refuse(path, f"text does not say its number of {key}", text.get(key))
    if not isinstance(kinds, list) or not kinds or any(kind not in KINDS for kind in kinds):
        raise _refuse(path, "kinds are not what they may be", kinds)
    if type(n_blocks) is not int or not 1 <= n_blocks <= 1 << 16 or not isinstance(taps, list) or not taps:
        raise _refuse(path, "blocks and taps are not a number and a list, of one or more", n_blocks)
    stored = [_tap(path, entry, n_blocks) for entry in taps]
    ordered = tuple(kind for kind in KINDS if kind in kinds)
    _check_arrays(header, stored, ordered)
    identity = StatisticsIdentity(model, text)
    by_name = {tap.name: tap for tap in stored}
    reader = TensorReader([header])
    digests = _digests(header, reader)
    return StatisticsFile(path, identity, ordered, by_name, n_blocks, header, reader, digests)


def _digests(header: Header, reader: TensorReader) -> dict[str, list[bytes]]:
    """{array: the hash of each of its matrices}, in file order. Raises IntegrityError for another header."""
    info = header.tensors[CONTENT]
    data = np.empty(info.nbytes, np.uint8)
    reader.read(info, 0, data.data)
    rows = [row.tobytes() for row in data.reshape(-1, 32)]
    if rows[0].hex() != header.sha256:
        raise IntegrityError(
            "the header of these statistics was changed since they were written",
            file=header.path,
            offset=0,
            expected=f"SHA-256 {rows[0].hex()} of the first {header.header_bytes} bytes",
            found=header.sha256,
            remedy=_REMEDY,
        )
    digests, at = {}, 1
    for name, tensor in header.tensors.items():
        if name != CONTENT:
            digests[name] = rows[at : at + tensor.shape[0]]
            at += tensor.shape[0]
    return digests


def _refuse(path: Path, what: str, found: object) -> MalformedInputError:
    return MalformedInputError(
        f"the metadata of these statistics is damaged: {what}",
        file=path,
        offset=8,
        found=printable(repr(found), 120),
        remedy=_REMEDY,
    )


def _field(metadata: Mapping[str, str], path: Path, key: str) -> Any:
    if key not in metadata:
        raise _refuse(path, f"no {key}", sorted(metadata))
    return parse_json(metadata[key].encode("utf-8"), file=path, base_offset=8)


def _tap(path: Path, entry: Any, n_blocks: int) -> StoredTap:
    sizes = {"block": n_blocks - 1, "columns": MAX_COLUMNS, "matrices": MAX_MATRICES}
    if not isinstance(entry, dict) or set(entry) != {"name", "tensors", *sizes}:
        raise _refuse(path, "a tap is incomplete", entry)
    for key, most in sizes.items():
        if type(entry[key]) is not int or not (0 if key == "block" else 1) <= entry[key] <= most:
            raise _refuse(path, f"a tap's {key} is out of bounds", entry[key])
    name, tensors = entry["name"], entry["tensors"]
    if not isinstance(name, str) or not isinstance(tensors, dict):
        raise _refuse(path, "a tap's name or tensors are of the wrong type", name)
    for tensor, matrix in tensors.items():
        if matrix is not None and (type(matrix) is not int or not 0 <= matrix < entry["matrices"]):
            raise _refuse(path, f"a tensor of {printable(name, 60)} has no such matrix", {tensor: matrix})
    return StoredTap(name, entry["block"], entry["columns"], entry["matrices"], tensors)


def _check_arrays(header: Header, taps: Sequence[StoredTap], kinds: Sequence[str]) -> None:
    """Exactly the arrays that taps and kinds call for, each of its type and shape, and no tensor under two taps."""
    names = [name for tap in taps for name in tap.tensors]
    if len({tap.name for tap in taps}) != len(taps) or len(set(names)) != len(names):
        raise _refuse(header.path, "a tap or a tensor stands twice", len(taps))
    expected = {name: (dtype, shape) for tap in taps for name, dtype, shape in array_shapes(tap, kinds)}
    expected[CONTENT] = ("U8", (1 + sum(shape[0] for _, shape in expected.values()), 32))
    odd = sorted(expected.keys() ^ header.tensors.keys())
    if odd:
        raise _refuse(header.path, "arrays and taps do not belong together", odd[0])
    for name, (dtype, shape) in expected.items():
        info = header.tensors[name]
        if (info.dtype, info.shape) != (dtype, shape):
            raise MalformedInputError(
                "an array of these statistics is not what its tap calls for",
                file=header.path,
                tensor=name,
                offset=info.offset,
                expected=f"{dtype} {list(shape)}",
                found=f"{info.dtype} {list(info.shape)}",
                remedy=_REMEDY,
            )


def refuse_other_model(statistics: StatisticsFile, model_sha256: str) -> None:
    """Raise IntegrityError, naming both hashes, where the statistics are of another model than ``model_sha256``."""
    found = str(statistics.identity.model["sha256"])
    if found != model_sha256:
        raise IntegrityError(
            "these statistics were made from another model",
            file=statistics.path,
            expected=f"model {model_sha256}",
            found=f"model {printable(found, 80)} ({printable(str(statistics.identity.model.get('name', '')), 80)})",
            remedy="give the statistics of this model, or leave --statistics out to make them",
        )


def merge_statistics(
    paths: Sequence[str | Path],
    target: str | Path,
    *,
    identity: StatisticsIdentity | None = None,
    replace: bool = False,
) -> StatisticsLayout:
    """Write the statistics of several texts together as ``target``, added in the order given, one array at a time.

    Sums and counts are those of one run over all the texts, up to the last bits of float64; a Hessian is rounded to
    float32 once more. ``identity`` (None: the parts' own, put together). Raises UsageError (fewer than two parts, of
    different kinds or inputs, or one text twice), IntegrityError (of different models) and as ``write_file``.
    """
    with ExitStack() as stack:
        parts = [stack.enter_context(read_statistics(path)) for path in paths]
        _refuse_unlike(parts)
        first = parts[0]
        layout = layout_statistics(identity or _together(parts), first.blocks(), first.kinds)
        pieces = layout.whole(lambda name: _add(parts, *name.rsplit(".", 1)))
        write_file(target, pieces, replace=replace)
        return layout


def merged_identity(paths: Sequence[str | Path]) -> StatisticsIdentity:
    """What ``merge_statistics`` of ``paths`` is of. Raises as ``read_statistics``."""
    with ExitStack() as stack:
        return _together([stack.enter_context(read_statistics(path)) for path in paths])


def _refuse_unlike(parts: Sequence[StatisticsFile]) -> None:
    if len(parts) < 2:
        raise UsageError("merging needs two files of statistics or more", found=len(parts))
    first = parts[0]
    for other in parts[1:]:
        refuse_other_model(other, str(first.identity.model["sha256"]))
        if (other.kinds, list(other.taps.values())) != (first.kinds, list(first.taps.values())):
            raise UsageError(
                "these statistics cannot be added: they are of different kinds or inputs",
                file=other.path,
                expected=f"{', '.join(first.kinds)} of {len(first.taps)} inputs, as in {first.path}",
                found=f"{', '.join(other.kinds)} of {len(other.taps)} inputs",
                remedy="collect both with the same --collect and the same version",
            )
    hashes = [part.identity.text["sha256"] for part in parts]
    if len(set(hashes)) != len(hashes):
        raise UsageError("the same text would count twice", expected="parts of different texts", found=hashes)


def _add(parts: Sequence[StatisticsFile], tap: str, suffix: str) -> npt.NDArray[Any]:
    total = parts[0].array(tap, suffix)
    total = total.astype(np.float64) if suffix == "hessian" else total
    for part in parts[1:]:
        values = part.array(tap, suffix)
        (np.maximum if suffix == "absmax" else np.add)(total, values, out=total)
    return total


def _together(parts: Sequence[StatisticsFile]) -> StatisticsIdentity:
    """The parts' texts in order, what they counted added up, and a hash that names them all."""
    texts = [dict(part.identity.text) for part in parts]
    hashes = [text["sha256"] for text in texts]
    text = {
        "sha256": hashlib.sha256(canonical_json(hashes)).hexdigest(),
        "datasets": list(dict.fromkeys(name for text in texts for name in text["datasets"])),
        "windows": sum(text["windows"] for text in texts),
        "tokens": sum(text["tokens"] for text in texts),
        "length": max(text["length"] for text in texts),
        "parts": texts,
    }
    return StatisticsIdentity(parts[0].identity.model, text)
