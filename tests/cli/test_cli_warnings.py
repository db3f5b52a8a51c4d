"""What a user is told: one line per level where rows fit no block, with the whole list where it is asked for; quiet is
quiet; what could not be done as asked ends in 20; plans tell time before work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_quantize import pipeline
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.artifacts.result import ArtifactResult
from llm_quantize.calibration import choose
from llm_quantize.cli import run
from llm_quantize.measures.amounts import bytes_text, time_text
from llm_quantize.plan import Cost, cpu_seconds
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.rates import RATES
from tests.tiny_models import make_tiny

LEVELS = ("Q4_K_M", "Q2_K", "IQ4_XS")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows no block of 256 divides, as those of many small models."""
    return make_tiny("llama", tmp_path_factory.mktemp("odd") / "odd", hidden_size=96, intermediate_size=192)


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = run([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def words_of(odd: Path, out: Path) -> list[str | Path]:
    return ["quantize", odd, *(word for level in LEVELS for word in ("-q", level)), "-o", out]


def test_one_warning_per_level_with_count_bytes_and_consequence(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, *words_of(odd, tmp_path))
    assert code == 20
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert [line.split(":")[1].strip() for line in warnings] == list(LEVELS)
    for line in warnings:
        assert " of 16 matrices, " in line
        assert "B larger for it (" in line
        assert " bits per weight, not " in line
        assert "), and no less precise" in line
    assert sum("degraded: " in line for line in out.splitlines()) == len(LEVELS)
    verbose = call(capsys, "-v", *words_of(odd, tmp_path))[2]
    assert "blk.1.ffn_up.weight: rows of 96: q5_0, not q4_k" in verbose


def test_bytes_told_are_those_of_the_files(odd: Path) -> None:
    (plan,) = pipeline.plan(str(odd), levels=["Q4_K_S"])
    assert plan.substituted
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    for one in plan.substituted:
        assert (by_name[one.tensor].qtype, by_name[one.tensor].nbytes) == (one.taken, one.nbytes)
        bits = {"q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}[one.asked]
        assert one.more == one.nbytes - by_name[one.tensor].output.shape[0] * one.shape[-1] * bits / 8
        assert QTYPES[one.taken].bits_per_weight >= QTYPES[one.asked].bits_per_weight
    assert f"{bytes_text(sum(one.more for one in plan.substituted))} larger" in plan.warnings[-1]


def test_quiet_says_nothing_but_results(odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "-s", *words_of(odd, tmp_path))
    assert (code, err) == (20, "")
    assert len(out.splitlines()) == 2 * len(LEVELS)
    assert call(capsys, *words_of(odd, tmp_path), "--quiet")[2] == ""
    code, _, err = call(capsys, "-s", "--json", *words_of(odd, tmp_path))
    assert (code, err) == (20, "")


def test_the_whole_list_is_in_json_and_manifest(odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, *words_of(odd, tmp_path), "--json")
    assert code == 20
    planned = json.loads(call(capsys, *words_of(odd, tmp_path), "--dry-run", "--json")[1])
    for told, plan in zip(json.loads(out)["artifacts"], planned["artifacts"], strict=True):
        manifest = read_manifest(Path(f"{told['path']}.manifest.json")) or {}
        assert told["fallbacks"] == manifest["fallbacks"] == plan["fallbacks"]
        assert sum(map(len, told["fallbacks"].values())) == 15
    assert call(capsys, *words_of(odd, tmp_path))[0] == 20, "again, when all are complete"
    assert call(capsys, *words_of(odd, tmp_path), "--strict")[0] == 9


def test_values_that_were_lost_are_told_once_for_all_tensors(demo_model: Path) -> None:
    (plan,) = pipeline.plan(str(demo_model), levels=["Q8_0"])
    counts = {"nonfinite_replaced": {tensor.name: 2 for tensor in plan.tensors[:20]}}
    result = ArtifactResult(plan, Path("x.gguf"), "written", 0.0, 0, nonfinite=counts)
    lines = result.degradations()
    assert lines[0].startswith(f"{plan.tensors[0].name} and 19 more: 40 NaN")


def test_a_level_that_calibrates_says_what_it_costs(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("plan", demo_model, "-q", "IQ2_M"), ("quantize", demo_model, "gptq", "-q", "4bit", "--dry-run")):
        code, out, _ = call(capsys, *words)
        assert code == 0
        assert "warning" not in out
        assert " s of CPU time and " in out.splitlines()[0]
        facts = json.loads(call(capsys, *words, "--json")[1])
        cost = facts["artifacts"][0]["cost"]
        assert (cost["collecting"], cost["feedback"])[words[0] == "quantize"] > 4
        assert bytes_text(cost["memory"]) in out.splitlines()[0]
        assert facts["cpu_seconds_needed"] >= cost["rounding"] + cost["collecting"] + cost["feedback"]


def test_a_large_shape_takes_hours(demo_model: Path) -> None:
    (small,) = pipeline.plan(str(demo_model), levels=["IQ2_M"])
    assert small.cost is not None
    assert small.cost.collecting is not None
    eight = Cost(8e9 / 5.77e6 * small.cost.rounding, 256, 2048, 256 * 2048, small.cost.collecting * 8e9 / 5.77e6 * 2)
    assert " h of CPU time" in str(eight.text)
    assert cpu_seconds([eight, eight]) == pytest.approx(2 * eight.rounding + (eight.collecting or 0))
    assert cpu_seconds([Cost(1.0, collecting=None)]) is None
    assert [time_text(seconds) for seconds in (0.1, 45, 700, 165_000, 9e6)] == [
        "1 s",
        "45 s",
        "12 min",
        "46 h",
        "2,500 h",
    ]


def test_rates_are_those_of_the_benchmark() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text())["types"]
    for row in rows:
        assert RATES[row["qtype"]][row["imatrix"]] == pytest.approx(max(row["native"].values()), rel=0.06)


def test_an_existing_output_is_refused_before_calibration(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_QUANTIZE_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "first.txt"
    text.write_text("The sea was calm, and the old man sat at the door. " * 200)
    words = ["quantize", demo_model, "-q", "Q2_K_S", "-o", tmp_path, "--sequence-length", "64"]
    assert call(capsys, *words, "--calibration-data", text, "--calibration-samples", "2")[0] == 0

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("calibrated")

    other = tmp_path / "other.txt"
    other.write_text(text.read_text().upper())
    path = tmp_path / f"{demo_model.name}-Q2_K_S.gguf"
    with monkeypatch.context() as patched:
        patched.setattr(choose, "collected", never)
        for changed in (["--calibration-data", other], ["--calibration-data", text, "--pure"]):
            code, _, err = call(capsys, *words, *changed, "--calibration-samples", "2")
            assert (code, "the output exists" in err) == (2, True)
        path.write_bytes(b"something else")
        assert call(capsys, *words, "--calibration-data", text)[0] == 2
