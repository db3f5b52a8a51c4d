"""Calibration against its peer: tokens per CPU second with statistics collected, and of llama.cpp's own forward.

Ours: ``llm_quantize.calibration.collect.calibrate`` on a Hugging Face checkpoint (reading, embedding, every block,
statistics, writing). Peer: libllama of the xllamacpp wheel, prompt after prompt through the BF16 file of the same
weights, logits of the last token only: what llama-imatrix does besides summing. Both on as many threads as asked (one
by default), in processes of their own, windows of equal length; loading is not counted for the peer.

    python benchmarks/calibration.py --directory /scratch
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

OURS = """
import json, sys, time
model, cache, threads, windows, length, kinds = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), sys.argv[6]
import os
os.environ["LLM_QUANTIZE_CACHE"] = cache
from llm_quantize.calibration.collect import calibrate
from llm_quantize.options import CalibrationOptions
from llm_quantize.models.opening import open_source
source = open_source(model)
options = CalibrationOptions(samples=windows, length=length, threads=threads, collect=tuple(kinds.split(",")))
import torch, transformers
wall, cpu = time.monotonic(), time.process_time()
with source.checkpoint:
    found = calibrate(source, options)
print(json.dumps({
    "tokens": found.tokens, "cpu_seconds": time.process_time() - cpu, "wall_seconds": time.monotonic() - wall,
    "memory_planned": found.memory_planned, "memory_peak": found.memory_peak, "dtype": found.dtype,
}))
"""

PEER = """
import json, sys, time
path, threads, windows, length = sys.argv[1], *map(int, sys.argv[2:5])
from llm_quantize.runtimes.llama_cpp import LlamaCpp
from llm_quantize.memory import peak_resident_bytes
import numpy as np
with LlamaCpp(path, context=length, threads=threads) as model:
    ids = np.random.default_rng(0).integers(0, 250, (windows + 1, length))
    model.advance(ids[windows].tolist())
    wall, cpu = time.monotonic(), time.process_time()
    for row in ids[:windows]:
        model.advance(row.tolist())
    print(json.dumps({
        "tokens": windows * length, "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.monotonic() - wall, "memory_peak": peak_resident_bytes(),
    }))
"""


def _checkpoint_maker() -> Any:
    """benchmarks/gguf.py, under another name: the package it measures is called like it."""
    spec = importlib.util.spec_from_file_location("benchmark_of_gguf", HERE / "gguf.py")
    if spec is None or spec.loader is None:
        raise SystemExit("benchmarks/gguf.py is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _child(program: str, *arguments: object, threads: int) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"tokens_per_cpu_second": found["tokens"] / found["cpu_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="scratch space of some GB; files are kept")
    parser.add_argument("--shape", choices=["1b", "tiny"], default="1b")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from llm_quantize.pipeline import quantize

    maker = _checkpoint_maker()
    model = options.directory / f"llama-{options.shape}"
    if not (model / "config.json").is_file():
        maker.make_checkpoint(model, maker.SHAPES[options.shape])
    bf16 = quantize(str(model), levels=["BF16"], output_dir=options.directory)[0].path
    common = (options.threads, options.windows, options.length)
    ours = {}
    for kinds in ("imatrix", "imatrix,absmax,hessian"):
        cache = options.directory / "cache" / f"{os.getpid()}-{kinds.replace(',', '-')}"
        ours[kinds] = _child(OURS, model, cache, *common, kinds, threads=1)
    peer = _child(PEER, bf16, *common, threads=options.threads)
    result = {
        "shape": options.shape,
        "threads": options.threads,
        "windows": options.windows,
        "length": options.length,
        "cpu": _cpu_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "xllamacpp")},
        "ours": ours,
        "peer": peer,
        "ratio": {kinds: run["tokens_per_cpu_second"] / peer["tokens_per_cpu_second"] for kinds, run in ours.items()},
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
