"""The plan: a pure function of headers, architecture, recipe and format that fixes every byte before any work.

Size, ``--dry-run``, preflight, resume, verify and report all read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import matrix_shape, unit_ranges
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.output import OutputFile, Span
from llm_quantize.memory import Sizes
from llm_quantize.results import Tabled


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of an artifact: where it comes from, its qtype, and its place (absolute offset in file number).

    A field of a packed matrix (codes, scales, ...) has no pieces, and the safetensors dtype in the place of a qtype.
    """

    output: OutputTensor
    qtype: str
    file: int
    offset: int
    nbytes: int

    @property
    def name(self) -> str:
        return self.output.name

    @property
    def row_bytes(self) -> int:
        return self.nbytes // max(1, matrix_shape(self.output.shape)[0])

    def span(self, start: int, stop: int) -> Span:
        """The place of rows [start, stop)."""
        return Span(self.file, self.offset + start * self.row_bytes, (stop - start) * self.row_bytes)


@dataclass(frozen=True)
class MatrixPlan:
    """A weight that is quantized as a whole, by a method that sees all of its rows and columns together.

    ``name``: the module's (or, in GGUF, the tensor's). ``weight``: where its rows come from, in the order stored;
    stacked experts are one weight. ``qtype``: its number grid. ``fields``: the tensors of the artifact that hold the
    result, as indices, in the order in which the format packs them.
    """

    name: str
    weight: OutputTensor
    qtype: str
    fields: tuple[int, ...]


CARD_UNIT = "model card"


@dataclass(frozen=True)
class CardPlan:
    """A model card whose figures are known only at the end: file number, and its text with room for them."""

    file: int
    text: bytes = field(repr=False)


@dataclass(frozen=True, repr=False)
class ArtifactPlan(Tabled):
    """Everything about one artifact, fixed: its ``files`` and ``tensors`` to the byte; how many ``weights`` of the
    source it holds; ``warnings``: what is good to know before the work.

    ``matrices``: what a method other than plain rounding quantizes; empty where every tensor is rounded by itself.
    ``held``: further tensors that such a run writes, as a transform changes them (indices). ``phases``: what is
    held beside the rounding of single tensors, before it or after. ``alike``: all levels of this format list the same
    tensors in the same order, so that one read serves several. ``too_large``: what a user can do about a tensor (TENSOR
    in the text) whose weights overflow its type. ``fallbacks``: {what cannot be done as asked: the tensors}, as far as
    that is known before the work. ``source_itemsize``: the most bytes of a weight as it is read;
    ``source_scratch``: see ``Model.scratch``.
    """

    columns = ("name", "shape", "type", "bytes")

    level: str
    name: str
    files: tuple[OutputFile, ...]
    tensors: tuple[TensorPlan, ...]
    weights: int
    identity: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    source_itemsize: int = 2
    source_scratch: int = 0
    format: str = "gguf"
    alike: bool = False
    matrices: tuple[MatrixPlan, ...] = ()
    held: frozenset[int] = frozenset()
    phases: tuple[Sizes, ...] = ()
    card: CardPlan | None = None
    too_large: str = "use another level"
    fallbacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits, headers included, per source weight."""
        return 8 * self.size / self.weights if self.weights else 0.0

    @property
    def digest(self) -> str:
        """SHA-256 of the identity: the same artifact from the same source by the same version."""
        return hashlib.sha256(canonical_json(dict(self.identity))).hexdigest()

    def units(self) -> dict[str, Span]:
        """Every unit of work and the place of its bytes, in order."""
        units = {
            unit_key(tensor.name, start, stop): tensor.span(start, stop)
            for tensor in self.tensors
            for start, stop in unit_ranges(tensor.output.shape)
        }
        if self.card is not None:
            units[CARD_UNIT] = Span(self.card.file, 0, len(self.card.text))
        return units

    @cached_property
    def _weights(self) -> dict[str, OutputTensor]:
        """The weight of each field that has no rows of the source of its own."""
        return {
            self.tensors[index].name: matrix.weight
            for matrix in self.matrices
            for index in matrix.fields
            if not self.tensors[index].output.pieces
        }

    def origin(self, tensor: TensorPlan, start: int, stop: int) -> tuple[OutputTensor, int, int]:
        """What rows [start, stop) of a stored tensor are made of: the same rows of the source, or a whole matrix."""
        weight = self._weights.get(tensor.name)
        if weight is None:
            return tensor.output, start, stop
        return weight, 0, matrix_shape(weight.shape)[0]

    def rounded(self) -> list[int]:
        """The tensors (indices) that are rounded by themselves, a few rows at a time."""
        taken = self.held.union(*(matrix.fields for matrix in self.matrices))
        return [index for index in range(len(self.tensors)) if index not in taken]

    def type_counts(self) -> dict[str, int]:
        """How many tensors have each qtype."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            counts[tensor.qtype] = counts.get(tensor.qtype, 0) + 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: one entry per tensor and file."""
        return {
            "level": self.level,
            "name": self.name,
            "size": self.size,
            "weights": self.weights,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "files": [{"name": file.name, "size": file.size} for file in self.files],
            "types": self.type_counts(),
            "warnings": list(self.warnings),
            **({"fallbacks": {text: list(names) for text, names in self.fallbacks.items()}} if self.fallbacks else {}),
            "tensors": self.rows(),
        }

    def summary(self) -> dict[str, Any]:
        """Level, files, size, bits per weight, and how many tensors."""
        facts = {"level": self.level, "format": self.format, "name": self.name, "files": len(self.files)}
        facts |= {"tensors": len(self.tensors), "size": self.size, "bits_per_weight": self.bits_per_weight}
        return facts | ({"warnings": len(self.warnings)} if self.warnings else {})

    def rows(self) -> list[dict[str, Any]]:
        """One for each tensor of the artifact."""
        return [
            {
                "name": tensor.name,
                "shape": list(tensor.output.shape),
                "type": tensor.qtype,
                "bytes": tensor.nbytes,
                "file": tensor.file,
                "offset": tensor.offset,
                "sources": [piece.source for piece in tensor.output.pieces],
            }
            for tensor in self.tensors
        ]


def unit_key(name: str, start: int, stop: int) -> str:
    """The name of a unit: a tensor and its rows."""
    return f"{name}[{start}:{stop}]"
