"""Quality on a published model: each number format as it is by default against rounding to nearest, on held-out text.

The model is one of ``make real-models``, 135 million weights in bfloat16. By default errors are fed back, calibrated on
the built-in texts; ``--method rtn`` rounds to nearest. For bitsandbytes those are its own encoder's bytes. For
compressed-tensors rtn is on scales that were searched, so there is a third file on plain scales: the largest magnitude
of a block over the largest level, as the package computes them. Divergence is measured on the built-in evaluation
text and on the English of it alone, on the same tokens for all files of a row, which are compared in pairs. Rows that
stand in the JSON file are kept. Where an environment with another tool is named, the tool's own error feedback joins
its rows, on the windows that our command draws. GGUF files with errors fed back are held against the bytes of
llama.cpp's quantizer, given the same importance.

    python benchmarks/real.py --model .models/SmolLM2-135M-Instruct --directory .models/runs --json FILE \\
        --llmcompressor-python PATH --mlx-python PATH --gptqmodel-python PATH --autoround-python PATH
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
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
from llm_quantize.data import evaluation_texts
from llm_quantize.models.opening import open_source


@dataclass(frozen=True)
class Row:
    """Files of one format and level, made in the ways that ``kinds`` names: of OURS, "plain", or of PEERS. ``besides``:
    what its name says beside these two. ``aims``: {other: the most that our divergence shall be of its}. ``group``: the
    groups that the level has by itself; a row of another --group-size is left out."""

    form: str
    level: str
    kinds: tuple[str, ...]
    besides: str = ""
    aims: Mapping[str, float] = field(default_factory=dict)
    group: int | None = None

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.form, self.level, self.besides)))

    def present(self, tools: Collection[str]) -> tuple[str, ...]:
        """``kinds`` without those of tools that are not at hand."""
        return tuple(how for how in self.kinds if how not in PEERS or PEERS[how][0] in tools)


ROWS = (
    Row("bitsandbytes", "NF4", ("default", "rtn"), aims={"rtn": 0.7}),
    Row("compressed-tensors", "NVFP4A16", ("default", "rtn", "plain", "llmcompressor"), aims={"llmcompressor": 0.75}),
    Row("compressed-tensors", "MXFP4A16", ("default", "rtn", "plain", "llmcompressor"), aims={"llmcompressor": 0.75}),
    Row("compressed-tensors", "W4A16", ("default", "rtn", "llmcompressor"), group=128, aims={"llmcompressor": 0.4}),
    Row("mlx", "4bit", ("default", "rtn", "mlx_lm.gptq")),
    Row("ctranslate2", "int8", ("default", "rtn"), aims={"rtn": 0.9}),
    Row("bitsandbytes", "INT8", ("default", "rtn"), aims={"rtn": 1.0}),
    Row("compressed-tensors", "FP8_DYNAMIC", ("default", "rtn", "plain")),
    Row("gptq", "4bit", ("default", "source", "rtn", "gptqmodel"), aims={"gptqmodel": 0.33}),
    Row("gptq", "3bit", ("default", "rtn", "gptqmodel"), aims={"gptqmodel": 0.33}),
    Row("gptq", "2bit", ("default", "rtn", "gptqmodel"), aims={"gptqmodel": 0.25}),
    Row("awq", "4bit", ("default", "rtn", "gptqmodel awq"), aims={"gptqmodel awq": 0.35}),
    Row("gguf", "Q4_K_M", ("feedback", "imatrix"), aims={"imatrix": 0.4}),
    Row("gguf", "Q3_K_M", ("feedback", "imatrix"), aims={"imatrix": 0.4}),
    Row("gguf", "Q2_K", ("feedback", "imatrix"), aims={"imatrix": 0.4}),
    Row("gguf", "Q4_0", ("feedback", "imatrix"), aims={"imatrix": 0.4}),
    # More than an hour of one core each.
    Row("gptq", "2bit", ("default", "autoround"), besides="tuned", aims={"autoround": 0.8}),
    Row("gptq", "4bit", ("default", "autoround"), besides="tuned", aims={"autoround": 0.8}),
)
TEXTS = {"English and Japanese": (), "English": ("pride_and_prejudice",)}
"""Passages of the built-in evaluation text, none: all of it. A model that knows little Japanese falls apart into bytes
there, which are most of the tokens."""
PEERS = {
    "llmcompressor": ("llmcompressor", "run_llmcompressor.py", ("--scheme", "{level}")),
    "mlx_lm.gptq": ("mlx", "run_mlx_gptq.py", ("--bits", "{bits}")),
    "gptqmodel": ("gptqmodel", "run_gptqmodel.py", ("--bits", "{bits}", "--group-size", "{group}")),
    "gptqmodel awq": (
        "gptqmodel",
        "run_gptqmodel.py",
        ("--method", "awq", "--bits", "{bits}", "--group-size", "{group}"),
    ),
    "autoround": ("autoround", "run_autoround.py", ("--scheme", "W{bits}A16", "--group-size", "{group}")),
}
"""The same format and size by other tools: the environment, its runner, and how that is told the level."""
OURS = {
    "default": (),
    "feedback": ("--method", "gptq"),
    "source": ("--inputs", "source"),
    "rtn": ("--method", "rtn"),
    "plain": ("--method", "rtn"),
    "imatrix": ("--method", "rtn", "--calibrate"),
}
"""The options of each of our files. "imatrix": the bytes of llama.cpp's quantizer, given the same importance."""
# Rounding to nearest as the format's owner scales, which is no option of ours where a better scale costs nothing.
PLAIN = """
from llm_quantize.cli import main
from llm_quantize.formats import compressed_tensors
compressed_tensors.OWN_ROUNDING = True
main()
"""


def command(form: str, level: str, how: str, options: argparse.Namespace) -> list[str]:
    """What a user would type, without the program's name and the directories."""
    chosen = list(OURS[how])
    if form in ("gptq", "awq"):
        chosen += ["--group-size", str(options.group_size)]
    if how not in ("rtn", "plain"):
        chosen += ["--calibration-samples", str(options.samples), "--sequence-length", str(options.length)]
    return ["quantize", form, "-q", level, *chosen, "--threads", str(options.threads)]


def run(program: list[str], arguments: list[str], threads: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One command in its own process: the JSON that it prints, and what it took. SystemExit where it fails."""
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *program, *arguments, "--json"], capture_output=True, text=True, env=environment, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 20):
        raise SystemExit(f"{shlex.join(arguments)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found: dict[str, Any] = json.loads(done.stdout)
    return found, {"cpu_seconds": round(cpu, 1), "wall_seconds": round(time.monotonic() - wall, 1)}


def measure(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """The files of a row made, and what each lost."""
    form, level = row.form, row.level
    made, paths = {}, []
    kinds = row.present(options.tools)
    for how in kinds:
        if how in PEERS:
            made[how], path = peer(form, level, how, options)
            paths.append(str(path))
            continue
        words = command(form, level, how, options)
        folder = options.directory / f"{form}-{level}-{how}"
        shutil.rmtree(folder, ignore_errors=True)
        program = ["-c", PLAIN] if how == "plain" else ["-m", "llm_quantize"]
        _, cost = run(program, [words[0], str(options.model), *words[1:], "-o", str(folder)], options.threads)
        path = model_in(folder)
        paths.append(str(path))
        size = weight_bytes(path)
        shown = shlex.join(["llm-quantize", words[0], "MODEL", *words[1:]])
        made[how] = {"command": shown + (" (on plain scales)" if how == "plain" else ""), "bytes": size, **cost}
    texts = {name: judge(name, paths, kinds, options) for name in TEXTS}
    return {"format": form, "level": level, "aims": dict(row.aims), "made": made, "texts": texts}


def peer(form: str, level: str, how: str, options: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """What another tool made on the windows that our command draws, and where it lies. SystemExit where it fails."""
    tool, script, words = PEERS[how]
    tokens = options.directory / f"tokens-{options.samples}x{options.length}.json"
    if not tokens.is_file():
        source = open_source(str(options.model))
        with source.checkpoint:
            text = TextTokenizer(source)
            drawn = sample_windows(load_texts(()), text, samples=options.samples, length=options.length, seed=0)
        tokens.write_text(json.dumps(drawn.ids.tolist()))
    told = {"level": level, "bits": level.removesuffix("bit"), "group": options.group_size}
    candidate = Candidate(
        f"{form}-{level}-{how.replace(' ', '-')}", tool, script, tuple(word.format(**told) for word in words)
    )
    inputs = (options.model.resolve(), tokens.resolve())
    found = launch(candidate, options.tools[tool].absolute(), inputs, options.directory.resolve(), options.threads)
    if "error" in found:
        raise SystemExit(f"{candidate.name}: {found['error']}")
    path = model_in(options.directory / candidate.name)
    return {
        "bytes": weight_bytes(path),
        **{key: found[key] for key in ("cpu_seconds", "wall_seconds", "rss_peak", "versions")},
    }, path


def model_in(folder: Path) -> Path:
    """The one model below ``folder``: a GGUF file, or a directory."""
    (path,) = list(folder.rglob("*.gguf")) or [file.parent for file in folder.rglob("config.json")]
    return path


def weight_bytes(path: Path) -> int:
    """What the weights of a model take on disk."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))


def judge(name: str, paths: list[str], kinds: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """What the files lost on one of TEXTS."""
    asked = ["--reference", str(options.model), "--windows", str(options.windows), "--threads", str(options.threads)]
    for passage in TEXTS[name]:
        file = options.directory / f"{passage}.txt"
        file.write_text(evaluation_texts()[passage], encoding="utf-8")
        asked += ["--text", str(file)]
    found, _ = run(["-m", "llm_quantize"], ["analyze", "quality", *paths, *asked], options.threads)
    return summary(kinds, found)


def summary(kinds: tuple[str, ...], found: dict[str, Any]) -> dict[str, Any]:
    """Of what ``analyze quality`` found: each file's losses, and the default's against those of the others, paired."""
    figures = (
        *("kld", "kld_sem", "clusters", "kld_median", "kld_99", "kld_999", "same_top", "acceptance", "perplexity"),
        "reference_perplexity",
    )
    pairs = {}
    for pair in found["pairs"]:
        one, other = kinds[pair["first"]], kinds[pair["second"]]
        pairs[f"{one} / {other}"] = {key: value for key, value in pair.items() if key not in ("first", "second")}
    return {
        "tokens": found["tokens"],
        "windows": found["windows"],
        "context": found["context"],
        "losses": {
            how: {"bits_per_weight": one["bits_per_weight"], **{key: one["divergence"][key] for key in figures}}
            for how, one in zip(kinds, found["artifacts"], strict=True)
        },
        "pairs": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--directory", type=Path, required=True, help="scratch space, about 2 GB")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="rows whose name contains TEXT; may be repeated"
    )
    parser.add_argument("--samples", type=int, default=48, help="windows of calibration")
    parser.add_argument("--length", type=int, default=512, help="tokens in each")
    parser.add_argument("--group-size", type=int, default=64, help="of gptq")
    parser.add_argument("--windows", type=int, default=13, help="windows of 512 tokens that are measured on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="what else the machine was doing, for the result")
    parser.add_argument("--json", type=Path, required=True)
    add_interpreters(parser)
    options = parser.parse_args()
    options.tools = interpreters(options)
    os.environ["LLM_QUANTIZE_CACHE"] = str(options.directory / "cache")
    for row in ROWS:
        # One file by itself is held against nothing.
        if row.group not in (None, options.group_size) or len(row.present(options.tools)) == 1:
            continue
        result = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {"rows": {}}
        result |= {
            "model": options.model.name,
            "threads": options.threads,
            "note": options.note or result.get("note", ""),
        }
        if row.name in result["rows"]:
            result["rows"][row.name]["aims"] = dict(row.aims)
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        wanted = not options.only or any(text in row.name for text in options.only)
        if wanted and row.name not in result["rows"]:
            result["rows"][row.name] = measure(row, options)
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(row.name, "done", flush=True)


if __name__ == "__main__":
    main()
