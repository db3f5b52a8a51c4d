"""Notes of a comparison in the reader's language.

Notes are sentences of the program, in English, as they stand in comparison.json. ``words/LANGUAGE.json`` has under
"note_patterns" one for each kind of them; what fits none is shown as it is: a runtime's own words, for example.
"""

from __future__ import annotations

import functools
import re

from llm_quantize.reports.labels import note_patterns

_PLACE = re.compile(r"\\\{(\w+)\\\}")


def translated(note: str, lang: str) -> str:
    """``note`` in the language ``lang``."""
    ours, theirs = note_patterns("en"), note_patterns(lang)
    for name, pattern in ours.items():
        if found := _expression(pattern).fullmatch(note):
            inner = {
                key: translated(value, lang) if key == "note" else value for key, value in found.groupdict().items()
            }
            return theirs[name].format(**inner)
    return note


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(_PLACE.sub(lambda place: f"(?P<{place[1]}>.+?)", re.escape(pattern)), re.DOTALL)
