"""What the command line says, in the reader's language: one table from English sentences to those of another one.

The library speaks English, and so does all JSON. What is shown to people goes through ``said``, which finds the
finished English sentence in ``words/messages.LANGUAGE.json`` and puts its values where the other language has them.
A sentence that the table lacks stays as it is; ``tests/reports/test_wording.py`` counts them.

A key has ``{0}``, ``{1}``, ... where the English sentence has values, in that order; so has its translation, in any
order and any number of times. ``{0:t}`` is a value that is itself a sentence, and ``{0:a}`` anything that stays as it
is. The other values of a key that says little itself must be names, numbers, or a list of them (of several words they
are looked up too): "download {0}" is not "download the
model again". A sentence after a name and a colon needs no key of its own ("config.json: ..."), nor one before a name in
brackets, nor several with semicolons or commas between.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from string import Formatter

from llm_quantize.errors import LlmQuantizeError, printable
from llm_quantize.reports.labels import LANGUAGES

_PLACE = re.compile(r"\{\d+\}")
_FREE = re.compile(r"\{(\d+):[ta]\}")
_OF_SOMETHING = re.compile(r"(\s*\S+: )(\S.*)", re.DOTALL)
_BEFORE_A_NAME = re.compile(r"(.+\S) \((\S+)\)", re.DOTALL)
_AND_MORE = re.compile(r"(.+\S)( \(and [\d,]+ more\))", re.DOTALL)
_AFTER_BRACKETS = re.compile(r"(.+\)) \((\S+)\)", re.DOTALL)
_NAMES = re.compile(r"(?:[\d.,]+ )?\S+(?:(?:,| or| and) (?:[\d.,]+ )?\S+)*|")
_IS_JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]{2}")
_LISTS = (("; ", "。"), (", ", "、"))
"""What stands between sentences, and between phrases, here and in Japanese."""
_MANY = 20
_LITTLE = 16
"""Letters; a key that has fewer could be part of many sentences."""
_DEPTH = 4
"""So many sentences within sentences are translated."""

_spoken = LANGUAGES[0]


def spoken() -> str:
    """The language of this call of the command line, one of LANGUAGES."""
    return _spoken


@contextmanager
def speaking(language: str) -> Iterator[None]:
    """``said`` speaks ``language`` (one of LANGUAGES) in every thread until this ends."""
    global _spoken
    before, _spoken = _spoken, language
    try:
        yield
    finally:
        _spoken = before


def speaks_english() -> bool:
    """Whether this call speaks the language of the sentences themselves."""
    return _spoken == LANGUAGES[0]


def wraps_at_spaces() -> bool:
    """Whether lines of this call's language may be broken at spaces; Japanese has none between its words, and the
    terminal breaks it better."""
    return speaks_english()


def language_of(environment: Mapping[str, str]) -> str:
    """The language that the locale asks for, as gettext reads it: LC_ALL, LC_MESSAGES or LANG, the first that is set,
    says whether there is one; LANGUAGE, a list, then says which. English where it asks for none that is here."""
    locale = next((environment[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if environment.get(name)), "C")
    if re.split(r"[.@]", locale)[0] in ("C", "POSIX"):
        return LANGUAGES[0]
    for wish in (*environment.get("LANGUAGE", "").split(":"), locale):
        language = re.split(r"[_.@]", wish)[0].lower()
        if language in LANGUAGES:
            return language
    return LANGUAGES[0]


@functools.cache
def sections(language: str) -> dict[str, dict[str, str]]:
    """The table of ``language`` as it is stored: {whose sentences, "ours" or "click": {English: translation}}."""
    text = files("llm_quantize.reports").joinpath("words", f"messages.{language}.json").read_bytes()
    found: dict[str, dict[str, str]] = json.loads(text)
    return found


@functools.cache
def messages(language: str) -> dict[str, str]:
    """{English sentence: the same in ``language``}; empty for English."""
    if language == LANGUAGES[0]:
        return {}
    return {text: translation for section in sections(language).values() for text, translation in section.items()}


@dataclass(frozen=True)
class _Row:
    """``pieces``: the words between the values. ``free``: the values that may be anything."""

    pieces: tuple[str, ...]
    translation: str
    free: frozenset[int]

    @property
    def letters(self) -> int:
        return sum(character.isalpha() for piece in self.pieces for character in piece)

    @property
    def frame(self) -> int:
        """How much stands before the first value of a sentence that holds another sentence."""
        return len(self.pieces[0]) if self.free else 0

    @property
    def weak(self) -> bool:
        """Whether many a sentence could be taken for this one."""
        return bool(self.free) and not self.frame and self.letters < _LITTLE

    def rank(self) -> tuple[int, ...]:
        """Rows of a smaller rank are asked first."""
        return -self.frame, -self.letters, -len(self.pieces[0]), -sum(map(len, self.pieces))

    def values(self, text: str) -> list[str] | None:
        """The values of ``text``, None where it is another sentence."""
        values = values_between(self.pieces, text)
        if values is None or self.letters >= _LITTLE:
            return values
        named = (number in self.free or _NAMES.fullmatch(value) for number, value in enumerate(values))
        return values if all(named) else None

    def filled(self, values: Sequence[str], depth: int) -> str:
        """The translation with ``values``; those that are sentences are looked up, ``depth`` levels deep."""
        told = ""
        for words, place, spec, _ in Formatter().parse(self.translation):
            told = _beside(told, words)
            if place is not None:
                told = _beside(told, _value(values[int(place)], spec or "", depth))
        return told


@functools.cache
def _rows(language: str) -> tuple[tuple[_Row, ...], tuple[_Row, ...]]:
    """The table in the order in which it is asked: frames first, as a sentence that is held is never the one that
    begins; then what says most itself. Apart, the rows that say little and hold anything: they are the last resort."""
    rows = [
        _Row(tuple(_PLACE.split(text)), other, frozenset(map(int, _FREE.findall(other))))
        for text, other in messages(language).items()
    ]
    rows.sort(key=_Row.rank)
    return tuple(row for row in rows if not row.weak), tuple(row for row in rows if row.weak)


def said(text: str) -> str:
    """``text``, a finished English sentence, in the language of this call; as it is where the table lacks it."""
    return _said(text, _DEPTH)


def said_of_many_words(text: str) -> str:
    """``said`` for what may also be a name of somebody else's: a single word stays as it is."""
    return said(text) if " " in text.strip() else text


def _said(text: str, depth: int) -> str:
    known = messages(_spoken)
    if not known or not depth:
        return text
    if text in known:
        return known[text]
    if (ended := _before_an_end(text, depth - 1)) is not None:
        return ended
    plain, weak = _rows(_spoken)
    if (found := _filled(plain, text, depth - 1)) is not None:
        return found
    if (composed := _composed(text, depth - 1)) != text:
        return composed
    found = _filled(weak, text, depth - 1)
    return text if found is None else found


def _filled(rows: Sequence[_Row], text: str, depth: int) -> str | None:
    """The translation of the first row that ``text`` is, its values in place; None where it is none of them."""
    for row in rows:
        if (values := row.values(text)) is not None:
            return row.filled(values, depth)
    return None


def _before_an_end(text: str, depth: int) -> str | None:
    """A sentence before "(and 3 more)", or before a name in brackets that follows brackets of its own: no part of its
    last value. None where there is no such end, or no translation."""
    if (found := _AND_MORE.fullmatch(text)) and (inner := _said(found[1], depth)) != found[1]:
        return inner + _said(found[2], depth)
    if (found := _AFTER_BRACKETS.fullmatch(text)) and (inner := _said(found[1], depth)) != found[1]:
        return f"{inner}（{found[2]}）"
    return None


def _composed(text: str, depth: int) -> str:
    """A sentence after a name and a colon, one before a name in brackets, or several in a row."""
    if (found := _OF_SOMETHING.fullmatch(text)) and (inner := _said(found[2], depth)) != found[2]:
        return found[1] + inner
    if (found := _BEFORE_A_NAME.fullmatch(text)) and (inner := _said(found[1], depth)) != found[1]:
        return f"{inner}（{found[2]}）"
    for between, theirs in _LISTS:
        parts = text.split(between)
        others = [_said(part, depth) for part in parts] if 1 < len(parts) < _MANY else parts
        if all(map(str.__ne__, others, parts)):
            return theirs.join(others)
    return text


def _value(text: str, spec: str, depth: int) -> str:
    """A value of a sentence. ``{0:t}`` is a sentence of its own, ``depth`` levels deep; so is ``{0}`` where it has
    several words; ``{0:a}`` stays as it is."""
    return _said(text, depth) if spec == "t" or (not spec and " " in text.strip()) else text


def _beside(before: str, after: str) -> str:
    """Both, without a space between two Japanese characters where they meet; beside a name it stays."""
    if before.endswith(" ") and _IS_JAPANESE.fullmatch(before[-2:-1] + after[:1]):
        before = before[:-1]
    elif after.startswith(" ") and _IS_JAPANESE.fullmatch(before[-1:] + after[1:2]):
        after = after[1:]
    return before + after


def values_between(pieces: Sequence[str], text: str) -> list[str] | None:
    """What stands between ``pieces`` in ``text``, in one pass over it; None where it is another sentence."""
    first, last = pieces[0], pieces[-1]
    if len(pieces) == 1:
        return [] if text == first else None
    end = len(text) - len(last)
    if not text.startswith(first) or not text.endswith(last) or end < len(first):
        return None
    at, values = len(first), []
    for piece in pieces[1:-1]:
        found = text.find(piece, at, end)
        if found < 0:
            return None
        values.append(text[at:found])
        at = found + len(piece)
    return [*values, text[at:end]]


def error_text(error: LlmQuantizeError) -> str:
    """What ``str(error)`` says, in the language of this call: the sentence, and a line for each fact."""
    return "\n".join(
        [said(error.what), *(f"  {said(label)}: {printable(said(value))}" for label, value in error.facts())]
    )
