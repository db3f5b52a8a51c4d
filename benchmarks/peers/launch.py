"""Runs one tool on one model in the tool's own environment, and keeps what it made and what that cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = ("gptqmodel", "llmcompressor", "autoawq", "autoround", "mlx")


@dataclass(frozen=True)
class Candidate:
    """``name``: of its files. ``tool``: whose interpreter runs ``script``, "ours" for this one; ``arguments`` follow
    the model, the tokens and the output."""

    name: str
    tool: str
    script: str
    arguments: tuple[str, ...] = ()


def add_interpreters(parser: ArgumentParser) -> None:
    """One option for each environment."""
    for tool in ENVIRONMENTS:
        text = f"interpreter of an environment with {tool}; without it {tool} is left out"
        parser.add_argument(f"--{tool}-python", type=Path, metavar="PATH", help=text)


def interpreters(options: Namespace) -> dict[str, Path]:
    """{tool: interpreter}; says which tools are left out."""
    found = {"ours": Path(sys.executable), "llamacpp": Path(sys.executable)}
    for tool in ENVIRONMENTS:
        path = getattr(options, f"{tool}_python")
        if path is None:
            print(f"skipped: {tool} (no --{tool}-python)", file=sys.stderr)
        else:
            found[tool] = path
    return found


def launch(candidate: Candidate, python: Path, inputs: tuple[Path, ...], folder: Path, threads: int) -> dict[str, Any]:
    """What the runner reported, from ``folder``/NAME.json where it ran before; {"error": ...} where it failed."""
    kept = folder / f"{candidate.name}.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    output = folder / candidate.name
    command = [python, HERE / candidate.script, *inputs, output, *candidate.arguments]
    environment = {
        name: value for name, value in os.environ.items() if candidate.tool == "ours" or name != "PYTHONPATH"
    }
    environment |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if candidate.tool == "llamacpp":
        environment |= {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    print(f"{folder.name}: {candidate.name}", file=sys.stderr, flush=True)
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    (folder / f"{candidate.name}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"error": f"exit {done.returncode}: {said[-1][:300] if said else 'no message'}"}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    kept.write_text(json.dumps(found) + "\n")
    return found
