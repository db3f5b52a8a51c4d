"""``compare`` from end to end on the built-in model, its resumption, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.advice.experience import MAKING
from llm_quantize.cli import run
from llm_quantize.compare import bench, comparison, measurements
from llm_quantize.compare.bench import MeasuredFile, measured_file
from llm_quantize.compare.comparison import (
    compare,
    parse_variants,
    remove_made,
    write_reports,
)
from llm_quantize.compare.making import make_words
from llm_quantize.compare.measurements import Measurements, artifact_identity, key_of
from llm_quantize.compare.notes import importance_notes, inputs_notes, speed_notes
from llm_quantize.errors import AccessError, IntegrityError, UnsupportedError, UsageError
from llm_quantize.evaluation import quality, speed
from llm_quantize.formats.gguf.metadata import importance_metadata
from llm_quantize.formats.gguf.metadata import text as gguf_text
from llm_quantize.io.gguf_file import layout_gguf
from llm_quantize.options import CalibrationOptions, MeasurementOptions, MethodOptions, Options
from llm_quantize.pipeline import plan
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.reports.findings import ComparisonResult, read_comparison
from llm_quantize.reports.notes import translated
from llm_quantize.runtimes import llama_cpp_library, mlx
from tests.reports.examples import comparison as comparison_of
from tests.reports.examples import variant

SMALL = Options(threads=1, measurement=MeasurementOptions(context=64, windows=4, prompts=("Once",)))
VARIANTS = parse_variants("gguf:Q8_0,Q2_K")
COMMANDS = ("llm-quantize compare demo",)


@pytest.fixture(scope="module")
def whole(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ComparisonResult, Path]:
    folder = tmp_path_factory.mktemp("compare")
    result = compare(str(demo_model), folder, variants=VARIANTS, options=SMALL, commands=COMMANDS)
    write_reports(result, folder)
    return result, folder


def test_every_figure_is_measured(whole: tuple[ComparisonResult, Path]) -> None:
    result, folder = whole
    good, poor = result.variants
    assert [variant.level for variant in result.variants] == ["Q8_0", "Q2_K"]
    assert 0 < good.divergence.kld < 0.01 < poor.divergence.kld < 2
    assert good.grade != poor.grade
    assert good.size == (folder / "artifacts" / good.file).stat().st_size
    assert good.bits_per_weight == pytest.approx(8 * good.size / result.model.parameters, rel=1e-3)
    assert good.quantize_cpu_seconds is not None
    assert good.quantize_cpu_seconds > 0
    assert good.speed is not None
    assert good.speed.generation_tokens_per_second > 0
    errors = {entry.name: entry.error for entry in poor.tensor_errors}
    assert 0.1 < errors["blk.0.attn_q.weight"] < 0.6
    assert not any("norm" in name for name in errors)
    assert poor.samples[0].prompt == "Once"
    assert result.reference.samples[0].text
    assert result.reference.perplexity == good.divergence.reference_perplexity
    assert result.text.tokens == 4 * 31
    assert result.model.layers == 6


def test_the_report_says_what_was_made_with_importance(tmp_path: Path) -> None:
    kinds = {"a": None, "b": "code", "c": "", "d": "code"}
    made = [MeasuredFile(tmp_path / name, "Q2_K", name, 1, 8.0, texts) for name, texts in kinds.items()]
    assert list(importance_notes(made)) == [
        "quantized with an importance matrix: c",
        "quantized with an importance matrix (code): b, d",
    ]
    assert list(importance_notes(made[1:2])) == ["quantized with an importance matrix (code): every file"]
    recorded = importance_metadata(file="i.gguf", datasets=("general", "code"), entries=1, chunks=1)
    cases: list[tuple[str | None, dict[str, Any]]] = [(None, {}), ("general, code", recorded)]
    for texts, metadata in cases:
        path = tmp_path / f"{len(metadata)}.gguf"
        layout = layout_gguf({"general.architecture": gguf_text("llama"), **metadata}, [])
        path.write_bytes(layout.header)
        assert measured_file(path).importance == texts


def test_the_report_says_which_speeds_were_disturbed(whole: tuple[ComparisonResult, Path]) -> None:
    rows = [
        replace(row, speed=None if row.speed is None else replace(row.speed, cpu_share=0.99))
        for row in whole[0].variants
    ]
    assert list(speed_notes(rows)) == []
    assert rows[0].speed is not None
    rows[0] = replace(rows[0], speed=replace(rows[0].speed, cpu_share=0.2))
    assert [note.rpartition(": ")[2] for note in speed_notes(rows)] == [rows[0].level]


def test_figures_of_weights_alone_are_told_from_those_with_rounded_inputs() -> None:
    """Made ones by the level that was asked for, taken ones by their label."""
    facts = [
        ("ctranslate2", "CT2-int8", "int8"),
        ("bitsandbytes", "mine-BNB-INT8", None),
        ("ctranslate2", "CT2-int8_float32", None),
        ("bitsandbytes", "BNB-NF4", "NF4"),
        ("compressed-tensors", "W8A8", "W8A8"),
        ("gguf", "Q8_0", "Q8_0"),
    ]
    found = [MeasuredFile(Path(label), label, "", 1, 8.0, format=form, asked=asked) for form, label, asked in facts]
    (note,) = inputs_notes(found)
    assert note.startswith(
        "what compare measures of CT2-int8, mine-BNB-INT8, CT2-int8_float32 is the loss of the weights;"
    )
    assert list(inputs_notes(found[3:])) == []
    for said in (note, f"a-W8A8: inputs of matrices rounded too, as its runtime does: {InputGrid('int8').text}"):
        assert translated(said, "en") == said
        assert "the" not in translated(said, "ja").split()


def test_the_three_reports_say_the_same(whole: tuple[ComparisonResult, Path]) -> None:
    result, folder = whole
    assert read_comparison(folder / "comparison.json") == result
    for name in ("index.html", "comparison.md"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "Q2_K" in text
        assert "llm-quantize compare demo" in text


def test_directories_are_made_again_by_the_words_of_the_report(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their weights say less than their levels (W8A8 rounds them as W8A16 does); int8 is timed in CTranslate2; a
    runtime that is not there is named with its remedy; and ``recommend`` takes the figures."""
    pytest.importorskip("ctranslate2")
    monkeypatch.delenv("LLM_QUANTIZE_MLX", raising=False)
    levels = [("compressed-tensors", "W8A8"), ("ctranslate2", "int8"), ("mlx", "4bit")]
    asked = MeasurementOptions(context=64, windows=2, prompts=())
    options = Options(threads=1, measurement=asked, method=MethodOptions(method="rtn"))
    missing = mlx.MLX.missing()
    monkeypatch.setattr(mlx, "run", lambda *_arguments: (_ for _ in ()).throw(missing))
    monkeypatch.setattr(mlx, "require", lambda: None)
    result = compare(str(demo_model), tmp_path, variants=levels, options=options)
    assert [one.make and one.make[:3] for one in result.variants] == [(f, "-q", q) for f, q in levels]
    assert result.variants[0].level == "W8A8"
    timed = [one.speed and one.speed.runtime.split()[0] for one in result.variants]
    assert timed == ["transformers", "CTranslate2", None]
    assert any(note.startswith("MLX-4bit was not run: ") and "make mlx-runtime" in note for note in result.notes)
    for one in result.variants:
        assert one.make is not None
        (planned,) = plan(str(demo_model), one.format, levels=[one.make[2]])
        assert planned.size == pytest.approx(one.size, rel=0.1)
    write_reports(result, tmp_path)
    assert (
        run(["recommend", str(demo_model), "--measured", str(tmp_path), "--device", "cpu", "--ram", "8", "--json"]) == 0
    )
    others = {one["runtime"]: one for one in json.loads(capsys.readouterr().out)["others"]}
    (int8,) = others["ctranslate2"]["choices"]
    assert (int8["kld"], int8["kld_basis"]) == (result.variants[1].divergence.kld, "measured")
    assert int8["generation_tokens_per_second"] is None or result.variants[1].speed is not None
    assert "measured" in {choice["kld_basis"] for choice in others["vllm"]["choices"]}
    assert {choice["generation_tokens_per_second"] for choice in others["vllm"]["choices"]} == {None}


def test_the_same_command_measures_nothing_twice(
    whole: tuple[ComparisonResult, Path], demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, folder = whole

    def never(*_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("measured again")

    for place in (quality, comparison):
        monkeypatch.setattr(place, "measure_quality", never, raising=False)
    monkeypatch.setattr(measurements.Measurements, "put", never)
    assert compare(str(demo_model), folder, variants=VARIANTS, options=SMALL, commands=COMMANDS) == result


def test_compare_and_recommend_say_the_same(
    whole: tuple[ComparisonResult, Path], demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, folder = whole
    advice = result.advice()
    assert advice.take is not None
    assert run(["recommend", str(demo_model), "--measured", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["take"]["file"] == result.variants[advice.take].file == result.to_dict()["recommended"]
    assert (found["take"]["kld_basis"], found["reason"]) == ("measured", advice.reason)
    assert found["smaller"]["file"] == result.variants[advice.smaller or 0].file
    # The two say the same for every machine of the page, too.
    for choice in result.machines:
        words = {"ram": ["--device", "cpu", "--ram"], "gpu": ["--ram", "4096G", "--vram"]}[choice.kind]
        code = run(["recommend", str(demo_model), "--measured", str(folder), *words, str(choice.memory), "--json"])
        found = json.loads(capsys.readouterr().out)
        assert code == 0
        assert (found["take"] or {}).get("file") == choice.file
    needs = result.variants[advice.take].needs
    assert found["take"]["memory"]["total"] == needs.ram


def test_a_variant_is_made_again_by_its_own_command(whole: tuple[ComparisonResult, Path], tmp_path: Path) -> None:
    result, folder = whole
    assert [one.make for one in result.variants] == [("gguf", "-q", "Q8_0"), ("gguf", "-q", "Q2_K")]
    assert make_words("gguf", "Q4_K_M", Options(), None, weighed=True)[3:] == ("--calibrate",)
    assert make_words("gguf", "Q4_K_M", Options(imatrix=Path("i")), None, weighed=True)[3:] == ("--imatrix", "i")
    assert make_words("gguf", "Q4_K_M", Options(calibrate=False), None)[3:] == ("--no-calibration",)
    words = make_words("gguf", "Q2_K", Options(calibrate=True, imatrix=None), "v1")
    assert words == ("gguf", "-q", "Q2_K", "--calibrate", "--revision", "v1")
    data = CalibrationOptions(data=("a.txt",), samples=3, length=64, chat=True)
    words = make_words("gptq", "4bit", Options(calibrate=True, calibration=data), None)
    assert shlex.join(words) == (
        "gptq -q 4bit --calibration-data a.txt --calibration-samples 3 --sequence-length 64 --chat"
    )
    assert {word for word in words if word.startswith("--")} <= set(MAKING)
    first = result.variants[0]
    assert run(["quantize", result.model.source, *(first.make or ()), "-o", str(tmp_path)]) == 0
    assert (tmp_path / first.file).read_bytes() == (folder / "artifacts" / first.file).read_bytes()


def test_another_models_figures_are_not_taken_from_what_was_kept(
    whole: tuple[ComparisonResult, Path], demo_model: Path, tmp_path: Path
) -> None:
    """A fine-tune has the names, shapes and sizes of its base: against it the same files lose something else."""
    tuned = shutil.copytree(demo_model, tmp_path / "tuned")
    file = tuned / "model.safetensors"
    data = bytearray(file.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 200_000, 2):
        data[place + 1] ^= 0x80  # signs of bfloat16 weights
    file.write_bytes(data)
    os.utime(file, ns=(0, (demo_model / "model.safetensors").stat().st_mtime_ns))
    folder = shutil.copytree(whole[1], tmp_path / "report")
    artifacts = [folder / "artifacts" / variant.file for variant in whole[0].variants]
    quiet = replace(SMALL, measurement=replace(SMALL.measurement, speed=False))
    base = compare(str(demo_model), folder, artifacts=artifacts, options=quiet)
    found = compare(str(tuned), folder, artifacts=artifacts, options=quiet)
    assert [one.divergence for one in base.variants] == [one.divergence for one in whole[0].variants]
    assert found.variants[0].divergence.kld > 10 * base.variants[0].divergence.kld
    assert found.model.headers == base.model.headers
    assert found.model.fingerprint != base.model.fingerprint


def test_an_artifact_is_known_by_its_bytes_and_not_by_its_times(
    whole: tuple[ComparisonResult, Path], tmp_path: Path
) -> None:
    made = whole[1] / "artifacts" / whole[0].variants[0].file
    copy = shutil.copy2(made, tmp_path / "copy.gguf")
    assert artifact_identity(Path(copy)) == artifact_identity(made)
    data = bytearray(made.read_bytes())
    data[-1000] ^= 1
    Path(copy).write_bytes(data)
    os.utime(copy, ns=(0, made.stat().st_mtime_ns))
    assert artifact_identity(Path(copy)) != artifact_identity(made)


def test_what_is_stopped_between_two_measurements_goes_on(
    whole: tuple[ComparisonResult, Path], demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the second artifact's speed: the quality is known already, the figures end up the same."""
    calls = []

    def stopping(path: Path, **options: Any) -> speed.Speed:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return speed.measure_speed(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(bench, "measure_speed", stopping)
        with pytest.raises(KeyboardInterrupt):
            compare(str(demo_model), tmp_path, variants=VARIANTS, options=SMALL)
    monkeypatch.setattr(quality, "measure_quality", None)
    stages: list[str] = []
    result = compare(
        str(demo_model),
        tmp_path,
        variants=VARIANTS,
        options=SMALL,
        on_event=lambda event: stages.append(event.text) if event.kind == "stage" else None,
    )
    assert stages == ["Q2_K: speed", "source: write", "Q8_0: write", "Q2_K: write"]
    assert [one.divergence for one in result.variants] == [one.divergence for one in whole[0].variants]


def test_artifacts_that_exist_are_taken(whole: tuple[ComparisonResult, Path], demo_model: Path, tmp_path: Path) -> None:
    first, folder = whole
    files = [folder / "artifacts" / variant.file for variant in first.variants]
    options = Options(threads=1, measurement=MeasurementOptions(context=64, windows=4, prompts=(), speed=False))
    result = compare(str(demo_model), tmp_path, artifacts=files, options=options)
    assert [variant.level for variant in result.variants] == ["Q8_0", "Q2_K"]
    assert [variant.divergence for variant in result.variants] == [variant.divergence for variant in first.variants]
    assert result.variants[0].speed is None
    assert result.variants[0].quantize_cpu_seconds is None
    assert result.machine.runtime == "--no-speed"
    assert not (tmp_path / "artifacts").exists()


def test_without_a_runtime_the_page_is_written_and_says_so(
    whole: tuple[ComparisonResult, Path], demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "xllamacpp" else found(name, package)

    llama_cpp_library.load_library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", without)
    warnings: list[str] = []
    file = whole[1] / "artifacts" / whole[0].variants[0].file
    result = compare(
        str(demo_model),
        tmp_path,
        artifacts=[file],
        options=SMALL,
        on_event=lambda event: warnings.append(event.text) if event.kind == "warning" else None,
    )
    assert result.variants[0].speed is None
    assert len([text for text in warnings if "[llamacpp]" in text]) == 1
    page = write_reports(result, tmp_path)["html"].read_text(encoding="utf-8")
    assert "Speed and memory were not measured: running a GGUF file needs an optional dependency" in page


def test_refusals(whole: tuple[ComparisonResult, Path], demo_model: Path, tmp_path: Path) -> None:
    file = whole[1] / "artifacts" / whole[0].variants[0].file
    with pytest.raises(UsageError, match="given twice"):
        compare(str(demo_model), tmp_path, artifacts=[file, file], options=SMALL)
    with pytest.raises(UsageError, match="no such artifact"):
        compare(str(demo_model), tmp_path, artifacts=[tmp_path / "none.gguf"], options=SMALL)
    other = Path(__file__).parents[2] / "benchmarks" / "models" / "demo-qwen3"
    with pytest.raises(IntegrityError):
        compare(str(other), tmp_path, artifacts=[file], options=SMALL)


def test_variants_are_read() -> None:
    assert parse_variants("gguf:Q8_0, Q4_K_M,GGUF:Q8_0") == [("gguf", "Q8_0"), ("gguf", "Q4_K_M")]
    for text in ("", "gguf:", ":Q8_0", "Q8_0,,Q4_0"):
        with pytest.raises(UsageError, match="has no name"):
            parse_variants(text)


def test_command_line(
    whole: tuple[ComparisonResult, Path], demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = whole[1] / "artifacts" / whole[0].variants[1].file
    words = ["compare", str(demo_model), str(file), "--context", "64", "--windows", "4", "--threads", "1"]
    assert run([*words, "--no-speed", "--lang", "ja", "-o", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["variants"][0]["level"] == "Q2_K"
    assert facts["commands"][1].split()[:3] == ["llm-quantize", "compare", str(demo_model)]
    assert "--no-speed" in facts["commands"][1]
    assert "--lang" not in facts["commands"][1]
    assert '<html lang="ja">' in Path(facts["reports"]["html"]).read_text(encoding="utf-8")
    assert run([*words, "--no-speed", "-o", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert "Q2_K" in told.out
    assert str(tmp_path / "index.html") in told.out


def test_remove_made_leaves_what_is_not_ours(tmp_path: Path) -> None:
    result = comparison_of(*(variant(level, 1_000_000, 0.01) for level in ("Q8_0", "Q4_K_M", "Q2_K")))
    made = tmp_path / "artifacts"
    made.mkdir()
    first, second, third = (entry.file for entry in result.variants)
    for name in (first, f"{first}.manifest.json", second, "mine.gguf", "notes.txt"):
        (made / name).write_text("x")
    (made / third).mkdir()
    (made / third / "part.gguf").write_text("x")
    (tmp_path / "index.html").write_text("page")
    Measurements(tmp_path / "measured.json").put("key", 1)
    remove_made(tmp_path, result, [made / second])
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(["index.html", "mine.gguf", "notes.txt", second])
    for name in ("mine.gguf", "notes.txt"):
        (made / name).unlink()
    remove_made(tmp_path, result)
    assert not made.exists()


def test_a_place_that_cannot_hold_the_report_is_refused_before_work(
    tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be done")

    monkeypatch.setattr(comparison, "open_source", never)
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "index.html").mkdir(parents=True)
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "measured.json")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "artifacts").write_text("")
    for name in ("file/below", "taken", "piped", "made", "x" * 300):
        with pytest.raises(AccessError):
            compare(str(demo_model), tmp_path / name, variants=VARIANTS, options=SMALL)
    assert (tmp_path / "piped" / "measured.json").is_fifo()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("somebody's page")
    with pytest.raises(UsageError, match="not of a comparison"):
        compare(str(demo_model), tmp_path / "site", variants=VARIANTS, options=SMALL)


def test_measurements_are_kept_and_damage_is_not_believed(tmp_path: Path) -> None:
    file = tmp_path / "new" / "measured.json"
    Measurements(file).put("a", [1, None])
    assert Measurements(file).get("a") == [1, None]
    whole = file.read_bytes()
    for damaged in (whole[:-3], whole.replace(b"[1,", b"[7,")):
        assert damaged != whole
        file.write_bytes(damaged)
        assert Measurements(file).get("a") is None
    file.write_text('{"version": "0.0.0", "facts": {"a": 2}}')
    assert Measurements(file).get("a") is None


def test_keys_differ_where_what_was_measured_differs(whole: tuple[ComparisonResult, Path]) -> None:
    first, other = (artifact_identity(whole[1] / "artifacts" / variant.file) for variant in whole[0].variants)
    assert first != other
    assert key_of("speed", artifact=first) != key_of("speed", artifact=other)
    assert key_of("speed", artifact=first) != key_of("errors", artifact=first)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"measurement": MeasurementOptions(context=5000)}, "longer than the model's context"),
        ({"measurement": MeasurementOptions(prompts=("Once", ""))}, "a prompt has no tokens"),
        ({"measurement": MeasurementOptions(prompts=("Once \udcff",))}, "a prompt is not UTF-8"),
        ({"calibration": CalibrationOptions(device="mps")}, "not here"),
    ],
)
def test_what_cannot_be_measured_is_not_quantized_first(
    words: dict[str, Any], message: str, tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    options = replace(SMALL, **words)
    with pytest.raises((UsageError, UnsupportedError), match=message):
        compare(str(demo_model), tmp_path, variants=VARIANTS, options=options)
    assert not list(tmp_path.iterdir())
