"""gpt-oss: experts that are dealt out in turn, and OpenAI's own files, whose MXFP4 goes over code for code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llm_quantize.architectures import open_architecture
from llm_quantize.architectures.base import OutputTensor, Piece
from llm_quantize.architectures.rows import Arrays, inverse, read_output_rows, scatter
from llm_quantize.artifacts.verify import verify
from llm_quantize.conversion import convert
from llm_quantize.errors import MalformedInputError
from llm_quantize.models.opening import open_source
from llm_quantize.options import Options
from llm_quantize.pipeline import quantize
from llm_quantize.runtimes.llama_cpp import LlamaCpp

from ..tiny_models import make_tiny, reference_logits, reference_model

PUBLISHED: dict[str, Any] = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "num_hidden_layers": 24,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}


def as_openai(root: Path) -> tuple[Path, Path]:
    """A tiny model with experts in MXFP4, as OpenAI ships them, and what transformers decodes it to."""
    tiny = make_tiny("gpt_oss", root / "tiny", hidden_size=64, intermediate_size=96)
    stored = load_file(tiny / "model.safetensors")
    plain = dict(stored)
    generator = torch.Generator().manual_seed(1)
    for name in [one for one in stored if one.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 123, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()
    config = json.loads((tiny / "config.json").read_text())
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    for folder, tensors, more in (("packed", stored, {"quantization_config": said}), ("plain", plain, {})):
        (root / folder).mkdir()
        for file in tiny.glob("*.json"):
            (root / folder / file.name).write_bytes(file.read_bytes())
        (root / folder / "config.json").write_text(json.dumps({**config, **more}))
        save_file(tensors, root / folder / "model.safetensors", {"format": "pt"})
    return root / "packed", root / "plain"


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {one.name: dequantize(one.data, one.tensor_type) for one in gguf.GGUFReader(path).tensors}


def test_what_openai_ships_goes_over_code_for_code(tmp_path: Path) -> None:
    packed, plain = as_openai(tmp_path)
    result = convert(str(packed), "gguf", output_dir=tmp_path / "out", options=Options(threads=1))
    assert result.conversion is not None
    assert result.conversion["verdict"] == "exact"
    outcome = verify(result.path, source=str(packed))
    assert outcome.ok, outcome.all_problems()
    found = tensors_of(result.path)
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(result.path).tensors}
    values = load_file(plain / "model.safetensors")
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts."
        both, down = values[prefix + "gate_up_proj"].float(), values[prefix + "down_proj"].float()
        expected = {"ffn_gate_exps": both[..., ::2].mT, "ffn_up_exps": both[..., 1::2].mT, "ffn_down_exps": down.mT}
        for word, value in expected.items():
            assert kinds[f"blk.{layer}.{word}.weight"] == "MXFP4"
            assert np.array_equal(found[f"blk.{layer}.{word}.weight"], value.numpy())
        bias = values[prefix + "gate_up_proj_bias"].float()
        assert np.array_equal(found[f"blk.{layer}.ffn_up_exps.bias"], bias[:, 1::2].numpy())


def test_the_packed_model_is_the_decoded_one(tmp_path: Path) -> None:
    packed, plain = as_openai(tmp_path)
    paths = []
    for model in (packed, plain):
        (result,) = quantize(str(model), "gguf", levels=["F32"], output_dir=model / "out", options=Options(threads=1))
        paths.append(result.path)
    one, other = map(tensors_of, paths)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    ids = np.random.Generator(np.random.PCG64(5)).integers(0, 256, 100).tolist()
    expected = reference_logits(reference_model(plain), ids)
    with LlamaCpp(paths[0], context=128, threads=1) as llama:
        assert np.abs(llama.logits(ids) - expected).max() < 1e-3 * np.ptp(expected)


@pytest.mark.parametrize("transpose", [True, False])
def test_columns_dealt_out_come_together_again(transpose: bool) -> None:
    """The obvious way: slices of the whole tensor."""
    whole = np.random.Generator(np.random.PCG64(2)).random((3, 4, 10)).astype(np.float32)
    expected = [
        np.ascontiguousarray(whole[..., k::2].swapaxes(1, 2) if transpose else whole[..., k::2]) for k in (0, 1)
    ]
    outputs = [
        OutputTensor(f"o{k}", expected[k].shape, (Piece("w", transpose=transpose, deal=(k, 2)),)) for k in (0, 1)
    ]
    source = Arrays(lambda name: whole)
    back = np.full_like(whole, np.nan)
    for output, values in zip(outputs, expected, strict=True):
        rows = values.reshape(-1, values.shape[-1])
        for start, stop in ((0, len(rows)), (2, 7)):
            assert np.array_equal(read_output_rows(source, output, start, stop), rows[start:stop])
        for start, stop in ((0, 5), (5, len(rows))):
            scatter(source, output, start, rows[start:stop], {"w": back})
    assert np.array_equal(back, whole)
    made = inverse({"w": whole.shape}, outputs)["w"]
    parts = Arrays(lambda name: expected[int(name[1])])
    assert np.array_equal(read_output_rows(parts, made, 1, 9), whole.reshape(-1, 10)[1:9])
    with pytest.raises(ValueError, match="1 of 2 shares of w"):
        inverse({"w": whole.shape}, outputs[:1])


def test_the_published_model_is_known_and_its_ramp_told() -> None:
    found = open_architecture(PUBLISHED)
    assert not found.limits
    assert found.sliding == [layer % 2 == 0 for layer in range(24)]
    assert (found.window, found.hyper.n_expert, found.hyper.expert_feed_forward_length) == (128, 32, 2880)
    assert any("YaRN's ramp" in note for note in found.notes)
    values = {key: value.value for key, value in found.metadata().items()}
    assert values["gpt-oss.expert_feed_forward_length"] == 2880
    assert values["gpt-oss.rope.scaling.factor"] == 32.0
    rounded = {**PUBLISHED, "rope_scaling": {**PUBLISHED["rope_scaling"], "truncate": True}}
    assert not open_architecture(rounded).notes


@pytest.mark.parametrize("limits", [True, False])
def test_a_ramp_that_is_no_truth_value_says_where_it_stands(limits: bool) -> None:
    """Also where another part of the configuration keeps it out of llama.cpp, and rotary numbers are not worked out."""
    other = {"swiglu_limit": 5.0} if limits else {}
    wrong = {**PUBLISHED, **other, "rope_scaling": {**PUBLISHED["rope_scaling"], "truncate": "often"}}
    with pytest.raises(MalformedInputError, match="truncate") as caught:
        open_architecture(wrong, file=Path("config.json"))
    assert caught.value.file == "config.json"


@pytest.mark.parametrize("change", [{"swiglu_limit": 5.0}, {"attention_bias": False}])
def test_what_llama_cpp_has_built_in(change: dict[str, Any]) -> None:
    (limit,) = open_architecture({**PUBLISHED, **change}).limits
    assert next(iter(change)) in str(limit)


def test_experts_that_are_dealt_out_are_put_back_by_a_run(tmp_path: Path) -> None:
    """What feedback writes is what it computes with: the artifact, decoded, is the quantized stream's weights."""
    tiny = make_tiny("gpt_oss", tmp_path / "model", hidden_size=64, intermediate_size=96)
    (result,) = quantize(str(tiny), "gguf", levels=["Q8_0"], output_dir=tmp_path / "out", options=Options(threads=1))
    with open_source(str(result.path)).checkpoint as stored:
        name = "model.layers.1.mlp.experts.gate_up_proj"
        rows, columns = stored.matrix(name)
        values = np.asarray(stored.read_rows(name, 0, rows)).reshape(4, 64, columns)
    wanted = load_file(tiny / "model.safetensors")[name].float().numpy()
    assert values.shape == wanted.shape
    assert np.abs(values - wanted).max() < 0.01 * np.abs(wanted).max()
