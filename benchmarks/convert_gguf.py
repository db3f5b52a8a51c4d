"""A GGUF file of a billion weights as a directory of bfloat16: CPU seconds and peak memory, ours and two peers'.

The file is synthetic: of Llama 3.2 1B's shape (16 blocks, 973 million weights in matrices), types as Q4_K_M gives them,
random codes, the vocabulary of the built-in model. Peers, each in a process of its own, as everybody here:

    gguf         the gguf package: every tensor dequantized in numpy, cast, saved with safetensors; GGUF's names stay
    transformers AutoModelForCausalLM.from_pretrained(gguf_file=...) with GgufConfig(dequantize=True), save_pretrained

    python benchmarks/convert_gguf.py --directory .peers/convert --json benchmarks/results/convert_gguf.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
# This folder has a file called like the gguf package: it must not come first on the import path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.append(str(HERE / "peers"))

import numpy as np
from costs import taken

from llm_quantize import api
from llm_quantize.data import demo_model
from llm_quantize.io.gguf_file import layout_gguf, read_gguf
from llm_quantize.options import Options
from llm_quantize.qtypes import QTYPES

WIDTH, INSIDE, BLOCKS, HEADS, KEYS = 2048, 8192, 16, 32, 8
KV = KEYS * WIDTH // HEADS
SHAPES = {
    **{"attn_q": (WIDTH, WIDTH), "attn_k": (KV, WIDTH), "attn_v": (KV, WIDTH), "attn_output": (WIDTH, WIDTH)},
    **{"ffn_gate": (INSIDE, WIDTH), "ffn_up": (INSIDE, WIDTH), "ffn_down": (WIDTH, INSIDE)},
}
HALVES = {"q4_k": (0, 2), "q6_k": (208,)}
"""Where the float16 numbers stand in a block."""

OF_GGUF = """
import sys
import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
import torch
tensors = {}
for tensor in GGUFReader(sys.argv[1]).tensors:
    values = dequantize(tensor.data, tensor.tensor_type)
    tensors[tensor.name] = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
save_file(tensors, sys.argv[2] + "/model.safetensors")
"""
OF_TRANSFORMERS = """
import os, sys
import torch
from transformers import AutoModelForCausalLM, GgufConfig
folder, name = os.path.split(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
)
model.save_pretrained(sys.argv[2])
"""


def metadata(place: Path) -> dict[str, Any]:
    """The built-in model's, of the larger shape."""
    small = api.quantize(demo_model(), "gguf", levels="F16", output_dir=place, name="small", options=Options(threads=1))
    found = dict(read_gguf(small[0].path).metadata)
    arch = found["general.architecture"].value
    sizes = {"embedding_length": WIDTH, "feed_forward_length": INSIDE, "block_count": BLOCKS}
    sizes |= {"attention.head_count": HEADS, "attention.head_count_kv": KEYS, "rope.dimension_count": WIDTH // HEADS}
    sizes |= {"attention.key_length": WIDTH // HEADS, "attention.value_length": WIDTH // HEADS}
    for key, size in sizes.items():
        name = f"{arch}.{key}"
        if name in found:
            found[name] = found[name]._replace(value=size)
    found["general.file_type"] = found["general.file_type"]._replace(value=15)  # Q4_K_M
    return found


def tensors(words: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, type), with Q4_K_M's wider matrices."""
    yield "token_embd.weight", (words, WIDTH), "q6_k"
    for block in range(BLOCKS):
        wide = block < BLOCKS // 8 or block >= 7 * BLOCKS // 8 or (block - BLOCKS // 8) % 3 == 2
        for name, shape in SHAPES.items():
            yield f"blk.{block}.{name}.weight", shape, "q6_k" if wide and name in ("attn_v", "ffn_down") else "q4_k"
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{block}.{name}.weight", (WIDTH,), "f32"
    yield "output_norm.weight", (WIDTH,), "f32"


def make(place: Path) -> Path:
    """The file."""
    path = place / "large-Q4_K_M.gguf"
    if path.is_file():
        return path
    place.mkdir(parents=True, exist_ok=True)
    told, generator = metadata(place / "small"), np.random.default_rng(0)
    words = len(told["tokenizer.ggml.tokens"].value)
    listed = [(name, shape, QTYPES[qtype].ggml_type) for name, shape, qtype in tensors(words)]
    layout = layout_gguf(told, listed)
    with path.with_suffix(".part").open("wb") as file:
        file.write(layout.header)
        for entry, (_, shape, qtype) in zip(layout.tensors, tensors(words), strict=True):
            file.seek(entry.offset)
            if qtype == "f32":
                file.write(np.ones(shape, np.float32).tobytes())
                continue
            each = QTYPES[qtype].block_bytes
            blocks = generator.integers(0, 256, (entry.nbytes // each, each), np.uint8)
            for at in HALVES[qtype]:
                scales = (generator.random(len(blocks), np.float32) / 1e4 + 1e-5).astype(np.float16)
                blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
            file.write(blocks.tobytes())
        file.truncate(layout.size)
    path.with_suffix(".part").rename(path)
    return path


def runs(source: Path, out: Path) -> Mapping[str, list[str]]:
    """{who: the command}."""
    ours = [sys.executable, "-m", "llm_quantize", "convert", str(source), "safetensors", "-q", "BF16", "-o", str(out)]
    return {
        "llm-quantize": [*ours, "--threads", "1", "--json"],
        "gguf": [sys.executable, "-c", OF_GGUF, str(source), str(out)],
        "transformers": [sys.executable, "-c", OF_TRANSFORMERS, str(source), str(out)],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="of llm-quantize, gguf, transformers")
    given = parser.parse_args(arguments)
    source, out = make(given.directory), given.directory / "out"
    rows: dict[str, Any] = {}
    for who, command in runs(source, out).items():
        if given.only and who not in given.only:
            continue
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        found = taken(command)
        said = found.pop("said")
        if who == "llm-quantize":
            (artifact,) = json.loads(said)["artifacts"]
            found |= {"verdict": artifact["conversion"]["verdict"]}
        written = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
        rows[who] = {**found, "written": written, "written_per_cpu_second": round(written / found["cpu_seconds"])}
        print(json.dumps({who: rows[who]}), flush=True)
        shutil.rmtree(out, ignore_errors=True)
    facts = {
        "source_bytes": source.stat().st_size,
        "weights": sum(math.prod(entry.shape) for entry in read_gguf(source).tensors),
        "level": "Q4_K_M",
        "page": resource.getpagesize(),
        "versions": {name: version(name) for name in ("gguf", "transformers", "torch", "numpy", "safetensors")},
        "rows": rows,
    }
    given.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
