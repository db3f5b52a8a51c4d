"""Every word of the reports, in English and Japanese (``words/LANGUAGE.json``).

Both files have the same keys with the same placeholders, and under "grades" a name for each of
``measures.grades.GRADES``; a test holds them to it.
"""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any

from llm_quantize.errors import UsageError

LANGUAGES = ("en", "ja")


@functools.cache
def _words(lang: str) -> dict[str, Any]:
    if lang not in LANGUAGES:
        raise UsageError("no report in this language", expected=", ".join(LANGUAGES), found=lang)
    found: dict[str, Any] = json.loads(files("llm_quantize.reports").joinpath("words", f"{lang}.json").read_bytes())
    return found


def labels(lang: str) -> dict[str, str]:
    """The words of one language. Raises UsageError for a language that is not here."""
    return {key: text for key, text in _words(lang).items() if isinstance(text, str)}


def grade_name(name: str, lang: str) -> str:
    """A grade of ``measures.grades`` in the reader's language; an unknown one as it is."""
    known: dict[str, str] = _words(lang)["grades"]
    return known.get(name, name)


def note_patterns(lang: str) -> dict[str, str]:
    """Sentences that notes are, by kind, with {places}; in the order in which they are tried."""
    known: dict[str, str] = _words(lang)["note_patterns"]
    return known
