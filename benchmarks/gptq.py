"""Speed against the tools that own the formats: CPU seconds, wall and peak memory of calibration and quantization.

The same synthetic bf16 Llama, the same tokens and as many threads for everybody, one after another, each in its own
process and environment. Imports are not counted; loading, calibration, quantization and saving are. Defaults of each
tool. Say with ``--note`` what else the machine was doing: figures of a busy machine are worth little.

    python benchmarks/gptq.py --directory /scratch --gptqmodel-python PATH --autoawq-python PATH \\
        --llmcompressor-python PATH --json benchmarks/results/gptq.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# This folder has a file called like the gguf package: it must not come first on the import path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.append(str(HERE / "peers"))

from launch import Candidate, add_interpreters, interpreters, launch

from llm_quantize.calibration.text import load_texts
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.calibration.windows import sample_windows
from llm_quantize.data import demo_model
from llm_quantize.models.opening import open_source

SHAPES = {
    "100m": {"hidden": 1024, "intermediate": 2816, "layers": 8, "heads": 16, "kv_heads": 4, "vocabulary": 2048},
    "tiny": {"hidden": 256, "intermediate": 768, "layers": 2, "heads": 4, "kv_heads": 2, "vocabulary": 2048},
}
AIM = 0.5

CANDIDATES = (
    Candidate("ours-gptq-4bit", "ours", "run_ours.py", ("gptq", "4bit", "--all-windows")),
    Candidate("ours-gptq-4bit-source", "ours", "run_ours.py", ("gptq", "4bit", "--all-windows", "--inputs", "source")),
    Candidate("gptqmodel-gptq-4bit", "gptqmodel", "run_gptqmodel.py", ("--bits", "4")),
    Candidate("ours-compressed-tensors-W4A16", "ours", "run_ours.py", ("compressed-tensors", "W4A16", "--all-windows")),
    Candidate("llmcompressor-W4A16", "llmcompressor", "run_llmcompressor.py", ("--scheme", "W4A16")),
    Candidate("ours-awq-4bit", "ours", "run_ours.py", ("awq", "4bit", "--all-windows")),
    Candidate("autoawq-4bit", "autoawq", "run_autoawq.py"),
    Candidate("gptqmodel-awq-4bit", "gptqmodel", "run_gptqmodel.py", ("--method", "awq")),
    Candidate("ours-gguf-Q4_K_M", "ours", "run_ours.py", ("gguf", "Q4_K_M", "--method", "gptq", "--all-windows")),
)
PAIRS = (
    ("ours-gptq-4bit", "gptqmodel-gptq-4bit"),
    ("ours-gptq-4bit-source", "gptqmodel-gptq-4bit"),
    ("ours-compressed-tensors-W4A16", "llmcompressor-W4A16"),
    ("ours-awq-4bit", "autoawq-4bit"),
    ("ours-awq-4bit", "gptqmodel-awq-4bit"),
)


def make_model(directory: Path, shape: str) -> Path:
    """The checkpoint of benchmarks/gguf.py in this shape, with the built-in model's tokenizer."""
    target = directory / f"llama-{shape}"
    if not (target / "tokenizer_config.json").is_file():
        spec = importlib.util.spec_from_file_location("benchmark_of_gguf", HERE / "gguf.py")
        if spec is None or spec.loader is None:
            raise SystemExit("benchmarks/gguf.py is missing")
        maker = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(maker)
        maker.make_checkpoint(target, SHAPES[shape])
        for name in ("tokenizer.json", "generation_config.json", "tokenizer_config.json"):
            shutil.copyfile(demo_model() / name, target / name)
    return target


def make_tokens(model: Path, folder: Path, windows: int, length: int) -> Path:
    """Windows of the built-in text, those that our command draws by itself."""
    source = open_source(str(model))
    with source.checkpoint:
        ids = sample_windows(load_texts(()), TextTokenizer(source), samples=windows, length=length, seed=0).ids
    target = folder / "tokens.json"
    target.write_text(json.dumps(ids.tolist()))
    return target


def ratios(runs: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours over theirs: CPU, wall, and memory at the peak."""
    rows = []
    for ours, theirs in PAIRS:
        one, two = runs.get(ours, {}), runs.get(theirs, {})
        if "cpu_seconds" in one and "cpu_seconds" in two:
            rows.append(
                {"ours": ours, "theirs": theirs, "aim": AIM}
                | {kind: one[kind] / two[kind] for kind in ("cpu_seconds", "wall_seconds", "rss_peak")}
            )
    return rows


def cpu_name() -> str:
    """As /proc/cpuinfo has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def show(result: dict[str, Any]) -> None:
    """The two tables."""
    for name, run in result["runs"].items():
        figures = (run["cpu_seconds"], run["wall_seconds"], run["rss_before"] / 1e6, run["rss_peak"] / 1e6)
        print("{:32} CPU {:8.1f} s  wall {:8.1f} s  before {:6.0f} MB  peak {:6.0f} MB".format(name, *figures))
    for row in result["ratios"]:
        figures = tuple(f"{kind} {row[kind]:.2f}" for kind in ("cpu_seconds", "wall_seconds", "rss_peak"))
        print(f"{row['ours']} / {row['theirs']}: {', '.join(figures)} (aim {row['aim']})")


def main() -> None:
    """Make the model, run everybody, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="scratch space of some GB; runs in it are reused")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="100m")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", metavar="TEXT", help="candidates whose name contains TEXT")
    parser.add_argument("--note", default="", help="what else the machine was doing, for the result")
    parser.add_argument("--json", type=Path)
    add_interpreters(parser)
    options = parser.parse_args()
    tools = interpreters(options)
    folder = options.directory / f"speed-{options.shape}-{options.windows}x{options.length}-{options.threads}"
    folder.mkdir(parents=True, exist_ok=True)
    # Statistics that an earlier run left would be reused: every run calibrates.
    os.environ["LLM_QUANTIZE_CACHE"] = str(folder / "cache")
    model = make_model(options.directory, options.shape)
    tokens = make_tokens(model, folder, options.windows, options.length)
    runs: dict[str, Any] = {}
    for candidate in CANDIDATES:
        if candidate.tool in tools and options.only in candidate.name:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            run = launch(candidate, tools[candidate.tool], (model, tokens), folder, options.threads)
            if "error" in run:
                print(f"{candidate.name} failed: {run['error']}", file=sys.stderr)
            else:
                run.pop("output")
                runs[candidate.name] = run
    result = {
        "model": {**SHAPES[options.shape], "bytes": (model / "model.safetensors").stat().st_size},
        "windows": options.windows,
        "length": options.length,
        "threads": options.threads,
        "cpu": cpu_name(),
        "note": options.note,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "runs": runs,
        "ratios": ratios(runs),
    }
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
