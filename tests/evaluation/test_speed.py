"""Speed and memory in the real runtime: figures that are there, and failures that are named."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quantize.errors import MalformedInputError, MissingExtraError, ResourceError, UnsupportedError, UsageError
from llm_quantize.evaluation import speed
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import quantize
from llm_quantize.runtimes import llama_cpp_library, transformers
from llm_quantize.runtimes.llama_cpp import LlamaCpp
from llm_quantize.runtimes.workers import timing


@pytest.fixture(scope="module")
def artifact(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed")
    return quantize(str(demo_model), levels=["Q4_K_M"], output_dir=folder)[0].path


def test_measured_in_a_process_of_its_own(artifact: Path) -> None:
    found = speed.measure_speed(artifact, threads=1)
    assert found.prompt_tokens_per_second > 0
    assert found.generation_tokens_per_second > 0
    # The child holds its interpreter and, on top of it, what the file and its runtime take.
    assert 5_000_000 < found.memory_empty < found.memory
    assert found.memory - found.memory_empty > artifact.stat().st_size
    assert (found.threads, found.repeats) == (1, speed.REPEATS)
    assert found.runtime.startswith("llama.cpp (xllamacpp ")
    assert 0 < found.cpu_share < 1.05
    assert not replace(found, cpu_share=speed.LEAST_SHARE).disturbed
    assert replace(found, cpu_share=speed.LEAST_SHARE - 0.01).disturbed


def test_damaged_artifact_is_named(artifact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(artifact.read_bytes()[:100_000])
    with pytest.raises(MalformedInputError, match="does not run") as caught:
        speed.measure_speed(broken, threads=1)
    assert caught.value.file == str(broken)
    assert caught.value.found is not None
    assert "llama.cpp does not load this file" in caught.value.found


def test_a_child_that_dies_is_told(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed.sys, "executable", "/bin/false")
    with pytest.raises(ResourceError, match="ended early"):
        speed.measure_speed(artifact, threads=1)


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such artifact"):
        speed.measure_speed(tmp_path / "none.gguf")


def test_no_runtime(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "xllamacpp" else found(name, package)

    llama_cpp_library.load_library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(MissingExtraError):
        speed.measure_speed(artifact)


def test_one_clock_warms_up_and_takes_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for every runtime: what stands before the new tokens is read, and not timed."""
    told: list[Any] = []
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.median(iter([9.0, 1.0, 4.0, 2.0]).__next__, 3) == 2.0
    write = timing.one_by_one(told.append, lambda token, position: told.append((token, position)))
    asked = {"prompt": 8, "new": 3, "lead": 2, "repeats": 1}
    found = timing.time_model(told.append, write, vocabulary=90, asked=asked, threads=1)
    prompt = [10, 20, 30, 40, 50, 60, 70, 80]
    behind = [[10, 20], (10, 2), (20, 3), (30, 4)]
    assert told == [prompt] * 3 + behind * 2
    assert (found["read"], found["write"]) == (3, 3)
    assert found["memory"] == pytest.approx(timing.resident(), rel=0.5)


def test_tokens_one_by_one_give_the_logits_of_the_whole(artifact: Path) -> None:
    ids = [5, 9, 200, 31, 77]
    with LlamaCpp(artifact, context=16, threads=1) as model:
        whole = model.logits(ids)
        model.advance(ids[:3])
        for position in (3, 4):
            found = model.advance([ids[position]], position)
            assert np.abs(found - whole[position]).max() < 1e-3 * np.ptp(whole)
        for wrong, position in (([], 3), (ids, 14), ([10**6], 0)):
            with pytest.raises(UsageError):
                model.advance(wrong, position)


@pytest.mark.parametrize(
    ("format", "level", "runtime", "empty"),
    [
        (None, "", "transformers ", 50_000_000),  # torch
        ("bitsandbytes", "NF4", "transformers ", 50_000_000),
        ("ctranslate2", "int8", "CTranslate2 ", 10_000_000),
        pytest.param("mlx", "4bit", "MLX ", 10_000_000, marks=pytest.mark.mlx),
    ],
)
def test_a_directory_is_timed_in_its_runtime(
    format: str | None, level: str, runtime: str, empty: int, demo_model: Path, tmp_path: Path
) -> None:
    path, size = demo_model, 0
    if format is not None:
        pytest.importorskip({"mlx": "json"}.get(format, format))
        options = Options(method=MethodOptions(method="rtn"))
        (made,) = quantize(str(demo_model), format, levels=[level], output_dir=tmp_path, options=options)
        path, size = made.path, made.size
    found = speed.measure_speed(path, threads=1)
    assert found.prompt_tokens_per_second > 0
    assert found.generation_tokens_per_second > 0
    assert empty < found.memory_empty < found.memory - size  # the runtime, then the weights
    assert (found.threads, found.prompt_tokens, found.new_tokens) == (1, speed.PROMPT_TOKENS, speed.NEW_TOKENS)
    assert found.runtime.startswith(runtime)
    assert 0 < found.cpu_share < 1.05


def test_a_runtime_without_a_clock_is_told(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "timer", None)
    with pytest.raises(UnsupportedError, match="in transformers is not measured"):
        speed.measure_speed(demo_model, threads=1)
