"""Quantized model directories written plainly: one long integer for each run of codes, one matrix after another.

Nothing of the package is used, so that what it decodes can be compared with what stands here. ``write_packed`` rounds
a model (min-max, or absmax where symmetric) and gives the values that a reader must find.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words_of(codes: list[int], bits: int) -> list[int]:
    """int32 values that hold ``codes``, lowest bits first."""
    total = sum(code << (index * bits) for index, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    data = total.to_bytes(4 * count, "little")
    return [int.from_bytes(data[at : at + 4], "little", signed=True) for at in range(0, len(data), 4)]


def pack_rows(codes: np.ndarray, bits: int) -> torch.Tensor:
    """int32: the codes of each row, packed along it."""
    return torch.tensor([words_of([int(code) for code in row], bits) for row in codes], dtype=torch.int32)


@dataclass(frozen=True)
class Form:
    """What to write. ``act_order``: columns in groups by a permutation, with g_idx."""

    method: str
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    version: str = "gptq"
    act_order: bool = False
    scale: torch.dtype = torch.float16
    integer: bool = False


@dataclass(frozen=True)
class Rounded:
    """codes (N, K) 0 to 2^b - 1, zeros and scales (N, G), the group of each column (K), the values."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    index: np.ndarray
    values: np.ndarray


def rounded(weight: np.ndarray, form: Form, seed: int) -> Rounded:
    rows, columns = weight.shape
    group = columns if form.group == -1 else form.group
    index = np.arange(columns) // group
    if form.act_order:
        index = np.random.default_rng(seed).permutation(index)
    groups, top = int(index.max()) + 1, (1 << form.bits) - 1
    scales, zeros = np.zeros((rows, groups), np.float32), np.zeros((rows, groups), np.int64)
    for g in range(groups):
        part = weight[:, index == g]
        if form.symmetric:
            scale = 2 * np.abs(part).max(axis=1) / top
            zero = np.full(rows, 1 << (form.bits - 1))
        else:
            low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
            scale = (high - low) / top
            zero = np.clip(np.round(-low / np.maximum(scale, 1e-9)), 1, top).astype(np.int64)
        scales[:, g] = torch.from_numpy(scale.astype(np.float32)).to(form.scale).float().numpy()
        zeros[:, g] = zero
    step, zero = scales[:, index], zeros[:, index]
    codes = np.clip(np.round(weight / np.maximum(step, 1e-9)) + zero, 0, top).astype(np.int64)
    values = (codes - zero).astype(np.float32) * step
    return Rounded(codes, zeros, scales, index, values)


def _gptq(found: Rounded, form: Form) -> dict[str, torch.Tensor]:
    stored = found.zeros - (1 if form.version == "gptq" else 0)
    return {
        "qweight": pack_rows(found.codes, form.bits).T.contiguous(),
        "qzeros": pack_rows(stored.T, form.bits),
        "scales": torch.from_numpy(found.scales.T.copy()).to(form.scale),
        "g_idx": torch.from_numpy(found.index.astype(np.int32)),
    }


def _awq(found: Rounded, form: Form) -> dict[str, torch.Tensor]:
    def shuffled(codes: np.ndarray) -> np.ndarray:
        return codes.reshape(len(codes), -1, 8)[:, :, AWQ_ORDER].reshape(codes.shape)

    return {
        "qweight": pack_rows(shuffled(found.codes.T), form.bits),
        "qzeros": pack_rows(shuffled(found.zeros.T), form.bits),
        "scales": torch.from_numpy(found.scales.T.copy()).to(form.scale),
    }


def _compressed(found: Rounded, form: Form) -> dict[str, torch.Tensor]:
    fields = {"weight_scale": torch.from_numpy(found.scales.copy()).to(form.scale)}
    half = 1 << (form.bits - 1)
    if form.integer:
        fields["weight"] = torch.from_numpy((found.codes - half).astype(np.int8))
        if not form.symmetric:
            fields["weight_zero_point"] = torch.from_numpy((found.zeros - half).astype(np.int8))
        return fields
    fields["weight_packed"] = pack_rows(found.codes, form.bits)
    fields["weight_shape"] = torch.tensor(found.codes.shape, dtype=torch.int64)
    if form.act_order:
        fields["weight_g_idx"] = torch.from_numpy(found.index.astype(np.int32))
    if not form.symmetric:
        fields["weight_zero_point"] = pack_rows(found.zeros.T, form.bits).T.contiguous()
    return fields


PACKERS: Mapping[str, Callable[[Rounded, Form], dict[str, torch.Tensor]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}


def settings_of(form: Form) -> dict[str, Any]:
    """quantization_config as the format's owner writes it."""
    if form.method == "gptq":
        return {
            "quant_method": "gptq", "bits": form.bits, "group_size": form.group, "sym": form.symmetric,
            "desc_act": form.act_order, "checkpoint_format": form.version, "pack_dtype": "int32", "lm_head": False,
        }  # fmt: skip
    if form.method == "awq":
        return {
            "quant_method": "awq", "bits": form.bits, "group_size": form.group, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": None,
        }  # fmt: skip
    strategy = {"strategy": "channel"} if form.group == -1 else {"strategy": "group", "group_size": form.group}
    weights = {"num_bits": form.bits, "type": "int", "symmetric": form.symmetric, "dynamic": False, **strategy}
    kind = "int-quantized" if form.integer else "pack-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {**group, "format": kind}},
    }  # fmt: skip


def is_linear(name: str) -> bool:
    """Whether a tensor of a checkpoint is the weight of a linear inside a layer, experts included."""
    words = ("norm", "embed", "lm_head", "ln_", "wte", "wpe", "mlp.gate.weight", "router")
    return name.endswith(".weight") and not any(word in name for word in words)


def write_packed(
    model: Path,
    folder: Path,
    form: Form,
    *,
    chosen: Callable[[str], bool] = is_linear,
    transposed: Callable[[str], bool] = lambda name: False,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Write the model in ``model`` to ``folder`` with the matrices that ``chosen`` names quantized. ``transposed``:
    those that the source has as (in, out). ``tensors``: in the place of the model's own.

    Returns {name in the source: float32 values a reader must find}.
    """
    folder.mkdir(parents=True)
    for file in model.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, folder / file.name)
    own = {name: value for file in sorted(model.glob("*.safetensors")) for name, value in load_file(file).items()}
    expected: dict[str, torch.Tensor] = {}
    stored: dict[str, torch.Tensor] = {}
    for seed, (name, value) in enumerate((tensors or own).items()):
        if value.ndim != 2 or not chosen(name):
            stored[name], expected[name] = value.clone(), value.float()
            continue
        matrix = value.float().numpy()
        found = rounded(matrix.T if transposed(name) else matrix, form, seed)
        expected[name] = torch.from_numpy(np.ascontiguousarray(found.values.T if transposed(name) else found.values))
        fields = PACKERS[form.method](found, form)
        stored |= {f"{name.removesuffix('.weight')}.{suffix}": field for suffix, field in fields.items()}
    save_file(
        {name: value.contiguous() for name, value in stored.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings_of(form)}))
    return expected
