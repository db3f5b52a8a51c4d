"""Families with a recurrent state in some layers: what stands where in the artifact, what is left out, what is refused.

That the numbers are right is shown elsewhere: logits in llama.cpp (test_logits.py), bytes (test_byte_oracle.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.advice.footprint import shape_of
from llm_quantize.architectures import open_architecture
from llm_quantize.architectures.mapping import artifact_shapes, row_order
from llm_quantize.architectures.rows import read_output_rows, to_float32
from llm_quantize.errors import MalformedInputError
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import Options, quantize
from tests.blockwise.tiny import options, write_noise
from tests.tiny_models import make_tiny

GUESSER = ("fc.weight", "norm.weight", "pre_fc_norm_hidden.weight", "layers.0.self_attn.q_proj.weight")
"""Some tensors of a head that predicts several tokens at once."""


def spoil(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def add_guesser(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {f"mtp.{name}": torch.ones((64, 64) if "norm" not in name else 64) for name in GUESSER}


def test_value_heads_stand_one_of_every_key_head_first(tmp_path: Path) -> None:
    """Six value heads of two key heads, against plain loops."""
    with (source := open_source(str(make_tiny("qwen3_5", tmp_path / "model", dtype="float32")))).checkpoint:
        outputs = {output.name: output for output in source.tensors.outputs}
        heads, hyper = [0, 3, 1, 4, 2, 5], source.architecture.hyper
        states = hyper.recurrence
        assert states is not None
        assert (states.layers, states.value_dim) == (frozenset({0, 1, 2, 4}), 32)
        rows = [head * 32 + i for head in heads for i in range(32)]
        assert row_order("value_heads", hyper).tolist() == heads  # type: ignore[union-attr]
        assert row_order("values", hyper).tolist() == rows  # type: ignore[union-attr]
        before = states.channels - states.values
        wanted = [*range(before), *(before + row for row in rows)]
        assert row_order("channels", hyper).tolist() == wanted  # type: ignore[union-attr]
        stored = load_file(tmp_path / "model" / "model.safetensors")
        prefix = "model.language_model.layers.1.linear_attn."

        def found(name: str) -> np.ndarray:
            output = outputs[f"blk.1.{name}"]
            count = output.shape[0] if len(output.shape) > 1 else 1
            return to_float32(read_output_rows(source.checkpoint, output, 0, count)).reshape(output.shape)

        def theirs(name: str) -> np.ndarray:
            return stored[prefix + name].numpy()

        np.testing.assert_array_equal(found("ssm_out.weight"), theirs("out_proj.weight")[:, rows])
        np.testing.assert_array_equal(found("attn_gate.weight"), theirs("in_proj_z.weight")[rows])
        np.testing.assert_array_equal(found("attn_qkv.weight"), theirs("in_proj_qkv.weight")[wanted])
        np.testing.assert_array_equal(found("ssm_conv1d.weight"), theirs("conv1d.weight")[wanted, 0])
        np.testing.assert_array_equal(found("ssm_dt.bias"), theirs("dt_bias")[heads])
        np.testing.assert_allclose(found("ssm_a"), -np.exp(theirs("A_log")[heads]), rtol=3e-7)


def test_towers_and_guessing_heads_are_named_and_kept_in_directories(tmp_path: Path) -> None:
    model = make_tiny("qwen3_5", tmp_path / "model")
    spoil(model, add_guesser)
    with (source := open_source(str(model))).checkpoint:
        left = dict(source.left_out)
    assert {name for name in left if name.startswith("mtp.")} == {f"mtp.{name}" for name in GUESSER}
    assert "several tokens" in left["mtp.fc.weight"]
    assert "vision tower" in left["model.visual.patch_embed.proj.weight"]
    given = options(write_noise(tmp_path / "1.txt", 1), method="rtn", group_size=32)
    (result,) = quantize(str(model), "compressed-tensors", levels=["W4A16"], output_dir=tmp_path / "out", options=given)
    kept = load_file(result.path / "model.safetensors")
    before = load_file(model / "model.safetensors")
    assert set(left) <= set(kept)
    assert all(torch.equal(kept[name], before[name]) for name in left)
    ignored = json.loads((result.path / "config.json").read_text())["quantization_config"]["ignore"]
    for prefix in ("model.language_model.", "model."):  # the whole model, and its text alone, in transformers
        assert {f"{prefix}layers.0.linear_attn.in_proj_{one}" for one in "ab"} <= set(ignored)
    assert any("mtp" in rule for rule in ignored)
    assert "model.language_model.layers.0.linear_attn.conv1d.weight" in kept
    assert "model.language_model.layers.0.linear_attn.in_proj_qkv.weight_packed" in kept


def test_a_tensor_that_nobody_planned_is_refused_by_name(tmp_path: Path) -> None:
    model = make_tiny("qwen3_5_text", tmp_path / "model")
    name = "model.layers.0.linear_attn.conv1d.bias"
    spoil(model, lambda tensors: tensors.update({name: torch.ones(320)}))
    with pytest.raises(MalformedInputError, match="does not have") as caught:
        open_source(str(model))
    assert caught.value.tensor == name


def test_attention_in_a_layer_that_has_a_state_is_refused(tmp_path: Path) -> None:
    model = make_tiny("qwen3_5_text", tmp_path / "model")
    name = "model.layers.0.self_attn.q_norm.weight"
    spoil(model, lambda tensors: tensors.update({name: torch.ones(32)}))
    with pytest.raises(MalformedInputError, match="does not have") as caught:
        open_source(str(model))
    assert caught.value.tensor == name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["linear_attention", "full_attention", "full_attention"]}, "order of layer_types"),
        ({"linear_key_head_dim": 16}, "linear_value_head_dim"),
        ({"attn_output_gate": False}, "attn_output_gate"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25, "mrope_section": [16, 8, 8]}}, "mrope_section"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_for_gguf_alone(changes: dict[str, Any], words: str) -> None:
    config = json.loads(PUBLISHED_TEXT) | {"num_hidden_layers": 3, **changes}
    assert any(words in limit.what for limit in open_architecture(config).limits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["linear_attention"]}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({"linear_num_value_heads": 30}, "linear_num_value_heads"),
        ({"rope_parameters": {"mrope_section": [0, 0]}}, "mrope_section"),
        ({"rope_parameters": {"mrope_section": [1, "2"]}}, "mrope_section"),
    ],
)
def test_impossible_sizes_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MalformedInputError, match=words):
        open_architecture(json.loads(PUBLISHED_TEXT) | changes)


PUBLISHED_TEXT = json.dumps(
    {
        "model_type": "qwen3_5_text",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "full_attention_interval": 4,
        "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]},
    }
)
MIXTURE = {
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}


@pytest.mark.parametrize(("changes", "billions"), [({}, 8.954), (MIXTURE, 34.661)], ids=["9B", "35B-A3B"])
def test_the_sizes_of_published_models(changes: dict[str, Any], billions: float) -> None:
    architecture = open_architecture(json.loads(PUBLISHED_TEXT) | changes)
    shapes = artifact_shapes(architecture.family, architecture.config, architecture.hyper)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) / 1e9 == pytest.approx(billions, abs=1e-3)
    metadata = {key.partition(".")[2]: value.value for key, value in architecture.metadata().items()}
    assert metadata["rope.dimension_sections"] == [11, 11, 10, 0]
    assert metadata["rope.dimension_count"] == 64
    assert metadata["ssm.inner_size"] == 4096
    assert ("feed_forward_length" in metadata) != bool(changes)
    assert not architecture.limits


def test_layers_with_a_state_have_no_cache_that_grows(tmp_path: Path) -> None:
    with (source := open_source(str(make_tiny("qwen3_5_text", tmp_path / "model")))).checkpoint:
        shape = shape_of(source)
    state = 4 * (6 * 32 * 32 + 3 * 320)
    assert shape.windows == (None, None, None, 0, None)
    assert shape.cache(1024) - shape.cache(512) == 2 * 2 * 2 * 32 * 512
    assert shape.layer_cache(0, 512) == shape.layer_cache(0, 4096) == state


def test_gguf_keeps_what_steers_a_state_as_llama_cpp_does(tmp_path: Path) -> None:
    """Of one model: quantized in GGUF, and floats for those who read directories."""
    model = make_tiny("qwen3_5_text", tmp_path / "model")
    with (source := open_source(str(model))).checkpoint:
        steering = [output.name for output in source.tensors.outputs if output.steers]
    assert steering[:2] == ["blk.0.ssm_alpha.weight", "blk.0.ssm_beta.weight"]
    assert len(steering) == 8
    (result,) = quantize(str(model), "gguf", levels=["Q8_0"], output_dir=tmp_path, options=Options(threads=1))
    types = {tensor.name: tensor.type.name for tensor in read_gguf(result.path).tensors}
    assert types["blk.0.ssm_alpha.weight"] == "Q8_0"
    assert types["blk.0.ssm_conv1d.weight"] == types["blk.0.ssm_a"] == "F32"
