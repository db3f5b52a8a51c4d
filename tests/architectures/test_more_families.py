"""What families of 2025 and 2026 have of their own, beyond the tests that every family passes."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.architectures import open_architecture
from llm_quantize.errors import MalformedInputError
from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import Options, quantize
from llm_quantize.runtimes.llama_cpp import LlamaCpp

from ..tiny_models import VOCABULARY, WINDOW, make_tiny, reference_logits, reference_model


def distance(model: Path, length: int) -> float:
    """From transformers' logits to those of the F32 file in llama.cpp, as a share of their range."""
    (made,) = quantize(str(model), "gguf", levels=["F32"], output_dir=model / "out", options=Options(threads=1))
    ids = np.random.Generator(np.random.PCG64(length)).integers(0, VOCABULARY, length).tolist()
    expected = reference_logits(reference_model(model), ids)
    with LlamaCpp(made.path, context=512, threads=1) as llama:
        return float(np.abs(llama.logits(ids) - expected).max() / np.ptp(expected))


def test_exaone_slides_in_its_model_of_64_layers(tmp_path: Path) -> None:
    """llama.cpp knows that model by the number of its layers; the fourth layers are not rotated."""
    changes = {"sliding_window": WINDOW, "layer_types": None}
    model = make_tiny("exaone4", tmp_path / "model", num_hidden_layers=64, **changes)
    with (source := open_source(str(model))).checkpoint:
        assert source.architecture.sliding == [(layer + 1) % 4 != 0 for layer in range(64)]
    assert distance(model, 3 * WINDOW) < 1e-3


def test_exaone_of_fewer_layers_that_slide_is_refused_for_llama_cpp(tmp_path: Path) -> None:
    model = make_tiny("exaone4", tmp_path / "model", sliding_window=WINDOW, layer_types=["sliding_attention"] * 2)
    with (source := open_source(str(model))).checkpoint:
        (limit,) = source.architecture.limits
    assert "order of layer_types" in str(limit)


def test_scores_of_ministral_grow_past_its_trained_context(tmp_path: Path) -> None:
    """Three trained contexts of 128 tokens; without the factor the logits would be others."""
    model = make_tiny("ministral3", tmp_path / "model")
    assert distance(model, 300) < 1e-3
    config = json.loads((model / "config.json").read_text())
    (made,) = (model / "out").glob("*.gguf")
    told = gguf.GGUFReader(made).get_field("mistral3.attention.temperature_scale")
    assert told is not None
    assert told.contents() == pytest.approx(config["rope_parameters"]["llama_4_scaling_beta"])
    ids = list(range(200))
    before = reference_logits(reference_model(model), ids)
    config["rope_parameters"]["llama_4_scaling_beta"] = 0.0
    (model / "config.json").write_text(json.dumps(config))
    assert np.abs(reference_logits(reference_model(model), ids) - before).max() > 1e-2 * np.ptp(before)


def test_a_wrapper_is_what_its_language_model_is(tmp_path: Path) -> None:
    """Mistral Small 3.1 has a Mistral inside, Ministral 3 a Ministral; both leave their tower out, and say so."""
    rope = {"rope_type": "default", "rope_theta": 50.0}
    small = make_tiny("mistral3", tmp_path / "small", model_type="mistral", rope_parameters=rope)
    ministral = make_tiny("mistral3", tmp_path / "ministral")
    for model, arch in ((small, "mistral3"), (ministral, "mistral3")):
        with (source := open_source(str(model))).checkpoint:
            assert source.architecture.gguf_name == arch
            assert any("vision tower" in reason for reason in source.tensors.left_out.values())
        assert distance(model, 60) < 1e-3


def test_the_width_of_lfm2_is_cut_as_its_configuration_asks(tmp_path: Path) -> None:
    """LFM2-1.2B: 12,288 becomes 8,192, in blocks of 256; key heads stand in GGUF by layers, 0 at convolutions."""
    published = {
        **{"model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 16},
        **{"block_ff_dim": 12288, "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0},
        **{"block_multiple_of": 256, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 65536},
        **{"max_position_embeddings": 128000, "conv_L_cache": 3, "full_attn_idxs": [2, 5, 8, 10, 12, 14]},
        **{"rope_theta": 1e6, "norm_eps": 1e-5},
    }
    found = open_architecture(published)
    assert not found.limits
    assert found.hyper.feed_forward_length == 8192
    assert found.hyper.tied
    heads = found.metadata()["lfm2.attention.head_count_kv"].value
    assert heads == [8 if layer in (2, 5, 8, 10, 12, 14) else 0 for layer in range(16)]
    assert open_architecture({**published, "block_auto_adjust_ff_dim": False}).hyper.feed_forward_length == 12288
    with pytest.raises(MalformedInputError, match="layer_types"):
        open_architecture({**published, "layer_types": ["conv", "mamba"] * 8})
    model = make_tiny("lfm2", tmp_path / "model")
    assert distance(model, 4) < 1e-3  # shorter than two windows of the convolution


@pytest.mark.parametrize("alpha", [1000.0, 50.0])
def test_hunyuan_stretches_its_base(alpha: float, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "alpha": alpha, "factor": 1.0, "rope_theta": 10.0}
    model = make_tiny("hunyuan_v1_dense", tmp_path / "model", rope_parameters=rope)
    assert distance(model, 300) < 1e-3


@pytest.mark.parametrize("variant", ["glm4_moe", "ernie4_5_moe"])
def test_a_bias_of_the_router_chooses_and_does_not_weigh(variant: str, tmp_path: Path) -> None:
    """Without it other experts answer: it is in the file, in F32, and llama.cpp heeds it."""
    model = make_tiny(variant, tmp_path / "model")
    (made,) = quantize(str(model), "gguf", levels=["Q8_0"], output_dir=tmp_path, options=Options(threads=1))
    biases = [one for one in gguf.GGUFReader(made.path).tensors if "exp_probs_b" in one.name]
    assert [one.name for one in biases] == ["blk.1.exp_probs_b.bias", "blk.2.exp_probs_b.bias"]
    assert all(one.tensor_type.name == "F32" and one.data.std() > 0.05 for one in biases)
    stored = load_file(model / "model.safetensors")
    names = [name for name in stored if name.endswith("e_score_correction_bias")]
    assert len(names) == 2
    assert distance(model, 100) < 1e-3
    ids = list(range(100))
    before = reference_logits(reference_model(model), ids)
    save_file(stored | {name: torch.zeros_like(stored[name]) for name in names}, model / "model.safetensors")
    assert np.abs(reference_logits(reference_model(model), ids) - before).max() > 1e-2 * np.ptp(before)


def test_a_next_token_head_is_left_out_and_said(tmp_path: Path) -> None:
    """Its layer stands behind the others, as the checkpoints of GLM-4.5 have it."""
    model = make_tiny("glm4_moe", tmp_path / "model", num_nextn_predict_layers=1)
    stored = load_file(model / "model.safetensors")
    extra = {
        name.replace("layers.2.", "layers.3."): value.clone() for name, value in stored.items() if "layers.2." in name
    }
    save_file(
        stored | extra | {"model.layers.3.enorm.weight": torch.ones(64)}, model / "model.safetensors", {"format": "pt"}
    )
    with (source := open_source(str(model))).checkpoint:
        reasons = source.tensors.left_out
    assert reasons.keys() == {*extra, "model.layers.3.enorm.weight"}
    assert all("predicts several tokens" in reason for reason in reasons.values())


def test_groups_of_experts_are_refused_for_llama_cpp(tmp_path: Path) -> None:
    model = make_tiny("glm4_moe", tmp_path / "model", n_group=2, topk_group=1, num_experts_per_tok=2)
    with (source := open_source(str(model))).checkpoint:
        assert "n_group" in str(source.architecture.limits[0])
