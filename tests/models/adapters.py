"""LoRA adapters written by hand, as peft saves them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.safetensors_by_hand import write_tensors

Arrays = dict[str, np.ndarray]


def factors(shapes: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 0) -> Arrays:
    """{tensor: values} of an adapter for weights (out, in) of these ``shapes``, by module."""
    random = np.random.default_rng(seed)
    found: Arrays = {}
    for module, (outputs, inputs) in shapes.items():
        front = f"base_model.model.{module}"
        found[f"{front}.lora_A.weight"] = random.standard_normal((rank, inputs)).astype(np.float32)
        found[f"{front}.lora_B.weight"] = random.standard_normal((outputs, rank)).astype(np.float32)
    return found


def write_adapter(place: Path, tensors: Mapping[str, np.ndarray], rank: int = 4, **settings: Any) -> Path:
    """The directory of an adapter; ``settings``: of adapter_config.json, beside the usual ones."""
    place.mkdir(parents=True, exist_ok=True)
    usual = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "base_model_name_or_path": "org/tiny"}
    (place / "adapter_config.json").write_text(json.dumps({**usual, **settings}))
    write_tensors(place / "adapter_model.safetensors", tensors)
    return place


def attention(layers: Sequence[int] = (0, 1), hidden: int = 256) -> dict[str, tuple[int, int]]:
    """Modules of the tiny Llama that adapters usually change."""
    return {
        f"model.layers.{layer}.self_attn.{name}": (hidden, hidden) for layer in layers for name in ("q_proj", "o_proj")
    }
