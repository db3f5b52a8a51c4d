"""What the library gives back, as people see it: one short line, and a small table in a notebook.

``to_dict`` of every result is JSON-ready; ``rows`` is what of it makes a table: ``pandas.DataFrame(result.rows())``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from llm_quantize.errors import printable

__all__ = ["Generation", "ModelInfo", "Results", "Settings", "Shown", "Tabled", "json_ready"]

Item = TypeVar("Item")

_LONGEST = 80
_MOST_ROWS = 50


class Shown:
    """A result with a short ``repr`` and a small table in notebooks, both of the facts in ``summary``."""

    def summary(self) -> dict[str, Any]:
        """The few facts by which one recognises it: numbers, short texts, paths."""
        raise NotImplementedError(type(self).__name__)

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={_short(value, quoted=True)}" for name, value in self.summary().items())
        return f"{type(self).__name__}({facts})"

    def _repr_html_(self) -> str:
        return html_table([self.summary()])


class Tabled(Shown):
    """A result that is many things of one kind: ``rows`` has a flat dict for each. ``columns``: those that a notebook
    shows; none: all."""

    columns: ClassVar[tuple[str, ...]] = ()

    def rows(self) -> list[dict[str, Any]]:
        """A flat dict for each, all with the same keys: ``pandas.DataFrame(result.rows())``."""
        raise NotImplementedError(type(self).__name__)

    def _repr_html_(self) -> str:
        rows = self.rows()
        shown = [{name: row[name] for name in self.columns} for row in rows] if self.columns else rows
        return html_table(shown, caption=repr(self))


class Results(list[Item]):
    """A list that a notebook shows as a table, a row for each result; ``pandas.DataFrame`` takes it too."""

    def _repr_html_(self) -> str:
        shown = [item.summary() for item in self if isinstance(item, Shown)]
        return html_table(shown) if len(shown) == len(self) else f"<pre>{escape(repr(self))}</pre>"


@dataclass(frozen=True, repr=False)
class Generation(Shown):
    """Text that an artifact wrote after ``prompt``: ``tokens`` in ``seconds``, without loading the model, with
    ``threads``."""

    artifact: str
    prompt: str
    text: str
    tokens: int
    seconds: float
    threads: int

    @property
    def tokens_per_second(self) -> float:
        """How fast it was written."""
        return self.tokens / max(self.seconds, 1e-9)

    def summary(self) -> dict[str, Any]:
        """The artifact, the text, how fast it came."""
        facts = {"artifact": Path(self.artifact).name, "prompt": self.prompt, "text": self.text}
        return {**facts, "tokens_per_second": round(self.tokens_per_second, 1)}

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """The same facts, JSON-ready."""
        return {**dataclasses.asdict(self), "tokens_per_second": self.tokens_per_second}


class ModelInfo(Shown, Mapping[str, Any]):
    """Facts of a model or an artifact, by name: ``info["parameters"]``. Sizes in bytes. Which there are depends on what
    was opened: a model directory, a quantized one, or a GGUF file."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._facts = dict(facts)

    def __getitem__(self, name: str) -> Any:
        return self._facts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def summary(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self._facts.items()
            if isinstance(value, str | int | float) and name != "directory"
        }

    def __repr__(self) -> str:
        named = {name: self._facts[name] for name in ("name", "architecture", "parameters") if name in self._facts}
        facts = ", ".join(f"{name}={_short(value, quoted=True)}" for name, value in named.items())
        return f"ModelInfo({facts}{', ' if facts else ''}{len(self)} facts)"

    def _repr_html_(self) -> str:
        return html_table([{"fact": name, "value": value} for name, value in self.summary().items()])

    def to_dict(self) -> dict[str, Any]:
        """All facts, JSON-ready."""
        found: dict[str, Any] = json_ready(self._facts)
        return found


class Settings:
    """Settings whose ``repr`` names only what is not the default: a mixin for dataclasses."""

    def __repr__(self) -> str:
        told = []
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            default = item.default
            if item.default_factory is not dataclasses.MISSING:
                default = item.default_factory()
            if default is dataclasses.MISSING or value != default:
                told.append(f"{item.name}={value!r}")
        return f"{type(self).__name__}({', '.join(told)})"


def json_ready(value: Any) -> Any:
    """``value`` as JSON has it: dataclasses and mappings are objects, paths texts, NaN and infinity null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: json_ready(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def html_table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> str:
    """An HTML table of flat ``rows``, at most 50 of them; everything in it is escaped."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    parts = ["<table>"]
    if caption:
        parts.append(f"<caption>{escape(caption)}</caption>")
    parts.append(_row("th", (name.replace("_", " ") for name in names)))
    parts += [_row("td", (_cell(row.get(name)) for name in names)) for row in rows[:_MOST_ROWS]]
    if len(rows) > _MOST_ROWS:
        parts.append(_row("td", [f"and {len(rows) - _MOST_ROWS} more"]))
    return "".join([*parts, "</table>"])


def _row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else _short(value)


def _short(value: Any, *, quoted: bool = False) -> str:
    """``value`` in at most 80 characters; a path by its last part that fits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str | Path):
        text = printable(str(value), _LONGEST)
        return repr(text) if quoted else text
    return printable(str(value), _LONGEST)
