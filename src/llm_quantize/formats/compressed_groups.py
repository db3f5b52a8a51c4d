"""Which config group of a compressed-tensors directory a module belongs to.

As the package (0.20) and Transformers (5.23) have it: a module belongs to the group whose target is its name, else to
the one whose expression (``re:``, matched from the first character on) finds it, the first in order of their text, else
to the one that names its class (``Linear``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from llm_quantize.formats.expressions import compiled, each_meant
from llm_quantize.formats.packed import Settings

EXPRESSION = "re:"
"""What a target begins with that is a regular expression."""
_LINEAR = "Linear"

Group = Mapping[str, Any]


class Groups:
    """The config groups. ``all``: in their order. ``mixed``: they do not all say the same of weights. ``of_class``: the
    one that means modules by their class; None: none does."""

    def __init__(self, settings: Settings) -> None:
        self.file = settings.file
        said = settings.values.get("config_groups")
        self.all: list[Group] = (
            [one for one in said.values() if isinstance(one, dict)] if isinstance(said, dict) else []
        )
        weights = [found for found in map(weights_of, self.all) if found is not None]
        self.mixed = any(found != weights[0] for found in weights)
        self._names: dict[str, Group] = {}
        expressions: dict[str, Group] = {}
        for group in self.all:
            for text in _targets(group):
                if text.startswith(EXPRESSION):
                    expressions[text] = group
                else:
                    self._names[text] = group
        self.of_class = self._names.get(_LINEAR)
        self._expressions = dict(sorted(expressions.items()))
        self._found: dict[str, Group] | None = None

    def named(self, names: Collection[str]) -> dict[str, Group]:
        """{module: its group} of those modules that a target means by name. Raises MalformedInputError for expressions
        that cannot be matched."""
        meanings = ((text, compiled(text.removeprefix(EXPRESSION), self.file)) for text in self._expressions)
        found = {name: self._names[name] for name in names if name in self._names}
        rest = [name for name in names if name not in found]
        found |= {name: self._expressions[rule] for name, rule in each_meant(meanings, rest, self.file)}
        return found

    def of(self, name: str, names: Collection[str]) -> Group | None:
        """The group of module ``name``; None where none means it. ``names``: of all modules, which are looked at once.
        Raises as ``named``."""
        if self._found is None:
            self._found = self.named(names)
        return self._found.get(name, self.of_class)


def weights_of(group: Group) -> Mapping[str, Any] | None:
    """What a group says of weights; None: nothing."""
    found = group.get("weights")
    return found if isinstance(found, dict) else None


def _targets(group: Group) -> list[str]:
    """Its targets; none where the configuration names none, or no list, which the package refuses."""
    found = group.get("targets")
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []
