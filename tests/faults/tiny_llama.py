"""A Llama of under a million weights, written without torch: quantized in milliseconds, every kind of tensor in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from llm_quantize.data import demo_model
from llm_quantize.io.safetensors_file import read_header

from ..io.torch_by_hand import numbers, state_dict, storage, tensor, write_zip
from ..safetensors_by_hand import write_model, write_raw

VOCABULARY = 320


def config(layers: int = 2, hidden: int = 256, inner: int = 256, **changes: Any) -> dict[str, Any]:
    """config.json of the model below, from that of the built-in one."""
    base = json.loads((demo_model() / "config.json").read_text())
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "vocab_size": VOCABULARY}
    return {**base, **sizes, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128, **changes}


def shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of a Llama with this configuration."""
    hidden, inner = settings["hidden_size"], settings["intermediate_size"]
    key_value = settings["num_key_value_heads"] * settings["head_dim"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (settings["vocab_size"], hidden)}
    for layer in range(settings["num_hidden_layers"]):
        front = f"model.layers.{layer}."
        found |= {
            f"{front}input_layernorm.weight": (hidden,),
            f"{front}self_attn.q_proj.weight": (hidden, hidden),
            f"{front}self_attn.k_proj.weight": (key_value, hidden),
            f"{front}self_attn.v_proj.weight": (key_value, hidden),
            f"{front}self_attn.o_proj.weight": (hidden, hidden),
            f"{front}post_attention_layernorm.weight": (hidden,),
            f"{front}mlp.gate_proj.weight": (inner, hidden),
            f"{front}mlp.up_proj.weight": (inner, hidden),
            f"{front}mlp.down_proj.weight": (hidden, inner),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (settings["vocab_size"], hidden)}


def write_tokenizer(directory: Path) -> None:
    """The built-in model's tokenizer, cut to its first VOCABULARY tokens."""
    data = json.loads((demo_model() / "tokenizer.json").read_text())
    model = data["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < VOCABULARY}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    (directory / "tokenizer.json").write_text(json.dumps(data))
    (directory / "tokenizer_config.json").write_text((demo_model() / "tokenizer_config.json").read_text())


def write_tiny_llama(directory: Path, *, seed: int = 0, rows: int = VOCABULARY, inner: int = 256) -> Path:
    """The model directory: two shards with an index, bfloat16 weights with heavy tails, ``rows`` in the embedding."""
    settings = config(inner=inner, vocab_size=rows)
    random = np.random.default_rng(seed)
    arrays = {
        name: (random.standard_t(4, shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        for name, shape in shapes(settings).items()
    }
    names = list(arrays)
    shards = {
        f"model-0000{number + 1}-of-00002.safetensors": {name: arrays[name] for name in part}
        for number, part in enumerate((names[:9], names[9:]))
    }
    write_model(directory, shards, config=settings)
    write_tokenizer(directory)
    return directory


def write_fp8_llama(directory: Path, *, scale: float = 0.01) -> Path:
    """The same sizes with matrices in FP8 and a scale for each block of 128 by 128; ``scale``: that of q_proj."""
    random = np.random.default_rng(3)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, shape in shapes(config()).items():
        if "_proj" not in name:
            arrays[name] = (random.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
            continue
        arrays[name] = (random.integers(0x20, 0x60, shape) | random.integers(0, 2, shape) << 7).astype(np.uint8)
        arrays[f"{name}_scale_inv"] = np.full((shape[0] // 128, shape[1] // 128), 0.01, np.float32)
    arrays["model.layers.0.self_attn.q_proj.weight_scale_inv"][0, 0] = scale
    words = {name: "F8_E4M3" for name, array in arrays.items() if array.dtype == np.uint8}
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    settings = config(quantization_config=quantization)
    write_model(directory, {"model.safetensors": arrays}, config=settings, dtypes=words)
    write_tokenizer(directory)
    return directory


def write_sparse_llama(directory: Path, *, layers: int, hidden: int, inner: int, key_value_heads: int) -> Path:
    """A model of any size whose weight file is a hole: it takes no room on the disk and reads as zeros."""
    settings = config(layers, hidden, inner, num_attention_heads=hidden // 128, head_dim=128)
    settings["num_key_value_heads"] = key_value_heads
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes(settings).items():
        end = at + 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    directory.mkdir(parents=True)
    path = write_raw(directory / "model.safetensors", header)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + at)
    (directory / "config.json").write_text(json.dumps(settings))
    write_tokenizer(directory)
    return directory


def pickled_llama(model: Path, directory: Path) -> Path:
    """The same model with its weights in one pytorch_model.bin, written by hand."""
    directory.mkdir(parents=True)
    pickles, storages = {}, {}
    for file in sorted(model.glob("*.safetensors")):
        for name, info in read_header(file).tensors.items():
            key = str(len(storages))
            storages[key] = file.read_bytes()[info.offset : info.offset + info.nbytes]
            strides = [math.prod(info.shape[at + 1 :]) for at in range(len(info.shape))]
            held = storage(key, info.elements, "BFloat16Storage")
            pickles[name] = tensor(held, shape=numbers(*info.shape), strides=numbers(*strides))
    write_zip(directory / "pytorch_model.bin", state_dict(**pickles), storages)
    for file in model.iterdir():
        if not file.name.startswith("model"):
            (directory / file.name).write_bytes(file.read_bytes())
    return directory
