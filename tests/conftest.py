"""Fixtures that many tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_quantize.data import demo_model as demo_model_path

os.environ["LC_ALL"] = "C.UTF-8"  # what commands say is tested in English, whoever runs the tests


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Statistics of tests are kept among the tests' files, never in the user's cache."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_QUANTIZE_CACHE", str(directory))
        yield directory


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The built-in trained model, as a Hugging Face directory."""
    return Path(demo_model_path())
