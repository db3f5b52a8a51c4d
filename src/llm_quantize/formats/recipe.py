"""A user's own mix: which tensor, or which matrix, gets which qtype. As a file: recipe_file.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llm_quantize.errors import IntegrityError, UsageError
from llm_quantize.measures.amounts import bytes_text
from llm_quantize.results import Shown

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source


@dataclass(frozen=True)
class Origin:
    """The file whose types a recipe repeats: its name, the ``sha256`` of its headers (of all parts, in order), its
    ``architecture`` and number of ``blocks``; ``importance``: what it says of the importance that it was made with
    ("file", "dataset", "entries", "chunks"), empty where there was none."""

    file: str
    sha256: str
    architecture: str
    blocks: int
    importance: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What a plan says of it."""
        return f"types as {self.file} has them (SHA-256 of its header {self.sha256[:16]}...)"

    def notes(self) -> Iterator[str]:
        """What the reader of a plan should know, a sentence each."""
        yield self.text
        if self.importance:
            told = ", ".join(f"{key} {value}" for key, value in self.importance.items())
            yield f"{self.file} was made with importance ({told}), which is not in it: types that need some calibrate"

    def refuse_unlike(self, architecture: str, blocks: int) -> None:
        """Raise UsageError for a model of another shape, naming both."""
        if (architecture, blocks) != (self.architecture, self.blocks):
            raise UsageError(
                f"{self.file} holds a model of another shape: its types mean nothing here",
                expected=f"{self.architecture} with {self.blocks} blocks, as in the file",
                found=f"{architecture} with {blocks} blocks",
                remedy="take the file of a model of the same architecture and as many blocks",
            )


AS_FOUND, FLAT = "sensitivities", "flatter sensitivities"
"""What ``Fit.chosen`` and ``Fit.tried`` call the recipes of its figures; others are plain levels, by their names."""

ESTIMATED = "estimated"
"""``Fit.way``: by gradients, not measured one by one."""


@dataclass(frozen=True)
class Fit:
    """Why a recipe that was chosen for a size is as it is. Bytes: ``size`` that was asked for, ``file`` that the weight
    files may have of it, ``reached`` (without what the card tells of it). ``context``: tokens of the cache that fits
    beside them, in the type ``kv``, which takes ``beside`` with all else that a runtime needs (0, "", 0: the file alone
    was to fit). ``bits`` per weight. ``way``: how sensitivities were found, "estimated" or "measured"; ``kld``: their
    sum, nats. ``tried``: {recipe: mean KLD on ``tokens`` positions of other text}, ``chosen`` being the one that was
    taken; empty where none was tried."""

    size: int
    file: int
    reached: int
    bits: float
    way: str
    kld: float
    chosen: str = ""
    tried: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    context: int = 0
    kv: str = ""
    beside: int = 0

    def words(self) -> dict[str, str]:
        """What a model card says of it."""
        return {"Types": "; ".join(self.notes())}

    def notes(self) -> Iterator[str]:
        """What the reader of a plan should know, a sentence each."""
        if self.context:
            yield (
                f"of {bytes_text(self.size)}, {bytes_text(self.beside)} are for a cache of {self.context:,} tokens in "
                f"{self.kv} and what the runtime needs: the file may have {bytes_text(self.file)}"
            )
        types = (
            f"types chosen to fit {bytes_text(self.file)}: {bytes_text(self.reached)}, {self.bits:.2f} bits per weight"
        )
        if self.way == ESTIMATED:
            yield f"{types}, by estimated sensitivities that sum to a KLD of {self.kld:.5f}"
        else:
            yield f"{types}, by measured sensitivities that sum to a KLD of {self.kld:.5f}"
        if self.tried:
            others = ", ".join(_tried_text(name, kld) for name, kld in self.tried.items())
            taken = _tried_text(self.chosen, self.tried[self.chosen])
            yield f"mean KLD on {self.tokens:,} tokens of other text: {others}; taken: {taken}"


def _tried_text(name: str, kld: float) -> str:
    """A recipe that was tried, and what it lost."""
    if name == FLAT:
        return f"flatter sensitivities {kld:.5f}"
    return f"sensitivities {kld:.5f}" if name == AS_FOUND else f"plain {name} {kld:.5f}"


@dataclass(frozen=True, repr=False)
class Recipe(Shown):
    """A user's own mix (``read_recipe``): the qtypes of single ``tensors`` by name, before everything else; the rest
    as ``level`` says. ``model``: digest of the model that it was made for, if it says so; ``sha256``: of the file.
    ``form``: the format that it is for, in whose words names, level and qtypes are. ``kept``: tensors whose codes are
    those of the source, if they can be, so that no importance is asked for. ``origin``: the file of another model whose
    types it repeats; tensors that only one of the two has are told then, not refused. ``fit``: the size that it was
    chosen for."""

    name: str
    level: str
    tensors: Mapping[str, str]
    model: str | None = None
    sha256: str = ""
    form: str = "gguf"
    kept: frozenset[str] = frozenset()
    origin: Origin | None = None
    fit: Fit | None = None

    def notes(self) -> tuple[str, ...]:
        """What the reader of a plan should know of how it came about, a sentence each."""
        return tuple(note for one in (self.origin, self.fit) if one is not None for note in one.notes())

    def groups(self) -> dict[str, dict[str, int]]:
        """{tensors of one kind, their block's number left out: {type: how many of them have it}}."""
        found: dict[str, dict[str, int]] = {}
        for name, qtype in self.tensors.items():
            kind = re.sub(r"\.\d+\.", ".*.", name).removesuffix(".weight")
            counts = found.setdefault(kind, {})
            counts[qtype] = counts.get(qtype, 0) + 1
        return found

    def summary(self) -> dict[str, object]:
        """Its name, its level, and how many tensors it names."""
        return {"name": self.name, "level": self.level, "tensors": len(self.tensors)}

    def check_use(self, source: Source, form: str, levels: Sequence[str], level_name: Callable[[str], str]) -> None:
        """Raise UsageError where it is for another format than ``form``, or stands beside other levels;
        IntegrityError where it was made for another model (a source opened for its headers cannot tell).
        ``level_name``: a level as the format calls it."""
        self.refuse_other_format(form)
        if [level_name(level) for level in levels] != [self.level]:
            raise UsageError("a recipe is a level of its own", expected=self.level, found=", ".join(levels))
        if self.model is None or source.checkpoint.headers_only:
            return
        found = source.content()
        if found != self.model:
            raise IntegrityError(
                f"the recipe {self.name} was made for another model",
                expected=f"model {self.model}",
                found=f"model {found}",
                remedy='make one for this model with `llm-quantize analyze profile`, or take "model" out of the recipe',
            )

    def refuse_other_format(self, form: str) -> None:
        """Raise UsageError where it is for another format than ``form``."""
        if self.form != form:
            raise UsageError(
                f"the recipe {self.name} is for another format",
                expected=form,
                found=self.form,
                remedy=f"quantize to {self.form} with it, or make one for {form}",
            )

    def refuse_unknown(self, unknown: Sequence[str]) -> None:
        """Raise UsageError where there are names that the model does not have."""
        if unknown:
            named = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            raise UsageError(
                f"the recipe {self.name} names tensors that this model does not have",
                found=named,
                remedy="a recipe fits the model that it was made for; take them out, or make one for this model",
            )


def no_recipes(format: str) -> UsageError:
    """The error of a format whose matrices all have one grid."""
    return UsageError(
        f"{format} takes no recipes: there, all matrices have one type",
        remedy="recipes are for gguf, compressed-tensors and mlx",
    )
