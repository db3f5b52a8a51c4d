"""Three sentences as a JSON list, as articles have them, calibrate; a dense model is not told of experts; several
artifacts are verified one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_quantize.cli import run
from llm_quantize.io.gguf_file import read_gguf

SENTENCES = ["The sky is blue today.", "A cat sat on the mat.", "Quantization makes models smaller."]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_QUANTIZE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(SENTENCES))
    return path


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = run([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_three_sentences_calibrate(
    demo_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("quantize", demo_model, "gguf", "-q", "IQ2_M", "--calibration-data", text, "-o", tmp_path)
    planned = json.loads(call(capsys, *words, "--dry-run", "--json")[1])["artifacts"][0]["cost"]
    assert planned["windows"] == 1
    assert planned["tokens"] < 60
    code, _, err = call(capsys, *words)
    assert code == 0
    assert "less than one window of 1,024: it is one window of 36" in err
    assert "without repeating" not in err
    metadata = read_gguf(tmp_path / f"{demo_model.name}-IQ2_M.gguf").metadata
    assert metadata["quantize.imatrix.chunks_count"].value == 1


def test_three_sentences_feed_errors_back(
    demo_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("quantize", demo_model, "gptq", "--calibration-data", text, "-o", tmp_path)
    code, out, err = call(capsys, *words, "--json")
    assert code in (0, 20)
    assert "it is one window of 36" in err
    assert call(capsys, "verify", json.loads(out)["artifacts"][0]["path"], "--source", demo_model)[0] == 0


def test_what_cannot_calibrate_at_all_is_refused(
    demo_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text.write_text('["", ""]')
    code, _, err = call(
        capsys, "analyze", "importance", demo_model, "--calibration-data", text, "-o", tmp_path / "i.dat"
    )
    assert code in (2, 3)
    assert "text" in err


def test_a_dense_model_is_not_told_of_experts(
    demo_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text.write_text('["a b"]')
    words = ("analyze", "importance", demo_model, "--calibration-data", text, "-o", tmp_path / "i.gguf")
    code, out, err = call(capsys, *words)
    assert code == 0
    assert "expert" not in out + err
    assert json.loads(call(capsys, *words, "--json")[1])["short_experts"] == {}


def test_several_artifacts_are_verified_one_after_the_other(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "out"
    assert call(capsys, "quantize", demo_model, "-q", "Q8_0", "-q", "Q4_0", "-o", place)[0] == 0
    assert call(capsys, "quantize", demo_model, "-q", "Q8_0", "-n", "s", "--split-max-size", "2M", "-o", place)[0] == 0
    assert call(capsys, "quantize", demo_model, "safetensors", "-q", "F16", "-o", place)[0] == 0
    files = sorted(place.glob("*.gguf"))
    assert len(files) == 2
    code, out, _ = call(capsys, "verify", *files)
    assert code == 0
    assert out.endswith("2 of 2 artifacts are ok\n")
    code, out, _ = call(capsys, "verify", place)
    assert (code, out.splitlines()[-1]) == (0, "4 of 4 artifacts are ok")
    data = bytearray(files[1].read_bytes())
    data[-5] ^= 4
    files[1].write_bytes(data)
    code, out, err = call(capsys, "verify", place, "--source", demo_model)
    assert code == 8
    assert "3 of 4 artifacts are ok" in out
    assert files[1].name in err
    assert "None" not in out + err
    facts = json.loads(call(capsys, "verify", place, "--json")[1])
    assert [artifact["ok"] for artifact in facts["artifacts"]].count(False) == 1


def test_parts_that_are_none_are_said_in_words(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        call(capsys, "quantize", demo_model, "-q", "Q8_0", "-n", "s", "--split-max-size", "2M", "-o", tmp_path)[0] == 0
    )
    (split,) = (path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("s-"))
    assert call(capsys, "quantize", demo_model, "-q", "Q4_0", "-o", split)[0] == 0
    code, _, err = call(capsys, "verify", split)
    assert code == 8
    assert "None" not in err
    assert "is no part of a split model, where part 1 of" in err
