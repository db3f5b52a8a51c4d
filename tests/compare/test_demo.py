"""The demo: the built-in data, the numbers it gives, and how they look in a terminal and without one."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.cells import cell_len
from safetensors.torch import load_file, save_file

from llm_quantize import data
from llm_quantize.cli.demo import command
from llm_quantize.compare import demo
from llm_quantize.errors import MissingExtraError, install_command
from llm_quantize.events import Caution, Measure, Stage
from llm_quantize.measures.divergence import Divergence, Paired
from llm_quantize.reports.wording import speaking
from llm_quantize.runtimes import base, transformers, vllm
from tests.hearing import into


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
    """Three levels, two windows, four tokens, no torch."""
    monkeypatch.setattr(demo, "LEVELS", ("F32", "BF16", "Q4_K_M"))
    monkeypatch.setattr(demo, "WINDOWS", 2)
    monkeypatch.setattr(demo, "NEW_TOKENS", 4)
    monkeypatch.setattr(demo, "find_spec", lambda _: None)


@pytest.mark.usefixtures("small")
def test_run_demo_measures_what_it_wrote(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    events: list[dict[str, Any]] = []
    result = demo.run_demo(tmp_path / "out", threads=1, on_event=into(events))
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
    assert "torch" in result.agreement.problem
    assert result.methods.rows == ()
    assert result.methods.problem == "torch and transformers not installed"
    assert result.methods.remedy == install_command("torch")
    measured = [event for event in events if event["event"] == "measure"]
    assert (measured[-1]["done"], measured[-1]["total"]) == (2, 2)
    shares = [event["whole"] for event in events if "whole" in event]
    assert shares == sorted(shares)
    assert 0.5 < shares[-1] < 1
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
    from llm_quantize.runtimes import llama_cpp

    def absent() -> None:
        raise MissingExtraError("running a GGUF file", "llamacpp")

    monkeypatch.setattr(llama_cpp, "load_library", absent)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[llamacpp\]'"):
        demo.run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def shallow(tmp_path: Path) -> Path:
    """The built-in model without all layers but the first, as error feedback takes time for each."""
    model, folder = data.demo_model(), tmp_path / "shallow"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, folder / name)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(model / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not re.search(r"layers\.[1-9]", name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_rounding_against_feedback(shallow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real pairs; this process has no GPTQModel, so GPTQ must say what is missing and not invent an answer."""
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(data, "demo_model", lambda: shallow)
    monkeypatch.setattr(demo, "LEVELS", ("F32", "Q4_K_M"))
    monkeypatch.setattr(demo, "PAIRS", (("GGUF Q2_K", "gguf", "Q2_K"), ("GPTQ 4bit", "gptq", "4bit")))
    monkeypatch.setattr(demo, "WHERE_INSTALLED", ())
    monkeypatch.setattr(demo, "CALIBRATION", replace(demo.CALIBRATION, samples=4, length=128))
    monkeypatch.setattr(demo, "WINDOWS", 3)
    monkeypatch.setattr(demo, "NEW_TOKENS", 3)
    monkeypatch.setenv("LLM_QUANTIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLM_QUANTIZE_VLLM", raising=False)
    monkeypatch.setattr(transformers, "run", _not_installed)
    events: list[dict[str, Any]] = []
    result = demo.run_demo(tmp_path / "out", threads=1, on_event=into(events))
    source, level = result.rows
    assert source.divergence is None
    assert level.divergence is not None
    assert level.divergence.kld > 0
    assert source.text
    assert result.agreement.runtime == "llama.cpp"
    assert result.agreement.tokens == 2 * 127
    assert result.agreement.kld < 1e-8
    assert result.agreement.same_top == 1
    found = result.methods
    assert [(row.label, row.method) for row in found.rows] == [
        ("GGUF Q2_K", "rounded"), ("GGUF Q2_K", "feedback"), ("GPTQ 4bit", "rounded"), ("GPTQ 4bit", "feedback"),
    ]  # fmt: skip
    assert found.tokens == 3 * 127
    assert found.calibration_tokens == 4 * 128
    assert found.importance_seconds > 0
    for rounded, feedback in (found.rows[:2], found.rows[2:]):
        assert rounded.tensor_bytes == feedback.tensor_bytes
        assert rounded.ratio is None
        assert rounded.run is None
        assert rounded.divergence is not None
        assert feedback.divergence is not None
        assert feedback.ratio is not None
        assert feedback.ratio.kld_ratio == pytest.approx(feedback.divergence.kld / rounded.divergence.kld)
        assert feedback.ratio.kld_ratio_sem > 0
        assert Path(feedback.path).exists()
        assert feedback.seconds > rounded.seconds > 0
    coarse, fine = found.rows[1].run, found.rows[3].run
    assert coarse is not None
    assert coarse.runtime == "llama.cpp"
    assert coarse.text
    assert coarse.tokens == 2 * 127
    assert 0 < coarse.kld < 0.01  # activations rounded to 8 bits; another file would be far off
    assert fine is not None
    assert fine.text == ""
    assert fine.tokens == 0
    assert "no GPTQModel here" in fine.problem
    assert "gptqmodel" in fine.remedy
    stages = [event["text"] for event in events if event["event"] == "stage"]
    assert {"GGUF Q2_K, rounded", "GPTQ 4bit, feedback", "GPTQ 4bit in its runtime"} <= set(stages)


def test_packages_that_are_there_have_their_pairs(
    shallow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NF4 in transformers and int8 in CTranslate2, for real; the other is left out, with what to install."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("ctranslate2")
    for runtime in demo.RUNTIMES.values():
        monkeypatch.delenv(runtime.VARIABLE or "LLM_QUANTIZE_NONE", raising=False)
    monkeypatch.setattr(data, "demo_model", lambda: shallow)
    monkeypatch.setattr(demo, "LEVELS", ("F32",))
    monkeypatch.setattr(demo, "PAIRS", ())
    monkeypatch.setattr(demo, "CALIBRATION", replace(demo.CALIBRATION, samples=2, length=64))
    monkeypatch.setattr(demo, "WINDOWS", 2)
    monkeypatch.setattr(demo, "NEW_TOKENS", 3)
    monkeypatch.setenv("LLM_QUANTIZE_CACHE", str(tmp_path / "cache"))
    found = demo.run_demo(tmp_path / "out", threads=1).methods
    assert [row.label for row in found.rows] == ["NF4", "NF4", "CT2 int8", "CT2 int8"]
    assert found.left_out == ()
    for row, runtime, far in ((found.rows[1], "transformers", 1e-4), (found.rows[3], "CTranslate2", 0.01)):
        assert row.run is not None
        assert (row.run.runtime, row.run.problem) == (runtime, "")
        assert row.run.text
        assert 0 <= row.run.kld < far
    known = demo.find_spec
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "ctranslate2" else known(name))
    pairs, left_out = demo.pairs_here()
    assert ([pair[0] for pair in pairs], left_out) == (["NF4"], (("CT2 int8", "ctranslate2"),))
    monkeypatch.setenv("LLM_QUANTIZE_CTRANSLATE2", "/somewhere/python")
    assert demo.pairs_here()[1] == ()


def _not_installed(*_: object, **__: object) -> Any:
    raise transformers.TRANSFORMERS.missing("ImportError: no GPTQModel here")


@pytest.mark.parametrize(("variable", "name"), [("1", "vLLM"), ("", "transformers")])
def test_vllm_where_it_is_named(variable: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory runs where the user has said, and its answer is compared with what the decoder reads."""
    pytest.importorskip("torch")
    monkeypatch.setenv("LLM_QUANTIZE_VLLM", variable)
    monkeypatch.delenv("LLM_QUANTIZE_TRANSFORMERS", raising=False)
    from llm_quantize.options import MethodOptions
    from llm_quantize.pipeline import Options, open_source, quantize

    options = Options(threads=1, method=MethodOptions(method="rtn"))
    (result,) = quantize(str(data.demo_model()), "gptq", levels=["4bit"], output_dir=tmp_path, options=options)
    windows = np.arange(128, dtype=np.int32).reshape(2, 64) + 5
    source = open_source(str(data.demo_model()))
    size = source.architecture.hyper.vocab_size
    asked: list[base.Request] = []

    def answer(path: Path, request: base.Request, **_: object) -> base.Reply:
        assert path == result.path
        asked.append(request)
        count = 0 if request.windows is None else len(request.windows)
        logprobs = np.full((count, 64, size), -np.log(size), np.float32)
        return base.Reply(logprobs, (" and so",) * len(request.prompts), ((1, 2),), {}, (), {})

    monkeypatch.setattr({"vLLM": vllm, "transformers": transformers}[name], "run", answer)
    with source.checkpoint:
        found = demo._run(source, result.path, windows, 1)
    assert (found.runtime, found.text, found.problem) == (name, " and so", "")
    assert found.tokens == 2 * 31
    assert found.kld > 1  # it knows nothing
    assert [request.prompts for request in asked] == [(), (demo.PROMPT,)]


def example_row(label: str, method: str, size: int, lost: Divergence | None, **more: Any) -> demo.DemoRow:
    perplexity = 34.98 if lost is None else lost.perplexity
    return demo.DemoRow(label, "x", label, method, "z", size, 32.09, 9, 117.61, perplexity, lost, **more)


def example_result(checked: bool) -> demo.DemoResult:
    lost = Divergence(
        tokens=6096, perplexity=42.37, perplexity_sem=0.5, reference_perplexity=34.98, reference_perplexity_sem=0.5,
        ln_ratio=0.19, ln_ratio_sem=0.01, kld=0.20131, kld_sem=0.00288, kld_median=0.1, kld_99=1.0, kld_999=2.0,
        kld_max=3.0, same_top=0.638, same_top_sem=0.01, rms_delta_p=0.1, rms_delta_p_sem=0.01,
    )  # fmt: skip
    rows = (
        example_row("F32", "rounded", 23_148_000, None, text=" the old man\nwas 吾輩は猫である" * 9),
        example_row("Q4_K_M", "rounded", 2_409_472, lost, text=" [bold]markup[/bold]"),
    )
    absent = {"problem": "torch not installed", "remedy": install_command("torch")}
    agreement = demo.Run("llama.cpp", "", 508, 4e-12, 1.0) if checked else demo.Run("", **absent)
    methods = example_methods(lost) if checked else demo.Methods(**absent)
    return demo.DemoResult(rows, 6096, 256, demo.PROMPT, agreement, methods, 31.2, kept=True)


def example_methods(lost: Divergence) -> demo.Methods:
    ratio = Paired(0, 1, 6096, -0.01, 0.001, 0.71234, 0.01234, 0.0, 0.0)
    ran = demo.Run("transformers", " 吾輩は猫である、[bold]と" * 9, 254, 1.2e-6, 0.9912)
    failed = demo.Run("vLLM", problem="Running a model in vLLM: ImportError", remedy="in a checkout: make vllm")
    rows = []
    for label, run in (("GGUF Q4_K_M", ran), ("AWQ 4bit", failed)):
        rows.append(example_row(label, "rounded", 14_757_814, lost))
        rows.append(example_row(label, "feedback", 14_757_814, lost, ratio=ratio, run=run))
    return demo.Methods(tuple(rows), 6096, 256, 8192, 4.4, left_out=(("CT2 int8", "ctranslate2"),))


@pytest.mark.parametrize("columns", [80, 100, 120])
@pytest.mark.parametrize("checked", [True, False])
def test_output_fits_the_terminal(checked: bool, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: example_result(checked))
    monkeypatch.setenv("COLUMNS", str(columns))
    outcome = CliRunner().invoke(command, ["-o", "out dir"])
    assert outcome.exception is None
    lines = outcome.stdout.splitlines()
    # The last line is a command to copy: it is never broken.
    assert max(cell_len(line) for line in lines[:-1]) <= columns
    assert "'out dir/demo-llama-Q4_K_M.gguf'" in lines[-1]
    table = "\n".join(lines[:3])
    for word in ("23.15 MB", "32.09", "34.98", "source", "42.37", "0.20131 ±0.00288", "63.8 %"):
        assert word in table
    words = " ".join(outcome.stdout.split())
    assert "[bold]markup[/bold]" in words
    assert ("not checked (torch not installed)" in words) is not checked
    if not checked:
        assert (
            "not shown: torch not installed. What to do: in a checkout of llm-quantize: pip install '.[torch]'" in words
        )
        return
    second = "\n".join(line for line in lines if line.startswith(("GGUF Q4_K_M", "AWQ 4bit")))
    for word in ("rounded", "feedback", "14.76 MB", "0.20131 ±0.00288", "0.71 ±0.01", "63.8 %", "117.6 s"):
        assert word in second
    assert "transformers" in second
    assert "1.2e-06" in second
    assert "99.1 %" in second
    assert "吾輩は猫である、[bold]" in second
    assert "CT2 int8 is not shown. What to do: pip install ctranslate2" in words
    assert "AWQ 4bit was not run in vLLM: Running a model in vLLM: ImportError. What to do: in a checkout" in words


def test_in_japanese_no_cell_of_the_tables_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: example_result(True))
    monkeypatch.setenv("COLUMNS", "80")
    with speaking("ja"):
        lines = CliRunner().invoke(command, []).stdout.splitlines()
    heads = [line for line in lines if line.startswith(("レベル", "ファイル"))]
    assert len(heads) == 3
    for line in heads:
        assert "…" not in line
        assert cell_len(line) <= 80
    assert any("誤差補償" in line and "14.76 MB" in line for line in lines)
    assert any(line.startswith("KL ダイバージェンス（± 標準誤差）は、") for line in lines)
    assert not [line for line in lines if line.startswith(("KL divergence", "Ratio", "Rounding", "To decoder"))]


def test_json_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: example_result(True))
    outcome = CliRunner().invoke(command, ["--json"])
    assert outcome.exception is None
    rounded, feedback = json.loads(outcome.stdout)["methods"]["rows"][2:]
    assert rounded["ratio"] is None
    assert feedback["ratio"]["kld_ratio"] == 0.71234
    assert feedback["divergence"]["kld_999"] == 2.0
    assert feedback["run"]["remedy"] == "in a checkout: make vllm"


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for each file and each tenth of what is measured, no bar."""

    def told(*_: object, on_event: Any, **__: object) -> demo.DemoResult:
        on_event(Stage("GPTQ 4bit, feedback"))
        on_event(Caution("careful"))
        on_event(Stage("measure every file against the source"))
        on_event(Measure(1, 2))
        on_event(Measure(2, 2))
        return example_result(True)

    monkeypatch.setattr(demo, "run_demo", told)
    outcome = CliRunner().invoke(command, [])
    assert outcome.exception is None
    assert outcome.stderr.splitlines() == [
        "GPTQ 4bit, feedback",
        "warning: careful",
        "measure every file against the source",
        "measure every file against the source: 50%",
        "measure every file against the source: 100%",
    ]
