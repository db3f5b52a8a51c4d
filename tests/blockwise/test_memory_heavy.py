"""The memory that a run says it needs is what it takes, on a model large enough to see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..faults.forking import QUIET_MACHINE
from ..tiny_models import make_tiny
from .tiny import write_text

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]

_RUN = """
import sys
from pathlib import Path
from llm_quantize.cli import run
code = run(sys.argv[1:])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024, flush=True)
sys.exit(code)
"""

SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
}


@pytest.mark.parametrize(
    ("format", "level", "threads", "more"),
    [
        ("gguf", "Q4_K", 1, ("--method", "gptq")),
        ("gguf", "Q4_K", 4, ("--method", "gptq")),
        ("gptq", "4bit", 4, ("--inputs", "block")),
        ("awq", "4bit", 1, ()),
    ],
)
def test_the_plan_is_above_the_peak_and_near_it(
    format: str, level: str, threads: int, more: tuple[str, ...], tmp_path: Path
) -> None:
    model = make_tiny("llama", tmp_path / "model", **SIZES)
    words = ["--json", "quantize", str(model), format, "-q", level, *more, "-o", str(tmp_path / "out")]
    words += [
        "--calibration-data",
        str(write_text(tmp_path)),
        "--calibration-samples",
        "32",
        "--sequence-length",
        "256",
    ]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *words, "--threads", str(threads)],
        capture_output=True,
        text=True,
        env={**os.environ, **QUIET_MACHINE, "LLM_QUANTIZE_CACHE": str(tmp_path / "cache")},
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    planned = [event["memory_needed"] for event in events if event["event"] == "start"][-1]
    peak = int(done.stdout.splitlines()[-1])
    assert peak <= planned <= 1.3 * peak, f"planned {planned:,}, peak {peak:,}"
