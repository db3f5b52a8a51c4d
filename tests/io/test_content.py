"""Hashes that are kept: a file is read once, and never believed to be what it was."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from llm_quantize.errors import MalformedInputError
from llm_quantize.io import content
from llm_quantize.io.content import SAMPLE_BYTES, SAMPLES, contents, keep_hash, kept_hash, standing

SIZE = 3 * SAMPLES * SAMPLE_BYTES


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


def read(file: Path, kept: Path | None) -> tuple[str, int]:
    """Its hash, and how many bytes had to be read for it."""
    told: list[int] = []
    (digest,) = contents([file], kept=kept, told=lambda done, _total: told.append(done))
    return digest, max(told, default=0)


@pytest.mark.parametrize("size", [0, 1, SAMPLE_BYTES, SIZE + 17])
def test_it_is_the_sha256_of_the_file(size: int, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(os.urandom(size))
    for _ in range(2):
        assert read(tmp_path / "f", tmp_path / "kept")[0] == hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()


def test_a_file_that_stays_is_read_once(file: Path, tmp_path: Path) -> None:
    first, size = read(file, tmp_path / "kept")
    assert size == SIZE
    assert read(file, tmp_path / "kept") == (first, 0)
    assert read(file, None) == (first, SIZE)


def test_a_byte_is_seen_though_size_and_time_of_writing_are_as_before(file: Path, tmp_path: Path) -> None:
    first, _ = read(file, tmp_path / "kept")
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(SAMPLE_BYTES + 100)  # in none of the sampled pieces
        stream.write(b"\xff")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    found, size = read(file, tmp_path / "kept")
    assert (found != first, size) == (True, SIZE)


def test_times_alone_are_not_believed(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands still: the samples decide."""
    first, _ = read(file, tmp_path / "kept")
    before = file.stat()
    with file.open("r+b") as stream:
        stream.write(b"\xff")
    true = os.fstat

    def stopped(descriptor: int) -> os.stat_result:
        found = true(descriptor)
        return before if found.st_ino == before.st_ino else found

    monkeypatch.setattr(content.os, "fstat", stopped)
    assert read(file, tmp_path / "kept")[0] != first


@pytest.mark.parametrize("damage", ["", "[]", "{}", "forged"])
def test_a_damaged_record_is_not_believed(damage: str, file: Path, tmp_path: Path) -> None:
    first, _ = read(file, tmp_path / "kept")
    (record,) = (tmp_path / "kept").iterdir()
    forged = json.dumps({**json.loads(record.read_text()), "sha256": "0" * 64})
    record.write_text(forged if damage == "forged" else damage)
    assert read(file, tmp_path / "kept") == (first, SIZE)


def test_where_nothing_can_be_kept_it_is_read_again(file: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file in its place")
    first, _ = read(file, tmp_path / "kept")
    assert read(file, tmp_path / "kept") == (first, SIZE)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MalformedInputError):
        contents([tmp_path / "pipe"], kept=None)


def test_a_byte_written_within_one_tick_of_the_clock_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that tells time in steps of 10 ms: the first hash waits until the next."""
    true = os.fstat

    class Coarse:
        def __init__(self, found: os.stat_result) -> None:
            self.found, self.st_ctime_ns = found, found.st_ctime_ns // 10_000_000 * 10_000_000

        def __getattr__(self, name: str) -> object:
            return getattr(self.found, name)

    monkeypatch.setattr(content.os, "fstat", lambda descriptor: Coarse(true(descriptor)))
    for number in range(20):
        file = tmp_path / f"{number}"
        file.write_bytes(bytes(SIZE))
        before = file.stat()
        first, _ = read(file, tmp_path / "kept")
        with file.open("r+b") as stream:
            stream.seek(SAMPLE_BYTES + 100)
            stream.write(b"\xff")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert read(file, tmp_path / "kept")[0] != first


def test_what_stands_is_the_same_until_it_is_written(file: Path) -> None:
    before = standing(file)
    assert standing(file) == before
    file.write_bytes(file.read_bytes())
    assert standing(file) != before


def test_a_hash_is_believed_of_the_same_facts_only(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    keep_hash(record, {"files": [1]}, "ab")
    assert kept_hash(record, {"files": [1]}) == "ab"
    assert kept_hash(record, {"files": [2]}) is None
    assert kept_hash(tmp_path / "none.json", {"files": [1]}) is None
