"""A user is told one figure of memory: by the plan, by its warning, by the check before work, by every start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_quantize import memory
from llm_quantize.artifacts import preflight
from llm_quantize.cli import run
from llm_quantize.measures.amounts import bytes_text

from ..tiny_models import make_tiny
from .tiny import write_text

RESIDENT = 80 << 20


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What ``preflight.check`` finds in a process whose size tests do not change."""
    found: list[int] = []
    check = preflight.check

    def noted(*words: Any, **more: Any) -> preflight.Preflight:
        fitted = check(*words, **more)
        found.append(fitted.memory_needed)
        return fitted

    monkeypatch.setattr(memory, "resident_bytes", lambda: RESIDENT)
    monkeypatch.setattr(memory, "peak_resident_bytes", lambda: RESIDENT)
    monkeypatch.setattr(memory, "torch_is_loaded", lambda: False)
    monkeypatch.setattr(preflight, "check", noted)
    return found


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("llama", ("gptq", "-q", "4bit", "--group-size", "32")),
        ("llama", ("gguf", "-q", "Q4_0", "--method", "gptq", "--inputs", "block")),
        ("mixtral", ("compressed-tensors", "-q", "W4A16", "--group-size", "16")),
        ("llama", ("awq", "-q", "4bit", "--group-size", "32")),
    ],
)
def test_one_figure(
    variant: str, words: tuple[str, ...], figures: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny(variant, tmp_path / "model")
    common = ["quantize", str(model), *words, "--threads", "1", "--json"]
    common += ["--calibration-data", str(write_text(tmp_path)), "--calibration-samples", "4", "--sequence-length", "40"]
    assert run([*common, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert run([*common, "-o", str(tmp_path / "out")]) in (0, 20)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    starts = [event["memory_needed"] for event in events if event["event"] == "start"]
    needed = plan["memory_needed"]
    assert f"{bytes_text(needed)} of memory" in " ".join(plan["artifacts"][0]["notes"])
    assert len(starts) == 2
    # The text is drawn and the network built by now: a window fewer, a bias that headers count elsewhere.
    assert [*starts, *figures] == [pytest.approx(needed, rel=1e-3)] * 4


def test_a_calibration_is_in_the_plan(
    figures: list[int], demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a level that needs importance; when it is done it is no longer to come."""
    common = ["quantize", str(demo_model), "-q", "IQ2_XS", "--threads", "1", "--json"]
    common += ["--calibration-data", str(write_text(tmp_path)), "--calibration-samples", "4", "--sequence-length", "40"]
    assert run([*common, "--dry-run"]) == 0
    needed = json.loads(capsys.readouterr().out)["memory_needed"]
    assert needed > RESIDENT + memory.TORCH_BYTES
    assert run([*common, "-o", str(tmp_path / "out")]) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    starts = [event["memory_needed"] for event in events if event["event"] == "start"]
    assert starts[0] == figures[0] == pytest.approx(needed, rel=1e-3)
    assert starts[1] == figures[1] < needed
