"""Documents: texts and conversations, packed, so that millions of short ones take little more than their letters."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

Message = Mapping[str, str]

SHORT = 4096
"""Texts of more characters are kept as they are."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or one conversation (``messages`` with ``role`` and ``content``); never both. ``metadata``: the other
    keys that stood beside it."""

    text: str = ""
    messages: tuple[Message, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def characters(self) -> int:
        return len(self.text) + sum(len(message["content"]) for message in self.messages)


class Documents(Sequence[Document]):
    """Documents in their order. ``characters``: of all of them."""

    def __init__(self, documents: Iterable[Document] = ()) -> None:
        self.characters = 0
        self._packed, self._ends = bytearray(), array("q")
        self._whole: dict[int, Document] = {}  # what is more than a short text
        for document in documents:
            self.append(document)

    def append(self, document: Document) -> None:
        if document.messages or document.metadata or len(document.text) > SHORT:
            self._whole[len(self._ends)] = document
            self._ends.append(len(self._packed))
            self.characters += document.characters
        else:
            self.append_text(document.text)

    def append_text(self, text: str) -> None:
        """As ``append(Document(text))``."""
        if len(text) > SHORT:
            self.append(Document(text))
            return
        self._packed += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._packed))
        self.characters += len(text)

    def contents(self, start: int = 0) -> Iterator[tuple[str, tuple[Message, ...]]]:
        """(text, messages) of each document from ``start`` on."""
        packed, whole = self._packed, self._whole
        begin = self._ends[start - 1] if start else 0
        for index in range(start, len(self._ends)):
            end = self._ends[index]
            if end == begin and index in whole:
                yield whole[index].text, whole[index].messages
            else:
                yield packed[begin:end].decode("utf-8", "surrogatepass"), ()
            begin = end

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | Sequence[Document]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index in self._whole:
            return self._whole[index]
        begin = self._ends[index - 1] if index else 0
        return Document(self._packed[begin : self._ends[index]].decode("utf-8", "surrogatepass"))
