"""JSON as data from strangers: bounded in size, depth and count before it is parsed, strict in what it may say.

RFC 8259 without its loose ends: UTF-8 only and no byte order mark, no NaN or Infinity, no duplicate names, no
lone surrogates, integers of at most 64 digits. Every refusal is a MalformedInputError with a byte offset.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from llm_quantize.errors import MalformedInputError, printable
from llm_quantize.io.paths import read_limited

MAX_DEPTH = 64
MAX_ITEMS = 4_000_000  # about 400,000 tensors in one header; bounds what parsing may allocate
MAX_DIGITS = 64

_BOM = b"\xef\xbb\xbf"
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_CHUNK = 1 << 20

# Byte classes for the scan: 1 quote, 2 opening, 3 closing, 4 comma.
_CLASSES = np.zeros(256, np.uint8)
for _characters, _class in ((b'"', 1), (b"{[", 2), (b"}]", 3), (b",", 4)):
    _CLASSES[list(_characters)] = _class


def read_json(path: str | Path, *, limit_bytes: int, max_depth: int = MAX_DEPTH, max_items: int = MAX_ITEMS) -> Any:
    """The JSON value in the file at ``path``. Raises MalformedInputError, AccessError, ResourceError."""
    return parse_json(read_limited(path, limit_bytes), file=path, max_depth=max_depth, max_items=max_items)


def read_json_object(path: str | Path, *, limit_bytes: int) -> dict[str, Any]:
    """As ``read_json``, for a file whose value must be an object."""
    value = read_json(path, limit_bytes=limit_bytes)
    if not isinstance(value, dict):
        raise MalformedInputError(
            "this file must hold a JSON object",
            file=path,
            offset=0,
            expected="{...}",
            found=_kind(value),
            remedy="fetch the file again",
        )
    return value


def parse_json(
    data: bytes | bytearray,
    *,
    file: str | Path,
    base_offset: int = 0,
    max_depth: int = MAX_DEPTH,
    max_items: int = MAX_ITEMS,
) -> Any:
    """The JSON value in ``data``, which stands at ``base_offset`` of ``file`` (for the messages' offsets)."""

    def refuse(what: str, position: int | None, **facts: object) -> NoReturn:
        remedy = facts.pop("remedy", None) or "fetch the file again; it is damaged or was edited by hand"
        raise MalformedInputError(
            what,
            file=file,
            offset=None if position is None else base_offset + position,
            expected=facts.get("expected"),
            found=facts.get("found"),
            remedy=str(remedy),
        )

    if data.startswith(_BOM):
        refuse(
            "JSON must not begin with a byte order mark",
            0,
            expected="'{' as the first byte",
            found="EF BB BF",
            remedy="save the file as UTF-8 without BOM",
        )
    _check_structure(data, max_depth, max_items, refuse)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse("JSON must be UTF-8", error.start, found=f"byte 0x{data[error.start]:02x}")
    try:
        value = _quick(text)
    except (_OddError, json.JSONDecodeError):
        value = _OddError  # what it is, and where, is told by the decoder that knows the data
    try:
        value = _Strict(data, refuse).decoder.decode(text) if value is _OddError else value
    except json.JSONDecodeError as error:
        position = len(text[: error.pos].encode())
        refuse("not JSON", position, expected=error.msg, found=_excerpt(data, position))
    if _SURROGATE.search(data):
        _check_surrogates(value, refuse)
    return value


class _OddError(Exception):
    """Something that RFC 8259 leaves to the reader, and that we refuse."""


def _plain_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _OddError
    return value


def _plain_constant(word: str) -> NoReturn:
    raise _OddError


def _plain_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _OddError
    return int(digits)


def _plain_real(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _OddError
    return number


_quick: Callable[[str], Any] = json.JSONDecoder(
    object_pairs_hook=_plain_object,
    parse_constant=_plain_constant,
    parse_int=_plain_integer,
    parse_float=_plain_real,
).decode
"""As strict as ``_Strict``, made once: a file of text may have millions of lines."""


class _Strict:
    """A JSON decoder whose hooks refuse what RFC 8259 leaves to the reader."""

    def __init__(self, data: bytes | bytearray, refuse: Callable[..., NoReturn]) -> None:
        self._data = data
        self._refuse = refuse
        self.decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_int=self._integer,
            parse_float=self._real,
        )

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            self._refuse(
                "one object holds the same name twice",
                self._only_repeat(twice),
                expected="each name once",
                found=twice,
            )
        return value

    def _only_repeat(self, key: str) -> int | None:
        """Where ``key`` is written the second time, if it is written exactly twice in the whole text."""
        quoted = json.dumps(key, ensure_ascii=False).encode("utf-8", "surrogatepass")
        if self._data.count(quoted) != 2:
            return None
        return self._data.rfind(quoted)

    def _constant(self, word: str) -> NoReturn:
        self._refuse(
            f"{word} is not a JSON number",
            self._data.find(word.encode()),
            expected="a finite number",
            found=word,
            remedy="replace it by null or by the number that was meant",
        )

    def _integer(self, digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            self._refuse(
                "an integer is too long",
                self._data.find(digits.encode()),
                expected=f"at most {MAX_DIGITS} digits",
                found=f"{len(digits):,} digits",
            )
        return int(digits)

    def _real(self, digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            self._refuse(
                "a number is too large for a float",
                self._data.find(digits.encode()),
                expected="a finite number",
                found=printable(digits, 40),
            )
        return number


def _check_structure(data: bytes | bytearray, max_depth: int, max_items: int, refuse: Callable[..., NoReturn]) -> None:
    """One linear scan for nesting depth and number of values, in bounded memory, before anything is built.

    Escapes are blanked first; they only mean anything inside strings, and the parser stops at any other.
    """
    if data.count(b"[") + data.count(b"{") <= max_depth and len(data) <= max_items:
        return  # it cannot be, wherever they stand
    flat = _ESCAPE.sub(b"__", data) if b"\\" in data else data
    depth = items = 0
    quoted = 0  # 1 inside a string
    for base in range(0, len(flat), _CHUNK):
        classes = _CLASSES[np.frombuffer(flat, np.uint8, count=min(_CHUNK, len(flat) - base), offset=base)]
        places = np.flatnonzero(classes)
        marks = classes[places]
        in_string = (np.cumsum(marks == 1) + quoted) & 1
        quoted = int(in_string[-1]) if len(in_string) else quoted
        outside = in_string == 0
        steps = np.where(outside & (marks == 2), 1, 0) - np.where(outside & (marks == 3), 1, 0)
        depths = depth + np.cumsum(steps)
        if len(depths) and int(depths.max()) > max_depth:
            at = base + int(places[int(np.argmax(depths > max_depth))])
            refuse("JSON is nested too deeply", at, expected=f"at most {max_depth} levels", found="more")
        depth = int(depths[-1]) if len(depths) else depth
        items += int(np.count_nonzero(outside & ((marks == 2) | (marks == 4))))
        if items > max_items:
            refuse("JSON holds too many values", base, expected=f"at most {max_items:,}", found="more")


def _check_surrogates(value: Any, refuse: Callable[..., NoReturn]) -> None:
    """Refuse half a surrogate pair anywhere in ``value``: such a string has no UTF-8, so it cannot be written."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, str) and not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
            refuse("a string holds half a surrogate pair", None, expected="whole characters", found=item)


def _excerpt(data: bytes | bytearray, position: int) -> str:
    piece = bytes(data[position : position + 24])
    return repr(piece.decode("utf-8", "replace")) if piece else "end of text"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}.get(type(value), "a number")
