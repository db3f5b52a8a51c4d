"""A GGUF artifact under the names and shapes of its checkpoint: decoded, and put back through the inverse of the map.

Every output tensor is built of ``Piece``s (architectures/base.py): rows of source tensors, reordered, transposed,
stacked, offset. Here each piece is undone, so that what a quantized file holds can be computed with wherever the
source's own weights can. Values are float32, as the reference decoders give them; nothing is rounded again. A
constant that the map adds (Gemma's norms) is subtracted in float32: adding it again gives the stored value exactly.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import numpy.typing as npt

from llm_quantize.architectures.base import OutputTensor, Piece
from llm_quantize.architectures.rows import chunk_ranges, matrix_shape, placed, scatter
from llm_quantize.errors import IntegrityError, MalformedInputError, MissingExtraError, UnsupportedError, printable
from llm_quantize.formats.gguf.describe import describe
from llm_quantize.formats.gguf.scales import Scales, decode
from llm_quantize.io.artifact_files import artifact_files
from llm_quantize.io.gguf_file import GgufFile, TensorEntry, read_gguf
from llm_quantize.io.paths import opened, pread_into
from llm_quantize.models.opening import Source
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.inputs import InputGrid

if TYPE_CHECKING:
    import torch

HEAD = "output.weight"
EMBEDDING = "token_embd.weight"
_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class Use:
    """Rows [first, first + count) of ``output`` are what ``piece`` says of a source tensor; the artifact has them as
    the same rows of ``held``."""

    held: OutputTensor
    output: OutputTensor
    first: int
    count: int
    piece: Piece


@dataclass(frozen=True)
class Stored:
    """A tensor of the map as an artifact has it: ``name`` and ``qtype`` there, ``nbytes`` of all that it consists
    of."""

    name: str
    qtype: str
    nbytes: int


class Decoded(ABC):
    """The weights of an artifact as ``source`` names them, whatever the artifact is. Threads may share it.

    ``names``: the checkpoint tensors that it holds. ``size``: bytes of its files of weights. ``weights``: how many it
    has. ``notes``: what differs between its metadata and the source's, in words: the streamed evaluation follows the
    source's configuration. ``scratch``: bytes in memory while a tensor is decoded, beside its values.

    A subclass gives rows of what the artifact holds (``rows_of``), and says which that is for every tensor of the map
    (``_held``); the map is undone here.
    """

    path: Path
    size: int
    weights: int
    notes: tuple[str, ...]
    scratch: int = 0

    def __init__(self, source: Source) -> None:
        self._source = source
        self._held: dict[str, OutputTensor] = {}
        self._uses: dict[str, tuple[Use, ...]] = {}
        self._head_uses: dict[str, tuple[Use, ...]] = {}

    @abstractmethod
    def stored(self, output: OutputTensor) -> Stored | None:
        """What the artifact has for a tensor of the map; None: nothing."""

    @abstractmethod
    def rows_of(self, held: OutputTensor, start: int, stop: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """(first row, float32 (n, columns)) of rows [start, stop) of a tensor of the artifact, in chunks that stay in a
        core's cache, none of which crosses from one matrix to the next."""

    def stored_rows(self, name: str, start: int, stop: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """``rows_of`` the tensor that the map calls ``name``."""
        return self.rows_of(self._held[name], start, stop)

    @abstractmethod
    def types(self) -> dict[str, str]:
        """The qtype of each tensor of the artifact, under its name there."""

    def close(self) -> None:
        """Close what is open."""
        return None

    @property
    def names(self) -> Collection[str]:
        """The checkpoint tensors that it holds."""
        return self._uses.keys()

    def read(self, name: str) -> torch.Tensor:
        """The checkpoint tensor ``name``: float32, its checkpoint's shape. KeyError if it is not in ``names``.

        Raises IntegrityError (the file became shorter), ResourceError (the disk failed), MissingExtraError.
        """
        return _tensor(self.decode(name))

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Fill ``out`` (the checkpoint's shape, any float type): without a tensor in between where it is float32."""
        self._read_into(name, self._uses[name], out)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``rows`` (int64) of a matrix, float32 (len(rows), columns); an embedding is not decoded whole."""
        (use, *others) = self._uses[name]
        piece = use.piece
        if others or piece.transpose or piece.curve or piece.order is not None or piece.columns is not None:
            return self.read(name)[rows]
        wanted = [row + use.first - use.piece.start for row in rows.tolist()]
        parts = [values for row in wanted for _, values in self.rows_of(use.held, row, row + 1)]
        columns = matrix_shape(self._source.checkpoint.tensors[name].shape)[1]
        values = np.concatenate(parts) if parts else np.empty((0, columns), np.float32)
        return _tensor(values - np.float32(use.piece.add) if use.piece.add else values)

    def decode(self, name: str) -> npt.NDArray[np.float32]:
        """``read`` as an array."""
        return self._decode(name, self._uses[name])

    def inputs(self, name: str, expert: int | None = None) -> InputGrid | None:
        """What a runtime rounds the inputs of the checkpoint tensor ``name`` to (``expert``: of that one, where it is a
        stack of them); None: nothing, or nothing that is followed here. Raises NumericPolicyError for a stored scale
        that is no positive number."""
        del name, expert
        return None

    def cache(self, names: Sequence[str]) -> tuple[InputGrid, InputGrid] | None:
        """What a runtime rounds keys and values to, before it keeps those of the attention that has the checkpoint
        tensors ``names``; None: nothing, or nothing that is followed here. Raises as ``inputs``."""
        del names
        return None

    def inputs_text(self) -> str:
        """What the inputs of its matrices are rounded to, in words, "" where they are not."""
        return ""

    def cache_text(self) -> str:
        """What its keys and values are kept as, in words; "" where that is not counted here."""
        return ""

    def for_head(self) -> HeadWeights:
        """The same weights for the head: where an embedding is tied and the artifact holds another matrix beside it,
        the runtime multiplies with that one."""
        return HeadWeights(self)

    def _decode(self, name: str, uses: tuple[Use, ...]) -> npt.NDArray[np.float32]:
        values = np.empty(self._source.checkpoint.tensors[name].shape, np.float32)
        self._fill(name, uses, values)
        return values

    def _read_into(self, name: str, uses: tuple[Use, ...], out: torch.Tensor) -> None:
        import torch

        shape = self._source.checkpoint.tensors[name].shape
        if tuple(out.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(shape)}, not {tuple(out.shape)}")
        plain = out.dtype == torch.float32 and out.device.type == "cpu" and out.is_contiguous()
        if plain:
            self._fill(name, uses, out.detach().numpy())
        else:
            out.copy_(_tensor(self._decode(name, uses)))

    def _fill(self, name: str, uses: tuple[Use, ...], values: npt.NDArray[np.float32]) -> None:
        """Write what the artifact holds of the checkpoint tensor ``name`` into ``values``, which has its shape."""
        for use in uses:
            for start, rows in self.rows_of(use.held, use.first, use.first + use.count):
                scatter(self._source.checkpoint, use.output, start, rows, {name: values})

    def _another(self, found: str, expected: str, *, tensor: str | None = None) -> IntegrityError:
        return IntegrityError(
            "the artifact was not made from this reference model",
            file=self.path,
            tensor=tensor,
            expected=f"{expected} (the reference: {self._source.checkpoint.directory})",
            found=f"{found} (the artifact)",
            remedy="give the model that the artifact was made from with --reference",
        )

    def _invert(self, outputs: Iterable[OutputTensor]) -> None:
        """The uses that make up each checkpoint tensor; and those that the head prefers."""
        for output in outputs:
            for use in self._uses_of(output, self._held[output.name]):
                name = use.piece.source
                if output.name == HEAD and name in self._uses:
                    self._head_uses[name] = (use,)
                else:
                    self._uses[name] = (*self._uses.get(name, ()), use)

    def _uses_of(self, output: OutputTensor, held: OutputTensor) -> Iterator[Use]:
        for first, count, piece in placed(self._source.checkpoint, output):
            yield Use(held, output, first, count, piece)


class DecodedArtifact(Decoded):
    """The weights of the artifact at ``path`` (a GGUF file, any part of a split one, or its directory).

    Raises UsageError (no such artifact), MalformedInputError (a damaged or truncated file), IntegrityError (made from
    another model: architecture, tensor names or shapes differ), UnsupportedError (a type without a decoder).
    """

    def __init__(self, source: Source, path: str | Path) -> None:
        super().__init__(source)
        self.path = Path(path)
        files = [read_gguf(file) for file in artifact_files(self.path)]
        self.size = sum(file.file_size for file in files)
        self._scales = Scales.of_files(files)
        self._entries = {name: one for name, one in _collect(files).items() if name not in self._scales.weights}
        self.weights = sum(math.prod(entry.shape) for _, entry in self._entries.values())
        self._check_model(files[0])
        self._held = self._agreeing()
        self._invert(self._held.values())
        self.notes = tuple(_differences(files[0], source))

    def types(self) -> dict[str, str]:
        """The qtype of each tensor of the artifact, in lower case."""
        return {name: entry.type.name.lower() for name, (_, entry) in self._entries.items()}

    def stored(self, output: OutputTensor) -> Stored | None:
        """As ``Decoded.stored``: under the name in the file."""
        found = self._entries.get(output.name)
        return None if found is None else Stored(output.name, found[1].type.name.lower(), found[1].nbytes)

    def rows_of(self, held: OutputTensor, start: int, stop: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """As ``Decoded.rows_of``. Raises UnsupportedError (no decoder for the type), IntegrityError (the file
        became shorter), NumericPolicyError (a scale of the matrix that is no positive number), ResourceError."""
        file, entry = self._entries[held.name]
        with opened(file.path) as descriptor:
            row_bytes = entry.nbytes // matrix_shape(entry.shape)[0]
            for _, first, last in chunk_ranges(entry.shape, start, stop):
                data = bytearray((last - first) * row_bytes)
                pread_into(descriptor, memoryview(data), entry.offset + first * row_bytes, file.path)
                packed = np.frombuffer(data, np.uint8).reshape(last - first, row_bytes)
                scales = self._scales.of_rows(held.name, entry.shape, first, last - first)
                yield first, _dequantize(file, entry, packed, matrix_shape(entry.shape)[1], scales)

    def _check_model(self, first: GgufFile) -> None:
        key = gguf.Keys.General.ARCHITECTURE
        found = getattr(first.metadata.get(key), "value", None)
        wanted = self._source.architecture.gguf_name
        if found is not None and found != wanted:
            raise self._another(f"it says {key} = {printable(str(found))}", f"{key} = {wanted}")
        source_tokens, tokens = (
            getattr(metadata.get(_TOKENS), "value", None) for metadata in (describe(self._source), first.metadata)
        )
        if tokens is not None and source_tokens is not None and len(tokens) != len(source_tokens):
            raise self._another(f"{len(tokens)} tokens in its vocabulary", f"{len(source_tokens)} tokens")

    def _agreeing(self) -> dict[str, OutputTensor]:
        """The tensors of the map, if the file has all of them in their shapes, and nothing else."""
        outputs = {output.name: output for output in self._source.tensors.outputs}
        self._allow_for_ties(outputs)
        for name in sorted(outputs.keys() | self._entries.keys()):
            if name not in self._entries:
                raise self._another("no such tensor", f"{list(outputs[name].shape)}", tensor=name)
            if name not in outputs:
                raise self._another(f"{list(self._entries[name][1].shape)}", "no such tensor", tensor=name)
            found, wanted = self._entries[name][1].shape, outputs[name].shape
            if _squeezed(found) != _squeezed(wanted):
                raise self._another(f"shape {list(found)}", f"shape {list(wanted)}", tensor=name)
        return outputs

    def _allow_for_ties(self, outputs: dict[str, OutputTensor]) -> None:
        """Of a tied table, other writers may keep one copy where this project keeps two, or two for one."""
        table = outputs.get(EMBEDDING)
        if table is None or len(table.pieces) != 1:
            return
        own = outputs.get(HEAD)
        tied = own is not None and [piece.source for piece in own.pieces] == [table.pieces[0].source]
        if tied and HEAD not in self._entries:
            del outputs[HEAD]
        elif own is None and HEAD in self._entries:
            outputs[HEAD] = OutputTensor(HEAD, table.shape, table.pieces)


class HeadWeights:
    """``Decoded`` as the head sees it (see ``Decoded.for_head``)."""

    def __init__(self, artifact: Decoded) -> None:
        self._artifact = artifact
        self.names = artifact.names

    def read(self, name: str) -> torch.Tensor:
        """As ``Decoded.read``, from the head's own matrix where that stands for this tensor."""
        uses = self._artifact._head_uses.get(name)
        return self._artifact.read(name) if uses is None else _tensor(self._artifact._decode(name, uses))

    def inputs(self, name: str, expert: int | None = None) -> InputGrid | None:
        """As ``Decoded.inputs``; a matrix of the head's own is not rounded for by any format that is read."""
        return None if name in self._artifact._head_uses else self._artifact.inputs(name, expert)

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """As ``Decoded.read_into``."""
        artifact = self._artifact
        artifact._read_into(name, artifact._head_uses.get(name, artifact._uses[name]), out)


def _dequantize(
    file: GgufFile,
    entry: TensorEntry,
    packed: npt.NDArray[np.uint8],
    columns: int,
    scales: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.float32]:
    name = entry.type.name.lower()
    if name in QTYPES:
        return decode(name, packed, columns, scales)
    with np.errstate(invalid="ignore", over="ignore"):
        try:
            values: npt.NDArray[np.float32] = gguf.quants.dequantize(packed, entry.type)
        except NotImplementedError as error:
            raise UnsupportedError(
                f"tensors of type {name} cannot be decoded", file=file.path, tensor=entry.name, found=name
            ) from error
    found = values.astype(np.float32, copy=False).reshape(len(packed), columns)
    return found if scales is None else found * scales


def _tensor(values: npt.NDArray[np.float32]) -> torch.Tensor:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("Computing with an artifact's weights", "torch") from error
    return torch.from_numpy(values)


def _collect(files: list[GgufFile]) -> dict[str, tuple[GgufFile, TensorEntry]]:
    found: dict[str, tuple[GgufFile, TensorEntry]] = {}
    for file in files:
        for entry in file.tensors:
            if entry.name in found:
                raise MalformedInputError(
                    "two parts of this split artifact hold the same tensor",
                    file=file.path,
                    tensor=entry.name,
                    found=found[entry.name][0].path,
                    remedy="put the parts of one artifact together",
                )
            found[entry.name] = (file, entry)
    return found


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """GGUF does not keep leading dimensions of 1."""
    return tuple(size for size in shape if size != 1)


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Values of an artifact's metadata, ``found``, that are not the source's, ``wanted``, in words."""
    for key, value in wanted.items():
        other = found.get(key)
        if other is None:
            continue
        if isinstance(value, float) and isinstance(other, float):
            same = math.isclose(value, other, rel_tol=1e-6)
        else:
            same = value == other
        if not same:
            yield f"{key} is {printable(str(other), 80)} in the artifact, {printable(str(value), 80)} in the reference"


def _differences(file: GgufFile, source: Source) -> Iterator[str]:
    """Hyper-parameters and tokens in which the artifact's metadata differs from what the source would give."""
    prefix = source.architecture.gguf_name + "."
    wanted = {key: value for key, (_, value, _) in describe(source).items() if key.startswith(prefix)}
    yield from differences(wanted, {key: getattr(file.metadata.get(key), "value", None) for key in wanted})
    tokens = [getattr(metadata.get(_TOKENS), "value", None) for metadata in (describe(source), file.metadata)]
    if None not in tokens and tokens[0] != tokens[1]:
        other = sum(one != two for one, two in zip(*tokens, strict=True))
        yield f"{other} tokens of the artifact's vocabulary are spelled otherwise than the reference's"
