"""Gemma 4: sizes that differ from layer to layer, keys shared by the last layers, embeddings of layers.

That the numbers are right is shown elsewhere: logits in llama.cpp (test_logits.py), bytes (test_byte_oracle.py).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.advice.footprint import shape_of
from llm_quantize.architectures import open_architecture
from llm_quantize.architectures.mapping import artifact_shapes, checkpoint_shapes
from llm_quantize.errors import MalformedInputError, UnsupportedError
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import Options, quantize
from llm_quantize.streams.network import open_network
from llm_quantize.streams.sizes import from_headers
from tests.tiny_models import WINDOW, make_tiny

E2B: dict[str, Any] = {
    "model_type": "gemma4_text",
    "hidden_size": 1536,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "sliding_window": 512,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "intermediate_size": 6144,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": 30.0,
    "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
}


def made(model: Path, **options: Any) -> Path:
    found = quantize(
        str(model), "gguf", levels=["F32"], output_dir=model / "out", options=Options(threads=1, **options)
    )
    return found[0].path


def test_sizes_of_e2b() -> None:
    architecture = open_architecture(E2B)
    assert architecture.limits == []
    shapes = artifact_shapes(architecture.family, architecture.config, architecture.hyper)
    assert shapes["per_layer_token_embd.weight"] == (262144, 35 * 256)
    assert shapes["blk.4.attn_q.weight"] == (8 * 512, 1536)
    assert shapes["blk.3.attn_k.weight"] == (256, 1536)
    assert shapes["blk.14.attn_k.weight"] == (512, 1536)
    assert "blk.15.attn_k.weight" not in shapes
    assert shapes["blk.14.ffn_up.weight"] == (6144, 1536)
    assert shapes["blk.15.ffn_up.weight"] == (12288, 1536)
    # "5.1 B with embeddings", of which 2.3 B are computed with.
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    assert 4.5e9 < sum(weights.values()) < 5.2e9
    assert max(weights, key=lambda name: weights[name]) == "per_layer_token_embd.weight"
    metadata = architecture.metadata()
    assert metadata["gemma4.feed_forward_length"].value == [6144] * 15 + [12288] * 20
    assert metadata["gemma4.attention.shared_kv_layers"].value == 20
    assert metadata["gemma4.attention.head_count_kv"].value == 1
    assert metadata["gemma4.attention.key_length"].value == 512
    assert metadata["gemma4.attention.key_length_swa"].value == 256
    assert metadata["gemma4.attention.sliding_window_pattern"].value == ([True] * 4 + [False]) * 7
    (divisors,) = architecture.constants.values()
    assert divisors.shape == (256,)
    assert (divisors[:64] == 1).all()
    assert (divisors[64:] > 1e29).all()


def test_both_spellings_of_heads_mean_the_same() -> None:
    old = {**E2B, "attention_k_eq_v": True, "num_global_key_value_heads": 2}
    full = [str(layer) for layer in range(4, 35, 5)]
    new = {name: value for name, value in old.items() if "global" not in name}
    new["per_layer_config"] = {layer: {"head_dim": 512, "num_key_value_heads": 2} for layer in full}
    assert open_architecture(new).hyper == open_architecture(old).hyper
    new["per_layer_config"]["4"] = {"head_dim": 128}
    with pytest.raises(MalformedInputError, match="per_layer_config"):
        open_architecture(new)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_kv_shared_layers": 21}, "num_kv_shared_layers"),
        ({"vocab_size_per_layer_input": 1024}, "vocab_size_per_layer_input"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}, "experts"),
    ],
)
def test_what_no_gguf_file_is_made_of(changes: dict[str, Any], words: str) -> None:
    limits = open_architecture({**E2B, **changes}).limits
    assert len(limits) == 1
    assert words in str(limits[0])


def test_keys_of_layers_that_have_none_are_left_out_and_said(tmp_path: Path) -> None:
    """Published checkpoints hold them; transformers ignores them too."""
    model = make_tiny("gemma4_text", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.4.self_attn.k_proj.weight"
    assert name not in tensors
    save_file({**tensors, name: torch.ones(32, 64)}, model / "model.safetensors", {"format": "pt"})
    with (source := open_source(str(model))).checkpoint:
        assert "not used" in source.left_out[name]
    assert "blk.4.attn_k.weight" not in read_gguf(made(model)).tensors
    save_file({**tensors, "model.layers.4.x.weight": torch.ones(2)}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(MalformedInputError, match="holds a tensor"):
        made(model)


def test_towers_are_left_out_and_said(tmp_path: Path) -> None:
    model = make_tiny("gemma4", tmp_path / "model")
    with (source := open_source(str(model))).checkpoint:
        reasons = set(source.left_out.values())
    assert {text.partition(":")[0] for text in reasons} == {"the vision tower", "the audio tower"}


def test_experts_are_mapped_and_refused_for_gguf(tmp_path: Path) -> None:
    mixed = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
    model = make_tiny("gemma4_text-keys", tmp_path / "model", **mixed)
    with (source := open_source(str(model))).checkpoint:
        assert source.left_out == {}
        names = {output.name for output in source.tensors.outputs}
        assert {"blk.0.ffn_gate_inp.scale", "blk.0.ffn_down_exps.scale", "blk.0.ffn_up_exps.weight"} <= names
        assert "blk.3.attn_v.weight" not in names
    with pytest.raises(UnsupportedError, match="with experts is not written as GGUF"):
        made(model)


def test_what_cannot_run_block_by_block_is_refused_in_the_plan(tmp_path: Path) -> None:
    model = make_tiny("gemma4_text", tmp_path / "model")
    with (source := open_source(str(model))).checkpoint:
        with pytest.raises(UnsupportedError, match="block by block"):
            from_headers(source)
        with pytest.raises(UnsupportedError, match="block by block"):
            open_network(source, dtype="float32")
    with pytest.raises(UnsupportedError, match="packed directories"):
        quantize(str(model), "gptq", levels=["4bit"], output_dir=tmp_path / "packed")
    with pytest.raises(UnsupportedError, match="cannot be a source"):
        open_source(str(made(model)))


def test_the_cache_counts_layers_with_keys_of_their_own(tmp_path: Path) -> None:
    model = make_tiny("gemma4_text", tmp_path / "model")
    with (source := open_source(str(model))).checkpoint:
        shape = shape_of(source)
    assert shape.widths == (2 * 16, 2 * 32, 2 * 16, 2 * 32, 0, 0)
    assert shape.windows == (WINDOW, 0, WINDOW, 0, WINDOW, 0)
    assert shape.cache(512) == 2 * 2 * 512 * 2 * (32 + 64)


def test_a_checkpoint_has_the_names_of_transformers(tmp_path: Path) -> None:
    model = make_tiny("gemma4_text", tmp_path / "model")
    architecture = open_architecture(json.loads((model / "config.json").read_text()))
    found = {name: tuple(value.shape) for name, value in load_file(model / "model.safetensors").items()}
    assert checkpoint_shapes(architecture.family, architecture.config, architecture.hyper) == found
