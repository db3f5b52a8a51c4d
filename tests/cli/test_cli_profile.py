"""``analyze profile`` from the command line, to an artifact of its recipe."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from llm_quantize.calibration.imatrix import TensorStatistics
from llm_quantize.cli import run
from llm_quantize.io.imatrix_writer import write_imatrix_dat
from llm_quantize.io.journal import record_line
from llm_quantize.models.opening import open_source
from tests.oracles.llama_quantize import types_of
from tests.tiny_models import make_tiny

TEXT = "What it costs to hold a tensor alone at a type is measured, not guessed. " * 40


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(make_tiny("llama", tmp_path / "tiny"))


def arguments(model: str, *more: str) -> list[str]:
    text = ["--text", "text.txt", "--windows", "2", "--context", "16"]
    return ["analyze", "profile", model, "--types", "q8_0,q5_0,q4_0", *text, *more]


def test_profile_then_quantize(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments(model, "--like", "Q5_0", "--json", "-o", "mine.json", "--name", "mine")) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["profile"], facts["recipe"], facts["name"], facts["level"]) == (
        "tiny.profile.json",
        "mine.json",
        "mine",
        "Q5_0",
    )
    assert not Path("tiny.profile.json.journal").exists()
    assert {row["qtype"] for row in facts["sensitivities"]} == {"q8_0", "q5_0", "q4_0"}
    assert run(["quantize", model, "--recipe", "mine.json"]) == 0
    found = types_of("tiny-mine.gguf")
    assert {name: found[name] for name in facts["tensors"]} == facts["tensors"]
    assert len(set(facts["tensors"].values())) > 1
    assert abs(Path("tiny-mine.gguf").stat().st_size - facts["size"]) < 1024
    capsys.readouterr()

    # Another size: nothing is measured again, and the table names what it stands on.
    kept = Path("tiny.profile.json").read_bytes()
    assert run(arguments(model, "--bpw", "12", "--text", "absent.txt")) == 0
    shown, told = capsys.readouterr()
    assert "blk.0.attn_v " in shown
    assert f"quantize {model} gguf --recipe tiny-12bpw.recipe.json" in shown
    assert "nothing is measured: the figures are those in tiny.profile.json" in told
    assert Path("tiny.profile.json").read_bytes() == kept

    assert run(arguments(model, "--like", "Q5_0", "-o", "mine.json")) == 2
    assert "--overwrite" in capsys.readouterr().err
    other = str(make_tiny("llama", Path("other"), hidden_size=96))
    assert run(arguments(other, "--profile", "tiny.profile.json")) == 8
    assert "another model" in capsys.readouterr().err


def test_kept_figures_are_of_one_importance(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("one", 1.0), ("other", 2.0)):
        rows = TensorStatistics(np.full((1, 64), value, np.float32), np.ones(1, np.float32))
        write_imatrix_dat(Path(f"{name}.dat"), {"blk.0.attn_q.weight": rows}, dataset="none", chunks=1)
    assert run(arguments(model, "--imatrix", "one.dat", "--like", "Q5_0", "-o", "a.json")) == 0
    assert f"quantize {model} gguf --recipe a.json --imatrix one.dat\n" in capsys.readouterr().out
    assert run(arguments(model, "--imatrix", "one.dat", "--like", "Q5_0", "-o", "b.json")) == 0
    capsys.readouterr()
    assert run(arguments(model, "--imatrix", "other.dat", "--like", "Q5_0", "-o", "c.json")) == 2
    assert "another importance matrix" in capsys.readouterr().err
    assert not Path("c.json").exists()


def test_what_it_takes_is_told_first(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments(model, "--dry-run")) == 0
    assert "48 variants over 32 tokens" in capsys.readouterr().out
    assert run(arguments(model, "--dry-run", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["streams"] == 48
    assert not Path("tiny.profile.json").exists()


def test_figures_of_a_fine_tune_are_not_taken(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal headers, size and time of writing; one byte in the middle of a large tensor is another."""
    monkeypatch.setenv("LLM_QUANTIZE_CACHE", "cache")
    assert run(arguments(model, "--dry-run")) == 0
    assert not Path("cache").exists(), "a question costs no reading of the model"
    assert run(arguments(model, "--like", "Q5_0")) == 0
    kept = Path("tiny.profile.json").read_bytes()
    rows = json.loads(kept)["sensitivities"]
    with open_source(model).checkpoint as checkpoint:
        info = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
        file, place = info.file, info.offset + info.nbytes // 2 + 1
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[place] ^= 0x80
    with file.open("r+b") as stream:
        stream.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    capsys.readouterr()
    assert run(arguments(model, "--like", "Q5_1")) == 8
    assert "measured on another model" in capsys.readouterr().err

    # Nor does measuring go on from what an unfinished run has measured on the other.
    with (source := open_source(model)).checkpoint:
        now = source.content()
    first = json.loads(kept)
    for digest, taken in ((first["model"]["sha256"], False), (now, True)):
        Path("tiny.profile.json").unlink()
        about = {"model": digest, "windows": first["text"]["sha256"], "importance": None, "device": "cpu"}
        Path("tiny.profile.json.journal").write_bytes(record_line({"identity": about}) + record_line({"rows": rows}))
        assert run(arguments(model, "--like", "Q5_1", "--json", "-o", f"{taken}.json")) == 0
        assert (json.loads(capsys.readouterr().out)["sensitivities"] == rows) == taken
        assert json.loads(Path("tiny.profile.json").read_bytes())["model"]["sha256"] == now


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "1G", "--bpw", "4"], "--size and --bpw"),
        (["--like", "Q9"], "no gguf level"),
        (["--types", "q9"], "no type"),
        (["--types", "f16"], "no such type to measure"),
        (["--imatrix", "a", "--statistics", "b"], "--imatrix and --statistics"),
    ],
)
def test_what_contradicts_itself(model: str, capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    assert run(arguments(model, *more)) == 2
    assert message in capsys.readouterr().err
