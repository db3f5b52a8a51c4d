"""The facts of ``info`` for a tied model with experts, which the built-in model is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_quantize.advice.describe import describe
from llm_quantize.data import demo_model
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import quantize
from llm_quantize.reports.terminal import print_facts
from tests.tiny_models import make_tiny


def test_tied_and_untied(tmp_path: Path) -> None:
    assert describe(str(make_tiny("gemma", tmp_path / "tied")))["tied_embeddings"] is True
    assert describe(str(make_tiny("llama", tmp_path / "untied")))["tied_embeddings"] is False


def test_experts(tmp_path: Path) -> None:
    facts = describe(str(make_tiny("qwen3_moe", tmp_path / "moe")))
    assert (facts["architecture"], facts["model_type"]) == ("qwen3moe", "qwen3_moe")
    assert facts["experts"] > 1
    counted = sum(entry["bytes"] for entry in facts["dtypes"].values())
    assert facts["memory"]["source_weights"] == counted


def test_a_directory_of_fp8_says_how_it_is_quantized(tmp_path: Path) -> None:
    """It is read like one of plain floats; what reads it must know more."""
    options = Options(threads=1, method=MethodOptions(method="rtn"))
    (result,) = quantize(
        str(demo_model()), "compressed-tensors", levels=["FP8_DYNAMIC"], output_dir=tmp_path, options=options
    )
    facts = describe(str(result.path))
    assert facts["layers"] == 6
    said = facts["quantization"]
    assert (said["format"], said["layout"]) == ("compressed-tensors", "float-quantized")
    assert (said["bits"], said["matrices"]) == (8, 42)
    assert "token" in said["activations"]


def test_what_is_left_out_is_listed_by_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    dropped = {f"layers.{number}.input_scale": "scale of activations" for number in range(300)} | {"x": "a buffer"}
    print_facts({"left_out": dropped, "tensors": []})
    assert capsys.readouterr().out == (
        "left out: layers.0.input_scale and 299 more: scale of activations; x: a buffer\n"
    )
