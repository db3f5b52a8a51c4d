"""Four tiny checkpoints that are the same bytes on every machine, with a text and importance for them.

No random generator of a library takes part: a tensor's numbers are integers from SHAKE-256 over its name, added up and
scaled by powers of two, so every step is exact. Configurations and tokenizers are written as JSON by this file.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.safetensors_by_hand import write_tensors

Shapes = Mapping[str, tuple[int, ...]]

IDS = {"bos_token_id": 262, "eos_token_id": 263, "pad_token_id": 264}
COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    **IDS,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 256,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    # Tied embeddings, scaled rotary embedding, rows of 256 (all K-quants) and of 128 (their fallbacks).
    "dense": {
        **COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "head_dim": 32,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": True,
        "vocab_size": 320,
    },
    # Experts, of which a token takes two; float16, in two files with an index.
    "mixture": {
        **COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "dtype": "float16",
        "head_dim": 32,
        "hidden_size": 256,
        "intermediate_size": 256,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 320,
    },
    # Biases, float32, and sizes that 64 does not divide; 200 is no multiple of 32 either.
    "odd": {
        **COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "float32",
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_attention_heads": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 319,
    },
    # Matrices that lie the other way round, query, key and value in one, norms with biases, learned positions.
    "turned": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.0,
        **IDS,
        "dtype": "bfloat16",
        "embd_pdrop": 0.0,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_embd": 64,
        "n_head": 4,
        "n_inner": None,
        "n_layer": 2,
        "n_positions": 256,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
        "vocab_size": 320,
    },
}
TEXTS = (
    "The old house stood at the end of the lane, and in the evening the wind went through the garden. ",
    "In 1212 and in 12 other years the river rose; nobody wrote down how high. ",
    "def mean(values):\n    return sum(values) / len(values)\n\n",
    "A pan, an apple, another day: then the thin man began to think. ",
    "春はあけぼの。やうやう白くなりゆく山ぎは。",
)


@dataclass(frozen=True)
class Numbers:
    """Exact numbers, the same for the same name everywhere."""

    name: str

    def integers(self, shape: tuple[int, ...], count: int = 1) -> np.ndarray:
        """Sums of ``count`` integers from -128 to 127, near enough to a normal distribution."""
        size = int(np.prod(shape))
        raw = np.frombuffer(hashlib.shake_256(self.name.encode()).digest(size * count), np.int8)
        return raw.reshape(count, *shape).sum(axis=0, dtype=np.int64)

    def matrix(self, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
        """A spread of about 1/sqrt(``fan_in``), and columns that differ by powers of two, as real models' do."""
        exponent = -8 - fan_in.bit_length() // 2
        steps = np.abs(Numbers(f"{self.name}/columns").integers((shape[-1],))) % 16
        columns = np.where(steps == 0, 2, np.where(steps < 6, 0, -1))
        return np.ldexp(self.integers(shape, 4).astype(np.float32), exponent + columns).astype(np.float32)

    def vector(self, shape: tuple[int, ...], centre: int) -> np.ndarray:
        """``centre`` and up to a half more or less."""
        return np.ldexp(self.integers(shape).astype(np.float32), -8) + np.float32(centre)


def make_models(directory: Path) -> None:
    """Write the models (dense, mixture, odd, turned, and broken: turned with numbers that are none), a text, a recipe,
    and MODEL.dat, importance."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "text.txt").write_bytes("".join(TEXTS[i * i % 5] for i in range(60)).encode())
    for name, config in CONFIGS.items():
        _write_model(directory / name, config)
    _broken(directory / "broken", CONFIGS["turned"])
    tensors = {"blk.0.attn_v.weight": "q6_k", "blk.1.ffn_down.weight": "iq4_nl", "token_embd.weight": "q8_0"}
    recipe = {
        "format": "llm-quantize-recipe",
        "format_version": 1,
        "name": "mix",
        "level": "Q4_K_S",
        "tensors": tensors,
    }
    _write_json(directory / "mix.recipe.json", recipe)
    bits = {f"model.layers.0.self_attn.{name}_proj": "int5_g128_asym" for name in "qkv"}
    bits |= {"model.layers.0.mlp.down_proj": "int2_g64", "model.layers.1.self_attn.o_proj": "int8"}
    recipe |= {"for": "compressed-tensors", "name": "bits", "level": "W3A16", "tensors": bits}
    _write_json(directory / "bits.recipe.json", recipe)
    _write_importance(directory / "dense.dat", _importance(_shapes(CONFIGS["dense"])))
    _write_importance(directory / "mixture.dat", _importance(_shapes(CONFIGS["mixture"])))


def digest(directory: Path) -> str:
    """One hash over the names and bytes of all files below ``directory``, which may be a file itself."""
    total = hashlib.sha256()
    for path in sorted(path for path in (directory, *directory.rglob("*")) if path.is_file()):
        total.update(
            f"{path.relative_to(directory).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return total.hexdigest()


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return dict(_gpt2(config) if config["model_type"] == "gpt2" else _llama(config))


def _llama(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the families that are called as Llama's tensors are."""
    hidden, heads, keys = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim", hidden // heads)
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        for name, rows in (("q", heads), ("k", keys), ("v", keys)):
            yield f"{base}.self_attn.{name}_proj.weight", (rows * head, hidden)
            if config["model_type"] == "qwen2":
                yield f"{base}.self_attn.{name}_proj.bias", (rows * head,)
        yield f"{base}.self_attn.o_proj.weight", (hidden, heads * head)
        experts = [""]
        if config["model_type"] == "qwen3_moe":
            yield f"{base}.self_attn.q_norm.weight", (head,)
            yield f"{base}.self_attn.k_norm.weight", (head,)
            yield f"{base}.mlp.gate.weight", (config["num_experts"], hidden)
            experts = [f".experts.{i}" for i in range(config["num_experts"])]
        inner = config.get("moe_intermediate_size", config["intermediate_size"])
        for expert in experts:
            yield f"{base}.mlp{expert}.gate_proj.weight", (inner, hidden)
            yield f"{base}.mlp{expert}.up_proj.weight", (inner, hidden)
            yield f"{base}.mlp{expert}.down_proj.weight", (hidden, inner)
        yield f"{base}.input_layernorm.weight", (hidden,)
        yield f"{base}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def _gpt2(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = config["n_embd"]
    yield "transformer.wte.weight", (config["vocab_size"], hidden)
    yield "transformer.wpe.weight", (config["n_positions"], hidden)
    for layer in range(config["n_layer"]):
        base = f"transformer.h.{layer}"
        sizes = {"attn.c_attn": (hidden, 3 * hidden), "attn.c_proj": (hidden, hidden)}
        sizes |= {"mlp.c_fc": (hidden, 4 * hidden), "mlp.c_proj": (4 * hidden, hidden)}
        for name, shape in sizes.items():
            yield f"{base}.{name}.weight", shape
            yield f"{base}.{name}.bias", shape[1:]
        for name in ("ln_1", "ln_2"):
            yield f"{base}.{name}.weight", (hidden,)
            yield f"{base}.{name}.bias", (hidden,)
    yield "transformer.ln_f.weight", (hidden,)
    yield "transformer.ln_f.bias", (hidden,)


def _values(name: str, shape: tuple[int, ...], turned: bool) -> np.ndarray:
    numbers = Numbers(name)
    if len(shape) == 1:
        is_norm = name.endswith("weight")
        return numbers.vector(shape, 1) if is_norm else np.ldexp(numbers.vector(shape, 0), -1)
    if name.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight")):
        return numbers.matrix(shape, 64)
    return numbers.matrix(shape, shape[0] if turned and "lm_head" not in name else shape[1])


def _stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """``values`` (float32) in the type of the file; bfloat16 by cutting off, which is exact to say."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return values.astype(np.dtype(dtype))


def _arrays(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    turned = config["model_type"] == "gpt2"
    shapes = sorted(_shapes(config).items())
    return {name: _stored(_values(name, shape, turned), config["dtype"]) for name, shape in shapes}


def _write_model(directory: Path, config: Mapping[str, Any]) -> None:
    directory.mkdir()
    arrays = _arrays(config)
    dtypes = {name: "BF16" for name in arrays if config["dtype"] == "bfloat16"}
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {**IDS, "do_sample": True, "temperature": 0.5})
    _write_json(directory / "tokenizer.json", _tokenizer())
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    _write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **names, "model_max_length": 256},
    )
    if config["model_type"] != "qwen3_moe":
        write_tensors(directory / "model.safetensors", arrays, dtypes, metadata={"format": "pt"})
        return
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    owner = {name: files[".layers.1." in name or name.startswith("lm_head")] for name in arrays}
    for file in files:
        part = {name: array for name, array in arrays.items() if owner[name] == file}
        write_tensors(directory / file, part, dtypes, metadata={"format": "pt"})
    total = sum(array.nbytes for array in arrays.values())
    _write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": owner})


def _broken(directory: Path, config: Mapping[str, Any]) -> None:
    """The turned model with a NaN and two infinities."""
    _write_model(directory, config)
    arrays = _arrays(config)
    words = {"h.0.attn.c_proj": 0x7FC0, "h.1.mlp.c_fc": 0x7F80, "h.1.mlp.c_proj": 0xFF80}
    for name, word in words.items():
        arrays[f"transformer.{name}.weight"][3, 5] = word
    write_tensors(directory / "model.safetensors", arrays, dict.fromkeys(arrays, "BF16"), metadata={"format": "pt"})


def _tokenizer() -> dict[str, Any]:
    """GPT-2's bytes and splitting rule, six merges, three special tokens."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    alphabet = sorted([chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))])
    merges = [["t", "h"], ["th", "e"], ["i", "n"], ["a", "n"], ["Ġ", "the"], ["1", "2"]]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(words) + i, "content": text, **flags, "special": True}
            for i, text in enumerate(("<s>", "</s>", "<pad>"))
        ],
        "normalizer": None,
        "pre_tokenizer": {**level, "add_prefix_space": False},
        "post_processor": None,
        "decoder": {**level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: i for i, word in enumerate(words)},
            "merges": merges,
        },
    }


_GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _importance(shapes: Shapes) -> dict[str, np.ndarray]:
    """Mean squares of the input channels of every matrix, by GGUF's names; experts one after another."""
    rows: dict[str, list[np.ndarray]] = {}
    for name, shape in shapes.items():
        if len(shape) != 2 or name.endswith("mlp.gate.weight"):
            continue
        parts = name.split(".")
        if not name.startswith("model.layers."):
            gguf = {"model": "token_embd", "lm_head": "output"}[parts[0]]
        elif "experts" in parts:
            gguf = f"blk.{parts[2]}.{_GGUF[f'mlp.{parts[-2]}']}_exps"
        else:
            gguf = f"blk.{parts[2]}.{_GGUF['.'.join(parts[3:5])]}"
        squares = np.square(Numbers(f"{name}/importance").integers((shape[1],), 2)) + 1
        rows.setdefault(f"{gguf}.weight", []).append(np.ldexp(squares.astype(np.float32), -12))
    return {name: np.concatenate(values) for name, values in rows.items()}


def _write_importance(path: Path, rows: Mapping[str, np.ndarray]) -> None:
    """llama.cpp's older file: entries of name, calls, sums; then the calls again, and the text it was made from."""
    calls, source = 4, b"text.txt"
    data = struct.pack("<i", len(rows))
    for name, values in rows.items():
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", calls, len(values)) + (values * np.float32(calls)).astype("<f4").tobytes()
    path.write_bytes(data + struct.pack("<ii", calls, len(source)) + source)


def _write_json(path: Path, value: Any) -> None:
    path.write_bytes(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")
