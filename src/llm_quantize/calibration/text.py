"""Text to calibrate or to measure on: files of the user, and the built-in sets, mixed by weight.

An item is ``NAME`` or ``NAME=WEIGHT``. NAME is a built-in set (``general``, ``code``, ``japanese``, ``chat``, or
``default``, the mix of all) or a file, which always has one of the suffixes .txt, .json, .jsonl and .parquet; so no
file can be taken for a set. ``=WEIGHT`` is a positive number after the last "=", a share of the windows relative to
the other items' (1 where it is left out). An item that is the path of a file as it stands is that file: write
``odd=2.txt=1`` to give such a file a weight.

The sets' texts and their licences: ``data/calibration/README.md``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_quantize.calibration.documents import Document, Documents, Message
from llm_quantize.calibration.text_files import SUFFIXES, read_documents
from llm_quantize.data import calibration_file
from llm_quantize.errors import UsageError, printable

DEFAULT = "default"
BUILT_IN: Mapping[str, float] = {"general": 0.3, "code": 0.2, "japanese": 0.2, "chat": 0.3}
"""The built-in sets and their shares of the default mix."""


@dataclass(frozen=True)
class Dataset:
    """The documents of one file or built-in set. ``weight``: its share of the windows, relative to the others'."""

    name: str
    documents: Sequence[Document]
    weight: float = 1.0
    built_in: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def characters(self) -> int:
        return packed(self.documents).characters


@dataclass(frozen=True)
class Corpus:
    """What text there is. Weights are positive and sum to 1."""

    datasets: tuple[Dataset, ...]

    @property
    def built_in(self) -> bool:
        """Nothing in it came from the user."""
        return all(dataset.built_in for dataset in self.datasets)

    def text(self) -> str:
        """All documents in their order, a blank line between two; a single .txt file comes back unchanged.

        This is what perplexity and divergence are measured on: every token counts once, whatever the weights say.
        """
        return "\n\n".join(
            plain(document.messages) if document.messages else document.text
            for dataset in self.datasets
            for document in dataset.documents
        )


def packed(documents: Sequence[Document]) -> Documents:
    """``documents``, packed where they are not."""
    return documents if isinstance(documents, Documents) else Documents(documents)


def plain(messages: Sequence[Message]) -> str:
    """A conversation as a play is printed, for models that have no template of their own."""
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def load_texts(items: Sequence[str] = ()) -> Corpus:
    """The documents of all ``items`` (none: the default mix). The same set or file named twice is read once, with the
    sum of its weights.

    Raises UsageError (neither a set nor a file, a weight that is not a positive number), and what ``read_documents``
    raises: AccessError, MalformedInputError, MissingExtraError, ResourceError.
    """
    weights: dict[tuple[str, bool], float] = {}
    for name, built_in, weight in text_items(items):
        key = (name if built_in else _same(name, weights), built_in)
        weights[key] = weights.get(key, 0.0) + weight
    total = sum(weights.values())
    return Corpus(tuple(_dataset(*key, weight / total) for key, weight in weights.items()))


def text_items(items: Sequence[str] = ()) -> list[tuple[str, bool, float]]:
    """(name or path, whether it is built in, weight as given) of every set and file that ``items`` mean, in order.
    Raises UsageError as ``load_texts``."""
    return [found for item in items or (DEFAULT,) for found in _parsed(item)]


def _parsed(item: str) -> Iterator[tuple[str, bool, float]]:
    """(name, whether it is built in, weight) of each data set that ``item`` means."""
    name, weight = item, 1.0
    head, separator, tail = item.rpartition("=")
    if separator and not _is_path(item):
        name, weight = head, _weight(item, tail)
    if name == DEFAULT:
        for part, share in BUILT_IN.items():
            yield part, True, weight * share
    elif name in BUILT_IN:
        yield name, True, weight
    elif Path(name).suffix.lower() in SUFFIXES or _is_path(name):
        yield name, False, weight
    else:
        raise UsageError(
            f"{printable(name, 100)!r} is neither a built-in data set nor a text file",
            expected=f"{', '.join((DEFAULT, *BUILT_IN))}, or a path that ends in {', '.join(SUFFIXES)}",
            remedy="check the name; a share of the mix is written NAME=WEIGHT, for example notes.txt=0.5",
        )


def _is_path(name: str) -> bool:
    """Whether something of this name exists (ValueError: a NUL; the opener says so later)."""
    try:
        return os.path.lexists(name)
    except ValueError:
        return False


def _weight(item: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight <= 1e9:  # also false for NaN
        raise UsageError(
            f"the weight of {printable(item, 100)!r} must be a positive number",
            expected="NAME=WEIGHT, for example code=0.5",
            found=text or "nothing after the '='",
        )
    return weight


def _same(name: str, known: Mapping[tuple[str, bool], float]) -> str:
    """The name under which this file is already known, or ``name``."""
    for other, built_in in known:
        if not built_in and os.path.realpath(other) == os.path.realpath(name):
            return other
    return name


def _dataset(name: str, built_in: bool, weight: float) -> Dataset:
    documents, metadata = read_documents(calibration_file(name) if built_in else Path(name))
    shown = name if built_in else os.fsencode(Path(name).name).decode("utf-8", "replace")
    return Dataset(shown, documents, weight, built_in, metadata)
