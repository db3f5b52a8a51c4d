"""Files of text: the forms that are read, the mix, and what is refused with file and byte."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_quantize.calibration import text_files
from llm_quantize.calibration.text import BUILT_IN, load_texts
from llm_quantize.calibration.text_files import read_documents
from llm_quantize.errors import (
    AccessError,
    LlmQuantizeError,
    MalformedInputError,
    MissingExtraError,
    ResourceError,
    UsageError,
)

CHAT = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


def write(path: Path, value: Any) -> Path:
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def texts(path: Path) -> list[str]:
    return [document.text for document in read_documents(path)[0]]


def test_every_form_of_plain_text(tmp_path: Path) -> None:
    words = "Grüße, 日本語\r\nsecond line\n"
    assert texts(write(tmp_path / "a.txt", words.encode())) == [words]
    assert texts(write(tmp_path / "b.TXT", b"\xef\xbb\xbf" + words.encode())) == [words]
    assert texts(write(tmp_path / "a.json", ["one", words, "", "  \n"])) == ["one", words]
    assert texts(write(tmp_path / "bom.json", b'\xef\xbb\xbf["one"]')) == ["one"]
    documents, metadata = read_documents(write(tmp_path / "k.json", {"text": ["x", "y"], "licence": "CC0", "n": [1]}))
    assert [document.text for document in documents] == ["x", "y"]
    assert metadata == {"licence": "CC0", "n": [1]}
    lines = b'\xef\xbb\xbf"one"\n\n{"text": "two", "id": 7}\r\n"\\u65e5"'
    documents, _ = read_documents(write(tmp_path / "a.jsonl", lines))
    assert [document.text for document in documents] == ["one", "two", "日"]
    assert documents[1].metadata == {"id": 7}


@given(text=st.text(max_size=8), key=st.sampled_from([None, "text", "other"]), blank=st.sampled_from(["", " ", "\t"]))
def test_the_short_way_through_a_line_finds_what_the_whole_way_finds(text: str, key: str | None, blank: str) -> None:
    for ascii in (True, False):
        words = json.dumps(text, ensure_ascii=ascii)
        line = f"{blank}{words}{blank}\r\n" if key is None else f'{blank}{{{blank}"{key}" :{words}{blank}}}\n'
        found = text_files._plain(line.encode())
        assert found is None or text_files._document(json.loads(line), Path("x"), "").text == found
        assert (found is None) == (key == "other" or words != f'"{text}"')


@pytest.mark.parametrize(
    "line",
    [
        b'"a\xff"',
        b'"a" "b"',
        b'"a',
        b'a"',
        b'{"text": "a"',
        b'"a"}',
        b'{"text": "a", "b": 1}',
        b'"a\tb"',
        b'\x0b"a"',
        b'"\xed\xa0\x80"',
    ],
)
def test_what_is_no_plain_line_goes_the_whole_way(line: bytes) -> None:
    assert text_files._plain(line) is None


def test_every_form_of_chat(tmp_path: Path) -> None:
    share = [{"from": "system", "value": "Be."}, {"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    tool = [*CHAT, {"role": "assistant", "content": None}]
    items = [{"messages": CHAT, "id": 3}, {"conversations": share}, {"messages": parts}, {"messages": tool}]
    path = write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, items)))
    found, _ = read_documents(path)
    assert [dict(m) for m in found[0].messages] == CHAT
    assert found[0].metadata == {"id": 3}
    assert [m["role"] for m in found[1].messages] == ["system", "user", "assistant"]
    assert found[2].messages[0]["content"] == "a\nb"
    assert found[3].messages[2]["content"] == ""
    assert list(read_documents(write(tmp_path / "c.json", items))[0]) == list(found)


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    rows = [f"text {i} 日" for i in range(600)]
    parquet.write_table(pyarrow.table({"id": range(601), "text": [*rows, None]}), path)
    assert texts(path) == rows
    parquet.write_table(pyarrow.table({"messages": [CHAT]}), path)
    assert [dict(m) for m in read_documents(path)[0][0].messages] == CHAT
    parquet.write_table(pyarrow.table({"words": ["x"]}), path)
    with pytest.raises(MalformedInputError, match="no column of text"):
        read_documents(path)
    parquet.write_table(pyarrow.table({"text": [1]}), path)
    with pytest.raises(MalformedInputError, match="row 1"):
        read_documents(path)
    parquet.write_table(pyarrow.table({"text": ["a" * 500_000] * 40}), path)
    monkeypatch.setattr(text_files, "LIMIT_BYTES", 5_000_000)
    with pytest.raises(ResourceError, match="unfolds"):
        read_documents(path)
    good = path.read_bytes()
    for bad in (b"", b"PAR1", good[:-1], good[: len(good) // 2], b"x" * 100):
        with pytest.raises(MalformedInputError) as caught:
            read_documents(write(path, bad))
        assert caught.value.file == str(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(text_files, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"\.\[parquet\]"):
        read_documents(path)


@pytest.mark.parametrize(
    ("name", "data", "says", "offset"),
    [
        ("a.txt", b"", "no text", None),
        ("a.txt", b" \n\t\r\n", "no text", None),
        ("a.txt", b"\xef\xbb\xbf", "no text", None),
        ("a.txt", b"good\xffbad", "not UTF-8", 4),
        ("a.txt", b"\xef\xbb\xbfgood\xe3\x81", "not UTF-8", 7),
        ("a.txt", "日".encode("utf-16"), "not UTF-8", 0),
        ("a.txt", "日\0b".encode(), "NUL", 3),
        ("a.json", b"", "not JSON", 0),
        ("a.json", b"[]", "no text", None),
        ("a.json", b"{}", "in a form", None),
        ("a.json", b'{"texts": ["a"]}', "in a form", None),
        ("a.json", b"3", "in a form", None),
        ("a.json", b'["a", 3]', "item 1", None),
        ("a.json", b'["a", ["b"]]', "item 1", None),
        ("a.json", b'["a\\u0000"]', "item 0 holds a NUL", None),
        ("a.json", b'["\\ud800"]', "surrogate", None),
        ("a.json", b'["a\xff"]', "UTF-8", 3),
        ("a.json", b"[" * 100_000, "deeply", 64),
        ("a.json", b'{"text": "a", "text": "b"}', "twice", None),
        ("a.jsonl", b'"a"\n{"text": 3}', "line 2", None),
        ("a.jsonl", b'"a"\n{"text": "b"', "not JSON", None),
        ("a.jsonl", b'"a"\n"b\xff"', "UTF-8", 6),
        ("a.jsonl", b'{"messages": [{"role": "user"}, 3]}', r"messages\[1\]", None),
        ("a.jsonl", b'{"messages": [{"role": 1, "content": "a"}]}', r"messages\[0\]", None),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": [{"image": 1}]}]}', r"messages\[0\]", None),
        ("a.jsonl", b'{"messages": []}', "no text", None),
        ("a.jsonl", b'{"conversations": "x"}', "line 1", None),
        ("a.jsonl", b"[" * 100_000, "deeply", 64),
    ],
)
def test_refused_with_file_and_byte(tmp_path: Path, name: str, data: bytes, says: str, offset: int | None) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(MalformedInputError, match=says) as caught:
        load_texts([str(path)])
    assert caught.value.file == str(path)
    assert caught.value.remedy
    if offset is not None:
        assert caught.value.offset == offset


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.txt").mkdir()
    os.mkfifo(tmp_path / "f.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    for name in ("d.txt", "f.txt"):
        with pytest.raises(AccessError, match="not a regular file"):
            load_texts([str(tmp_path / name)])
    (tmp_path / "null.txt").symlink_to("/dev/null")
    with pytest.raises(AccessError, match="not a regular file"):
        load_texts([str(tmp_path / "null.txt")])
    for name in ("gone.txt", "none.jsonl"):
        with pytest.raises(UsageError, match="no such text file"):
            load_texts([str(tmp_path / name)])
    write(tmp_path / "a.csv", "x")
    with pytest.raises(UsageError, match="must say what it is"):
        load_texts([str(tmp_path / "a.csv")])
    for item in ("genral", "", str(tmp_path), "nul\0.txt", "\ud800.txt"):
        with pytest.raises((UsageError, AccessError)):
            load_texts([item])


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for suffix in text_files.SUFFIXES:
        path = tmp_path / f"huge{suffix}"
        with path.open("wb") as stream:
            stream.truncate(1 << 40)
        with pytest.raises(ResourceError, match="larger") as caught:
            read_documents(path)
        assert caught.value.found == f"{1 << 40:,} bytes"


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_LINE_LIMIT", 100)
    path = write(tmp_path / "a.jsonl", '"ok"\n"' + "a" * 200 + '"')
    with pytest.raises(MalformedInputError, match="too long") as caught:
        read_documents(path)
    assert caught.value.offset == 5


def test_default_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = load_texts()
    assert corpus.built_in
    assert {d.name: round(d.weight, 9) for d in corpus.datasets} == dict(BUILT_IN)
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "odd=2.txt", "b=0.3.txt"):
        write(tmp_path / name, f"text of {name}")
    mixed = {d.name: d.weight for d in load_texts(["a.txt=3", "code"]).datasets}
    assert mixed == {"a.txt": 0.75, "code": 0.25}
    assert not load_texts(["a.txt=3", "code"]).built_in
    # The whole item is a file: no weight is read into its name.
    assert {d.name: d.weight for d in load_texts(["odd=2.txt", "odd=2.txt=3", "a.txt"]).datasets} == {
        "odd=2.txt": 0.8,
        "a.txt": 0.2,
    }
    assert [d.name for d in load_texts(["b=0.3.txt"]).datasets] == ["b=0.3.txt"]
    half = {d.name: d.weight for d in load_texts(["default=1", "a.txt"]).datasets}
    assert half["a.txt"] == pytest.approx(0.5)
    assert half["general"] == pytest.approx(0.15)
    # The same text is never taken twice, under whatever name.
    (tmp_path / "link.txt").symlink_to("a.txt")
    assert len(load_texts(["a.txt", "./a.txt", "link.txt"]).datasets) == 1
    assert {d.name: d.weight for d in load_texts(["general", "general=2", "a.txt"]).datasets}["general"] == 0.75


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "x", "", "1e300"])
def test_weights_that_are_none(weight: str) -> None:
    with pytest.raises(UsageError, match="positive number"):
        load_texts([f"general={weight}"])


def test_text_of_a_corpus_is_what_was_written(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "One.\r\n\n Two. \n")
    assert load_texts([str(path)]).text() == "One.\r\n\n Two. \n"
    chat = write(tmp_path / "c.jsonl", {"messages": CHAT})
    assert load_texts([str(path), str(chat)]).text().endswith(" Two. \n\n\nUser: Hi.\n\nAssistant: Hello.")


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".txt", ".json", ".jsonl", ".parquet"]))
def test_any_bytes_give_documents_or_our_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    path = write(tmp_path_factory.mktemp("any") / f"a{suffix}", data)
    try:
        documents, _ = read_documents(path)
    except LlmQuantizeError:
        return
    assert documents


def test_a_name_that_is_not_utf8_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.txt")
    Path(path).write_text("words")
    assert load_texts([path]).datasets[0].name == "a\ufffd.txt"


def test_a_parquet_file_that_unfolds_to_gigabytes(tmp_path: Path) -> None:
    """One long text in a dictionary, and any number of rows that are it: some kilobytes on disk."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    word = pyarrow.array(["a" * 40_000_000])
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300, pyarrow.int32()), word)
    talk = pyarrow.array([[{"role": "user", "content": "a" * 40_000_000}] * 2])
    long = pyarrow.array(["a" * 80_000_000])
    for name, table in (("text", {"text": rows}), ("chat", {"messages": talk}), ("row", {"text": long})):
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.table(table), path, compression="zstd")
        assert path.stat().st_size < 100_000
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ResourceError, match="unfolds to more"):
            read_documents(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kilobytes
