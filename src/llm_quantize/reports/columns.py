"""Text in the columns of a terminal: how wide it is there, and lines broken as Japanese is."""

from __future__ import annotations

import re
import unicodedata

_ATOM = re.compile(r"\s+|[!-~\xa1-\u02ff]+|[\u4e00-\u9fff々]+|[\u30a1-\u30ff]+|.", re.DOTALL)
"""What is never broken: a word of the Latin script, a run of kanji, a run of katakana, any other character."""
_NOT_FIRST = "、。，．・：；？！」』】）〕］｝〉》～％ゝゞヽヾぁぃぅぇぉっゃゅょゎ,.:;?!)]}%…"
"""Characters that begin no line, alone or together (the rules of JIS X 4051, as far as they matter here)."""
_NOT_LAST = "「『【（〔［｛〈《([{"
"""Characters that end none."""


def width(text: str) -> int:
    """How many columns ``text`` takes in a terminal: two for a wide character, none for a combining one."""
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else int(not unicodedata.combining(one)) for one in text)


def wrapped(text: str, columns: int) -> list[str]:
    """``text``, one paragraph, in lines of at most so many columns (1 or more): broken at spaces, and beside wide
    characters where Japanese may be broken. A word that is longer by itself stays whole."""
    lines, line = [], ""
    for piece in _unbroken(text):
        if line and width(line + piece.rstrip()) > columns:
            lines.append(line.rstrip())
            line = ""
        line += piece if line else piece.lstrip()
    return [*lines, line.rstrip()] if line or not lines else lines


def _unbroken(text: str) -> list[str]:
    """``text`` cut wherever a line may end; each space stays at the end of what is before it."""
    pieces: list[str] = []
    for atom in _ATOM.findall(text):
        before = pieces[-1] if pieces else ""
        if before and (atom.isspace() or not atom.strip(_NOT_FIRST) or before[-1] in _NOT_LAST):
            pieces[-1] += " " if atom.isspace() else atom
        else:
            pieces.append(" " if atom.isspace() else atom)
    return pieces
