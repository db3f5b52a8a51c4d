"""The model card: what stands in its metadata, and that it says nothing that is not known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from llm_quantize.formats import awq, gptq
from llm_quantize.formats.base import SchemeOptions
from llm_quantize.formats.card import PackedFacts, about_packed, card

FACTS = PackedFacts(
    form=awq,
    scheme=awq.scheme("4bit", SchemeOptions()),
    name="demo-AWQ-4bit",
    matrices=224,
    packed=3_400_000_000,
    kept=500_000_000,
    weights=6_700_000_000,
    method={"Codes chosen by": "error feedback", "Text": "a | b\nc"},
)
FRONT = {
    "license": "apache-2.0",
    "language": ["en", "ja"],
    "tags": ["x"],
    "pipeline_tag": 3,
    "model-index": {"a": 1},
}


def text_of(facts: PackedFacts, measured: dict[str, str] | None = None) -> str:
    about = about_packed(facts)
    return card(about, name=facts.name, source="acme/demo", revision="0123abc", front=FRONT, measured=measured)


def front(text: str) -> dict[str, object]:
    assert text.startswith("---\n")
    found = yaml.safe_load(text[4:].partition("\n---\n")[0])
    assert isinstance(found, dict)
    return found


def test_front_matter() -> None:
    assert front(text_of(FACTS)) == {
        "base_model": "acme/demo",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "language": ["en", "ja"],
        "library_name": "transformers",
        "tags": ["llm-quantize", "quantized", "awq", "4-bit"],
    }
    local = front(card(about_packed(FACTS), name="x", source="demo", revision=None, front={}))
    assert "base_model" not in local
    assert "license" not in local


def test_recipe_sizes_and_loss() -> None:
    text = text_of(FACTS)
    assert "3,900,000,000 bytes (3.90 GB), 4.66 bits per weight" in text
    assert "| Scales | float16, one for 128 weights |" in text
    assert "| Text | a \\| b c |" in text
    assert "commit `0123abc`" in text
    assert "## Loss" not in text
    measured = text_of(FACTS, {"Mean KL divergence": "0.0123 ± 0.0004 nats per token"})
    assert "## Loss\n\n| | |\n|---|---|\n| Mean KL divergence | 0.0123 ± 0.0004 nats per token |" in measured
    ignoring = text_of(replace(FACTS, ignored=("model.layers.0.mlp.down_proj",)))
    assert "| Left as they are | 1 modules, the first model.layers.0.mlp.down_proj |" in ignoring


@pytest.mark.parametrize(
    ("level", "symmetric", "refused"),
    [("4bit", True, False), ("8bit", True, False), ("3bit", True, True), ("4bit", False, True)],
)
def test_runtimes(level: str, symmetric: bool, refused: bool) -> None:
    scheme = gptq.scheme(level, SchemeOptions(symmetric=symmetric))
    assert (gptq.vllm_refusal(scheme) is not None) is refused
    text = text_of(replace(FACTS, form=gptq, scheme=scheme))
    assert ("vllm serve" in text) is not refused
    assert "optimum gptqmodel" in text
