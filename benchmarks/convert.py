"""Speed and memory of ``convert``: directories of random codes, each put into another format in a process of its own.

The models are of Llama's shape (hidden 4096, 11008 inside, two blocks: 405 million weights in matrices, 200 MB of
codes) with the tokenizer of the built-in model. Bytes per CPU second are those of the source's files; the seconds are
of the whole process, with one thread, the least of several runs: noise only adds. What it takes to start (Python,
torch) is ``start``: the least of the same conversion of a model of 2 million weights. ``user`` leaves out the seconds
of the system, which are those of writing: where memory is scarce, as in a shared virtual machine, they vary by half a
second for the same bytes.

    python benchmarks/convert.py --directory .peers/convert --json benchmarks/results/convert.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
# This folder has a file called like the gguf package: it must not come first on the import path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.append(str(HERE / "peers"))

import numpy as np
from costs import taken
from safetensors.numpy import save_file

from llm_quantize.data import demo_model

LARGE, SMALL = (4096, 11008, 2), (512, 1024, 1)  # width, width inside, blocks
HEADS, GROUP = 4, 128
CASES = (
    ("gptq", "compressed-tensors", None),
    ("awq", "compressed-tensors", None),
    ("awq", "gptq", None),
    ("gptq", "mlx", None),
    ("gptq", "safetensors", "BF16"),
)


def fields(form: str, rows: int, columns: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Random codes of 4 bits: of GPTQ with the zero point that is none, of AWQ with random ones."""
    bits = np.iinfo(np.int32)

    def words(shape: tuple[int, int]) -> np.ndarray:
        return generator.integers(bits.min, bits.max, shape, np.int32, endpoint=True)

    groups = columns // GROUP
    scales = (generator.random((groups, rows), np.float32) / 100 + 0.001).astype(np.float16)
    if form == "awq":
        return {"qweight": words((columns, rows // 8)), "qzeros": words((groups, rows // 8)), "scales": scales}
    index = np.arange(columns, dtype=np.int32) // GROUP
    zeros = np.full((groups, rows // 8), 0x77777777, np.int32)
    return {"qweight": words((columns // 8, rows)), "qzeros": zeros, "scales": scales, "g_idx": index}


def shapes(width: int, inside: int) -> dict[str, tuple[int, int]]:
    """The matrices of a block."""
    return {
        **{f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "o")},
        **{f"mlp.{name}_proj": (inside, width) for name in ("gate", "up")},
        "mlp.down_proj": (width, inside),
    }


def make(form: str, place: Path, size: tuple[int, int, int] = LARGE) -> Path:
    """The model as ``form`` has it."""
    width, inside, blocks = size
    if (place / "model.safetensors").is_file():
        return place
    place.mkdir(parents=True, exist_ok=True)
    source, generator = demo_model(), np.random.default_rng(0)
    for file in source.iterdir():
        if file.name.startswith(("tokenizer", "special", "generation")):
            shutil.copy(file, place / file.name)
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": width, "intermediate_size": inside, "num_hidden_layers": blocks}
    config |= {"head_dim": width // HEADS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    config |= {"tie_word_embeddings": True}
    said = {"gptq": {"checkpoint_format": "gptq", "sym": True, "desc_act": False}}
    said["awq"] = {"version": "gemm", "zero_point": True}
    config["quantization_config"] = {"quant_method": form, "bits": 4, "group_size": GROUP, **said[form]}
    (place / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": generator.random((config["vocab_size"], width), np.float32)}
    tensors["model.norm.weight"] = np.ones(width, np.float32)
    for block in range(blocks):
        layer = f"model.layers.{block}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = np.ones(width, np.float32)
        for name, shape in shapes(width, inside).items():
            found = fields(form, *shape, generator)
            tensors |= {f"{layer}.{name}.{suffix}": value for suffix, value in found.items()}
    plain = {name: value.astype(np.float16) if value.dtype == np.float32 else value for name, value in tensors.items()}
    save_file(plain, place / "model.safetensors", metadata={"format": "pt"})
    return place


def measured(source: Path, out: Path, format: str, level: str | None, times: int) -> Mapping[str, Any]:
    """The least CPU seconds and the largest memory of ``times`` conversions with one thread."""
    command = [sys.executable, "-m", "llm_quantize", "convert", str(source), format, "-o", str(out), "--threads", "1"]
    runs = []
    for _ in range(times):
        shutil.rmtree(out, ignore_errors=True)
        runs.append(taken([*command, "--json", *([] if level is None else ["-q", level])]))
    (artifact,) = json.loads(runs[0]["said"])["artifacts"]
    shutil.rmtree(out, ignore_errors=True)
    return {
        "source": source.name,
        "format": format,
        "level": artifact["level"],
        "verdict": artifact["conversion"]["verdict"],
        "source_bytes": (source / "model.safetensors").stat().st_size,
        "cpu_seconds": min(run["cpu_seconds"] for run in runs),
        "user_seconds": round(min(run["cpu_seconds"] - run["system_seconds"] for run in runs), 2),
        "peak_rss": max(run["peak_rss"] for run in runs),
    }


def rated(large: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """``large`` with what it took in a second: of the whole process, and beyond what ``small`` took."""
    rates: dict[str, Any] = {"bytes_per_cpu_second": round(large["source_bytes"] / large["cpu_seconds"])}
    size = large["source_bytes"] - small["source_bytes"]
    for kind in ("cpu", "user"):
        seconds = large[f"{kind}_seconds"] - small[f"{kind}_seconds"]
        rates[f"start_{kind}_seconds"] = small[f"{kind}_seconds"]
        rates[f"bytes_per_{kind}_second_without_start"] = round(size / max(0.01, seconds))
    return {**large, **rates}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--times", type=int, default=5, help="runs of each conversion, of which the least counts")
    given = parser.parse_args(arguments)
    rows, out = [], given.directory / "out"
    for form, format, level in CASES:
        small, large = make(form, given.directory / f"small-{form}", SMALL), make(form, given.directory / form)
        start, found = (measured(source, out, format, level, given.times) for source in (small, large))
        rows.append(rated(found, start))
        print(json.dumps(rows[-1]), flush=True)
    facts = {"numpy": np.__version__, "times": given.times, "rows": rows}
    given.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
