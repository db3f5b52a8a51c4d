"""Quantized directories wherever artifacts are taken: quality, comparison, generated text, ``info``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llm_quantize.advice.describe import describe
from llm_quantize.artifacts.decoded_directory import DecodedDirectory
from llm_quantize.cli import run
from llm_quantize.compare import bench, measurements
from llm_quantize.compare.comparison import compare, write_reports
from llm_quantize.errors import IntegrityError, MissingExtraError, UsageError
from llm_quantize.evaluation import generation_check
from llm_quantize.evaluation.quality import measure_quality
from llm_quantize.io.artifact_paths import is_artifact_directory, remove_artifact
from llm_quantize.models.opening import open_source
from llm_quantize.options import MeasurementOptions
from llm_quantize.pipeline import Options, quantize
from llm_quantize.runtimes import scored, transformers, vllm
from llm_quantize.runtimes.base import Reply, Request
from tests.oracles import divergence as oracle
from tests.oracles.packed_formats import Form, write_packed
from tests.oracles.whole_model import whole_logits
from tests.tiny_models import VOCABULARY, make_tiny, reference_model

OPTIONS = Options(threads=1, measurement=MeasurementOptions(context=32, windows=3, prompts=("Once",)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A tied model, three directories and a file made of it."""
    folder = tmp_path_factory.mktemp("packed")
    model = make_tiny("qwen3", folder / "model")
    forms = {
        "gptq": Form("gptq", bits=8, symmetric=False, act_order=True),
        "awq": Form("awq", symmetric=False),
        "W4A16": Form("compressed-tensors", scale=torch.bfloat16),
    }
    values = {name: write_packed(model, folder / name, form) for name, form in forms.items()}
    (result,) = quantize(str(model), "gguf", levels=["Q8_0"], output_dir=folder, options=Options(threads=1))
    source = open_source(str(model))
    yield SimpleNamespace(
        model=model, source=source, values=values, gguf=result.path, paths={name: folder / name for name in forms}
    )
    source.checkpoint.close()


def windows(count: int = 2, length: int = 24) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 260, (count, length)).astype(np.int32)


def whole(values: dict[str, torch.Tensor], model: Path, folder: Path) -> Any:
    """transformers' own model with these weights."""
    folder.mkdir()
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    return reference_model(folder)


def test_quality_equals_whole_models(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Three formats and a GGUF file on the same tokens."""
    found = measure_quality(tiny.source, [*tiny.paths.values(), tiny.gguf], windows(), threads=1)
    base = [rows.tolist() for rows in whole_logits(reference_model(tiny.model), windows())]
    for one, (name, values) in zip(found.artifacts, tiny.values.items(), strict=False):
        other = whole_logits(whole(values, tiny.model, tmp_path / name), windows())
        expected = oracle.divergence(base, [rows.tolist() for rows in other], windows().tolist())
        assert one.divergence.kld == pytest.approx(expected["kld"], rel=2e-4)
        assert one.divergence.kld > 1e-5
        size = (tiny.paths[name] / "model.safetensors").stat().st_size
        assert one.size == size
        assert one.bits_per_weight == pytest.approx(8 * size / sum(value.numel() for value in values.values()))
    klds = [one.divergence.kld for one in found.artifacts]
    assert klds[0] < klds[1]  # 8 bits against 4
    assert len(found.pairs) == 6


def test_a_comparison_of_every_format(tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def answered(directory: Path, request: Request) -> Reply:
        asked.append(directory)
        if directory.name == "awq":
            raise MissingExtraError("Running a model in transformers", "torch")
        texts = tuple(f"{prompt} and so on" for prompt in request.prompts)
        timed = {"read": 2.0, "write": 4.0, "memory": 3e8, "memory_empty": 2e8, "cpu_share": 0.9}
        told = None if request.timing is None else timed
        return Reply(None, texts, tuple((5, 6, 7) for _ in texts), {"transformers": "5.0"}, (), {}, timed=told)

    monkeypatch.setattr(transformers, "run", answered)
    paths = [*tiny.paths.values(), tiny.gguf]
    result = compare(str(tiny.model), tmp_path, artifacts=paths, options=OPTIONS)
    facts = {variant.level: variant for variant in result.variants}
    assert {level: variant.format for level, variant in facts.items()} == {
        "GPTQ-8bit": "gptq", "AWQ-4bit": "awq", "W4A16": "compressed-tensors", "Q8_0": "gguf"
    }  # fmt: skip
    assert facts["W4A16"].samples[0].text == "Once and so on"
    assert facts["AWQ-4bit"].samples == ()
    assert facts["GPTQ-8bit"].speed is not None
    assert facts["GPTQ-8bit"].speed.generation_tokens_per_second == 8.0
    assert facts["GPTQ-8bit"].speed.runtime == "transformers 5.0"
    assert facts["GPTQ-8bit"].needs.ram == 300_000_000
    assert facts["AWQ-4bit"].speed is None
    assert [note.count("AWQ-4bit was not run") for note in result.notes].count(1) == 1
    assert facts["Q8_0"].speed is not None
    assert [note for note in result.notes if "AWQ-4bit was not run" in note]
    errors = {(entry.layer, entry.role): entry for entry in facts["W4A16"].tensor_errors}
    assert errors[(1, "ffn_down")].name == "model.layers.1.mlp.down_proj.weight"
    assert errors[(1, "ffn_down")].qtype == "int4_g32"
    assert {entry.role for entry in facts["Q8_0"].tensor_errors} >= {role for _, role in errors}
    page = write_reports(result, tmp_path)["html"].read_text(encoding="utf-8")
    assert "W4A16" in page
    count = len(asked)
    again = compare(str(tiny.model), tmp_path, artifacts=paths, options=OPTIONS)
    assert len(asked) == count + 2  # only what could not be run is tried again
    assert [variant.divergence for variant in again.variants] == [variant.divergence for variant in result.variants]
    assert all(path.exists() for path in paths)


def test_only_directories_say_why_there_is_no_speed(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.Bench, "answers", lambda self, artifact, on_event: ())
    result = compare(str(tiny.model), tmp_path, artifacts=[tiny.paths["gptq"]], options=OPTIONS)
    assert "none of these ran" in result.machine.runtime
    assert result.variants[0].label == "GPTQ-8bit"


def test_an_identity_follows_the_bytes(tiny: SimpleNamespace, tmp_path: Path) -> None:
    first = measurements.artifact_identity(tiny.paths["gptq"])
    assert first == measurements.artifact_identity(tiny.paths["gptq"])
    assert first != measurements.artifact_identity(tiny.paths["awq"])
    write_packed(tiny.model, tmp_path / "again", Form("gptq", bits=8, symmetric=False, act_order=True))
    other = measurements.artifact_identity(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    config["quantization_config"]["desc_act"] = False
    (tmp_path / "again" / "config.json").write_text(json.dumps(config))
    assert other != measurements.artifact_identity(tmp_path / "again")


def test_generated_text_is_judged(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def answered(directory: Path, request: Request) -> Reply:
        assert directory == tiny.paths["awq"]
        tokens = tuple(tuple([3, 4] * 20) for _ in request.prompts)
        return Reply(None, tuple("na na" for _ in request.prompts), tokens, {}, (), {})

    monkeypatch.setattr(transformers, "run", answered)
    check = generation_check.check_generation(tiny.paths["awq"], prompts=("a", "b"), max_tokens=40)
    assert [finding.kind for finding in check.findings] == ["loop", "loop"]
    assert not check.answers[0].ended


@pytest.mark.parametrize("runtime", ["transformers", "vllm"])
def test_quality_in_a_runtime(
    runtime: str, tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the runtime computes is asked for a few windows at a time, and held against the streamed figure."""
    model = whole(tiny.values["awq"], tiny.model, tmp_path / "whole")
    asked: list[int] = []

    def answered(directory: Path, request: Request, **_: Any) -> Reply:
        assert request.windows is not None
        asked.append(len(request.windows))
        logits = torch.from_numpy(np.stack(whole_logits(model, request.windows)))
        return Reply(torch.log_softmax(logits, -1).numpy(), (), (), {}, (), {})

    monkeypatch.setattr(transformers, "run", answered)
    monkeypatch.setattr(vllm, "run", answered)
    monkeypatch.setattr(scored, "HELD_BYTES", 2 * 24 * 4 * VOCABULARY)
    found = measure_quality(tiny.source, [tiny.paths["awq"]], windows(3), threads=1, runtime=runtime)
    real = found.artifacts[0].runtime
    assert real is not None
    assert real.runtime == runtime
    assert real.rounding.kld < 1e-7
    assert real.explained
    assert real.divergence.kld == pytest.approx(found.artifacts[0].divergence.kld, rel=1e-3)
    assert asked == [2, 1]

    def other(directory: Path, request: Request, **_: Any) -> Reply:
        return Reply(np.zeros((2, 24, 7), np.float32), (), (), {}, (), {})

    monkeypatch.setattr(transformers, "run", other)
    monkeypatch.setattr(vllm, "run", other)
    with pytest.raises(IntegrityError, match="vocabulary"):
        measure_quality(tiny.source, [tiny.paths["awq"]], windows(3), threads=1, runtime=runtime)


def test_runtimes_that_do_not_run_it(tiny: SimpleNamespace) -> None:
    with pytest.raises(UsageError, match="does not run"):
        measure_quality(tiny.source, [tiny.paths["awq"]], windows(), threads=1, runtime="llama.cpp")
    with pytest.raises(UsageError, match="does not run"):
        measure_quality(tiny.source, [tiny.gguf], windows(), threads=1, runtime="vllm")


def test_a_directory_is_removed_only_as_its_manifest_lists_it(tiny: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    write_packed(tiny.model, folder, Form("gptq"))
    files = [{"name": file.name} for file in folder.iterdir()]
    assert not is_artifact_directory(folder)
    assert is_artifact_directory(folder, [entry["name"] for entry in files])
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    assert is_artifact_directory(folder)
    (folder / "notes.txt").write_text("mine")
    remove_artifact(folder)
    assert folder.exists()
    (folder / "notes.txt").unlink()
    (folder / "manifest.json").write_text("[")
    assert not is_artifact_directory(folder)
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    remove_artifact(folder)
    assert not folder.exists()


def test_memory_of_decoding_is_planned(tiny: SimpleNamespace) -> None:
    artifact = DecodedDirectory(tiny.source, tiny.paths["W4A16"])
    assert artifact.scratch > max(matrix.nbytes for matrix in artifact.packed.matrices.values())
    artifact.close()


def test_info(tiny: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    facts = describe(str(tiny.paths["gptq"]))
    assert facts["quantization"] == {
        "format": "gptq", "layout": "gptq", "bits": 8, "group_size": 32, "symmetric": False, "matrices": 14,
        "act_order": 14,
    }  # fmt: skip
    assert facts["not_quantized"] == {"model.embed_tokens": 1}
    assert facts["parameters"] == sum(values.numel() for values in tiny.values["gptq"].values())
    assert facts["dtypes"]["int8_g32_asym"]["tensors"] == 14
    assert run(["info", str(tiny.paths["W4A16"])]) == 0
    told = capsys.readouterr().out
    assert "format compressed-tensors, layout pack-quantized, bits 4, group size 32, symmetric yes" in told
    assert run(["info", str(tiny.paths["awq"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantization"]["layout"] == "gemm"


def test_the_commands(tiny: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["analyze", "quality", str(tiny.paths["awq"]), str(tiny.gguf), "--reference", str(tiny.model)]
    assert run([*words, "--context", "32", "--windows", "2", "--threads", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [Path(one["path"]).name for one in facts["artifacts"]] == ["awq", tiny.gguf.name]
    assert facts["artifacts"][0]["tensors"][0]["qtype"] == "int4_g32_asym"
    assert run([*words, "--context", "32", "--windows", "2", "--threads", "1"]) == 0
    assert "model.layers." in capsys.readouterr().out
