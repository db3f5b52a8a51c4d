"""The whole job against its peer: Hugging Face safetensors to a quantized GGUF, CPU seconds, wall, memory, bytes.

Peer: a 16-bit GGUF written with the ``gguf`` package in the way llama.cpp's converter uses it (tensor by tensor through
float32), then llama.cpp's own quantizer from the cyllama wheel. Ours: one command. Both run here, in turn, on the same
synthetic checkpoint of heavy-tailed weights (default: the shape of a 1.1 B-weight Llama); the tensor data is compared
byte for byte. Results go to stdout, and to the file given with --json.

    python benchmarks/gguf.py --directory /scratch --level Q4_K_M
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# This file is called like the package it measures: its own folder must not come first on the import path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np
from gguf import GGUFReader, LlamaFileType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SHAPES = {
    "1b": {"hidden": 2048, "intermediate": 5632, "layers": 22, "heads": 32, "kv_heads": 4, "vocabulary": 32000},
    "tiny": {"hidden": 512, "intermediate": 1536, "layers": 4, "heads": 8, "kv_heads": 2, "vocabulary": 4096},
}

PEER_CONVERT = """
import sys, json
import numpy as np, gguf
from safetensors import safe_open
source, target, arch_source = sys.argv[1:4]
config = json.load(open(source + "/config.json"))
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
reader = gguf.GGUFReader(arch_source)
writer = gguf.GGUFWriter(target, "llama")
for key, field in reader.fields.items():
    if key.startswith("GGUF.") or key == "general.architecture":
        continue
    kind, item = field.types[0], (field.types[-1] if len(field.types) > 1 else None)
    if kind != gguf.GGUFValueType.ARRAY or field.contents():
        writer.add_key_value(key, field.contents(), kind, item)
heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
with safe_open(source + "/model.safetensors", framework="pt") as tensors:
    for name in tensors.keys():
        data = tensors.get_tensor(name).float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            n = heads if "q_proj" in name else kv_heads
            data = data.reshape(n, 2, data.shape[0] // n // 2, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        if data.ndim > 1:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, data)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
"""

PEER_QUANTIZE = """
import sys
from cyllama.llama import llama_cpp
source, target, file_type, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
parameters = llama_cpp.LlamaModelQuantizeParams()
parameters.ftype = file_type
parameters.nthread = threads
llama_cpp.model_quantize(source, target, parameters)
"""

OURS = """
import sys
from llm_quantize.cli import run
code = run(sys.argv[1:])
if code:
    sys.exit(code)
"""

IO_REPORT = """
import sys
with open("/proc/self/io") as file, open("/proc/self/status") as status:
    peak = [line for line in status if line.startswith("VmHWM")][0].split()[1]
    sys.stderr.write("IO peak: " + peak + " " + " ".join(file.read().split()) + chr(10))
"""


def make_checkpoint(directory: Path, shape: dict[str, int], seed: int = 0) -> int:
    """Write a Llama checkpoint of Student-t (5 degrees of freedom) bf16 weights; returns the number of weights."""
    directory.mkdir(parents=True, exist_ok=True)
    hidden, inner, layers = shape["hidden"], shape["intermediate"], shape["layers"]
    kv = hidden // shape["heads"] * shape["kv_heads"]
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape["vocabulary"], hidden),
        "lm_head.weight": (shape["vocabulary"], hidden),
        "model.norm.weight": (hidden,),
    }
    parts = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(layers):
        for name, (rows, columns) in parts.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = (rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = (hidden,)
    _save_bf16(tensors, directory / "model.safetensors", seed)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "vocab_size": shape["vocabulary"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }
    (directory / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return sum(int(np.prod(shape)) for shape in tensors.values())


def _save_bf16(shapes: dict[str, tuple[int, ...]], path: Path, seed: int) -> None:
    """Write bfloat16 tensors one by one: heavy-tailed matrices, vectors of ones."""
    random = np.random.default_rng(seed)
    base = (random.standard_t(5, 1 << 24) * 0.02).astype(np.float32)
    pool = (base.view(np.uint32) >> 16).astype(np.uint16)
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            if len(shape) == 1:
                file.write(np.full(shape, 0x3F80, np.uint16).tobytes())
            else:
                file.write(np.resize(np.roll(pool, int(random.integers(len(pool)))), shape).tobytes())


def measure(code: str, *arguments: object) -> dict[str, float]:
    """Run Python ``code`` in a process of its own: CPU and wall seconds, peak RSS, bytes read and written."""
    with tempfile.TemporaryFile("w+") as errors:
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", code + IO_REPORT, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - began
        errors.seek(0)
        text = errors.read()
    if process.returncode:
        raise SystemExit(f"a measured command failed with {process.returncode}:\n{text[-2000:]}")
    words = text[text.rindex("IO ") :].split()
    counts = {words[i].rstrip(":"): int(words[i + 1]) for i in range(1, len(words) - 1, 2)}
    return {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "wall_seconds": round(wall, 3),
        "peak_rss_bytes": counts["peak"] * 1024,
        "read_bytes": counts["rchar"],
        "written_bytes": counts["wchar"],
    }


def same_tensor_data(left: Path, right: Path) -> tuple[int, list[str]]:
    """How many tensors two GGUF files share, and the names of those whose type or bytes differ."""
    first = {tensor.name: tensor for tensor in GGUFReader(left).tensors}
    second = {tensor.name: tensor for tensor in GGUFReader(right).tensors}
    different = sorted(first.keys() ^ second.keys())
    for name in first.keys() & second.keys():
        if first[name].tensor_type != second[name].tensor_type or not np.array_equal(
            first[name].data, second[name].data
        ):
            different.append(name)
    return len(first.keys() & second.keys()), different


def benchmark(directory: Path, shape: str, level: str, threads: list[int]) -> dict[str, Any]:
    """All measurements, as one JSON-ready object."""
    source = directory / f"llama-{shape}"
    if source.exists():
        shutil.rmtree(source)
    weights = make_checkpoint(source, SHAPES[shape])
    out = directory / "out"
    ours: dict[str, Any] = {}
    for count in threads:
        shutil.rmtree(out, ignore_errors=True)
        arguments = ("quantize", source, "gguf", "-q", level, "-o", out, "--threads", count)
        ours[str(count)] = measure(OURS, *arguments)
    artifact = out / f"{source.name}-{level}.gguf"
    seed = directory / "seed"
    measure(OURS, "quantize", source, "gguf", "-q", "Q8_0", "-o", seed, "--overwrite")
    half, peer_file = directory / "peer-bf16.gguf", directory / "peer.gguf"
    convert = measure(PEER_CONVERT, source, half, seed / f"{source.name}-Q8_0.gguf")
    file_type = LlamaFileType[f"MOSTLY_{level}"].value
    quantize = measure(PEER_QUANTIZE, half, peer_file, file_type, threads[-1])
    shared, different = same_tensor_data(artifact, peer_file)
    best = ours[str(threads[-1])]
    peer_cpu = convert["cpu_seconds"] + quantize["cpu_seconds"]
    return {
        "level": level,
        "shape": shape,
        "weights": weights,
        "ours": ours,
        "peer": {"convert": convert, "quantize": quantize, "cyllama": version("cyllama"), "gguf": version("gguf")},
        "tensors_compared": shared,
        "tensors_different": different,
        "ratios": {
            "cpu_against_convert_and_quantize": round(peer_cpu / best["cpu_seconds"], 2),
            "cpu_against_quantize_alone": round(quantize["cpu_seconds"] / best["cpu_seconds"], 2),
            "written_bytes": round((convert["written_bytes"] + quantize["written_bytes"]) / best["written_bytes"], 2),
            "wall_one_thread_to_most": round(
                ours[str(threads[0])]["wall_seconds"] / max(1e-9, best["wall_seconds"]), 2
            ),
        },
    }


def main() -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="scratch directory, about 6 GB [default: a temporary one]")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--level", default="Q4_K_M")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write the JSON here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        result = benchmark(directory, arguments.shape, arguments.level, arguments.threads)
    text = json.dumps(result, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
