"""Plain weights in another element type: torch's own cast, every tensor, and a directory that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llm_quantize import pipeline
from llm_quantize.errors import NumericPolicyError, UsageError
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.methods.gptq_options import GptqOptions
from llm_quantize.options import MethodOptions, Options
from tests.tiny_models import make_tiny, reference_logits, reference_model

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {variant: make_tiny(variant, directory / variant) for variant in ("llama3", "qwen3_moe", "gpt2")}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("level", sorted(DTYPES))
@pytest.mark.parametrize("variant", ["llama3", "qwen3_moe", "gpt2"])
def test_every_tensor_is_torchs_cast(models: dict[str, Path], variant: str, level: str, tmp_path: Path) -> None:
    (result,) = pipeline.quantize(str(models[variant]), "safetensors", levels=[level], output_dir=tmp_path)
    assert result.path.name == f"{variant}-{level}"
    source, found = tensors_of(models[variant]), tensors_of(result.path)
    assert found.keys() == source.keys()
    for name, values in source.items():
        assert found[name].dtype == DTYPES[level]
        assert torch.equal(found[name], values.to(DTYPES[level])), name
    config = json.loads((result.path / "config.json").read_text())
    assert DTYPES[level] == getattr(torch, config.get("dtype") or config["torch_dtype"])
    assert result.size == sum(file.stat().st_size for file in result.path.iterdir() if file.name != "manifest.json")


@pytest.mark.parametrize("variant", ["llama3", "qwen3_moe", "gpt2"])
def test_transformers_computes_the_same(models: dict[str, Path], variant: str, tmp_path: Path) -> None:
    (result,) = pipeline.quantize(str(models[variant]), "safetensors", levels=["F32"], output_dir=tmp_path)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    expected = reference_logits(reference_model(models[variant]), ids)
    assert (reference_logits(reference_model(result.path), ids) == expected).all()


def test_shards_and_their_index_are_exact(models: dict[str, Path], tmp_path: Path) -> None:
    options = Options(method=MethodOptions(shard_size=40_000))
    (result,) = pipeline.quantize(
        str(models["llama3"]), "safetensors", levels=["bf16"], output_dir=tmp_path, options=options
    )
    index = json.loads((result.path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    total = 0
    for name in files:
        with safe_open(result.path / name, "pt") as file:
            for tensor in file.keys():  # noqa: SIM118 - not a mapping
                assert index["weight_map"][tensor] == name
                values = file.get_tensor(tensor)
                total += values.numel() * values.element_size()
    assert index["metadata"]["total_size"] == total
    reference_model(result.path)


def test_values_that_half_precision_cannot_hold_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    for file in models["llama3"].iterdir():
        (wide / file.name).write_bytes(file.read_bytes())
    values = load_file(wide / "model.safetensors")
    name = next(name for name in values if name.endswith("q_proj.weight"))
    values[name][1, 2] = 1e6
    save_file(values, wide / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericPolicyError, match="too large for f16") as caught:
        pipeline.quantize(str(wide), "safetensors", levels=["F16"], output_dir=tmp_path / "out")
    assert caught.value.tensor == name
    assert caught.value.remedy == "use BF16 or F32, which hold larger magnitudes: -q BF16"
    with pytest.raises(NumericPolicyError, match="too large for f16") as caught:
        pipeline.quantize(str(wide), "gguf", levels=["F16"], output_dir=tmp_path / "out")
    assert caught.value.remedy == "use BF16 or F32, which hold larger magnitudes: -q BF16"
    assert caught.value.found == "999424 at row 2, column 2"
    pipeline.quantize(str(wide), "safetensors", levels=["BF16"], output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        Options(method=MethodOptions(method="gptq", gptq=GptqOptions())),
        Options(method=MethodOptions(transform="awq")),
        Options(method=MethodOptions(group_size=64)),
        Options(method=MethodOptions(ignore=("q_proj",))),
        Options(overrides=Overrides(pure=True)),
        Options(split_max_size=10**6),
    ],
)
def test_options_of_other_formats_are_refused(models: dict[str, Path], options: Options, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="safetensors"):
        pipeline.plan(str(models["llama3"]), "safetensors", levels=["BF16"], options=options)


@pytest.mark.parametrize("level", ["Q4_K_M", "4bit", ""])
def test_unknown_levels_are_refused(models: dict[str, Any], level: str) -> None:
    with pytest.raises(UsageError, match="no safetensors level"):
        pipeline.plan(str(models["llama3"]), "safetensors", levels=[level])
