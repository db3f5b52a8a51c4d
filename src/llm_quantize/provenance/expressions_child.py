"""Expressions of strangers searched in names, in the limited process of ``rederive.py``.

Told {"names"}, asked {"expressions"}: answers {"found": how many were found} or {"wrong": the expression that is none}.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any


def answers(first: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One answer for each question."""
    found = 0
    for text in asked["expressions"]:
        try:
            expressions = [re.compile(text), re.compile(text, re.IGNORECASE)]
        except (re.error, RecursionError, OverflowError) as error:
            yield {"wrong": f"{text[:80]}: {error}"}
            return
        found += sum(any(one.search(name) for name in first["names"]) for one in expressions)
    yield {"found": found}
