"""GPTQ, AWQ and compressed-tensors directories written by hand: rounding to nearest, plain numpy, nothing of src.

For real runtimes to read before, and beside, what llm_quantize.formats writes. Layouts: GPTQModel (gptq, gptq_v2),
AutoAWQ (gemm), compressed-tensors (pack-quantized). value = scale * (code - zero), codes 0 .. 2^bits - 1;
N rows (out), K columns (in), G groups of a row; ``scale`` and ``zero`` are (N, G).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ..safetensors_by_hand import write_tensors
from ..tiny_models import reference_logits, reference_model

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column 8c + AWQ_ORDER[i]


@dataclass(frozen=True)
class Layout:
    """What a directory holds. ``group`` -1: one scale for a row. ``signed_scales``: the element of largest magnitude
    becomes the lowest code, so that the scale of about half of the groups is negative."""

    format: str  # gptq, awq, compressed-tensors
    bits: int = 4
    group: int = 128
    symmetric: bool = True
    scale: str = "float16"  # or bfloat16
    signed_scales: bool = False
    version: str = "gptq"  # or gptq_v2
    desc_act: bool = False


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to the uint16 of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def stored(scale: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a scale (bfloat16 as uint16), and what they say in float32."""
    if dtype == "float16":
        return scale.astype(np.float16), scale.astype(np.float16).astype(np.float32)
    words = to_bfloat16(scale)
    return words, (words.astype(np.uint32) << 16).view(np.float32)


def round_to_nearest(weight: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """codes int64 (N, K), stored scale, scale float32 (N, G), zero int64 (N, G) of a float32 matrix (N, K)."""
    rows, columns = weight.shape
    group = columns if layout.group == -1 else layout.group
    blocks = weight.astype(np.float64).reshape(rows, columns // group, group)
    top = 2**layout.bits - 1
    zero = np.full(blocks.shape[:2], 2 ** (layout.bits - 1), np.int64)
    if layout.symmetric and layout.signed_scales:
        peak = np.take_along_axis(blocks, np.abs(blocks).argmax(2)[..., None], 2)[..., 0]
        scale = -peak / 2 ** (layout.bits - 1)
    elif layout.symmetric:
        scale = 2 * np.abs(blocks).max(2) / top
    else:
        low, high = np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)
        scale = (high - low) / top
    raw, scale = stored(scale, layout.scale)
    if not layout.symmetric:
        # Version 1 of the gptq layout stores z - 1, so that 0 cannot be said.
        lowest = 1 if layout.format == "gptq" and layout.version == "gptq" else 0
        zero = np.clip(np.rint(-low / scale), lowest, top).astype(np.int64)
    codes = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, top)
    return codes.astype(np.int64).reshape(rows, columns), raw, scale, zero


def decode(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """float32 (N, K)."""
    each = codes.shape[1] // scale.shape[1]
    return (codes - zero.repeat(each, 1)).astype(np.float32) * scale.repeat(each, 1)


def dense(values: np.ndarray, bits: int) -> np.ndarray:
    """(n, k) small numbers to int32 words (n, ceil(k * bits / 32)): lowest bits first, across words."""
    rows, count = values.shape
    flat = ((values[..., None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(rows, count * bits)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return np.packbits(flat, axis=1, bitorder="little").view("<i4").astype(np.int32)


def gptq_fields(codes: np.ndarray, raw: np.ndarray, zero: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    columns, groups = codes.shape[1], zero.shape[1]
    said = zero if layout.version == "gptq_v2" else zero - 1
    return {
        "qweight": dense(codes, layout.bits).T,
        "qzeros": dense(said.T, layout.bits),
        "scales": raw.T,
        "g_idx": (np.arange(columns) // (columns // groups)).astype(np.int32),
    }


def awq_fields(codes: np.ndarray, raw: np.ndarray, zero: np.ndarray) -> dict[str, np.ndarray]:
    def words(values: np.ndarray) -> np.ndarray:  # (a, N) to (a, N / 8)
        eights = values.reshape(len(values), -1, 8)[..., AWQ_ORDER]
        return dense(eights.reshape(len(values), -1), 4)

    return {"qweight": words(codes.T), "qzeros": words(zero.T), "scales": raw.T}


def compressed_fields(codes: np.ndarray, raw: np.ndarray, zero: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    fields = {
        "weight_packed": dense(codes, layout.bits),
        "weight_scale": raw,
        "weight_shape": np.array(codes.shape, np.int64),
    }
    if not layout.symmetric:
        fields["weight_zero_point"] = dense(zero.T, layout.bits).T
    return fields


def quantization_config(layout: Layout) -> dict[str, Any]:
    """What the format's owner writes into config.json."""
    if layout.format == "gptq":
        return {
            "quant_method": "gptq",
            "bits": layout.bits,
            "group_size": layout.group,
            "desc_act": layout.desc_act,
            "sym": layout.symmetric,
            "lm_head": False,
            "checkpoint_format": layout.version,
            "pack_dtype": "int32",
            "true_sequential": True,
            "damp_percent": 0.01,
        }
    if layout.format == "awq":
        return {
            "quant_method": "awq",
            "bits": layout.bits,
            "group_size": layout.group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        }
    whole = layout.group == -1
    weights = {
        "num_bits": layout.bits,
        "type": "int",
        "symmetric": layout.symmetric,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else layout.group,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }
    part = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {**part, "format": "pack-quantized"}},
    }


def write_directory(source: Path, directory: Path, layout: Layout) -> dict[str, np.ndarray]:
    """The model of ``source`` (one bfloat16 safetensors file) with its linears as ``layout`` says. Returns the decoded
    weights in float32 under the names of the source."""
    directory.mkdir(parents=True)
    tensors: dict[str, np.ndarray] = {}
    decoded = {}
    for name, value in safetensors.torch.load_file(source / "model.safetensors").items():
        weight = value.float().numpy()
        stem = name.removesuffix(".weight")
        if not (name.endswith(".weight") and stem.endswith(LINEARS)):
            tensors[name] = to_bfloat16(weight)
            continue
        codes, raw, scale, zero = round_to_nearest(weight, layout)
        decoded[name] = decode(codes, scale, zero)
        if layout.format == "gptq":
            fields = gptq_fields(codes, raw, zero, layout)
        elif layout.format == "awq":
            fields = awq_fields(codes, raw, zero)
        else:
            fields = compressed_fields(codes, raw, zero, layout)
        tensors |= {f"{stem}.{suffix}": array for suffix, array in fields.items()}
    write_tensors(directory / "model.safetensors", tensors, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(layout)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    for file in source.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            shutil.copyfile(file, directory / file.name)
    return decoded


def logprobs(source: Path, decoded: dict[str, np.ndarray], windows: np.ndarray) -> np.ndarray:
    """float64 (windows, length, vocabulary): the model of ``source`` in float32 torch with the weights ``decoded``,
    by way of a float32 checkpoint, so that transformers itself stacks what it holds stacked."""
    tensors = {name: value.float() for name, value in safetensors.torch.load_file(source / "model.safetensors").items()}
    assert set(decoded) <= set(tensors)
    tensors |= {name: torch.from_numpy(value) for name, value in decoded.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        shutil.copyfile(source / "config.json", folder / "config.json")
        model = reference_model(folder)
        logits = np.stack([reference_logits(model, window.tolist()) for window in windows]).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence in nats of log-probabilities (..., vocabulary); ``other`` may be float32."""
    exact = other.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    return float((np.exp(reference) * (reference - exact)).sum(-1).mean())
