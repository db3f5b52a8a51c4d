"""A directory under the names and shapes of its source's checkpoint.

Its tensors go through the source's own map (architectures/): where a matrix stands under another name, alone where the
source has experts stacked, or stacked where the source has them alone, the map of each leads to the same tensor, and
the map of the source is undone as for a GGUF file (decoded.py). What stands under its own name is taken as it is.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.architectures import open_architecture
from llm_quantize.architectures.base import OutputTensor, Piece
from llm_quantize.architectures.rows import RowSource, chunk_rows, placed, read_output_rows, to_float32, weights_of
from llm_quantize.artifacts.decoded import EMBEDDING, HEAD, Decoded, Stored, Use, differences
from llm_quantize.errors import IntegrityError, MalformedInputError, UnsupportedError
from llm_quantize.formats.packed import ALIGNED
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.models.opening import Source
from llm_quantize.models.packed_rows import PackedRows, zero_biases
from llm_quantize.models.quantized import open_directory
from llm_quantize.models.stored import StoredDirectory
from llm_quantize.qtypes.inputs import InputGrid

_HEADS = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight")
_READABLE = ("F16", "BF16", "F32", "F64")


class DecodedRows(Decoded):
    """An artifact that can be read under the names of its source's checkpoint: ``_rows`` (``models.base.Rows``) gives
    rows of its tensors, ``_infos`` says what they are; ``_held``: the source's map, of these. ``differs``: where its
    configuration is not the source's, in words. A subclass opens it (``_open``)."""

    packed: Any
    differs: tuple[str, ...]
    _rows: RowSource
    _infos: dict[str, TensorInfo]

    def __init__(self, source: Source, path: str | Path) -> None:
        super().__init__(source)
        self.path = Path(path)
        self._open()

    @abstractmethod
    def _open(self) -> None:
        """Read what it is."""

    def types(self) -> dict[str, str]:
        """As ``Decoded.types``: int4_g128 and the like, and the element types of what is not quantized."""
        return {name: info.dtype.lower() for name, info in self._infos.items()}

    def stored(self, output: OutputTensor) -> Stored | None:
        """As ``Decoded.stored``: several tensors of the artifact that are one of the map have one name, with stars."""
        found = self._held.get(output.name)
        if found is None or not found.pieces:
            return None
        names = list(dict.fromkeys(piece.source for piece in found.pieces))
        qtypes = dict.fromkeys(self._infos[name].dtype.lower() for name in names)
        weights = sum(weights_of(self._infos[name].shape) for name in names)
        nbytes = sum(self._infos[name].nbytes for name in names)
        return Stored(_starred(names), "+".join(qtypes), round(nbytes * weights_of(output.shape) / max(1, weights)))

    @property
    def reference(self) -> Mapping[str, TensorInfo]:
        """The source's tensors."""
        return self._source.checkpoint.tensors

    def parts(self, name: str) -> Iterator[tuple[str, int, int]]:
        """(the artifact's tensor, first row, rows) of all that the tensor which the map calls ``name`` consists of."""
        found = self._held.get(name)
        for first, count, piece in () if found is None else placed(self._rows, found):
            yield piece.source, first, count

    def rows_of(self, held: OutputTensor, start: int, stop: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """As ``Decoded.rows_of``. Raises what ``PackedDirectory.rows`` raises."""
        per_matrix = held.shape[-2] if len(held.shape) > 1 else 1
        step = max(ALIGNED, chunk_rows(held.shape[-1] if held.shape else 1) // ALIGNED * ALIGNED)
        first = start
        while first < stop:
            base = first // per_matrix * per_matrix
            last = min(stop, base + per_matrix, base + ((first - base) // step + 1) * step)
            yield first, to_float32(read_output_rows(self._rows, held, first, last))
            first = last

    def _as_it_stands(self, name: str, target: str, transpose: bool) -> tuple[Use, ...]:
        """The source's tensor ``target`` from the artifact's ``name``, whole and without the map."""
        shape = self._infos[name].shape
        shape = (*shape[:-2], shape[-1], shape[-2]) if transpose else shape
        held, output = (OutputTensor(name, shape, (Piece(one, transpose=transpose),)) for one in (name, target))
        return tuple(self._uses_of(output, held))


class DecodedDirectory(DecodedRows):
    """The weights of the model in the directory ``path``, which was made from ``source``: its matrices decoded, every
    other tensor as it stands there (AWQ changes norms), all in float32. ``differs``: where its configuration is not the
    source's, in words.

    Raises UsageError (no such directory), MalformedInputError (damaged files), UnsupportedError
    (a way of quantizing that is not decoded), IntegrityError (fields that do not fit each other; a tensor that the
    source has and this has not, or the reverse, or one of another shape; another architecture).
    """

    packed: StoredDirectory

    def close(self) -> None:
        """Close its files."""
        self.packed.close()

    def inputs(self, name: str, expert: int | None = None) -> InputGrid | None:
        """As ``Decoded.inputs``; matrices that are one in the source have the largest of their scales, as runtimes join
        them."""
        found = [self.packed.inputs(weight) for weight in self._weights_of(name, expert)]
        grids = [grid for grid in found if grid is not None]
        if not grids:
            return None
        return (min if grids[0].nested else max)(grids, key=lambda grid: grid.whole or 0.0)

    def cache(self, names: Sequence[str]) -> tuple[InputGrid, InputGrid] | None:
        """As ``Decoded.cache``."""
        layers = dict.fromkeys(
            weight.rsplit(".", 2)[0]
            for name in names
            for weight in self._weights_of(name, None)
            if weight.count(".") > 1
        )
        found = (self.packed.cache(layer) for layer in layers)
        return next((grids for grids in found if grids is not None), None)

    def inputs_text(self) -> str:
        """As ``Decoded.inputs_text``."""
        return self.packed.inputs_text

    def cache_text(self) -> str:
        """As ``Decoded.cache_text``."""
        return "" if self.packed.cache_grid is None else self.packed.cache_text

    def _weights_of(self, name: str, expert: int | None) -> Iterator[str]:
        """The artifact's weights that make up the checkpoint tensor ``name``, or an expert of it."""
        for use in self._uses.get(name, ()):
            first, last = use.first, use.first + use.count
            if expert is not None and len(use.output.shape) == 3:
                rows = use.output.shape[-2]
                first, last = max(first, expert * rows), min(last, (expert + 1) * rows)
            for start, count, piece in placed(self._rows, use.held):
                if start < last and first < start + count:
                    yield piece.source

    def _open(self) -> None:
        self.packed = open_directory(self.path)
        try:
            self._understand()
        except BaseException:
            self.close()
            raise

    def _understand(self) -> None:
        packed, source = self.packed, self._source
        self.size = packed.size
        self._transposed = {
            piece.source for output in source.tensors.outputs for piece in output.pieces if piece.transpose
        }
        try:
            self._rows = PackedRows(packed, self._transposed)
        except IntegrityError as error:
            raise self._misfit(error.what, error.tensor, error.expected, error.found) from error
        self._infos = self._rows.tensors
        self.differs = tuple(self._config_notes())
        notes = [*packed.notes, *self.differs, *self._drop_zero_biases()]
        own_head = self._own_head()
        self.scratch = packed.scratch
        self.weights = sum(weights_of(info.shape) for info in self._infos.values())
        mapped = {name: info for name, info in self._infos.items() if name != own_head}
        self._held = {output.name: output for output in self._mapped(mapped)}
        self._invert_all(own_head)
        if own_head is not None and not self._head_uses:
            notes.append(f"{own_head} is in the artifact, but its configuration ties the head to the embedding")
        self.notes = tuple(notes)

    def _mapped(self, infos: Mapping[str, TensorInfo]) -> Iterator[OutputTensor]:
        """The source's map, of the artifact's tensors. Raises IntegrityError where they are not the source's."""
        try:
            outputs = self._source.architecture.map_tensors(infos).outputs
        except (MalformedInputError, UnsupportedError) as error:
            raise self._misfit(error.what, error.tensor, error.expected, error.found) from error
        for output in outputs:
            for piece in output.pieces:
                info = infos[piece.source]
                if piece.source in self.packed.plain and info.dtype.upper() not in _READABLE:
                    raise UnsupportedError(
                        "a tensor that is not quantized has an element type that is no weight's",
                        file=info.file,
                        tensor=info.name,
                        offset=info.offset,
                        expected=", ".join(_READABLE),
                        found=info.dtype.upper(),
                    )
            yield output

    def _misfit(self, what: str, tensor: str | None, expected: object, found: object) -> IntegrityError:
        return IntegrityError(
            f"the artifact was not made from this reference model: {what}",
            file=self.path,
            tensor=tensor,
            expected=f"{expected} (the reference: {self._source.checkpoint.directory})",
            found=f"{found} (the artifact)",
            remedy="give the model that the artifact was made from with --reference",
        )

    def _config_notes(self) -> Iterator[str]:
        """Where its configuration is not the source's; IntegrityError where it is another architecture's."""
        wanted = self._source.architecture
        found = open_architecture(self.packed.config, file=self.packed.file)
        if found.gguf_name != wanted.gguf_name:
            raise self._another(f"an architecture of {found.gguf_name}", wanted.gguf_name)
        yield from differences(
            {key: value.value for key, value in wanted.metadata(None).items()},
            {key: value.value for key, value in found.metadata(None).items()},
        )

    def _drop_zero_biases(self) -> Iterator[str]:
        zero = zero_biases(self.packed, self._source.checkpoint.tensors.__contains__)
        for name in zero:
            del self._infos[name]
        if zero:
            yield f"{len(zero)} biases that the reference has not are in the artifact, all zeros"

    def _own_head(self) -> str | None:
        """A head of its own where the source has its embedding for one."""
        if not self._source.architecture.hyper.tied:
            return None
        known = self._source.checkpoint.tensors
        return next((name for name in self._infos if _HEADS.search(name) and name not in known), None)

    def _invert_all(self, own_head: str | None) -> None:
        source = self._source
        used = {piece.source: piece for output in source.tensors.outputs for piece in output.pieces}
        for name, piece in used.items():
            info = self._infos.get(name)
            if info is not None and info.shape == source.checkpoint.tensors[name].shape:
                self._uses[name] = self._as_it_stands(name, name, piece.transpose)
        straight = set(self._uses)
        for output in source.tensors.outputs:
            for use in self._uses_of(output, self._held.get(output.name, output)):
                if use.piece.source not in straight and output.name != HEAD:
                    self._uses[use.piece.source] = (*self._uses.get(use.piece.source, ()), use)
        table = next((o.pieces[0].source for o in source.tensors.outputs if o.name == EMBEDDING), None)
        untied = self.packed.config.get("tie_word_embeddings") is False
        if own_head is not None and untied and table is not None:
            self._head_uses[table] = self._as_it_stands(own_head, table, False)


def _starred(names: list[str]) -> str:
    """One name for several: parts in which they differ are stars."""
    parts = [name.split(".") for name in names]
    if len({len(part) for part in parts}) > 1:
        return f"{names[0]} and {len(names) - 1} more"
    return ".".join(words[0] if len(set(words)) == 1 else "*" for words in zip(*parts, strict=True))
