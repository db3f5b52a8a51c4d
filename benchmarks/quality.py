"""Quality against the tools that own the formats: mean KL divergence to the source, paired, at equal bytes.

Everybody gets the same model, calibration tokens out of the same windows and the same judge: weights decoded by
peers/dequantize.py (numpy and the gguf package, from the layouts), run by transformers in float32 over held-out text,
and compared with the source token by token. Peers that are absent are left out and named. Runs are kept in the
directory and not repeated.

    python benchmarks/quality.py --directory /scratch --gptqmodel-python PATH --autoawq-python PATH \\
        --llmcompressor-python PATH --autoround-python PATH --json benchmarks/results/quality.json
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
# This folder has a file called like the gguf package: it must not come first on the import path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.append(str(HERE / "peers"))

from dequantize import read_checkpoint, read_gguf, tensor_bytes
from launch import Candidate, add_interpreters, interpreters, launch

from llm_quantize.calibration.text import load_texts
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.calibration.windows import sample_windows
from llm_quantize.data import demo_model
from llm_quantize.evaluation.texts import evaluation_text
from llm_quantize.measures.divergence import ROWS, Comparison, pair
from llm_quantize.models.opening import open_source

AWQ_WINDOWS = 64
"""The first so many of them for the tools that search scales, which take ten minutes and more for all of them here."""

WINDOWS, LENGTH = 256, 256
"""Calibration windows and their length, which is also that of the held-out windows: what the models were trained on."""

LEVELS = {"Q4_K_S": 0.80, "Q4_K_M": 0.80, "Q3_K_S": 0.70, "Q3_K_M": 0.70, "Q2_K": 0.70, "Q4_0": 0.80}
MORE_LEVELS = ("IQ4_XS",)
GPTQ = {"4bit": 0.85, "3bit": 0.75, "2bit": 0.60}

AIMS: dict[tuple[str, str], float | None] = {
    **{(f"ours-gguf-{level}", f"llamacpp-{level}"): aim for level, aim in LEVELS.items()},
    **{(f"ours-gptq-{level}", f"gptqmodel-gptq-{level}"): aim for level, aim in GPTQ.items()},
    ("ours-awq-4bit", "autoawq-4bit"): 0.75,
    ("ours-awq-4bit", "gptqmodel-awq-4bit"): 0.75,
    ("ours-compressed-tensors-W4A16", "llmcompressor-W4A16"): 0.80,
    **{(f"ours-gguf-{level}", f"llamacpp-{level}"): None for level in MORE_LEVELS},
    ("ours-gptq-4bit-source", "gptqmodel-gptq-4bit"): GPTQ["4bit"],
    ("ours-gptq-4bit", "autoround-W4A16-0"): None,
    ("ours-gptq-4bit", "autoround-W4A16-200"): None,
    ("ours-gptq-3bit", "autoround-W3A16-200"): None,
    ("ours-gptq-2bit", "autoround-W2A16-200"): None,
}
"""(ours, theirs): the ratio of mean KLD aimed at, None where the peer is there for context."""


def models() -> dict[str, Path]:
    """The models trained by scripts/train_demo_model.py, by name."""
    return {"demo-llama": demo_model()} | {name: HERE / "models" / name for name in ("demo-qwen3", "demo-qwen3-moe")}


def candidates() -> list[Candidate]:
    """Everything that is measured, ours first."""
    found = [Candidate(f"ours-gptq-{level}", "ours", "run_ours.py", ("gptq", level)) for level in GPTQ]
    found.append(Candidate("ours-gptq-4bit-source", "ours", "run_ours.py", ("gptq", "4bit", "--inputs", "source")))
    found.append(Candidate("ours-awq-4bit", "ours", "run_ours.py", ("awq", "4bit")))
    found.append(Candidate("ours-compressed-tensors-W4A16", "ours", "run_ours.py", ("compressed-tensors", "W4A16")))
    for level in (*LEVELS, *MORE_LEVELS):
        found.append(Candidate(f"ours-gguf-{level}", "ours", "run_ours.py", ("gguf", level, "--method", "gptq")))
        found.append(Candidate(f"llamacpp-{level}", "llamacpp", "run_llamacpp.py", ("--level", level)))
    for level in GPTQ:
        found.append(Candidate(f"gptqmodel-gptq-{level}", "gptqmodel", "run_gptqmodel.py", ("--bits", level[0])))
    found.append(Candidate("gptqmodel-awq-4bit", "gptqmodel", "run_gptqmodel.py", ("--method", "awq")))
    found.append(Candidate("autoawq-4bit", "autoawq", "run_autoawq.py"))
    found.append(Candidate("llmcompressor-W4A16", "llmcompressor", "run_llmcompressor.py", ("--scheme", "W4A16")))
    for scheme, iterations in (("W4A16", 0), ("W4A16", 200), ("W3A16", 200), ("W2A16", 200)):
        arguments = ("--scheme", scheme, "--iterations", str(iterations))
        found.append(Candidate(f"autoround-{scheme}-{iterations}", "autoround", "run_autoround.py", arguments))
    return found


def prepare(model: Path, folder: Path) -> tuple[Path, np.ndarray]:
    """The calibration tokens as a file, and the held-out windows."""
    folder.mkdir(parents=True, exist_ok=True)
    source = open_source(str(model))
    with source.checkpoint:
        tokenizer = TextTokenizer(source)
    tokens = folder / "tokens.json"
    ids = sample_windows(load_texts(()), tokenizer, samples=WINDOWS, length=LENGTH, seed=0).ids.tolist()
    if not tokens.is_file():
        tokens.write_text(json.dumps(ids))
    elif json.loads(tokens.read_text()) != ids:
        raise SystemExit(f"{tokens} holds other windows: give another --directory")
    return tokens, evaluation_text(tokenizer, context=LENGTH).windows


def first_windows(tokens: Path) -> Path:
    """The first AWQ_WINDOWS of the windows in ``tokens``, as a file beside it."""
    few = tokens.with_name(f"tokens{AWQ_WINDOWS}.json")
    few.write_text(json.dumps(json.loads(tokens.read_text())[:AWQ_WINDOWS]))
    return few


def prepare_llamacpp(model: Path, folder: Path) -> tuple[Path, Path]:
    """What llama.cpp's quantizer is given: the model as BF16 GGUF and the importance matrix of the same tokens."""
    from llm_quantize.cli import run

    half, matrix = folder / f"{model.name}-BF16.gguf", folder / "imatrix.gguf"
    if not half.is_file():
        _must(run(["quantize", str(model), "gguf", "-q", "BF16", "-o", str(folder), "-n", model.name]))
    if not matrix.is_file():
        shape = ["--calibration-samples", str(WINDOWS), "--sequence-length", str(LENGTH)]
        _must(run(["analyze", "importance", str(model), "-o", str(matrix), *shape]))
    return half, matrix


def _must(code: int | None) -> None:
    if code:
        raise SystemExit(code)


def measure_model(name: str, model: Path, tools: dict[str, Path], folder: Path, only: str) -> dict[str, Any]:
    """All candidates on one model, and the pairs that AIMS names."""
    from float_forward import Judge

    tokens, held_out = prepare(model, folder)
    gguf_inputs = prepare_llamacpp(model, folder)
    config = json.loads((model / "config.json").read_text())
    source = read_checkpoint(model)
    judge: Judge | None = None
    found: dict[str, Any] = {}
    scores: dict[str, Comparison] = {}
    for candidate in candidates():
        if candidate.tool not in tools or only not in candidate.name:
            continue
        inputs = gguf_inputs if candidate.tool == "llamacpp" else (model, tokens)
        if "awq" in candidate.name and candidate.tool != "ours":
            inputs = (model, first_windows(tokens))
        cost = launch(candidate, tools[candidate.tool], inputs, folder, threads=1)
        if "error" in cost:
            print(f"{name}: {candidate.name} failed: {cost['error']}", file=sys.stderr)
            found[candidate.name] = cost
            continue
        output = Path(cost.pop("output"))
        kept = folder / f"{candidate.name}.scores.npy"
        comparison = Comparison()
        scores_kept = kept.is_file() and kept.stat().st_mtime >= (folder / f"{candidate.name}.json").stat().st_mtime
        known = np.load(kept) if scores_kept else np.empty((0, 0))
        if len(known) == ROWS:  # every window has as many scored tokens
            for window in np.split(known, len(held_out), axis=1):
                comparison.add_scores(window)
        else:  # never measured, or by a version that kept other figures
            judge = judge or Judge(model, source, held_out)
            weights = read_checkpoint(output) if output.is_dir() else read_gguf(output, config)
            comparison = judge.measure(weights)
            np.save(kept, comparison.scores())
        scores[candidate.name] = comparison
        found[candidate.name] = {**cost, "bytes": tensor_bytes(output), **comparison.result().to_dict()}
    return {
        "held_out_windows": len(held_out),
        "source_bytes": tensor_bytes(model),
        "candidates": found,
        "pairs": pairs(scores, found),
    }


def pairs(scores: dict[str, Comparison], found: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours over theirs, for every pair of AIMS that was measured."""
    rows = []
    for (ours, theirs), aim in AIMS.items():
        if ours in scores and theirs in scores:
            both = pair([scores[ours], scores[theirs]], 0, 1)
            one, two = found[ours], found[theirs]
            rows.append(
                {
                    "ours": ours,
                    "theirs": theirs,
                    "aim": aim,
                    "kld_ratio": both.kld_ratio,
                    "kld_ratio_sem": both.kld_ratio_sem,
                    "kld_999_ratio": one["kld_999"] / two["kld_999"],
                    "same_top_difference": one["same_top"] - two["same_top"],
                    "bytes_ratio": one["bytes"] / two["bytes"],
                }
            )
    return rows


def show(name: str, measured: dict[str, Any]) -> None:
    """The tables of one model."""
    print(f"\n{name}: held-out KLD ± SEM, 99.9 %, same top, bytes, CPU s, wall s, peak MB")
    for label, one in measured["candidates"].items():
        if "kld" in one:
            loss = f"{one['kld']:.5f} ± {one['kld_sem']:.5f}  {one['kld_999']:.3f}  {one['same_top']:.4f}"
            cost = f"{one['cpu_seconds']:8.1f} {one['wall_seconds']:8.1f} {one['rss_peak'] / 1e6:8.0f}"
            print(f"  {label:32} {loss}  {one['bytes']:>10,}  {cost}")
    for row in measured["pairs"]:
        aim = (
            ""
            if row["aim"] is None
            else f"aim {row['aim']:.2f} {'met' if row['kld_ratio'] <= row['aim'] else 'MISSED'}"
        )
        print(
            f"  {row['ours']} / {row['theirs']}: {row['kld_ratio']:.3f} ± {row['kld_ratio_sem']:.3f} {aim}; 99.9 % "
            f"{row['kld_999_ratio']:.2f}, same top {row['same_top_difference']:+.4f}, bytes {row['bytes_ratio']:.4f}"
        )


def main() -> None:
    """Run, judge, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="scratch space; finished runs in it are reused")
    parser.add_argument("--models", nargs="+", choices=list(models()), default=list(models()))
    parser.add_argument("--only", default="", metavar="TEXT", help="candidates whose name contains TEXT")
    parser.add_argument("--json", type=Path)
    add_interpreters(parser)
    options = parser.parse_args()
    tools = interpreters(options)
    result: dict[str, Any] = {
        "calibration": {"windows": WINDOWS, "length": LENGTH, "text": "built-in mix, seed 0"},
        "versions": {name: version(name) for name in ("torch", "transformers", "cyllama", "gguf")},
        "models": {},
    }
    for name in options.models:
        measured = measure_model(name, models()[name], tools, options.directory / name, options.only)
        show(name, measured)
        result["models"][name] = measured
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
