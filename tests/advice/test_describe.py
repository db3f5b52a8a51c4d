"""The facts of ``info`` for a tied model with experts, which the built-in model is not."""

from __future__ import annotations

from pathlib import Path

from llm_quantize.advice.describe import describe
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
