"""The one tree of errors. Every failure a user can cause or meet is one of these; anything else is a bug.

A message says what happened, where (file, tensor, offset), what was expected and found, and what to do.
``exit_code`` is what the command line returns (docs/reference/exit-codes.md).
"""

from __future__ import annotations

import copyreg
from pathlib import Path
from typing import Any, ClassVar
from unicodedata import category


class LlmQuantizeError(Exception):
    """Base of all expected errors.

    ``what`` is one sentence. The rest are optional facts: ``file``, ``tensor``, ``offset`` (bytes from the start
    of ``file``), ``expected``, ``found``, ``remedy`` (what the user can do now).
    """

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "error"

    def __init__(
        self,
        what: str,
        *,
        file: str | Path | None = None,
        tensor: str | None = None,
        offset: int | None = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.offset = offset
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.remedy = remedy
        super().__init__(self.__str__())

    def facts(self) -> list[tuple[str, str]]:
        """(label, what is known), for a reader, without what is absent."""
        known = (
            ("file", self.file),
            ("tensor", self.tensor),
            ("offset", self.offset),
            ("expected", self.expected),
            ("found", self.found),
            ("what to do", self.remedy),
        )
        return [(label, str(value)) for label, value in known if value is not None]

    def __str__(self) -> str:
        return "\n".join([self.what, *(f"  {label}: {printable(value)}" for label, value in self.facts())])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with all its facts, whatever a subclass's constructor takes: it may come from another process."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    def to_dict(self) -> dict[str, object]:
        """The same facts as one JSON-ready object (absent facts left out)."""
        facts = {
            "error": self.kind,
            "exit_code": self.exit_code,
            "what": self.what,
            "file": self.file,
            "tensor": self.tensor,
            "offset": self.offset,
            "expected": self.expected,
            "found": self.found,
            "remedy": self.remedy,
        }
        return {key: value for key, value in facts.items() if value is not None}


class UsageError(LlmQuantizeError):
    """The arguments contradict each other or name something that does not exist."""

    exit_code = 2
    kind = "usage"


class MalformedInputError(LlmQuantizeError):
    """An input file breaks its own format."""

    exit_code = 3
    kind = "malformed-input"


class UnsupportedError(LlmQuantizeError):
    """A valid input that this version cannot handle: architecture, dtype, tokenizer, type."""

    exit_code = 4
    kind = "unsupported"


class MissingExtraError(UnsupportedError):
    """A command needs an optional dependency that is not installed."""

    kind = "missing-extra"

    def __init__(self, feature: str, extra: str, *, remedy: str | None = None) -> None:
        super().__init__(
            f"{feature} needs an optional dependency that is not installed",
            remedy=remedy or install_command(extra),
        )


class ResourceError(LlmQuantizeError):
    """Not enough disk, memory or file size."""

    exit_code = 5
    kind = "resources"


class AccessError(LlmQuantizeError):
    """The system or our path policy forbids touching this file."""

    exit_code = 6
    kind = "permission"


class NetworkError(LlmQuantizeError):
    """The hub cannot be reached, or refuses: network, authentication, gated, offline."""

    exit_code = 7
    kind = "network"


class IntegrityError(LlmQuantizeError):
    """Bytes are not what a hash, a manifest or a journal says they are."""

    exit_code = 8
    kind = "integrity"


class NumericPolicyError(LlmQuantizeError):
    """Values that we refuse to quantize silently: NaN, infinity, a scale that overflows."""

    exit_code = 9
    kind = "numeric-policy"


class BusyError(LlmQuantizeError):
    """Another process is writing the same output."""

    exit_code = 10
    kind = "busy"


class PromiseError(LlmQuantizeError):
    """What a method made is not what it promises: far from the weights, and worse than plain rounding."""

    exit_code = 13
    kind = "promise"


class StoppedError(LlmQuantizeError):
    """Stopped by a signal; the same command continues where this one ended."""

    exit_code = 75
    kind = "stopped"


def install_command(*extras: str) -> str:
    """How this package is installed with ``extras``, in one line: from a checkout, as no package index holds it yet."""
    chosen = f"'.[{','.join(extras)}]'" if extras else "."
    return f"in a checkout of llm-quantize: pip install {chosen}"


def printable(text: str, limit: int = 400) -> str:
    """``text`` with control characters escaped and its length bounded, fit for a terminal. All blanks stay."""
    safe = "".join(c if c.isprintable() or category(c) == "Zs" else f"\\x{ord(c):02x}" for c in text)
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"
