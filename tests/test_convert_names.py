"""What conversions are called: a level is taken off a name where the source itself says that it is its level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_quantize import api
from llm_quantize.conversion import bare_name, foresee
from llm_quantize.errors import UsageError
from llm_quantize.models.opening import open_source
from llm_quantize.options import MethodOptions, Options
from tests.models.adapters import factors, write_adapter
from tests.tiny_models import make_tiny, row_lengths_of_256


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("source") / "tiny", **row_lengths_of_256("llama"))


def quantized(model: Path, place: Path, format: str, level: str, **method: Any) -> Path:
    options = Options(threads=1, calibrate=False, method=MethodOptions(method="rtn", **method))
    (result,) = api.quantize(model, format, levels=level, output_dir=place, options=options)
    return result.path


def named(path: Path, *, lora: tuple[str, ...] = ()) -> str | None:
    source = open_source(str(path), lora=lora, headers_only=True)
    with source.checkpoint:
        return bare_name(source)


SOURCES = [
    ("gptq", "4bit", {"group_size": 64}, "tiny-GPTQ-4bit-g64"),
    ("gptq", "8bit", {"group_size": -1}, "tiny-GPTQ-8bit-channel"),
    ("awq", "4bit", {}, "tiny-AWQ-4bit"),
    ("compressed-tensors", "W4A16_ASYM", {"group_size": 32}, "tiny-W4A16_ASYM-g32"),
    ("compressed-tensors", "FP8_DYNAMIC", {}, "tiny-FP8_DYNAMIC-channel"),
    ("bitsandbytes", "NF4", {"double_quant": True}, "tiny-BNB-NF4"),
    ("bitsandbytes", "INT8", {}, "tiny-BNB-INT8"),
    ("mlx", "4bit", {}, "tiny-MLX-4bit"),
    ("ctranslate2", "int8", {}, "tiny-CT2-int8"),
    ("ctranslate2", "int8_float32", {}, "tiny-CT2-int8_float32"),
]


@pytest.mark.parametrize(("format", "level", "method", "name"), SOURCES)
def test_levels_do_not_pile_up(
    llama: Path, format: str, level: str, method: dict[str, Any], name: str, tmp_path: Path
) -> None:
    """By the manifest; without it by what is stored; and what only looks like a level stays."""
    source = quantized(llama, tmp_path, format, level, **method)
    assert (source.name, named(source)) == (name, "tiny")
    (source / "manifest.json").write_text('{"made": {"name": "../x"}}')
    assert named(source) == "tiny"
    (source / "manifest.json").unlink()
    assert named(source) == "tiny"
    other = source.rename(tmp_path / "tiny-GPTQ-3bit-Q4_0")
    assert named(other) is None


def test_of_floats_the_manifest_alone_says_it(llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path, "safetensors", "BF16")
    assert (source.name, named(source)) == ("tiny-BF16", "tiny")
    (source / "manifest.json").unlink()
    assert named(source) is None
    assert named(llama) is None


def test_a_conversion_and_its_plan_have_that_name(llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path, "gptq", "4bit", group_size=64)
    assert foresee(str(source), "gguf").plan.name == "tiny-Q4_0"
    options = Options(threads=1)
    assert api.convert(source, "gguf", output_dir=tmp_path, options=options).path.name == "tiny-Q4_0.gguf"
    made = api.convert(source, "gguf", output_dir=tmp_path, name="mine", options=options)
    assert made.path.name == "mine-Q4_0.gguf"
    adapter = write_adapter(tmp_path / "tune", factors({"model.layers.0.self_attn.o_proj": (256, 256)}))
    merged = api.convert(source, "gguf", output_dir=tmp_path, lora=adapter, options=options)
    assert merged.path.name == "tiny-tune-Q4_0.gguf"
    assert named(tmp_path / "tiny-Q4_0.gguf") is None, "a GGUF file has its name without the level already"


def test_a_conversion_to_itself_is_refused_where_it_lies(llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path, "gptq", "4bit", group_size=64)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    with pytest.raises(UsageError):
        api.convert(source, "gptq", output_dir=tmp_path, options=Options(threads=1, overwrite=True))
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    made = api.convert(source, "gptq", output_dir=tmp_path / "other", options=Options(threads=1))
    assert made.path.name == source.name
