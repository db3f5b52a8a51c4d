"""Quantized checkpoints back to float32, written from the layouts alone: numpy, and no code of any peer or of ours.

``read_checkpoint(directory)`` gives {name of the float checkpoint: float32 array} for GPTQ ("gptq", "gptq_v2"), AWQ
("gemm"), compressed-tensors ("pack-quantized") and plain directories; ``read_gguf`` the same for a GGUF file of the
families measured here, with the gguf package's own dequantization. N = outputs, K = inputs, G = group, b = bits.

    gptq   qweight int32 (K*b/32, N), lowest bits first along K; qzeros int32 (K/G, N*b/32) likewise along N, minus one
           in version 1; scales (K/G, N); g_idx (K,).                      w = s * (q - z)
    awq    qweight int32 (K, N/8), qzeros (K/G, N/8): nibble i of a word is column 8c + (0 2 4 6 1 3 5 7)[i]
    ct     weight_packed int32 (N, K*b/32) along K, unsigned with 2^(b-1) added; weight_scale (N, K/G);
           weight_zero_point int32 (N*b/32, K/G) along N where asymmetric
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I64": "<i8", "I8": "i1", "U8": "u1", "F64": "<f8"}


def tensors_of(directory: Path) -> dict[str, tuple[str, Array]]:
    """{name: (safetensors dtype, raw array)} of all shards; bfloat16 stays uint16."""
    found: dict[str, tuple[str, Array]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = np.fromfile(path, np.uint8)
        length = int(data[:8].view("<u8")[0])
        header = json.loads(data[8 : 8 + length].tobytes())
        body = data[8 + length :]
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                raw = body[start:stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
                found[name] = (entry["dtype"], raw)
    return found


def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors of a checkpoint directory or a GGUF file, headers and metadata not counted."""
    if path.is_dir():
        return sum(array.nbytes for _, array in tensors_of(path).values())
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)


def to_float(dtype: str, array: Array) -> npt.NDArray[np.float32]:
    """float32 values of a stored float tensor."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def unpack(words: Array, bits: int) -> npt.NDArray[np.int64]:
    """int32 (words, columns) to unsigned values (words*32/bits, columns): a stream of bits, the lowest first."""
    raw = np.ascontiguousarray(words).view(np.uint32)
    places = np.arange(32, dtype=np.uint32)[None, :, None]
    stream = ((raw[:, None, :] >> places) & 1).reshape(-1, raw.shape[1]).astype(np.int64)
    count = stream.shape[0] // bits
    values = stream[: count * bits].reshape(count, bits, -1)
    return (values << np.arange(bits)[None, :, None]).sum(1)


def gptq(parts: Mapping[str, Array], bits: int, version: int) -> npt.NDArray[np.float32]:
    """One linear, (N, K)."""
    codes = unpack(parts["qweight"], bits)
    zeros = unpack(parts["qzeros"].T, bits).T
    if version == 1:
        zeros = (zeros + 1) % (1 << bits)
    group = parts["g_idx"].astype(np.int64) if "g_idx" in parts else None
    scales = parts["scales"]
    if group is None:
        group = np.arange(codes.shape[0]) // (codes.shape[0] // scales.shape[0])
    return np.ascontiguousarray((scales[group] * (codes - zeros[group])).T.astype(np.float32))


def awq(parts: Mapping[str, Array]) -> npt.NDArray[np.float32]:
    """One linear, (N, K)."""
    codes, zeros = (_awq_nibbles(parts[name]) for name in ("qweight", "qzeros"))
    scales = parts["scales"]
    group = np.arange(codes.shape[0]) // (codes.shape[0] // scales.shape[0])
    return np.ascontiguousarray(((codes - zeros[group]) * scales[group]).T.astype(np.float32))


def _awq_nibbles(words: Array) -> npt.NDArray[np.int64]:
    raw = np.ascontiguousarray(words).view(np.uint32)
    values = np.empty((raw.shape[0], raw.shape[1], 8), np.int64)
    for place, column in enumerate(AWQ_ORDER):
        values[:, :, column] = (raw >> np.uint32(4 * place)) & 15
    return values.reshape(raw.shape[0], -1)


def compressed(parts: Mapping[str, Array], bits: int) -> npt.NDArray[np.float32]:
    """One linear, (N, K). Raises ValueError where the groups are not in order (weight_g_idx)."""
    rows, columns = (int(size) for size in parts["weight_shape"])
    half, scale = 1 << (bits - 1), parts["weight_scale"]
    codes = unpack(parts["weight_packed"].T, bits).T[:, :columns] - half
    if "weight_g_idx" in parts:
        raise ValueError("weight_g_idx: groups out of order are not measured here")
    group = np.arange(columns) // (columns // scale.shape[1])
    if "weight_zero_point" in parts:
        zeros = unpack(parts["weight_zero_point"], bits)[:rows] - half
        codes = codes - zeros[:, group]
    return (codes * scale[:, group]).astype(np.float32)


_FIELDS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
}


def read_checkpoint(directory: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Every weight of a checkpoint directory by its name in the float model. Raises KeyError for other formats."""
    config = json.loads((directory / "config.json").read_text()).get("quantization_config", {})
    stored = tensors_of(directory)
    method = config.get("quant_method", "")
    if "auto-round" in method:
        method = "awq" if "awq" in config.get("packing_format", "") else "gptq"
    fields = _FIELDS[method] if method else ()
    found: dict[str, npt.NDArray[np.float32]] = {}
    linears: dict[str, dict[str, tuple[str, Array]]] = {}
    for name, entry in stored.items():
        module, _, field = name.rpartition(".")
        if field in fields:
            linears.setdefault(module, {})[field] = entry
        else:
            found[name] = to_float(*entry)
    for module, entries in linears.items():
        parts = {field: to_float(*entry) if "scale" in field else entry[1] for field, entry in entries.items()}
        if method == "gptq":
            version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
            found[module + ".weight"] = gptq(parts, _gptq_bits(parts, config), version)
        elif method == "awq":
            found[module + ".weight"] = awq(parts)
        else:
            found[module + ".weight"] = compressed(parts, _ct_bits(config))
    return found


def _gptq_bits(parts: Mapping[str, Array], config: Mapping[str, Any]) -> int:
    """From the shapes, which no ``dynamic`` rule of the configuration can contradict."""
    if "g_idx" in parts:
        return 32 * parts["qweight"].shape[0] // len(parts["g_idx"])
    return int(config["bits"])


def _ct_bits(config: Mapping[str, Any]) -> int:
    (group,) = config["config_groups"].values()
    return int(group["weights"]["num_bits"])


def read_gguf(path: Path, config: Mapping[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
    """Every weight of a GGUF file of a Llama or Qwen3 (MoE) by its name in the checkpoint with ``config``."""
    from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
    from gguf.quants import dequantize

    arch = {"llama": MODEL_ARCH.LLAMA, "qwen3": MODEL_ARCH.QWEN3, "qwen3_moe": MODEL_ARCH.QWEN3MOE}[
        config["model_type"]
    ]
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    values = {
        name.removesuffix(".weight"): dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for name, tensor in stored.items()
    }
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    found = {}
    for name in float_names(config):
        place, _, expert = name.partition(" ")
        key = names.get_name(place, try_suffixes=(".weight",))
        if key is None or key.removesuffix(".weight") not in values:
            continue
        value = values[key.removesuffix(".weight")]
        if expert:
            value = value[int(expert)]
            place = place.replace(".experts.", f".experts.{expert}.")
        if arch == MODEL_ARCH.LLAMA and ".q_proj." in place:
            value = _unpermute(value, heads)
        if arch == MODEL_ARCH.LLAMA and ".k_proj." in place:
            value = _unpermute(value, kv_heads)
        found[place] = value
    return found


def _unpermute(value: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of q and k from llama.cpp's order (pairs of a rotation side by side) to Hugging Face's (halves)."""
    rows, columns = value.shape
    return np.ascontiguousarray(value.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, -1))


def float_names(config: Mapping[str, Any]) -> list[str]:
    """Names of the float checkpoint; those of experts with " e" behind them, under the name of the stack."""
    layer = ["input_layernorm", "post_attention_layernorm"]
    layer += [f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    layer += ["mlp.gate", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    found = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for index in range(config["num_hidden_layers"]):
        found += [f"model.layers.{index}.{name}.weight" for name in layer]
        for part in ("gate_proj", "up_proj", "down_proj") if "num_experts_per_tok" in config else ():
            experts = config.get("num_experts", config.get("num_local_experts", 0))
            found += [f"model.layers.{index}.mlp.experts.{part}.weight {e}" for e in range(experts)]
    return found
