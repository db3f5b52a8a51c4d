"""The command line as a user meets it: exit codes, messages, JSON, progress."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_quantize import cli
from llm_quantize.cli import COMMANDS, run
from llm_quantize.cli.common import Mode
from llm_quantize.cli.progress import told
from llm_quantize.cli.sizes import Size
from llm_quantize.events import Note, Progress, Start


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = run(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def call_json(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code, out, _ = call(capsys, *words)
    return code, json.loads(out)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_the_listed_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, name, "--help")
    assert code == 0
    assert out.startswith(f"Usage: llm-quantize {name}")
    assert COMMANDS[name].endswith(".")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version")[:2] == (0, f"llm-quantize, version {cli.__version__}\n")


@pytest.mark.parametrize("quiet", [False, True])
def test_notes_are_told_unless_quiet(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with told(Mode(False, 0, quiet), "test") as sink:
        sink(Note("no text was\ngiven"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("note: no text was") == (not quiet)
    assert err.count("\n") == (not quiet)


def test_progress_of_two_works_is_told_apart(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    now = [0.0]
    monkeypatch.setattr("llm_quantize.cli.progress.time.monotonic", lambda: now[0])
    with told(Mode(False, 0, False), "quantize") as sink:
        for total, unit in ((1000, "tokens"), (300_000_000, None)):
            sink(Start(total, 1, 0, 0))
            now[0] += 10
            sink(Progress(total, total, unit))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("calibrate: 100% (100 tokens/s, ")
    assert second.startswith("quantize: 100% (30 Mw/s, ")


def test_quantize_info_verify(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", str(demo_model), "gguf", "-q", "Q4_K_M", "-q", "Q8_0", "-o", str(tmp_path), "--json"]
    code, result = call_json(capsys, *words)
    assert code == 0
    assert [artifact["level"] for artifact in result["artifacts"]] == ["Q4_K_M", "Q8_0"]
    for artifact in result["artifacts"]:
        assert Path(artifact["path"]).stat().st_size == artifact["size"]
    path = result["artifacts"][0]["path"]
    code, facts = call_json(capsys, "info", path, "--json")
    assert (code, facts["architecture"], facts["parameters"]) == (0, "llama", 5_770_496)
    code, outcome = call_json(capsys, "verify", path, "--source", str(demo_model), "--json")
    assert (code, outcome["ok"]) == (0, True)
    assert all(tensor["hash"] == "ok" and tensor["relative_error"] < 0.15 for tensor in outcome["tensors"])


def test_info_of_a_checkpoint(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, facts = call_json(capsys, "--json", "info", str(demo_model))
    assert code == 0
    assert facts["parameters"] == 5_770_496
    assert (facts["layers"], facts["heads"], facts["kv_heads"], facts["tied_embeddings"]) == (6, 4, 2, False)
    assert facts["memory"]["kv_cache_f16"] == {"tokens": 1024, "bytes": 2 * 2 * 6 * 2 * 64 * 1024}
    code, out, _ = call(capsys, "info", str(demo_model), "--tensors")
    assert code == 0
    assert "model.layers.5.mlp.down_proj.weight" in out


def test_dry_run_writes_nothing(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code, text, _ = call(capsys, "quantize", str(demo_model), "-q", "Q4_K_M", "-o", str(out), "--dry-run")
    assert code == 0
    assert "3,576,832 bytes" in text
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (["plan", "{model}", "gguf", "-q", "Q9"], 2, "usage"),
        (["plan", "{model}", "gguf", "-q", "IQ1_S", "--no-calibration"], 2, "usage"),
        (["plan", "{model}", "gptq", "-q", "4bit", "--no-calibration"], 2, "usage"),
        (["plan", "{model}", "gptq", "-q", "4bit", "--asym", "--no-zero-point"], 2, "usage"),
        (["plan", "{model}", "exl2", "-q", "4bit"], 4, "unsupported"),
        (["plan", "{model}", "compressed-tensors"], 2, "usage"),
        (["plan", "{model}", "gguf"], 2, "usage"),
        (["plan", "{model}", "gguf", "-q", "Q8_0", "--tensor-type", "nothing"], 2, "usage"),
        (["plan", "{model}", "gguf", "-q", "Q8_0", "--tensor-type", "(=q8_0"], 2, "usage"),
        (["plan", "{model}", "gguf", "-q", "Q8_0", "--output-type", "q4_k_m"], 2, "usage"),
        (["plan", "{model}", "gguf", "-q", "Q8_0", "--split-max-size", "many"], 2, "usage"),
        (["plan", "{model}/absent", "gguf", "-q", "Q8_0"], 2, "usage"),
        (["quantize", "{model}", "gguf", "-q", "Q8_0", "--imatrix", "{model}/absent"], 2, "usage"),
        (["quantize", "{model}", "gguf", "-q", "Q8_0", "-o", "{model}/config.json/x"], 6, "permission"),
        (["verify", "{model}/absent.gguf"], 2, "usage"),
        (["verify", "{model}/config.json"], 3, "malformed-input"),
        (["run", "{model}/absent.gguf", "hello"], 2, "usage"),
        (["frobnicate"], 2, "usage"),
    ],
)
def test_refusals(demo_model: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, kind: str) -> None:
    filled = [word.format(model=demo_model) for word in words]
    found, error = call_json(capsys, *filled, "--json")
    assert (found, error["exit_code"], error["error"]) == (code, code, kind)
    assert error["what"]
    plain, out, err = call(capsys, *filled)
    assert (plain, out) == (code, "")
    assert err.strip()
    assert "Traceback" not in err


def test_sizes() -> None:
    size = Size()
    assert [size.convert(text, None, None) for text in ("4G", "512M", "1.5k", "4GiB", "16", "7.5")] == [
        4 * 10**9,
        512 * 10**6,
        1500,
        4 * 2**30,
        16 * 10**9,  # a bare number is what people call memory by
        7_500_000_000,
    ]
    assert size.convert("16000000000", None, None) == 16 * 10**9


def test_progress_is_plain_lines_without_a_terminal(demo_model: Path, tmp_path: Path) -> None:
    words = ["quantize", str(demo_model), "-q", "Q8_0", "-o", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "llm_quantize", *words], capture_output=True, text=True, check=True)
    assert "quantize: 100%" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    quiet = subprocess.run(
        [sys.executable, "-m", "llm_quantize", "-s", *words, "--overwrite"], capture_output=True, text=True, check=True
    )
    assert quiet.stderr == ""


def test_progress_is_json_lines_with_json(demo_model: Path, tmp_path: Path) -> None:
    words = ["quantize", str(demo_model), "-q", "Q8_0", "-o", str(tmp_path), "--json"]
    done = subprocess.run([sys.executable, "-m", "llm_quantize", *words], capture_output=True, text=True, check=True)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert events[0]["event"] == "start"
    progress = [event for event in events if event["event"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == 5_770_496
    assert json.loads(done.stdout)["artifacts"][0]["level"] == "Q8_0"


def test_run_generates(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "-s", "quantize", str(demo_model), "-q", "Q8_0", "-o", str(tmp_path))[0] == 0
    artifact = str(tmp_path / "demo-llama-Q8_0.gguf")
    code, result = call_json(capsys, "run", artifact, "It is a truth", "-n", "12", "--json")
    assert code == 0
    assert len(result["text"]) > 10
    assert (result["tokens"], result["threads"] >= 1, result["tokens_per_second"] > 0) == (12, True, True)
    again = call_json(capsys, "run", artifact, "It is a truth", "-n", "12", "--json", "--threads", "1")[1]
    assert (again["text"], again["threads"]) == (result["text"], 1)
    code, source = call_json(capsys, "run", str(demo_model), "It is a truth", "-n", "12", "--json")
    assert code == 0
    assert len(source["text"]) > 10


def test_run_takes_its_prompt_from_standard_input(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(capsys, "-s", "quantize", str(demo_model), "-q", "Q8_0", "-o", str(tmp_path))[0] == 0
    words = ("run", str(tmp_path / "demo-llama-Q8_0.gguf"))
    code, text, told = call(capsys, *words, "It is a truth", "-n", "8", "--threads", "1")
    assert code == 0
    assert re.fullmatch(r"8 tokens, [0-9.]+ tokens/s with 1 thread; the prompt's \d+ in [0-9.]+ s\n", told)

    def given(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    given(b"It is a truth\n")
    assert call(capsys, *words, "-", "-n", "8", "--threads", "1")[:2] == (0, text)
    assert call(capsys, "-s", *words, "It is a truth", "-n", "8", "--threads", "1") == (0, text, "")
    given(b"\xff")
    code, _, told = call(capsys, *words, "-")
    assert (code, "not UTF-8" in told) == (2, True)
    given(b"")
    assert call(capsys, *words, "-")[0] == 2
    # A full context ends the text; what has no effect is refused.
    code, short, told = call(capsys, *words, "It is a truth", "-n", "500", "-c", "16", "--threads", "1")
    assert (code, short[: len(text) - 1]) == (0, text[:-1])
    assert int(told.split()[0]) < 16
    for more in (("--top-p", "0.5"), ("--system", "Be kind."), ("-c", "2"), ("--gpu-layers", "2")):
        code, _, told = call(capsys, *words, "It is a truth", *more, "--threads", "1")
        assert code in (2, 4), more
        assert "what to do" in told, more
