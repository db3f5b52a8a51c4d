"""Fixtures that many tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_quantize.data import demo_model as demo_model_path


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The built-in trained model, as a Hugging Face directory."""
    return Path(demo_model_path())
