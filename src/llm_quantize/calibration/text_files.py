"""Files of text, read as data from strangers: .txt, .json, .jsonl and .parquet.

Each becomes a list of documents. UTF-8 with or without a byte order mark; nothing is decoded twice, nothing guessed.
Every refusal names the file and, where there is one, the byte.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from llm_quantize.calibration.documents import Document, Documents, Message
from llm_quantize.engine.limited import LimitedProcess
from llm_quantize.errors import MalformedInputError, MissingExtraError, ResourceError, UsageError, printable
from llm_quantize.io.json_file import parse_json
from llm_quantize.io.paths import open_argument, pread_into, read_failure

LIMIT_BYTES = 512 << 20
"""The most bytes of one file, and of the text that a compressed one unfolds to: about 120 million tokens."""

_LINE_LIMIT = 64 << 20
_BOM = b"\xef\xbb\xbf"
_PARQUET, _MAGIC = "llm_quantize.calibration.parquet_child", b"PAR1"
_PARQUET_MEMORY, _PARQUET_SECONDS = 3 << 30, 300
# One arena and few threads: address space is what is limited.
_ARROW = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "ARROW_IO_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
_SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}

# A JSON line that is nothing but a string, or an object of nothing but "text", without escapes: as most lines are.
_PLAIN = re.compile(
    rb'[ \t]*(?:\{[ \t]*"text"[ \t]*:[ \t]*"([^"\\\x00-\x1f]*)"[ \t]*\}|"([^"\\\x00-\x1f]*)")[ \t\r\n]*'
)


def read_documents(path: Path) -> tuple[Documents, dict[str, Any]]:
    """(documents, metadata of the whole file) of the file at ``path``; its suffix says what it is.

    Raises UsageError (no such file, or a suffix that is none of ours), AccessError (not a regular file), ResourceError
    (too large), MalformedInputError (not UTF-8, a NUL character, not of its format, no text in it), MissingExtraError
    (.parquet without pyarrow).
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            "the name of a text file must say what it is",
            file=path,
            expected=", ".join(SUFFIXES),
            found=suffix or "no suffix",
            remedy="rename the file, or convert it to one of these",
        )
    metadata: dict[str, Any] = {}
    documents = Documents()
    if suffix == ".parquet":
        _parquet(path, documents)
    elif suffix == ".jsonl":
        _json_lines(path, documents)
    elif suffix == ".json":
        metadata = _json(path, documents)
    else:
        _keep_text(_checked(_text(_read(path), path), path), documents)
    if not documents:
        raise MalformedInputError(
            "there is no text in this file", file=path, expected="some text", remedy="give a file with text in it"
        )
    return documents, metadata


SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")


def _keep(document: Document, documents: Documents) -> None:
    """Add ``document`` where it has words."""
    contents = (document.text, *(message["content"] for message in document.messages))
    if any(content and not content.isspace() for content in contents):  # strip() would copy the text
        documents.append(document)


def _keep_text(text: str, documents: Documents) -> None:
    """As ``_keep`` of a document that is nothing but ``text``."""
    if text and not text.isspace():
        documents.append_text(text)


def _open(path: Path) -> tuple[int, int]:
    try:
        descriptor, size = open_argument(path, "text file")
    except ValueError as error:
        raise UsageError("not a possible file name", file=path, found=error) from error
    if size > LIMIT_BYTES:
        os.close(descriptor)
        raise ResourceError(
            "this text file is larger than it may be",
            file=path,
            expected=f"at most {LIMIT_BYTES:,} bytes",
            found=f"{size:,} bytes",
            remedy="a few megabytes are plenty: cut a part out of it",
        )
    return descriptor, size


def _read(path: Path) -> bytearray:
    """The whole file without its byte order mark; the size is checked before anything is allocated."""
    descriptor, size = _open(path)
    try:
        data = bytearray(size)
        pread_into(descriptor, memoryview(data), 0, path)
    finally:
        os.close(descriptor)
    return data


def _text(data: bytes | bytearray, path: Path, base: int = 0) -> str:
    if base == 0 and data.startswith(_BOM):
        data, base = data[3:], 3
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedInputError(
            "this text is not UTF-8",
            file=path,
            offset=base + error.start,
            expected="UTF-8, with or without a byte order mark",
            found=f"byte 0x{data[error.start]:02x}",
            remedy="convert the file to UTF-8 (iconv -f ENCODING -t UTF-8)",
        ) from error


def _checked(text: str, path: Path, where: str = "") -> str:
    """``text``, or MalformedInputError where it holds a NUL character or half a surrogate pair."""
    if "\0" in text:
        place = text.index("\0")
        raise MalformedInputError(
            f"{where or 'this file'} holds a NUL character: it is not text",
            file=path,
            offset=None if where else len(text[:place].encode()),
            remedy="give the text itself, as UTF-8",
        )
    return text


def _json(path: Path, documents: Documents) -> dict[str, Any]:
    """Add what the file holds; returns what stood beside it."""
    data = _read(path)
    start = 3 if data.startswith(_BOM) else 0
    value = parse_json(data[start:] if start else data, file=path, base_offset=start)
    metadata: dict[str, Any] = {}
    if isinstance(value, dict):
        if "text" not in value:
            _refuse(path, "", 'a list of strings, or an object with "text"', f"the keys {', '.join(value)}")
        metadata = {key: item for key, item in value.items() if key != "text"}
        value = value["text"]
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        _refuse(path, "", 'a list of strings, or an object with "text"', value)
    for index, item in enumerate(value):
        if isinstance(item, str) and "\0" not in item:
            _keep_text(item, documents)
        else:
            _keep(_document(item, path, f"item {index}"), documents)
    return metadata


def _json_lines(path: Path, documents: Documents) -> None:
    for number, (offset, line) in enumerate(_lines(path), 1):
        text = _plain(line)
        if text is not None:
            _keep_text(text, documents)
        elif line.strip():
            _keep(_document(parse_json(line, file=path, base_offset=offset), path, f"line {number}"), documents)


def _plain(line: bytes) -> str | None:
    """The text of a line that is in the shortest form, as ``parse_json`` would find it; None for all else."""
    found = _PLAIN.fullmatch(line)
    if found is None:
        return None
    try:
        return (found[1] if found[2] is None else found[2]).decode("utf-8")
    except UnicodeDecodeError:  # which parse_json refuses, saying where
        return None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of each line, without the byte order mark; at most one chunk and one line in memory."""
    descriptor, _ = _open(path)
    with os.fdopen(descriptor, "rb") as stream:
        offset = 0
        while True:
            try:
                line = stream.readline(_LINE_LIMIT + 1)
            except OSError as error:
                raise read_failure(error, path, offset=offset) from error
            if not line:
                return
            if len(line) > _LINE_LIMIT:
                raise MalformedInputError(
                    "a line is too long",
                    file=path,
                    offset=offset,
                    expected=f"at most {_LINE_LIMIT:,} bytes",
                    remedy="write one JSON value per line",
                )
            marked = offset == 0 and line.startswith(_BOM)
            yield (3, line[3:]) if marked else (offset, line)
            offset += len(line)


def _refuse(path: Path, where: str, expected: str, found: object) -> NoReturn:
    kind = {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(type(found), "a number")
    raise MalformedInputError(
        f"{where or 'this file'} holds no text in a form that we know",
        file=path,
        expected=expected,
        found=printable(found, 80) if isinstance(found, str) and where == "" else kind,
        remedy="docs/reference/text.md shows the forms",
    )


def _document(item: Any, path: Path, where: str) -> Document:
    """A string, {"text": ...}, {"messages": [...]} or {"conversations": [...]}."""
    if isinstance(item, str):
        return Document(_checked(item, path, where))
    if isinstance(item, dict):
        for key in ("messages", "conversations"):
            if isinstance(item.get(key), list):
                messages = tuple(_message(part, path, f"{where}, {key}[{i}]") for i, part in enumerate(item[key]))
                return Document(messages=messages, metadata={k: v for k, v in item.items() if k != key})
        if isinstance(item.get("text"), str):
            others = {key: value for key, value in item.items() if key != "text"}
            return Document(_checked(item["text"], path, where), metadata=others)
    _refuse(path, where, 'a string, {"text": "..."}, {"messages": [...]} or {"conversations": [...]}', item)


def _message(item: Any, path: Path, where: str) -> Message:
    """{"role", "content"}, or ShareGPT's {"from", "value"}; content may be a list of parts of type text, or null (a
    call of a tool, which has no words)."""
    if not isinstance(item, dict):
        _refuse(path, where, '{"role": ..., "content": ...}', item)
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if isinstance(content, list):
        parts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(part, str) for part in parts):
            content = "\n".join(parts)
    if not isinstance(role, str) or not (content is None or isinstance(content, str)):
        _refuse(path, where, '{"role": "...", "content": "..."}', item)
    return {"role": _SPEAKERS.get(role, role), "content": _checked(content or "", path, where)}


def _parquet(path: Path, documents: Documents) -> None:
    """Rows as a limited process reads them: a file of some kilobytes may unfold to any size, within one row too."""
    if find_spec("pyarrow") is None:
        raise MissingExtraError("reading .parquet files", "parquet")
    if not _is_parquet(path):
        raise _unreadable(path, "its first and last bytes are not PAR1")
    first = {"columns": ["text", "messages", "conversations"], "most": _LINE_LIMIT}
    process = LimitedProcess(_PARQUET, first, memory=_PARQUET_MEMORY, environment=_ARROW)
    try:
        process.ask({"file": str(path.absolute())}, cpu=_PARQUET_SECONDS)
        _rows(process, path, documents)
    finally:
        process.close()


def _rows(process: LimitedProcess, path: Path, documents: Documents) -> None:
    column, characters = "", 0
    while "end" not in (said := _said(process, path)):
        if "column" in said:
            column = said["column"]
            continue
        for row, value in zip(said["rows"], said["values"], strict=True):
            if column == "text" and isinstance(value, str) and "\0" not in value:
                characters += len(value)
                _keep_text(value, documents)
            else:
                found = value if isinstance(value, str) else json.loads(value["json"])
                document = _document({column: found}, path, f"row {row}")
                characters += document.characters
                _keep(document, documents)
            if characters > LIMIT_BYTES:
                raise _unfolds(path, f"{characters:,} characters")


def _said(process: LimitedProcess, path: Path) -> dict[str, Any]:
    """What the process says next, unless that is an error."""
    said = process.answer(12 * _LINE_LIMIT)
    if said is None:
        limited, how = process.why()
        if limited:
            raise _unfolds(path, how)
        raise ResourceError(
            "the process that reads the .parquet file ended",
            file=path,
            found=how,
            remedy="check that this Python can start (memory limits), or give the text as .jsonl",
        )
    if "too_much" in said:
        raise _unfolds(path, said["too_much"])
    if "columns" in said:
        raise MalformedInputError(
            "this .parquet file has no column of text",
            file=path,
            expected="a column text, messages or conversations",
            found=printable(said["columns"], 200),
            remedy="rename the column that holds the text to: text",
        )
    if "refused" in said:
        raise _unreadable(path, said["refused"])
    return said


def _is_parquet(path: Path) -> bool:
    """Whether a regular file, and not too large, begins and ends as the format says."""
    descriptor, size = _open(path)
    try:
        ends = bytearray(8)
        if size >= len(ends):
            pread_into(descriptor, memoryview(ends)[:4], 0, path)
            pread_into(descriptor, memoryview(ends)[4:], size - 4, path)
    finally:
        os.close(descriptor)
    return ends == 2 * _MAGIC


def _unreadable(path: Path, found: str) -> MalformedInputError:
    return MalformedInputError(
        "this .parquet file cannot be read", file=path, found=printable(found, 200), remedy="fetch the file again"
    )


def _unfolds(path: Path, found: str) -> ResourceError:
    return ResourceError(
        "this file unfolds to more text than it may",
        file=path,
        expected=f"at most {LIMIT_BYTES:,} characters, {_LINE_LIMIT:,} in a row, {_PARQUET_MEMORY >> 30} GiB of "
        f"memory and {_PARQUET_SECONDS} seconds",
        found=printable(found, 200),
        remedy="a few megabytes are plenty: cut a part out of it",
    )
