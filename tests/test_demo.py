"""The demo: the built-in data, the numbers it gives, and how they look in a terminal of 80 columns."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from llm_quantize import data, demo
from llm_quantize.cli.demo import command
from llm_quantize.errors import MissingExtraError, UsageError
from llm_quantize.evaluation.divergence import Divergence, measure


def test_built_in_data() -> None:
    folder = data.demo_model()
    assert (folder / "model.safetensors").stat().st_size < 12_000_000
    assert {"config.json", "tokenizer.json", "README.md"} <= {path.name for path in folder.iterdir()}
    text = data.evaluation_text()
    assert 80_000 < len(text.encode()) < 100_000
    assert "\r" not in text
    assert text.startswith("## Chapter 1\n")
    assert "\n\n一\n" in text
    assert "吾輩は猫である" in text


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two levels, two windows, four tokens, no torch."""
    monkeypatch.setattr(demo, "LEVELS", ("BF16", "Q4_K_M"))
    monkeypatch.setattr(demo, "WINDOWS", 2)
    monkeypatch.setattr(demo, "NEW_TOKENS", 4)
    monkeypatch.setattr(demo, "find_spec", lambda _: None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """The built-in model as F32 and Q4_K_M."""
    pytest.importorskip("xllamacpp")
    from llm_quantize.pipeline import quantize

    folder = tmp_path_factory.mktemp("demo")
    results = quantize(str(data.demo_model()), "gguf", levels=["F32", "Q4_K_M"], output_dir=folder)
    return tuple(result.path for result in results)


@pytest.mark.usefixtures("small")
def test_run_demo_measures_what_it_wrote(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    events: list[dict[str, Any]] = []
    result = demo.run_demo(tmp_path / "out", threads=1, on_event=lambda event: events.append(dict(event)))
    assert [row.level for row in result.rows] == ["F32", "BF16", "Q4_K_M"]
    for row in result.rows:
        assert Path(row.path).stat().st_size == row.size
    source, same, small = result.rows
    assert source.divergence is None
    assert source.bits_per_weight > same.bits_per_weight > small.bits_per_weight
    assert 10 < source.perplexity < 100
    assert same.divergence is not None
    assert small.divergence is not None
    assert 0 <= same.divergence.kld < 1e-3 < small.divergence.kld < 0.1
    assert small.divergence.reference_perplexity == source.perplexity
    assert result.tokens == 2 * 127
    assert all(row.text for row in result.rows)
    assert not result.agreement.checked
    assert "torch" in result.agreement.problem
    assert [event for event in events if event["event"] == "measure"][-1] == {"event": "measure", "done": 2, "total": 2}
    assert json.loads(json.dumps(result.to_dict()))["rows"][2]["divergence"]["kld"] == small.divergence.kld


@pytest.mark.usefixtures("small")
def test_without_a_directory_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(demo.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(demo, "LEVELS", ("Q4_K_M",))
    outcome = CliRunner().invoke(command, ["--json", "--threads", "1"])
    assert outcome.exception is None
    found = json.loads(outcome.stdout)
    assert not found["kept"]
    assert list(tmp_path.iterdir()) == []


def test_missing_runtime_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_quantize.evaluation.runtimes import llama_cpp_library

    def absent() -> None:
        raise MissingExtraError("running a GGUF file", "llamacpp")

    monkeypatch.setattr(llama_cpp_library, "load_library", absent)
    with pytest.raises(MissingExtraError, match=r"pip install 'llm-quantize\[llamacpp\]'"):
        demo.run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_against_itself(files: tuple[Path, ...]) -> None:
    seen: list[tuple[int, int]] = []
    same, other = measure(
        files[0], files, data.evaluation_text(), context=64, max_windows=3, threads=1,
        on_window=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert same.tokens == 3 * 31
    assert same.kld == 0
    assert same.same_top == 1
    assert same.ln_ratio == 0
    assert other.kld > 0
    again = measure(files[0], files[1:], data.evaluation_text(), context=64, max_windows=3, threads=3)
    assert again == [other]


def test_nothing_to_compare_is_refused(files: tuple[Path, ...]) -> None:
    with pytest.raises(UsageError):
        measure(files[0], [], "text")


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_llama_cpp_agrees_with_transformers(files: tuple[Path, ...]) -> None:
    found = demo.compare_with_transformers(data.demo_model(), files[0], windows=2)
    assert found.checked
    assert found.kld < 1e-8
    assert found.same_top == 1
    assert found.largest_difference < 1e-3 * found.logit_range


def example_result(checked: bool) -> demo.DemoResult:
    lost = Divergence(
        tokens=6096, perplexity=42.37, perplexity_sem=0.5, reference_perplexity=34.98, reference_perplexity_sem=0.5,
        ln_ratio=0.19, ln_ratio_sem=0.01, kld=0.20131, kld_sem=0.00288, kld_median=0.1, kld_99=1.0, kld_999=2.0,
        kld_max=3.0, same_top=0.638, same_top_sem=0.01, rms_delta_p=0.1, rms_delta_p_sem=0.01,
    )  # fmt: skip
    rows = (
        demo.DemoRow(
            "F32", "x/a-F32.gguf", 23_148_000, 32.09, 0.01, 34.98, None, " the old man\nwas 吾輩は猫である" * 9
        ),
        demo.DemoRow("Q4_K_M", "x/a-Q4_K_M.gguf", 2_409_472, 3.34, 0.0, 42.37, lost, " [bold]markup[/bold]"),
    )
    agreement = (
        demo.Agreement(True, tokens=508, kld=4e-12, same_top=1.0, largest_difference=5e-5, logit_range=36.0)
        if checked
        else demo.Agreement(False, problem="torch not installed")
    )
    return demo.DemoResult(rows, 6096, 256, demo.PROMPT, agreement, 31.2, kept=True)


@pytest.mark.parametrize("checked", [True, False])
def test_output_fits_80_columns(checked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: example_result(checked))
    monkeypatch.setenv("COLUMNS", "80")
    outcome = CliRunner().invoke(command, ["-o", "out dir"])
    assert outcome.exception is None
    lines = outcome.stdout.splitlines()
    # The last line is a command to copy: it is never broken.
    assert max(cell_len(line) for line in lines[:-1]) <= 80
    assert "'out dir/demo-llama-Q4_K_M.gguf'" in lines[-1]
    table = "\n".join(lines[:3])
    for word in ("23.15 MB", "32.09", "34.98", "source", "3.34", "42.37", "0.20131 ±0.00288", "63.8 %"):
        assert word in table
    assert "[bold]markup[/bold]" in outcome.stdout
    assert ("not checked (torch not installed)" in " ".join(outcome.stdout.split())) is not checked
