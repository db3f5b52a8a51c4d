"""What commands print: whole lines without a terminal, short plans, quiet results, split artifacts, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.cli import run
from llm_quantize.errors import UsageError
from llm_quantize.io.artifact_files import first_file
from llm_quantize.memory import available_cpus
from llm_quantize.runtimes import generate
from tests.hearing import into


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = run([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def artifacts(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one Q8_0 file, one Q4_K_M file, and a Q8_0 artifact of several parts in ``parts``."""
    place = tmp_path_factory.mktemp("artifacts")
    assert run(["-s", "quantize", str(demo_model), "-q", "Q8_0", "-q", "Q4_K_M", "-o", str(place)]) == 0
    words = ["-q", "Q8_0", "-n", "parts", "--split-max-size", "2M", "-o", str(place)]
    assert run(["-s", "quantize", str(demo_model), *words]) == 0
    return place


def parts_of(artifacts: Path) -> list[Path]:
    parts = sorted(artifacts.rglob("parts*-of-*.gguf"))
    assert len(parts) >= 3
    return parts


def test_piped_info_is_whole_lines(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / ("a long name " * 12).strip()
    model.symlink_to(demo_model)
    code, out, _ = call(capsys, "info", model)
    assert code == 0
    lines = out.splitlines()
    assert f"directory: {model}" in lines
    assert "context length: 1,024" in lines
    assert lines == [line.rstrip() for line in lines]
    assert all(": " in line for line in lines)
    memory = next(line for line in lines if line.startswith("memory: "))
    assert memory.endswith("kv cache, f16, 1,024 tokens 3.15 MB")


def test_info_on_a_terminal_folds_and_keeps_all(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    model = tmp_path / ("x" * 150)
    model.symlink_to(demo_model)
    code, out, _ = call(capsys, "info", model)
    assert code == 0
    assert "…" not in out
    assert str(model) in "".join(out.split())


def test_plan_is_short_and_v_lists_tensors(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, short, _ = call(capsys, "plan", demo_model, "-q", "Q4_K_M", "--threads", "1")
    assert code == 0
    assert "blk.0" not in short
    assert "39 q4_k, 13 f32, 5 q6_k" in short
    assert short.endswith("with 1 thread\n")
    for words in (
        ("-v", "plan", demo_model, "-q", "Q4_K_M"),
        ("plan", demo_model, "-q", "Q4_K_M", "-v"),
        ("quantize", demo_model, "-q", "Q4_K_M", "--dry-run", "--verbose"),
    ):
        code, out, _ = call(capsys, *words)
        assert code == 0
        assert "output.weight\t2048 x 256\tq6_k\t430,080\n" in out
        assert sum(line.count("\t") == 3 for line in out.splitlines()) == 57


@pytest.mark.parametrize("words", [("plan",), ("quantize", "--dry-run")])
def test_plan_fits_memory_as_a_run_does(
    demo_model: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    command = (words[0], demo_model, *words[1:], "-q", "Q8_0")
    assert "with 7 threads" in call(capsys, *command, "--threads", "7")[1]
    code, out, err = call(capsys, *command, "--max-ram", "1M")
    assert (code, out) == (5, "")
    assert "the memory limit is too small" in err
    facts = json.loads(call(capsys, *command, "--json")[1])
    assert facts["threads"] == available_cpus()


def test_verify_lists_all_with_v_after_its_name(
    artifacts: Path, demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("verify", artifacts / "demo-llama-Q8_0.gguf", "--source", demo_model)
    short, whole = call(capsys, *words)[1], call(capsys, *words, "-v")[1]
    assert short.count("blk.") <= 10 < whole.count("blk.")


def test_quiet_prints_results_and_no_progress(demo_model: Path, tmp_path: Path) -> None:
    words = ["quantize", str(demo_model), "-q", "Q8_0", "-o", str(tmp_path), "--overwrite"]
    for options in (["-s"], ["-s", "--json"]):
        command = [sys.executable, "-m", "llm_quantize", *options, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert "demo-llama-Q8_0.gguf" in done.stdout


def test_options_of_a_calibration_that_is_none_are_named(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("quantize", demo_model, "-q", "Q8_0", "-o", tmp_path)
    assert "had no effect" not in call(capsys, *words)[2]
    err = call(capsys, *words, "--calibration-samples", "256", "--chat")[2]
    assert "--calibration-samples, --chat had no effect: nothing was calibrated (no level here needs it" in err
    err = call(capsys, *words, "--inputs", "block", "--correction", "0.5")[2]
    assert "--inputs, --correction had no effect: no errors are fed back" in err
    assert '"text": "--chat had no effect' in call(capsys, *words, "--chat", "--json")[2]


def test_quiet_is_quiet(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], artifacts: Path) -> None:
    words = ("run", artifacts / "demo-llama-Q8_0.gguf", "a b " * 600, "-n", "1")
    code, _, err = call(capsys, *words)
    assert code == 0
    assert err.startswith("warning: ")
    assert "1024" in err
    code, _, err = call(capsys, "-s", *words)
    assert (code, err) == (0, "")


@pytest.mark.parametrize("given", ["directory", "first", "last"])
def test_info_of_a_split_artifact_opens_all_parts(
    artifacts: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    parts = parts_of(artifacts)
    path = {"directory": parts[0].parent, "first": parts[0], "last": parts[-1]}[given]
    code, out, _ = call(capsys, "info", path, "--json")
    facts: dict[str, Any] = json.loads(out)
    assert code == 0
    assert facts["parameters"] == 5_770_496
    assert len(facts["tensors"]) == 57
    assert [entry["name"] for entry in facts["files"]] == [part.name for part in parts]
    assert facts["size"] == sum(part.stat().st_size for part in parts)
    assert facts["architecture"] == "llama"


def test_run_opens_the_first_part(artifacts: Path, tmp_path: Path) -> None:
    parts = parts_of(artifacts)
    assert [first_file(path) for path in (*parts, parts[0].parent)] == [parts[0]] * (len(parts) + 1)
    assert "".join(generate(parts[1], "It was", max_tokens=3))
    (tmp_path / parts[1].name).symlink_to(parts[1])
    with pytest.raises(UsageError, match="absent") as caught:
        first_file(tmp_path / parts[1].name)
    assert parts[0].name in str(caught.value)


@pytest.mark.parametrize("command", [("run", "{}", "hello"), ("info", "{}")])
def test_a_directory_of_several_artifacts(
    artifacts: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    code, out, err = call(capsys, *(word.format(artifacts) for word in command))
    assert (code, out) == (2, "")
    assert "several artifacts" in err
    assert "demo-llama-Q4_K_M.gguf, demo-llama-Q8_0.gguf" in err


def test_run_refuses_at_once_and_in_words(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = artifacts / "demo-llama-Q8_0.gguf"
    for words, code, text in (
        (("",), 2, "the prompt is empty"),
        (("hi", "--temperature", "1", "--seed", "-5"), 2, "-5 is not in the range"),
        (("hi", "--chat"), 4, "no chat template"),
    ):
        found, out, err = call(capsys, "run", path, *words)
        assert (found, out.strip()) == (code, "")
        assert text in err


@pytest.mark.parametrize("runtime", ["llama.cpp", "transformers"])
def test_run_warns_beyond_the_trained_context(artifacts: Path, demo_model: Path, runtime: str) -> None:
    model = demo_model if runtime == "transformers" else artifacts / "demo-llama-Q8_0.gguf"
    heard: list[Any] = []
    list(generate(model, "a b " * 600, max_tokens=1, on_event=into(heard)))
    assert [event["event"] for event in heard] == ["warning", "generated"]
    assert "1 of answer pass the 1024" in heard[0]["text"]
    heard.clear()
    assert "".join(generate(model, "It was", max_tokens=2, on_event=into(heard)))
    assert [event["event"] for event in heard] == ["generated"]
