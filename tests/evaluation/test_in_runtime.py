"""Artifacts in their runtime against one of them: a file that is the reference has lost nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm_quantize import data
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.errors import UsageError
from llm_quantize.evaluation.in_runtime import measure_in_runtime
from llm_quantize.evaluation.texts import evaluation_text
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.grids.ggml_words import WORDS
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.measures.perplexity import Tokens
from llm_quantize.models.opening import open_source
from llm_quantize.options import CalibrationOptions, MethodOptions, Options
from llm_quantize.pipeline import quantize

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """The built-in model as F32 and Q4_K_M."""
    folder = tmp_path_factory.mktemp("in-runtime")
    results = quantize(str(data.demo_model()), "gguf", levels=["F32", "Q4_K_M"], output_dir=folder)
    return tuple(result.path for result in results)


@pytest.fixture(scope="module")
def windows() -> Tokens:
    source = open_source(str(data.demo_model()))
    with source.checkpoint:
        return evaluation_text(TextTokenizer(source), context=64, limit=3).windows


def test_a_file_against_itself(files: tuple[Path, ...], windows: Tokens) -> None:
    seen: list[tuple[int, int]] = []
    same, other = measure_in_runtime(
        files[0], files, windows, threads=1, on_window=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert same.tokens == 3 * 31
    assert same.kld == 0
    assert same.same_top == 1
    assert same.ln_ratio == 0
    assert other.kld > 0
    assert measure_in_runtime(files[0], files[1:], windows, threads=3) == [other]


def test_nothing_to_compare_is_refused(files: tuple[Path, ...]) -> None:
    with pytest.raises(UsageError):
        measure_in_runtime(files[0], [], np.zeros((1, 8), np.int32))


@pytest.mark.parametrize("qtype", ["q1_0", "q2_0", "nvfp4"])
def test_new_types_are_what_our_reader_makes_of_them(qtype: str, windows: Tokens, tmp_path: Path) -> None:
    """llama.cpp on the file, and on the floats that our reader finds in it. It rounds inputs to 8 bits on the way."""
    options = Options(overrides=Overrides(tensor_types=((r"^blk", qtype),)))
    (made,) = quantize(str(data.demo_model()), "gguf", levels=["Q8_0"], output_dir=tmp_path, options=options)
    (floats,) = quantize(str(made.path), "gguf", levels=["F32"], output_dir=tmp_path / "floats")
    (found,) = measure_in_runtime(floats.path, [made.path], windows, threads=1)
    assert found.kld < 5e-3
    (source,) = quantize(str(data.demo_model()), "gguf", levels=["F32"], output_dir=tmp_path / "source")
    (lost,) = measure_in_runtime(source.path, [made.path], windows, threads=1)
    assert lost.kld > 20 * found.kld


def test_words_chosen_by_feedback_are_what_llama_cpp_reads(windows: Tokens, tmp_path: Path) -> None:
    """All codebook types in one file: stock bytes, whose floats our reader finds too."""
    places = (*(rf"^blk\.{block}\." for block in range(5)), r"^blk\.5\.ffn", r"^blk\.5\.attn")
    types = tuple(zip(places, WORDS, strict=True))
    options = Options(
        overrides=Overrides(tensor_types=types),
        method=MethodOptions(method="gptq"),
        calibration=CalibrationOptions(samples=4, length=64),
    )
    (made,) = quantize(str(data.demo_model()), "gguf", levels=["Q8_0"], output_dir=tmp_path, options=options)
    manifest = read_manifest(manifest_path(made.path))
    assert manifest is not None
    told = {entry["name"]: entry for entry in manifest["matrices"]}
    assert {told[name]["type"] for name in told} == set(WORDS)
    ratios = {name: entry["loss"] / entry["plain_loss"] for name, entry in told.items()}
    assert max(ratios.values()) < 0.97, ratios  # there is little text
    (floats,) = quantize(str(made.path), "gguf", levels=["F32"], output_dir=tmp_path / "floats")
    (source,) = quantize(str(data.demo_model()), "gguf", levels=["F32"], output_dir=tmp_path / "source")
    (found,) = measure_in_runtime(floats.path, [made.path], windows, threads=1)
    (lost,) = measure_in_runtime(source.path, [made.path], windows, threads=1)
    assert lost.kld > 20 * found.kld
