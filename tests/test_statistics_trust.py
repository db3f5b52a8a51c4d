"""Files of statistics are not believed: damage anywhere ends a run, another file in the cache is collected again."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quantize.calibration.collect import calibrate
from llm_quantize.calibration.outcome import Calibration
from llm_quantize.cli import run
from llm_quantize.errors import IntegrityError
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.io.safetensors_file import read_header
from llm_quantize.io.statistics_file import read_statistics
from llm_quantize.models.opening import open_source
from llm_quantize.options import CalibrationOptions, MethodOptions
from llm_quantize.pipeline import Options, plan
from tests.hearing import into
from tests.io.test_statistics_file import edit, put, reseal
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = random.Random(3)
    words = ("the", "cat", "sat", "on", "a", "mat", "saw", "an", "old", "house", "by", "river", "nobody", "lived")
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(chance.choice(words) for _ in range(1500)))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen2", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_QUANTIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def collect(model: Path, text: Path, *, seed: int = 0, told: list[Any] | None = None) -> Calibration:
    chosen = CalibrationOptions(
        data=(str(text),), samples=4, length=64, collect=("imatrix", "hessian"), seed=seed, threads=1
    )
    with (source := open_source(str(model))).checkpoint:
        return calibrate(source, chosen, on_event=into(told if told is not None else []))


@pytest.fixture
def statistics(model: Path, text: Path, cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(collect(model, text).path, tmp_path / "s.safetensors"))


def command(model: Path, statistics: Path, directory: Path) -> list[str]:
    words = ["quantize", str(model), "gptq", "-q", "4bit", "--statistics", str(statistics), "--inputs", "source"]
    return [*words, "--group-size", "32", "--threads", "1", "-o", str(directory)]


def test_no_flipped_bit_of_a_hessian_is_believed(
    model: Path, statistics: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chance, sound = random.Random(1), statistics.read_bytes()
    tensors = read_header(statistics).tensors
    hessians = [info for name, info in tensors.items() if name.endswith(".hessian")]
    assert run(command(model, statistics, tmp_path / "sound")) == 0
    capfd.readouterr()
    for number in range(6):
        info = chance.choice(hessians)
        data = bytearray(sound)
        data[info.offset + chance.randrange(info.nbytes)] ^= 1 << chance.randrange(8)
        statistics.write_bytes(data)
        assert run(command(model, statistics, tmp_path / f"out{number}")) == IntegrityError.exit_code
        told = " ".join(capfd.readouterr().err.split())
        assert "these statistics were changed since they were written" in told
        assert info.name in told


def test_the_identity_of_a_run_covers_whole_hessians(model: Path, statistics: Path) -> None:
    def identity() -> Any:
        options = Options(
            statistics=statistics, method=MethodOptions(inputs="source", transform="none", group_size=32), threads=1
        )
        return plan(str(model), "gptq", levels=["4bit"], options=options)[0].identity

    first = identity()
    info = next(info for name, info in read_header(statistics).tensors.items() if name.endswith(".hessian"))
    data = bytearray(statistics.read_bytes())
    data[info.offset + 5] ^= 1  # beside the diagonal
    statistics.write_bytes(data)
    reseal(statistics)
    assert identity() != first


@pytest.mark.parametrize("what", ["no blocks", "no taps", "no token", "no counts"])
def test_entries_that_are_missing_or_zero_are_malformed(
    model: Path, statistics: Path, tmp_path: Path, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name, info = next(pair for pair in read_header(statistics).tensors.items() if pair[0].endswith(".counts"))
    if what == "no token":
        data = bytearray(statistics.read_bytes())
        data[info.offset : info.offset + info.nbytes] = np.zeros(info.shape, np.int64).tobytes()
        statistics.write_bytes(data)
        reseal(statistics)
    elif what == "no counts":
        edit(statistics, lambda fields: fields.update({"other": fields.pop(name)}))
    else:
        edit(statistics, put("blocks", 0) if what == "no blocks" else put("taps", []))
    assert run(command(model, statistics, tmp_path / "out")) == 3
    assert "s.safetensors" in capfd.readouterr().err


def test_another_texts_file_in_the_cache_is_not_believed(model: Path, text: Path, cache: Path) -> None:
    first, other = collect(model, text), collect(model, text, seed=1)
    expected = first.path.read_bytes()
    shutil.copy(other.path, first.path)
    named = manifest_path(other.path).read_bytes()
    manifest_path(first.path).write_bytes(named)
    told: list[Any] = []
    again = collect(model, text, told=told)
    assert (again.path, again.reused) == (first.path, False)
    assert again.path.read_bytes() == expected
    assert "are of another model or text" in str(told)


def test_a_file_of_an_older_version_in_the_cache_is_collected_again(model: Path, text: Path, cache: Path) -> None:
    first = collect(model, text)
    expected = first.path.read_bytes()
    edit(first.path, put("format_version", "1"))
    told: list[Any] = []
    again = collect(model, text, told=told)
    assert not again.reused
    assert again.path.read_bytes() == expected
    assert "were kept by another version" in str(told)
    with read_statistics(again.path) as found:
        assert len(found.content_sha256) == 64
