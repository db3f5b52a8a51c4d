"""Ministral 3: queries that grow with their position, and the wrapper with a tower that Mistral publishes it in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llm_quantize.architectures import open_architecture
from llm_quantize.artifacts.verify import verify
from llm_quantize.errors import UnsupportedError
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.options import CalibrationOptions, Options
from llm_quantize.pipeline import plan, quantize
from tests.tiny_models import TINY, VOCABULARY, make_tiny, quiet, reference_logits, reference_model

IDS = np.random.Generator(np.random.PCG64(5)).integers(0, VOCABULARY, 150).tolist()
OPTIONS = Options(threads=1, calibration=CalibrationOptions(samples=4, length=64))


def test_the_growth_of_queries_is_in_the_file_and_in_the_logits(tmp_path: Path) -> None:
    model = make_tiny("ministral3", tmp_path / "model")
    (result,) = quantize(str(model), "gguf", levels=["F32"], output_dir=tmp_path / "out", options=OPTIONS)
    metadata = read_gguf(result.path).metadata
    assert metadata["mistral3.attention.temperature_scale"].value == pytest.approx(0.1)
    with_growth = reference_logits(reference_model(model), IDS)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["llama_4_scaling_beta"] = 0.0
    (model / "config.json").write_text(json.dumps(config))
    without = reference_logits(reference_model(model), IDS)
    first = TINY["ministral3"][1]["rope_parameters"]["original_max_position_embeddings"]
    assert np.array_equal(with_growth[:first], without[:first])
    assert np.abs(with_growth[first:] - without[first:]).max() > 0.01 * np.ptp(without), "the test shows nothing"


def test_growth_without_yarn_is_refused_for_gguf_alone(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 50.0, "llama_4_scaling_beta": 0.1}
    model = make_tiny(
        "ministral3", tmp_path / "model", rope_parameters={**rope, "original_max_position_embeddings": 64}
    )
    with pytest.raises(UnsupportedError, match="queries by their position with YaRN alone"):
        plan(str(model), "gguf", levels=["Q8_0"], options=OPTIONS)
    assert plan(str(model), "compressed-tensors", levels=["W8A16"], options=OPTIONS)


def test_a_wrapper_around_another_text_model_is_refused(tmp_path: Path) -> None:
    config: dict[str, Any] = json.loads((make_tiny("mistral3", tmp_path / "model") / "config.json").read_text())
    assert not open_architecture(config).limits
    config["text_config"]["model_type"] = "mistral4"
    (limit,) = open_architecture(config).limits
    assert "model_type" in str(limit)


def test_the_tower_is_left_out_of_gguf_and_kept_in_directories(tmp_path: Path) -> None:
    model = make_tiny("mistral3", tmp_path / "model")
    (result,) = quantize(str(model), "gguf", levels=["Q8_0"], output_dir=tmp_path / "gguf", options=OPTIONS)
    manifest = json.loads(next(result.path.parent.glob("*.json")).read_text())
    assert "vision tower" in json.dumps(manifest)
    assert not any("vision" in one.name for one in read_gguf(result.path).tensors)

    (made,) = quantize(str(model), "compressed-tensors", levels=["W8A16"], output_dir=tmp_path / "out", options=OPTIONS)
    assert verify(made.path, source=str(model)).ok
    card = (made.path / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "AutoModelForCausalLM" not in card
    with quiet():
        loaded, told = transformers.AutoModelForImageTextToText.from_pretrained(
            made.path, dtype=torch.float32, output_loading_info=True
        )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    got, expected = reference_logits(loaded.eval(), IDS[:40]), reference_logits(reference_model(model), IDS[:40])
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.999


def test_a_release_in_fp8_is_read_with_its_scales(tmp_path: Path) -> None:
    """As Mistral publishes them: E4M3, one scale for each matrix and one of its inputs, tower and head in bfloat16."""
    plain = make_tiny("mistral3", tmp_path / "model")
    tensors = load_file(plain / "model.safetensors")
    stored, decoded = dict(tensors), dict(tensors)
    for name in [one for one in tensors if "language_model.model.layers" in one and one.endswith("_proj.weight")]:
        scale = tensors[name].float().abs().max() / 448
        stored[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        decoded[name] = stored[name].float() * scale
        stored[name.replace(".weight", ".weight_scale_inv")] = scale
        stored[name.replace(".weight", ".activation_scale")] = torch.tensor(0.05)
    files = []
    for folder, content in (("fp8", stored), ("decoded", decoded)):
        target = shutil.copytree(plain, tmp_path / folder)
        save_file(content, target / "model.safetensors", metadata={"format": "pt"})
        if folder == "fp8":
            config = json.loads((target / "config.json").read_text())
            config["quantization_config"] = {
                "quant_method": "fp8",
                "activation_scheme": "static",
                "weight_block_size": None,
                "dequantize": False,
                "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
            }
            (target / "config.json").write_text(json.dumps(config))
        out = tmp_path / f"{folder}-out"
        (made,) = quantize(str(target), "gguf", levels=["F32"], output_dir=out, options=OPTIONS)
        files.append({one.name: one.data.tobytes() for one in gguf.GGUFReader(made.path).tensors})
    assert files[0] == files[1]
