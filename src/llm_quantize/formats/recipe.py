"""A user's own mix: which tensor, or which matrix, gets which qtype. As a file: recipe_file.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_quantize.errors import IntegrityError, UsageError
from llm_quantize.results import Shown

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source


@dataclass(frozen=True, repr=False)
class Recipe(Shown):
    """A user's own mix (``read_recipe``): the qtypes of single ``tensors`` by name, before everything else; the rest
    as ``level`` says. ``model``: digest of the model that it was made for, if it says so; ``sha256``: of the file.
    ``form``: the format that it is for, in whose words names, level and qtypes are. ``kept``: tensors whose codes are
    those of the source, if they can be, so that no importance is asked for."""

    name: str
    level: str
    tensors: Mapping[str, str]
    model: str | None = None
    sha256: str = ""
    form: str = "gguf"
    kept: frozenset[str] = frozenset()

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
        remedy="recipes are for gguf and compressed-tensors",
    )
