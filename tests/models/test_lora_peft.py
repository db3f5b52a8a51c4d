"""Adapters that peft made, merged here and by peft's own merge_and_unload: the same weights, the same logits."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from llm_quantize.architectures.rows import to_float32
from llm_quantize.models.opening import open_model
from llm_quantize.pipeline import quantize
from tests.tiny_models import make_tiny

LINEAR = ["q_proj", "k_proj", "o_proj", "down_proj", "gate_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("llama", {"target_modules": LINEAR}),
    "rsLoRA": ("llama", {"target_modules": LINEAR, "use_rslora": True}),
    "DoRA": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "all of it": ("qwen2", {"target_modules": "all-linear", "r": 7, "lora_alpha": 5}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 9},
            "alpha_pattern": {r"layers\.\d+\.self_attn\.k_proj": 31},
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "embedding, DoRA": ("llama", {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True}),
    "tied embedding": ("llama3", {"target_modules": ["embed_tokens", "v_proj"]}),
    "modules_to_save": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "norms saved": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["input_layernorm", "norm"]}),
    "biases": ("llama-bias", {"target_modules": LINEAR[:3], "bias": "all"}),
    "biases of LoRA": ("llama-bias", {"target_modules": LINEAR[:2], "bias": "lora_only"}),
    "a bias of B": ("llama-bias", {"target_modules": LINEAR[:3], "lora_bias": True}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D, DoRA": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "Conv1D, embedding": ("gpt2", {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
}


def opened(model: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def trained(model: Path, place: Path, settings: Mapping[str, Any], *, seed: int = 0, half: bool = False) -> Any:
    """A peft model whose adapter, with random values, is saved in ``place``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = opened(model)
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})
        wrapped = peft.get_peft_model(base, config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
                if half:
                    parameter.data = parameter.data.to(torch.bfloat16).float()
        wrapped.save_pretrained(place)
    return wrapped


def merged_by_peft(wrapped: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return wrapped.merge_and_unload()


def check_weights(model: Path, lora: list[str], twin: Mapping[str, torch.Tensor], *, tolerance: float = 4e-7) -> None:
    front = "" if "lm_head.weight" in twin and "model.norm.weight" in twin else "transformer."
    touched = 0
    with open_model(str(model), lora=lora) as found:
        for name in found.tensors:
            key = name if name in twin else f"{front}{name}"
            values = to_float32(found.read_rows(name, 0, found.matrix(name)[0]))
            expected = twin[key].detach().reshape(values.shape).numpy()
            np.testing.assert_allclose(values, expected, rtol=tolerance, atol=tolerance * abs(expected).max())
            touched += name in found.changed
    assert touched > 1


@pytest.mark.parametrize("case", CASES)
def test_weights_and_logits_as_peft_has_them(tmp_path: Path, case: str) -> None:
    variant, settings = CASES[case]
    model = make_tiny(variant, tmp_path / "model")
    wrapped = trained(model, tmp_path / "adapter", settings)
    twin = merged_by_peft(wrapped).eval()
    check_weights(model, [str(tmp_path / "adapter")], twin.state_dict())
    (result,) = quantize(
        str(model), "safetensors", levels=["F32"], lora=[str(tmp_path / "adapter")], output_dir=tmp_path / "out"
    )
    ids = torch.arange(5, 35).reshape(2, 15)
    with torch.no_grad():
        expected, before = twin(ids).logits, opened(model).eval()(ids).logits
        found = opened(result.path).eval()(ids).logits
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def test_a_scale_is_pefts(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    wrapped = trained(model, tmp_path / "adapter", CASES["LoRA"][1])
    for module in wrapped.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.25)
    check_weights(model, [f"{tmp_path / 'adapter'}=0.25"], merged_by_peft(wrapped).state_dict())


def test_two_adapters(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    first = trained(model, tmp_path / "a", CASES["LoRA"][1])
    trained(model, tmp_path / "b", {"target_modules": ["q_proj", "up_proj"], "r": 2}, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first.load_adapter(tmp_path / "b", "second")
        first.base_model.set_adapter(["default", "second"])
    check_weights(model, [str(tmp_path / "a"), str(tmp_path / "b")], merged_by_peft(first).state_dict(), tolerance=8e-7)


def test_an_adapter_in_half_precision_and_in_a_pickle(tmp_path: Path) -> None:
    """The same values in bfloat16, in adapter_model.bin: the same bits."""
    from safetensors.torch import load_file

    model = make_tiny("llama", tmp_path / "model")
    wrapped = trained(model, tmp_path / "adapter", CASES["DoRA"][1], half=True)
    pickled = shutil.copytree(tmp_path / "adapter", tmp_path / "pickled")
    tensors = load_file(pickled / "adapter_model.safetensors")
    torch.save({name: value.to(torch.bfloat16) for name, value in tensors.items()}, pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    check_weights(model, [str(pickled)], merged_by_peft(wrapped).state_dict())
    with (
        open_model(str(model), lora=[str(pickled)]) as one,
        open_model(str(model), lora=[str(tmp_path / "adapter")]) as other,
    ):
        for name in one.tensors:
            rows = one.matrix(name)[0]
            assert one.read_rows(name, 0, rows).tobytes() == other.read_rows(name, 0, rows).tobytes()
