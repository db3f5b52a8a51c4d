"""Checkpoints of the sizes that people have, as headers over files with holes: nothing of their weights exists."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

from llm_quantize.data import demo_model

SHAPES: Mapping[str, dict[str, int]] = {
    "1B": {"hidden": 2048, "inner": 8192, "layers": 16, "heads": 32, "kv": 8},
    "8B": {"hidden": 4096, "inner": 14_336, "layers": 32, "heads": 32, "kv": 8},
    "70B": {"hidden": 8192, "inner": 28_672, "layers": 80, "heads": 64, "kv": 8},
}


def large_model(size: str, place: Path, *, vocabulary: int | None = None) -> Path:
    """A Llama of SHAPES[size] in ``place``, in BF16, with the demo model's tokenizer, and its ``vocabulary`` too unless
    that is given."""
    shape, demo = SHAPES[size], demo_model()
    place.mkdir()
    config = json.loads((demo / "config.json").read_text())
    hidden, inner, head = shape["hidden"], shape["inner"], shape["hidden"] // shape["heads"]
    config["vocab_size"] = vocabulary or config["vocab_size"]
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": shape["layers"],
               "num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv"], "head_dim": head,
               "max_position_embeddings": 131_072, "tie_word_embeddings": False}  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo / name, place / name)
    block = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (shape["kv"] * head, hidden),
             "self_attn.v_proj": (shape["kv"] * head, hidden), "self_attn.o_proj": (hidden, hidden),
             "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
             "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}  # fmt: skip
    tensors = {f"model.layers.{i}.{name}.weight": s for i in range(shape["layers"]) for name, s in block.items()}
    edge = (config["vocab_size"], hidden)
    tensors |= {"model.embed_tokens.weight": edge, "lm_head.weight": edge, "model.norm.weight": (hidden,)}
    header, end = {}, 0
    for name, dims in tensors.items():
        begin, end = end, end + 2 * dims[0] * (dims[1] if len(dims) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (place / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return place
