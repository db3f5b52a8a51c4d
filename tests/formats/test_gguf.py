"""Model card, sampling defaults, provenance and splits: what the metadata says, key by key."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from llm_quantize.formats.gguf.metadata import (
    card_metadata,
    general_metadata,
    importance_metadata,
    read_card,
    recipe_metadata,
    split_metadata,
    split_tensors,
)


def values(metadata: dict) -> dict:
    return {key: value.value for key, value in metadata.items()}


def test_a_full_model_card() -> None:
    card = {
        "license": "other",
        "license_name": "llama3.2",
        "license_link": "LICENSE",
        "base_model": ["org/big", "lonely"],
        "tags": ["a", "b", "a"],
        "pipeline_tag": "text-generation",
        "language": "ja",
        "ignored": 1,
    }
    assert values(card_metadata(card)) == {
        "general.license": "other",
        "general.license.name": "llama3.2",
        "general.license.link": "LICENSE",
        "general.base_model.count": 2,
        "general.base_model.0.name": "big",
        "general.base_model.0.organization": "org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/big",
        "general.base_model.1.name": "lonely",
        "general.tags": ["a", "b", "text-generation"],
        "general.languages": ["ja"],
    }
    assert card_metadata({"license": 7, "tags": {"x": 1}, "base_model": None}) == {}


@pytest.mark.parametrize("text", ["---\n[: bad\n---\n", "---\na: &x [1]\nb: *x\n---\n"])
def test_a_card_that_cannot_be_read_is_left_out_aloud(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    said: list[str] = []
    assert read_card(tmp_path, said.append) == {}
    assert len(said) == 1


def test_sampling_defaults_and_size_label() -> None:
    generation = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "do_sample": True,
        "max_length": 4,
    }
    found = general_metadata(
        architecture="qwen3moe",
        name="m",
        parameters=30_000_000_000,
        expert_parameters=28_000_000_000,
        experts=128,
        card={},
        generation_config=generation,
    )
    assert values(found) == {
        "general.architecture": "qwen3moe",
        "general.type": "model",
        "general.name": "m",
        "general.size_label": "128x2.2B",
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.95,
        "general.sampling.min_p": 0.1,
        "general.sampling.penalty_repeat": 1.1,
    }


def test_provenance() -> None:
    assert values(recipe_metadata(file_type=15, quantized=True, level="Q4_K_M", version="9")) == {
        "general.file_type": 15,
        "general.quantization_version": 2,
        "general.quantized_by": "llm-quantize 9",
        "llm_quantize.version": "9",
        "llm_quantize.level": "Q4_K_M",
    }
    assert "general.quantization_version" not in recipe_metadata(file_type=0, quantized=False, level="F32", version="9")
    assert values(importance_metadata(file="i.gguf", datasets=["a", "b"], entries=7, chunks=3)) == {
        "quantize.imatrix.file": "i.gguf",
        "quantize.imatrix.dataset": "a, b",
        "quantize.imatrix.entries_count": 7,
        "quantize.imatrix.chunks_count": 3,
    }


def test_splits() -> None:
    tensors = [(name, (1, 100), GGMLQuantizationType.F32) for name in "abcd"]
    assert split_tensors(tensors, None) == [[0, 1, 2, 3]]
    assert split_tensors(tensors, 800) == [[0, 1], [2, 3]]
    assert split_tensors(tensors, 799) == [[0], [1], [2], [3]]
    assert split_tensors(tensors, 1) == [[0], [1], [2], [3]]
    assert values(split_metadata(1, 3, 57)) == {"split.no": 1, "split.count": 3, "split.tensors.count": 57}
