"""Experts as the hub has them in Qwen 3.5, all of a layer in one tensor: directories hold them as single ones."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llm_quantize.pipeline import quantize
from tests.blockwise.tiny import options, write_noise
from tests.tiny_models import make_tiny


def fuse(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    for layer in range(4):
        prefix = f"model.language_model.layers.{layer}.mlp.experts."
        gate, up, down = (
            [tensors.pop(f"{prefix}{expert}.{name}.weight") for expert in range(4)]
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        tensors[prefix + "gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        tensors[prefix + "down_proj"] = torch.stack(down)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_a_directory_of_fused_experts_is_that_of_single_ones(tmp_path: Path) -> None:
    text = write_noise(tmp_path / "1.txt", 1)
    found = []
    for name in ("single", "fused"):
        model = make_tiny("qwen3_5_moe", tmp_path / name / "model", moe_intermediate_size=64)
        if name == "fused":
            fuse(model)
        given = options(text, method="rtn", group_size=32, ignore=("shared_expert[.]down_proj",))
        out = tmp_path / name / "out"
        (result,) = quantize(str(model), "compressed-tensors", levels=["W4A16"], output_dir=out, options=given)
        found.append((load_file(result.path / "model.safetensors"), (result.path / "config.json").read_text()))
    (single, config), (fused, other) = found
    assert single.keys() == fused.keys()
    assert all(torch.equal(single[name], fused[name]) for name in single)
    assert "model.language_model.layers.0.mlp.experts.3.down_proj.weight_packed" in fused
    assert config == other
