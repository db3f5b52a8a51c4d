"""``llm-quantize analyze quality``: figures, gate, report, and refusals with their codes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_quantize import data
from llm_quantize.cli import run
from llm_quantize.cli.analyze_quality import _verdict
from llm_quantize.evaluation.generation_check import Answer, Finding, GenerationCheck
from llm_quantize.pipeline import Options, quantize
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("demo")
    results = quantize(
        str(data.demo_model()), "gguf", levels=["Q8_0", "Q3_K_M"], output_dir=folder, options=Options(threads=1)
    )
    text = folder / "text.txt"
    text.write_text("The sea was calm, and the old man was tired. " * 40, encoding="utf-8")
    return SimpleNamespace(q8=str(results[0].path), q3=str(results[1].path), text=str(text))


def measure(files: SimpleNamespace, *words: str, code: int = 0) -> None:
    common = ["--reference", str(data.demo_model()), "--context", "64", "--windows", "3", "--threads", "1"]
    assert run(["analyze", "quality", *words, *common]) == code


def test_text(files: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    measure(files, files.q8, files.q3, "--runtime", "llama.cpp")
    captured = capsys.readouterr()
    told = captured.out
    assert "errors of tensors in demo-llama-Q8_0.gguf: " in captured.err
    for words in (
        "demo-llama-Q8_0.gguf", "indistinguishable", "99.9 %", "Noise floor", "excellent below 0.010",
        "93 scored tokens in 3 windows of 64 (built-in English and Japanese prose)",
        "as its rounding of activations explains", "(paired), ratio 0.0",
        "largest errors of tensors in demo-llama-Q3_K_M.gguf", "planned",
    ):  # fmt: skip
        assert words in told
    assert max(map(len, told.splitlines()[:3])) <= 100


def test_json_gate_and_report(files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "page.html"
    measure(
        files, files.q8, files.q3, "--json", "--max-kld", "0.01", "--report", str(report), "--text", files.text, code=9
    )
    found = json.loads(capsys.readouterr().out)
    assert found["error"] == "numeric-policy"
    assert found["exit_code"] == 9
    assert "Q3_K_M" in found["found"]
    assert found["texts"] == ["text.txt"]
    assert found["tokens"] == 3 * 31
    one, two = found["artifacts"]
    assert one["divergence"]["kld"] < 0.01 < two["divergence"]["kld"]
    assert one["generation"] is None
    assert two["tensors"][0]["relative"] >= two["tensors"][-1]["relative"]
    assert found["pairs"][0]["kld_difference"] < 0
    page = report.read_text(encoding="utf-8")
    assert "Q3_K_M" in page
    assert "text.txt" in page


def test_the_gate_passes_and_the_report_is_japanese(
    files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "page.html"
    measure(files, files.q8, "--max-kld", "0.01", "--report", str(report), "--lang", "ja")
    assert f"レポート: {report}" in capsys.readouterr().out
    assert 'lang="ja"' in report.read_text(encoding="utf-8")


@pytest.mark.parametrize(("wrong", "better", "said"), [(1, 0, "about as well as"), (4, 1, "worse than")])
def test_the_verdict_counts_prompts_on_both_sides(wrong: int, better: int, said: str) -> None:
    answer = Answer("p", "text", 1, ended=True, loop=0.0, repetition=0.0)
    findings = tuple(Finding(f"prompt {index}", "loop", "loops") for index in range(wrong))
    check = GenerationCheck((answer,) * 8, (answer,) * 8, findings, better)
    counts = f"of 8 prompts, {wrong} go wrong here only and {better} in the source only"
    assert _verdict(check) == f"writes {said} the source: {counts}"


def test_generated_text(files: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    measure(files, files.q8, "--generate", "--json")
    (one,) = json.loads(capsys.readouterr().out)["artifacts"]
    assert one["generation"]["ok"]
    assert len(one["generation"]["answers"]) == len(one["generation"]["reference"]) == 8


def test_an_imatrix_weighs_the_errors(
    files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gguf
    import numpy as np

    path = tmp_path / "imatrix.gguf"
    writer = gguf.GGUFWriter(path, "", use_temp_file=False)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["x"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(files.q3).tensors}
    width = int(tensors["blk.0.ffn_up.weight"].shape[0])
    sums = np.zeros((1, width), np.float32)
    sums[0, 3] = 5
    writer.add_tensor("blk.0.ffn_up.weight.in_sum2", sums)
    writer.add_tensor("blk.0.ffn_up.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    measure(files, files.q3, "--statistics", str(path), "--json")
    losses = json.loads(capsys.readouterr().out)["artifacts"][0]["tensors"]
    assert losses[0]["name"] == "blk.0.ffn_up.weight"
    assert losses[0]["weighted"] > 0
    assert all(loss["weighted"] is None for loss in losses[1:])


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["absent.gguf"], 2, "no such artifact"),
        (["Q8", "--text", "absent.txt"], 2, "absent.txt"),
        (["Q8", "--runtime", "vllm"], 2, "llama.cpp"),
        (["Q8", "--max-kld", "0"], 2, "max-kld"),
        (["Q8", "--max-kld", "nan"], 2, "max-kld"),
        (["Q8", "--report", "Q8"], 2, "a file that is read"),
        (["Q8", "--report", "x" * 300], 6, "name is too long"),
        (["Q8", "--report", "Q8/x.html"], 6, "directory is a file"),
        (["Q8", "--context", "2048"], 2, "context"),
        (["Q8", "--max-ram", "1M"], 5, "memory limit"),
        ([], 2, "ARTIFACT"),
    ],
)
def test_refusals(
    words: list[str], code: int, expected: str, files: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("Q8", files.q8) for word in words]
    assert run(["analyze", "quality", *given, "--reference", str(data.demo_model()), "--threads", "1"]) == code
    told = capsys.readouterr()
    assert expected in told.err + told.out


def test_another_model(files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny("llama", tmp_path / "model")
    assert run(["analyze", "quality", files.q8, "--reference", str(model), "--context", "32"]) == 8
    told = capsys.readouterr().err
    assert "not made from this reference model" in told
    assert files.q8 in told.replace("\n", "")
    assert str(model) in told.replace("\n", "")


def test_text_that_is_too_short(files: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    measure(files, files.q8, "--text", str(short), code=2)
    assert "shorter than one window" in capsys.readouterr().err
