"""What a configuration says of modules: names, and expressions of strangers, matched in linear time.

Quantized checkpoints name modules by Python's regular expressions, and Python's engine backtracks: one line of a
downloaded file could hold a command for ever. Here google-re2 matches them, whose time goes by their length and the
name's; what it has not (look-around, back-references) is refused, as is what together takes too long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from llm_quantize.errors import MalformedInputError, printable

MOST_CHARACTERS = 4096
MOST_SECONDS = 20.0
_MEMORY = 1 << 20  # bytes for the program and the states of one expression
_LOOKS = 64  # names between two looks at the clock

Meaning = Callable[[str], bool]


def compiled(expression: str, file: Path) -> Meaning:
    """Whether ``expression`` matches a name, from its first character on (as ``re.match`` does). ``file``: where it
    stands. Raises MalformedInputError for one that cannot be matched in linear time, or is none."""
    import re2

    if len(expression) > MOST_CHARACTERS:
        _refuse(expression, file, f"{len(expression):,} characters")
    options = re2.Options()
    options.max_mem, options.log_errors, options.never_capture = _MEMORY, False, True
    try:
        matcher = re2.compile(expression, options)
    except re2.error as error:
        reason = error.args[0] if error.args else ""
        _refuse(expression, file, reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason))
    return lambda name: matcher.match(name) is not None


def first_meant(rules: Iterable[tuple[str, Meaning]], names: Collection[str], file: Path) -> Iterator[tuple[str, str]]:
    """(rule, the first of ``names`` that it means) for every rule that means one. ``file``: where the rules stand.
    Raises MalformedInputError where that takes more than MOST_SECONDS of CPU."""
    look = _watch(len(names), file)
    for rule, means in rules:
        for number, name in enumerate(names):
            look(number, rule)
            if means(name):
                yield rule, name
                break


def each_meant(rules: Iterable[tuple[str, Meaning]], names: Collection[str], file: Path) -> Iterator[tuple[str, str]]:
    """(name, the first of ``rules`` that means it) for every one of ``names`` that is meant; the time that ``rules``
    takes to come counts, and one of them is held at a time. Raises as ``first_meant``."""
    look, left = _watch(len(names), file), list(names)
    for count, (rule, means) in enumerate(rules):
        look(count, rule)
        others = []
        for number, name in enumerate(left, 1):
            look(number, rule)
            if means(name):
                yield name, rule
            else:
                others.append(name)
        left = others


def _watch(count: int, file: Path) -> Callable[[int, str], None]:
    """A function that is told of each step and raises MalformedInputError after MOST_SECONDS of CPU."""
    end = time.process_time() + MOST_SECONDS

    def look(number: int, rule: str) -> None:
        if number % _LOOKS == 0 and time.process_time() > end:
            raise MalformedInputError(
                "the expressions of the configuration take too long to match",
                file=file,
                expected=f"all of them and {count:,} modules in {MOST_SECONDS:g} seconds",
                found=f"no end at {printable(rule, 80)}",
                remedy=f"fetch {file.name} again; shorten or remove its expressions if they are really so many",
            )

    return look


def _refuse(expression: str, file: Path, found: str) -> NoReturn:
    raise MalformedInputError(
        "an expression in the configuration cannot be matched in linear time",
        file=file,
        expected=f"a regular expression of at most {MOST_CHARACTERS:,} characters, without look-around and "
        "back-references",
        found=f"{printable(expression, 80)} ({printable(found, 80)})",
        remedy=f"write it in another way, or remove it from {file.name}",
    )
