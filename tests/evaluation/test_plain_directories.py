"""Directories of plain weights wherever an artifact is measured, compared and described."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llm_quantize.advice.describe import describe
from llm_quantize.cli import run
from llm_quantize.pipeline import quantize
from tests.tiny_models import make_tiny

WIDE = {"hidden_size": 128, "intermediate_size": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights neither bfloat16 nor float16 holds."""
    return make_tiny("llama", tmp_path_factory.mktemp("plain") / "model", dtype="float32", **WIDE)


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    results = quantize(str(model), "safetensors", levels=["F32", "BF16", "F16"], output_dir=folder)
    return {result.level: result.path for result in results}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(2000))))
    return tmp_path / "text.txt"


def test_divergence_is_that_of_rounding(
    model: Path, made: dict[str, Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--text", str(text), "--context", "64", "--windows", "2", "--threads", "1", "--json"]
    paths = [str(made[level]) for level in ("F32", "BF16", "F16")]
    assert run(["analyze", "quality", *paths, "--reference", str(model), "--runtime", "transformers", *asked]) == 0
    found = json.loads(capsys.readouterr().out)["artifacts"]
    kld = [one["divergence"]["kld"] for one in found]
    assert kld[0] == found[0]["divergence"]["kld_max"] == 0
    assert 0 < kld[2] < kld[1] < 1e-3
    assert [one["runtime"]["explained"] for one in found] == [True, True, True]
    assert found[0]["runtime"]["rounding"]["kld"] < 1e-9


def test_variants_of_several_formats_on_one_page(
    model: Path, made: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = "safetensors:BF16,gguf:Q8_0,gptq:4bit"
    asked = ["--text", str(text), "--context", "64", "--windows", "2", "--threads", "1", "--no-speed", "--json"]
    asked += ["--calibration-data", str(text), "--calibration-samples", "4", "--sequence-length", "32"]
    report = tmp_path / "report"
    assert run(["compare", str(model), str(made["F32"]), "--variants", variants, "-o", str(report), *asked]) == 0
    rows = json.loads(capsys.readouterr().out)["variants"]
    assert [(row["format"], row["level"]) for row in rows] == [
        ("safetensors", "BF16"),
        ("gguf", "Q8_0"),
        ("gptq", "GPTQ-4bit"),
        ("safetensors", "F32"),
    ]
    klds = [row["kld"] for row in rows]
    assert klds[3] == 0 < klds[0] < klds[1] < klds[2]
    page = (report / "index.html").read_text()
    assert "GPTQ-4bit" in page
    assert rows[3]["tensor_errors"] == []
    assert rows[0]["bits_per_weight"] == pytest.approx(16, abs=0.5)


def test_info_tells_what_it_was_made_from(model: Path, made: dict[str, Path], tmp_path: Path) -> None:
    facts = describe(str(made["BF16"]))
    assert facts["made_from"] == {"model": "model", "level": "BF16"}
    assert set(facts["dtypes"]) == {"BF16"}
    assert "made_from" not in describe(str(model))
    other = Path(shutil.copytree(made["BF16"], tmp_path / "other"))
    (other / "manifest.json").write_text("{}")
    assert "changed" in describe(str(other))["manifest"]
