"""Directories in layouts that are only read, written plainly: one value after another, nothing of the package.

``write_peer`` draws codes and scales for every matrix of a model's blocks, and gives the float32 values they mean. The
formulas are the owners': ModelOpt's NVFP4QTensor, MXFP4QTensor and MXFP8QTensor, AutoAWQ's WQLinear_GEMV and
WQLinear_GEMVFast, auto_round's QuantLinear, transformers' FineGrainedFP8.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .packed_formats import pack_rows
from .reference_directories import AWQ_ORDER

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
Fields = dict[str, torch.Tensor]
Made = tuple[Fields, np.ndarray]
"""The tensors of a module, by suffix, and its values."""


def halves(codes: np.ndarray) -> torch.Tensor:
    """uint8: two codes a byte, the first in the low half."""
    return torch.from_numpy((codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8))


def powers(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[torch.Tensor, np.ndarray]:
    codes = rng.integers(110, 125, shape)
    return torch.from_numpy(codes.astype(np.uint8)), np.float32(2.0) ** (codes - 127).astype(np.float32)


def e4m3(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[torch.Tensor, np.ndarray]:
    drawn = torch.from_numpy(rng.normal(size=shape).astype(np.float32)).to(torch.float8_e4m3fn)
    return drawn, drawn.float().numpy()


def each_of(scales: np.ndarray, group: int) -> np.ndarray:
    return np.repeat(scales, group, axis=1)


def nvfp4(rng: np.random.Generator, rows: int, columns: int) -> Made:
    codes, whole = rng.integers(0, 16, (rows, columns)), np.float32(0.0123)
    drawn = torch.from_numpy(rng.uniform(1, 400, (rows, columns // 16)).astype(np.float32)).to(torch.float8_e4m3fn)
    levels = np.array(E2M1, np.float32)[codes]
    values = levels * each_of(drawn.float().numpy() * whole, 16)
    fields = {"weight": halves(codes), "weight_scale": drawn, "weight_scale_2": torch.tensor(whole)}
    return {**fields, "input_scale": torch.tensor(0.5)}, values


def mxfp4(rng: np.random.Generator, rows: int, columns: int) -> Made:
    codes = rng.integers(0, 16, (rows, columns))
    stored, scales = powers(rng, (rows, columns // 32))
    return {"weight": halves(codes), "weight_scale": stored}, np.array(E2M1, np.float32)[codes] * each_of(scales, 32)


def mxfp8(rng: np.random.Generator, rows: int, columns: int) -> Made:
    stored, scales = powers(rng, (rows, columns // 32))
    codes, levels = e4m3(rng, (rows, columns))
    return {"weight": codes, "weight_scale": stored}, levels * each_of(scales, 32)


def fp8_rows(rng: np.random.Generator, rows: int, columns: int) -> Made:
    codes, levels = e4m3(rng, (rows, columns))
    scales = rng.uniform(0.01, 0.1, (rows, 1)).astype(np.float32)
    return {"weight": codes, "weight_scale": torch.from_numpy(scales[:, 0].copy())}, levels * scales


def fp8_whole(rng: np.random.Generator, rows: int, columns: int) -> Made:
    codes, levels = e4m3(rng, (rows, columns))
    scale = np.float32(0.0173)
    return {"weight": codes, "weight_scale": torch.tensor(scale), "input_scale": torch.tensor(0.5)}, levels * scale


def _blocks(scales: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return np.repeat(np.repeat(scales, 128, axis=0), 128, axis=1)[:rows, :columns]


def fp8_blocks(rng: np.random.Generator, rows: int, columns: int) -> Made:
    codes, levels = e4m3(rng, (rows, columns))
    scales = rng.uniform(0.01, 0.1, (-(-rows // 128), -(-columns // 128))).astype(np.float32)
    fields = {"weight": codes, "weight_scale_inv": torch.from_numpy(scales)}
    return fields, levels * _blocks(scales, rows, columns)


def fp8_powers(rng: np.random.Generator, rows: int, columns: int) -> Made:
    codes, levels = e4m3(rng, (rows, columns))
    stored, scales = powers(rng, (-(-rows // 128), -(-columns // 128)))
    fields = {"weight": codes, "weight_scale_inv": stored.view(torch.float8_e8m0fnu)}
    return fields, levels * _blocks(scales, rows, columns)


def _integers(rng: np.random.Generator, rows: int, columns: int, group: int) -> tuple[np.ndarray, ...]:
    """codes (N, K), zeros (N, G), scales float16 (N, G)."""
    shape = (rows, columns // group)
    codes, zeros = rng.integers(0, 16, (rows, columns)), rng.integers(1, 16, shape)
    return codes, zeros, rng.uniform(0.001, 0.02, shape).astype(np.float16)


def _values(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    return (codes - each_of(zeros, group)).astype(np.float32) * each_of(scales.astype(np.float32), group)


def _padded(numbers: np.ndarray, group: int) -> np.ndarray:
    """(N, G) filled with zeros to the groups that AutoAWQ's calculate_zeros_width makes room for."""
    multiple = {64: 16, 32: 32}.get(group, 8)
    return np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % multiple)))


def awq_gemv(rng: np.random.Generator, rows: int, columns: int) -> Made:
    group = 64
    codes, zeros, scales = _integers(rng, rows, columns, group)
    fields = {
        "qweight": pack_rows(codes, 4),
        "qzeros": pack_rows(_padded(zeros, group), 4),
        "scales": torch.from_numpy(_padded(scales, group)),
    }
    return fields, _values(codes, zeros, scales, group)


def awq_gemv_fast(rng: np.random.Generator, rows: int, columns: int) -> Made:
    group = 64
    codes, zeros, scales = _integers(rng, rows, columns, group)
    offsets = -(scales.astype(np.float32) * zeros).astype(np.float16)
    words = np.zeros((rows // 4, columns), np.uint16)
    place = [32 * (c // 32) + c % 32 // 8 * 2 + c % 8 // 2 * 8 + c % 2 for c in range(columns)]  # of pairs
    place = [p - p % 8 + (p % 2) * 4 + p % 8 // 2 for p in place]  # even places of eight first
    for row in range(rows):
        for column in range(columns):
            # 4 rows of 64 columns are 256 codes one after the other, four to a word
            at = row % 4 * 64 + place[column] % 64
            words[row // 4, place[column] // 64 * 64 + at // 4] |= int(codes[row, column]) << (at % 4 * 4)
    fields = {
        "qweight": torch.from_numpy(words.view(np.int16)),
        "qzeros": torch.from_numpy(_padded(offsets, group).T.copy()),
        "scales": torch.from_numpy(_padded(scales, group).T.copy()),
    }
    values = codes.astype(np.float32) * each_of(scales.astype(np.float32), group)
    return fields, values + each_of(offsets.astype(np.float32), group)


def gptq(minus: int) -> Callable[[np.random.Generator, int, int], Made]:
    def made(rng: np.random.Generator, rows: int, columns: int) -> Made:
        codes, zeros, scales = _integers(rng, rows, columns, 64)
        fields = {
            "qweight": pack_rows(codes, 4).T.contiguous(),
            "qzeros": pack_rows(zeros.T - minus, 4),
            "scales": torch.from_numpy(scales.T.copy()),
        }
        return fields, _values(codes, zeros, scales, 64)

    return made


def awq_gemm(rng: np.random.Generator, rows: int, columns: int) -> Made:
    codes, zeros, scales = _integers(rng, rows, columns, 64)

    def words(numbers: np.ndarray) -> torch.Tensor:
        return pack_rows(numbers.reshape(len(numbers), -1, 8)[:, :, AWQ_ORDER].reshape(numbers.shape), 4)

    fields = {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": torch.from_numpy(scales.T.copy())}
    return fields, _values(codes, zeros, scales, 64)


def mxfp4_packed(rng: np.random.Generator, rows: int, columns: int) -> Made:
    fields, values = mxfp4(rng, rows, columns)
    return {"weight_packed": fields["weight"], "weight_scale": fields["weight_scale"]}, values


def kimi(rng: np.random.Generator, rows: int, columns: int) -> Made:
    """INT4 in groups of 32, as Kimi K2 Thinking and K2.5 ship their experts: pack-quantized, scales of bfloat16."""
    codes = rng.integers(-8, 8, (rows, columns))
    scales = torch.from_numpy(rng.uniform(0.001, 0.02, (rows, columns // 32)).astype(np.float32)).to(torch.bfloat16)
    fields = {
        "weight_packed": pack_rows(codes + 8, 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int32),
    }
    return fields, codes.astype(np.float32) * each_of(scales.float().numpy(), 32)


_AUTO = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": False}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}
_KIMI = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "targets": ["Linear"],
            "weights": {
                **{"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
                **{"dynamic": False, "actorder": None, "observer": "minmax", "block_structure": None},
            },
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quantization_status": "compressed",
}

PEERS: Mapping[str, tuple[Callable[[np.random.Generator, int, int], Made], dict[str, Any]]] = {
    "ModelOpt NVFP4": (nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "ModelOpt MXFP4": (mxfp4, {"quant_method": "modelopt", "quant_algo": "W4A8_MXFP4_FP8"}),
    "ModelOpt MXFP8": (mxfp8, {"quant_method": "modelopt", "quant_algo": "MXFP8"}),
    "ModelOpt FP8 per row": (fp8_rows, {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}),
    "ModelOpt FP8": (fp8_whole, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "FP8 blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}),
    "FP8 powers": (
        fp8_powers,
        {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "scale_fmt": "ue8m0"},
    ),
    "FP8 rows": (fp8_rows, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "AWQ gemv": (awq_gemv, {**_AWQ, "version": "gemv"}),
    "AWQ gemv_fast": (awq_gemv_fast, {**_AWQ, "version": "gemv_fast"}),
    "AutoRound auto_gptq": (gptq(1), {**_AUTO, "packing_format": "auto_round:auto_gptq"}),
    "AutoRound unsaid": (gptq(1), _AUTO),
    "AutoRound": (gptq(0), {**_AUTO, "packing_format": "auto_round"}),
    "AutoRound gptqmodel": (gptq(0), {**_AUTO, "packing_format": "auto_round:gptqmodel"}),
    "AutoRound auto_awq": (awq_gemm, {**_AUTO, "packing_format": "auto_round:auto_awq"}),
    "AutoRound llm_compressor": (
        mxfp4_packed,
        {**_AUTO, "group_size": 32, "packing_format": "auto_round:llm_compressor", "data_type": "mx_fp"},
    ),
    "Kimi": (kimi, _KIMI),
}
"""What to call it: how a module is written, and its quantization_config."""


def write_peer(
    model: Path, place: Path, peer: str, *, mixed: str = "", ends: tuple[str, ...] = ("_proj.weight",)
) -> dict[str, np.ndarray]:
    """The directory ``model`` with its matrices (names that end in one of ``ends``) drawn anew in the layout ``peer``;
    with ``mixed`` every other one in that layout. Returns what they mean, by the names of the weights."""
    write, settings = PEERS[peer]
    place.mkdir(parents=True)
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, place / path.name)
    tensors, values = load_file(model / "model.safetensors"), dict[str, np.ndarray]()
    rng = np.random.default_rng(7)
    for name in [name for name in tensors if name.endswith(ends)]:
        rows, columns = tensors.pop(name).shape
        way = PEERS[mixed][0] if mixed and len(values) % 2 else write
        fields, values[name] = way(rng, rows, columns)
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{suffix}": field.contiguous() for suffix, field in fields.items()}
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": settings}, indent=1))
    return values
