"""A format refuses only for itself: what llama.cpp lacks stops a GGUF, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_quantize import pipeline
from llm_quantize.advice.describe import describe
from llm_quantize.errors import MalformedInputError, UnsupportedError
from llm_quantize.options import CalibrationOptions, MethodOptions, Options
from tests.tiny_models import make_tiny, reference_model

GROUPS = MethodOptions(group_size=32)
ROUNDED = Options(method=MethodOptions(method="rtn", group_size=32))


def changed(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def other_activation(model: Path) -> None:
    """Llama with GELU: transformers computes it, llama.cpp's graph of llama does not."""
    changed(model / "config.json", lambda config: config.update(hidden_act="gelu"))


def other_pre_tokenizer(model: Path) -> None:
    """A split that no pre-tokenizer of llama.cpp does."""
    split = {"type": "Split", "pattern": {"Regex": "[aeiou]+|[^aeiou]+"}, "behavior": "Isolated", "invert": False}

    def change(content: dict[str, Any]) -> None:
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}

    changed(model / "tokenizer.json", change)


def two_tokens_first(model: Path) -> None:
    """A template with two tokens before a text, which GGUF has no word for."""
    content = json.loads((model / "tokenizer.json").read_text())
    name = next(text for text, index in content["model"]["vocab"].items() if index == 0)
    special = {"SpecialToken": {"id": name, "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [0], "tokens": [name]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(content))


LIMITS = [other_activation, other_pre_tokenizer, two_tokens_first]


@pytest.fixture(params=LIMITS, ids=lambda change: change.__name__)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    directory = make_tiny("llama", tmp_path / "model")
    request.param(directory)
    return directory


def test_gguf_refuses_what_llama_cpp_lacks(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        pipeline.quantize(str(model), "gguf", levels=["Q8_0"], output_dir=tmp_path / "out")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("format", "level"), [("gptq", "4bit"), ("safetensors", "F16")])
def test_directories_do_not_care(model: Path, format: str, level: str, tmp_path: Path) -> None:
    options = ROUNDED if format == "gptq" else Options()
    (result,) = pipeline.quantize(str(model), format, levels=[level], output_dir=tmp_path, options=options)
    assert result.status == "written"
    if format == "safetensors":
        reference_model(result.path)


def test_and_are_calibrated(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 400)
    calibration = CalibrationOptions(data=(str(text),), samples=2, length=32)
    options = Options(method=GROUPS, calibration=calibration)
    (result,) = pipeline.quantize(str(model), "gptq", levels=["4bit"], output_dir=tmp_path, options=options)
    assert result.measured is not None


def test_info_tells_the_limit(model: Path) -> None:
    told = describe(str(model))["tokenizer"], describe(str(model)).get("gguf")
    assert "cannot be made" in str(told)


def without_tokenizer(directory: Path) -> Path:
    model = make_tiny("qwen2", directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    return model


def test_no_tokenizer_is_only_missed_where_text_is_read(tmp_path: Path) -> None:
    model = without_tokenizer(tmp_path / "model")
    (result,) = pipeline.quantize(str(model), "gptq", levels=["4bit"], output_dir=tmp_path, options=ROUNDED)
    assert result.status == "written"
    with pytest.raises(MalformedInputError, match="no tokenizer") as caught:
        pipeline.quantize(
            str(model), "gptq", levels=["4bit"], output_dir=tmp_path / "out", options=Options(method=GROUPS)
        )
    assert "--statistics" in str(caught.value)
    with pytest.raises(MalformedInputError, match="no tokenizer"):
        pipeline.plan(str(model), "gptq", levels=["4bit"], options=Options(method=GROUPS))
    with pytest.raises(MalformedInputError, match="no tokenizer"):
        pipeline.plan(str(model), "gguf", levels=["Q8_0"])
    assert "cannot be made" in str(describe(str(model)))
