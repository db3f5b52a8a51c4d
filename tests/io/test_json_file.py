"""JSON from strangers: what is refused, where it says so, and that it is bounded."""

from __future__ import annotations

import errno
import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_quantize.errors import AccessError, MalformedInputError
from llm_quantize.io.json_file import parse_json, read_json, read_json_object


def refused(data: bytes, **options: Any) -> MalformedInputError:
    with pytest.raises(MalformedInputError) as caught:
        parse_json(data, file="x.json", **options)
    assert caught.value.file == "x.json"
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("data", "offset", "says"),
    [
        (b"", 0, "not JSON"),
        (b'{"a": 1,}', None, "not JSON"),
        (b'{"a" 1}', 5, "not JSON"),
        ('{"あ": 1, }'.encode(), None, "not JSON"),
        (b'{"a": 1} x', 9, "not JSON"),
        (b'\xef\xbb\xbf{"a": 1}', 0, "byte order mark"),
        (b'{"a": "\xff"}', 7, "UTF-8"),
        (b'{"a": NaN}', 6, "NaN"),
        (b'{"a": [1, -Infinity]}', 10, "-Infinity"),
        (b'{"a": 1e999}', 6, "too large"),
        (b'{"a": ' + b"9" * 65 + b"}", 6, "too long"),
        (b'{"a": ' + b"9" * 100_000 + b"}", 6, "too long"),
        (b'{"a": 1, "b": {"c": 1}, "a": 2}', 24, "twice"),
        (b'{"a": {"b": 1, "b": 2}}', 15, "twice"),
        (b'{"a": "\\ud800"}', None, "surrogate"),
        (b'{"\\udfffa": 1}', None, "surrogate"),
        (b'{"a": "line\nbreak"}', 11, "not JSON"),
        ('{"a": "\u3042\u3042", b}'.encode(), 16, "not JSON"),
    ],
)
def test_refused_with_its_byte(data: bytes, offset: int | None, says: str) -> None:
    error = refused(data)
    assert says in error.what
    if offset is not None:
        assert error.offset == offset
        assert refused(data, base_offset=1000).offset == 1000 + offset


def test_message_tells_which_name_is_twice() -> None:
    assert refused(b'{"k": 1, "k": 2}').found == "k"


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b"[[", b'[{"a":'])
def test_depth(opening: bytes) -> None:
    began = time.process_time()
    error = refused(opening * 200_000)
    assert "deeply" in error.what
    assert error.offset is not None
    assert error.offset <= len(opening) * 65
    assert time.process_time() - began < 1


def test_depth_limit_is_exact() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64, file="x")
    assert refused(b"[" * 65 + b"]" * 65).offset == 64


def test_brackets_inside_strings_do_not_count() -> None:
    deep = {"a": "[" * 1000, 'q"[[[[': "\\" + "{" * 1000 + '\\"', "b": ["\\\\", "]" * 999]}
    assert parse_json(json.dumps(deep).encode(), file="x", max_depth=2) == deep
    assert parse_json(json.dumps(deep, ensure_ascii=False).encode(), file="x", max_depth=2) == deep


def test_a_string_over_many_scan_blocks_and_depth_after_it() -> None:
    long = '"' + "[" * (3 << 20) + '"'
    assert parse_json(f"[{long}, [1]]".encode(), file="x", max_depth=2)[1] == [1]
    assert refused(f"[{long}, [[1]]]".encode(), max_depth=2).offset == len(long) + 4


@pytest.mark.parametrize("item", [b"[],", b"{},", b"0,", b'"ab",'])
def test_many_values_are_refused_before_they_are_built(item: bytes) -> None:
    data = b"[" + item * (24_000_000 // len(item)) + b"0]"
    tracemalloc.start()
    try:
        began = time.process_time()
        error = refused(data)
        assert time.process_time() - began < 2
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()
    assert "too many values" in error.what


def test_whole_pairs_of_surrogates_are_characters() -> None:
    assert parse_json(b'"\\ud83d\\ude00"', file="x") == "\U0001f600"


def test_common_real_world_numbers() -> None:
    text = b'{"model_max_length": 1000000000000000019884624838656, "eps": 1e-05, "x": -0.0, "n": null}'
    assert parse_json(text, file="x") == json.loads(text)


def test_size_limit_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(MalformedInputError, match="larger"):
        read_json(path, limit_bytes=1 << 20)


@pytest.mark.parametrize("kind", ["absent", "fifo", "directory", "dangling", "loop", "nul"])
def test_not_a_regular_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "nul":
        path = tmp_path / "a\0b"
    with pytest.raises(MalformedInputError) as caught:
        read_json(path, limit_bytes=100)
    assert caught.value.file


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")

    def refuse(*_args: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(AccessError) as caught:
        read_json(path, limit_bytes=100)
    assert caught.value.file == str(path)


@pytest.mark.parametrize("text", ["[]", "1", "null", '"a"', "true"])
def test_object_wanted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(MalformedInputError, match="object"):
        read_json_object(path, limit_bytes=100)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**60), 10**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=12,
)


@given(JSON, st.booleans())
@settings(max_examples=200, deadline=None)
def test_agrees_with_json(value: Any, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode(), file="x") == value


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_text_raises_only_ours(data: st.DataObject) -> None:
    text = bytearray(json.dumps(data.draw(JSON)).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        text[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b"\\", b"{"])
        )
    try:
        value = parse_json(bytes(text), file="x")
    except MalformedInputError as error:
        assert error.offset is None or 0 <= error.offset <= len(text)  # noqa: PT017
    else:
        assert json.loads(text.decode()) == value
