"""The plan: a pure function of headers, architecture, recipe and format that fixes every byte before any work.

Size, ``--dry-run``, preflight, resume, verify and report all read it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import matrix_shape, unit_ranges, weights_of
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.output import OutputFile, Span
from llm_quantize.measures.amounts import bytes_text, counted, time_text
from llm_quantize.memory import Sizes
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.inputs import InputGrid
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


CACHED = 2
"""Scales of an attention's keys and values."""


@dataclass(frozen=True)
class MatrixPlan:
    """A weight that is quantized as a whole, by a method that sees all of its rows and columns together.

    ``name``: the module's (or, in GGUF, the tensor's). ``weight``: where its rows come from, in the order stored;
    stacked experts are one weight. ``qtype``: its number grid. ``fields``: the tensors of the artifact that hold the
    result, as indices, in the order in which the format packs them. ``seen``: it stands in a block, where its inputs
    can be observed; others are rounded, whatever the method. ``cache``: what runtimes keep the keys and values before
    it as; their scales, found when it is quantized, are the last CACHED of its fields then.
    """

    name: str
    weight: OutputTensor
    qtype: str
    fields: tuple[int, ...]
    seen: bool = True
    cache: InputGrid | None = None


@dataclass(frozen=True)
class Substitution:
    """A tensor of ``shape`` whose rows do not divide into the blocks of ``asked``, the type that it should have; it has
    ``taken`` instead. ``usual``: llama.cpp's choice, where ``taken`` was found to lose a ``share`` of what that would.
    """

    tensor: str
    shape: tuple[int, ...]
    asked: str
    taken: str
    usual: str = ""
    share: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return round(weights_of(self.shape) * QTYPES[self.taken].bits_per_weight / 8)

    @property
    def more(self) -> int:
        """Bytes that it takes beyond those that ``asked`` would have taken."""
        return self.nbytes - round(weights_of(self.shape) * QTYPES[self.asked].bits_per_weight / 8)

    @property
    def line(self) -> str:
        """All of it, for a list."""
        told = f"{self.tensor}: rows of {self.shape[-1]}: {self.taken}, not {self.asked}"
        return f"{told} (it loses {self.share:.2f} of what {self.usual} loses)" if self.usual else told

    @property
    def text(self) -> str:
        """What could not be done as asked, the same for every such tensor."""
        return f"the rows do not divide into the blocks of {self.asked}; {self.taken} is used instead"


@dataclass(frozen=True)
class Cost:
    """What an artifact takes to make, estimated before: CPU seconds on a core as in docs/reference/speed.md.

    ``windows`` and ``length``: the text at most; ``tokens``: what it probably has; 0 where none is run. ``collecting``:
    the calibration, once for all levels of a run; ``feedback``: the text through the model for this level alone; both
    None where a graphics processor does them. ``memory``: bytes at the height of what runs text.
    """

    rounding: float
    windows: int = 0
    length: int = 0
    tokens: int = 0
    collecting: float | None = 0.0
    feedback: float | None = 0.0
    memory: int = 0

    @property
    def text(self) -> str | None:
        """What is run through the model before the artifact is there, as a sentence; None where nothing is."""
        if not self.windows:
            return None
        feeds = self.feedback != 0.0
        first = "feeds errors back" if feeds else "calibrates first, unless an earlier run did with this text"
        seconds = self.feedback if feeds else self.collecting
        memory = bytes_text(self.memory)
        costs = f"{memory} of memory" if seconds is None else f"{time_text(seconds)} of CPU time and {memory} of memory"
        return (
            f"{first}: {counted(self.tokens, 'token')} in at most {counted(self.windows, 'window')} of {self.length:,} "
            f"run through the model, one block in memory at a time: about {costs} (this needs the extra [torch])"
        )


def cpu_seconds(costs: Sequence[Cost]) -> float | None:
    """CPU seconds of all of a run's artifacts; None where a graphics processor does a part that cannot be told."""
    if any(cost.collecting is None or cost.feedback is None for cost in costs):
        return None
    own = sum(cost.rounding + (cost.feedback or 0.0) for cost in costs)
    return own + max((cost.collecting or 0.0 for cost in costs), default=0.0)


CARD_UNIT = "model card"
ARITHMETIC = "compute_dtype"
"""The key of an identity that says in which type text was run through the model."""


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
    in the text) whose weights overflow its type. ``source_itemsize``: the most bytes of a weight as it is read;
    ``source_scratch``: see ``Model.scratch``. ``warnings`` and ``notes``: a sentence for each thing that the user
    should know, or may like to; ``details``: {such a sentence: the whole list behind it}. ``substituted``: tensors that
    have not the type of the level. ``silent``: {what an importance says nothing of, and what that means: the
    tensors}. ``cost``: what making it takes. ``judged``: what becomes of each tensor is told (artifacts/verdict.py).
    ``asked``: the level as the user named it.
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
    notes: tuple[str, ...] = ()
    details: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    substituted: tuple[Substitution, ...] = ()
    silent: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cost: Cost | None = None
    judged: bool = False
    asked: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @property
    def observed(self) -> bool:
        """Whether a method that reads text has anything to choose."""
        return any(matrix.seen for matrix in self.matrices)

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

    @cached_property
    def fields_of(self) -> dict[str, str]:
        """{a field: the matrix that it is part of}."""
        return {self.tensors[index].name: matrix.name for matrix in self.matrices for index in matrix.fields}

    def origin(self, tensor: TensorPlan, start: int, stop: int) -> tuple[OutputTensor, int, int]:
        """What rows [start, stop) of a stored tensor are made of: the same rows of the source, or a whole matrix."""
        weight = self._weights.get(tensor.name)
        if weight is None:
            return tensor.output, start, stop
        return weight, 0, matrix_shape(weight.shape)[0]

    @property
    def chained(self) -> bool:
        """Whether text runs through the model while it is made, so that all of its matrices follow from all weights."""
        return bool(self.matrices) and "inputs" in self.identity

    def rounded(self) -> list[int]:
        """The tensors (indices) that are rounded by themselves, a few rows at a time."""
        taken = self.held.union(*(matrix.fields for matrix in self.matrices))
        return [index for index in range(len(self.tensors)) if index not in taken]

    def fallbacks(self) -> dict[str, list[str]]:
        """{what of types and importance could not be as asked: the tensors}."""
        found = {text: list(names) for text, names in self.silent.items()}
        for one in self.substituted:
            found.setdefault(one.text, []).append(one.tensor)
        return dict(sorted(found.items()))

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
            **({"notes": list(self.notes)} if self.notes else {}),
            **({"fallbacks": self.fallbacks()} if self.fallbacks() else {}),
            **({"cost": asdict(self.cost)} if self.cost is not None else {}),
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


def substituted_text(substituted: Sequence[Substitution], matrices: int, plan: ArtifactPlan) -> str:
    """One sentence for all of ``substituted``, of the ``matrices`` of ``plan`` that a level gives its types: how many,
    how large, what they became, and what that means."""
    kinds = Counter((one.asked, one.taken) for one in substituted)
    told = ", ".join(f"{count:,} {asked} became {taken}" for (asked, taken), count in kinds.items())
    size, more = sum(one.nbytes for one in substituted), sum(one.more for one in substituted)
    return (
        f"the rows of {len(substituted):,} of {counted(matrices, 'matrix', 'matrices')}, {bytes_text(size)}, do not "
        f"divide into the blocks of this level's types: {told}; the file is {bytes_text(more)} larger for it "
        f"({plan.bits_per_weight:.2f} bits per weight, not {8 * (plan.size - more) / plan.weights:.2f}), and no less "
        "precise (-v lists them)"
    )


def spoken(plans: Sequence[ArtifactPlan]) -> list[tuple[str, str, tuple[str, ...]]]:
    """What ``plans`` have to say, each thing once: ("warning" or "note", text, the list behind it), what concerns only
    some of several levels with the level in front."""
    found: list[tuple[str, str, tuple[str, ...]]] = []
    for kind in ("warning", "note"):
        told = [plan.warnings if kind == "warning" else plan.notes for plan in plans]
        for plan, texts in zip(plans, told, strict=True):
            for text in texts:
                common = all(text in others for others in told)
                said = (kind, text if common else f"{plan.level}: {text}", tuple(plan.details.get(text, ())))
                if said not in found:
                    found.append(said)
    return found


def unit_key(name: str, start: int, stop: int) -> str:
    """The name of a unit: a tensor and its rows."""
    return f"{name}[{start}:{stop}]"
