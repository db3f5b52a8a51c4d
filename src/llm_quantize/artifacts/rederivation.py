"""What making an artifact again told: whether its bytes are the same, and where not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quantize.errors import IntegrityError, printable
from llm_quantize.measures.amounts import counted
from llm_quantize.results import Tabled

_SHOWN = 8


@dataclass(frozen=True)
class Difference:
    """Where an artifact is not what is made of its source now: in ``file``, in ``tensor`` ("": beside the tensors), in
    ``count`` rows from the first to the last of ``rows`` (None: the whole of it); ``offset``: of the first byte in the
    file, None where it has nothing there."""

    file: str
    tensor: str
    rows: tuple[int, int] | None
    count: int
    offset: int | None

    @property
    def text(self) -> str:
        """One line."""
        file, tensor = printable(self.file, 120), printable(self.tensor, 120)
        if not tensor:
            where = "is not there" if self.offset is None else f"differs from byte {self.offset:,} on"
            return f"{file} {where}"
        if self.rows is None:
            return f"{file}: {tensor} is not there, or has another size"
        first, last = self.rows
        rows = f"row {first:,}" if first == last else f"{self.count:,} rows of {first:,} to {last:,}"
        return f"{file}: {tensor} differs in {rows}, from byte {self.offset:,} of the file on"


@dataclass(frozen=True)
class Dependency:
    """A file that an artifact was made from: its name, its hash, what it is ("source", "adapter", "text",
    "imatrix", "statistics"), and of a source or an adapter the name (``model``) and its hub commit."""

    name: str
    sha256: str
    kind: str
    model: str = ""
    revision: str | None = None


@dataclass(frozen=True, repr=False)
class Rederivation(Tabled):
    """An artifact that was made again. ``source``: what from, as the manifest calls it; ``differences``: where bytes
    differ; ``sources``: tensors whose weights in the source are not those that it was made of; ``changed``: keys of the
    manifest that say otherwise; ``cautions``: why bytes might differ though nothing is wrong. ``other_version``: what
    the manifest says is otherwise by another version of this package alone. ``tensors`` and ``size`` (bytes) were
    compared. ``dependencies``: the files that it was made from, where they were asked for. ``left``: matrices that
    were not made again, as what text would run through differs already."""

    columns = ("file", "tensor", "rows", "count", "offset")

    path: Path
    source: str
    differences: tuple[Difference, ...]
    sources: tuple[str, ...]
    changed: tuple[str, ...]
    cautions: tuple[str, ...]
    tensors: int
    size: int
    other_version: bool = False
    dependencies: tuple[Dependency, ...] = ()
    left: int = 0

    @property
    def same(self) -> bool:
        """Whether every byte is the same."""
        return not (self.differences or self.sources or self.changed)

    @property
    def same_tensors(self) -> bool:
        """Whether every byte of every tensor is, and what else differs does so by another version of this package."""
        beside = self.other_version and not any(one.tensor for one in self.differences)
        return self.same or (beside and not self.sources)

    @property
    def verdict(self) -> str:
        """ "same", "same tensors" (another version wrote the fronts of files), "another source" or "differs"."""
        if self.same or self.same_tensors:
            return "same" if self.same else "same tensors"
        return "another source" if self.sources or any(key.startswith("source") for key in self.changed) else "differs"

    def lines(self) -> Iterator[str]:
        """What differs, a line each."""
        if self.sources:
            more = f" and {len(self.sources) - 1:,} more" if len(self.sources) > 1 else ""
            yield f"the source's weights are not those that it was made of: {printable(self.sources[0], 120)}{more}"
        for one in self.differences:
            yield one.text
        if self.changed:
            yield f"the manifest says otherwise: {', '.join(printable(key, 60) for key in self.changed)}"

        if self.left:
            matrices = counted(self.left, "matrix", "matrices")
            yield f"{matrices} not made again: what text would run through differs already"

    def error(self) -> IntegrityError | None:
        """An error that names the first difference; None where every tensor is the same."""
        if self.same_tensors:
            return None
        lines = list(self.lines())
        first = self.differences[0] if self.differences else None
        return IntegrityError(
            "making the artifact again gives other bytes",
            file=self.path,
            tensor=next((one.tensor for one in self.differences if one.tensor), None),
            offset=None if first is None else first.offset,
            found=lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""),
            remedy="; ".join(self.cautions) or "the artifact was changed, or the source or a text was: copy them again",
        )

    def summary(self) -> dict[str, Any]:
        """The verdict, and how much was compared."""
        facts = {"path": self.path, "verdict": self.verdict, "source": self.source, "tensors": self.tensors}
        return facts | ({"differences": len(self.differences)} if self.differences else {})

    def rows(self) -> list[dict[str, Any]]:
        """One for each difference."""
        return [asdict(one) for one in self.differences]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "verdict": self.verdict,
            "same": self.same,
            "source": self.source,
            "tensors": self.tensors,
            "size": self.size,
            "differences": self.rows(),
            **({"other_source": list(self.sources)} if self.sources else {}),
            **({"manifest_differs_in": list(self.changed)} if self.changed else {}),
            **({"matrices_not_made_again": self.left} if self.left else {}),
            **({"cautions": list(self.cautions)} if self.cautions else {}),
        }

    @property
    def line(self) -> str:
        """The outcome in one line."""
        if self.same:
            return f"made again from {self.source}: the same {self.size:,} bytes, {counted(self.tensors, 'tensor')}"
        if self.same_tensors:
            return f"made again from {self.source}: the same {counted(self.tensors, 'tensor')}, other fronts of files"
        return f"made again from {self.source}: other bytes"
