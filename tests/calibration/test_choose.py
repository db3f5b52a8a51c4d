"""Where a run's importance comes from: a file, statistics, a calibration of its own, or nowhere."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from llm_quantize import pipeline
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.calibration import choose, collect
from llm_quantize.calibration.outcome import export
from llm_quantize.errors import IntegrityError, UsageError
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.models.opening import open_source
from llm_quantize.options import CalibrationOptions
from llm_quantize.pipeline import Options
from tests.tiny_models import make_tiny, row_lengths_of_256


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = random.Random(2)
    words = ("the", "cat", "sat", "on", "a", "mat", "saw", "an", "old", "house", "by", "river", "nobody", "lived")
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(chance.choice(words) for _ in range(1500)))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen2", tmp_path_factory.mktemp("model") / "tiny", **row_lengths_of_256("qwen2"))


def chosen(text: Path, **more: Any) -> Options:
    calibration = CalibrationOptions(data=(str(text),), samples=4, length=64)
    return Options(calibration=calibration, threads=1, **more)


def make(model: Path, directory: Path, level: str, options: Options) -> Path:
    return pipeline.quantize(str(model), levels=[level], output_dir=directory, options=options)[0].path


def test_a_level_that_needs_importance_calibrates_and_says_so_in_the_file(
    model: Path, text: Path, tmp_path: Path
) -> None:
    path = make(model, tmp_path / "own", "Q2_K_S", chosen(text))
    metadata = read_gguf(path).metadata
    assert metadata["quantize.imatrix.dataset"].value == "words.txt"
    assert metadata["quantize.imatrix.chunks_count"].value == 4
    plan = pipeline.plan(str(model), levels=["Q2_K_S"], options=chosen(text))[0]
    assert plan.size == path.stat().st_size
    assert any("calibrates first" in text and "at most 4 windows of 64" in text for text in plan.notes)
    assert plan.warnings == ()


def test_statistics_the_matrix_made_of_them_and_a_calibration_give_the_same_tensors(
    model: Path, text: Path, tmp_path: Path
) -> None:
    options = chosen(text)
    source = open_source(str(model))
    with source.checkpoint:
        result = collect.calibrate(source, options.calibration)
        export(result, source, tmp_path / "i.gguf", "imatrix")
    files = [
        make(model, tmp_path / "own", "Q4_K_M", chosen(text, calibrate=True)),
        make(model, tmp_path / "statistics", "Q4_K_M", chosen(text, statistics=result.path)),
        make(model, tmp_path / "imatrix", "Q4_K_M", chosen(text, imatrix=tmp_path / "i.gguf")),
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    hashes = [[tensor["units"] for tensor in (read_manifest(manifest_path(path)) or {})["tensors"]] for path in files]
    assert hashes[0] == hashes[2]
    plain = make(model, tmp_path / "plain", "Q4_K_M", chosen(text))
    assert "quantize.imatrix.file" not in read_gguf(plain).metadata
    assert hashes[0] != [tensor["units"] for tensor in (read_manifest(manifest_path(plain)) or {})["tensors"]]


def test_no_calibration_is_refused_where_a_level_cannot_do_without(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="importance"):
        make(model, tmp_path, "Q2_K_S", chosen(text, calibrate=False))
    assert not list(tmp_path.iterdir())


def test_options_that_contradict_each_other_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    for more in ({"imatrix": tmp_path / "a", "statistics": tmp_path / "b"}, {"imatrix": tmp_path, "calibrate": True}):
        with pytest.raises(UsageError, match="only one of these"):
            make(model, tmp_path, "Q4_K_M", chosen(text, **more))


def test_statistics_of_another_model_are_refused_naming_both(model: Path, text: Path, tmp_path: Path) -> None:
    source = open_source(str(model))
    with source.checkpoint:
        statistics = collect.calibrate(source, chosen(text).calibration).path
    other = make_tiny("qwen2", tmp_path / "other", seed=7, **row_lengths_of_256("qwen2"))
    with pytest.raises(IntegrityError, match="another model") as caught:
        make(other, tmp_path / "out", "Q4_K_M", chosen(text, statistics=statistics))
    assert caught.value.expected != caught.value.found
    assert not (tmp_path / "out").exists()


def test_foreseen_importance_has_the_names_and_shapes_of_the_real_one(model: Path, text: Path) -> None:
    options = chosen(text, calibrate=True)
    source = open_source(str(model))
    with source.checkpoint:
        foreseen = choose.foresee(source, "gguf", ["Q4_K_M"], options)
        real = choose.collected(source, "gguf", options, lambda event: None)
        rows = choose.rows_of(source, real)
    assert isinstance(foreseen, choose.Foreseen)
    assert foreseen.names == set(real.names) == rows.keys()
