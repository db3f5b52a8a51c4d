"""Streamed quality: the same figures as whole models of transformers, whatever the threads, the place of the hidden
states and the grouping; in agreement with llama.cpp; and refusals that name what is wrong."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize import data, memory
from llm_quantize.artifacts.decoded import DecodedArtifact
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.errors import (
    IntegrityError,
    LlmQuantizeError,
    NumericPolicyError,
    ResourceError,
    UsageError,
)
from llm_quantize.evaluation import streamed
from llm_quantize.evaluation.quality import QualityResult, measure_quality
from llm_quantize.evaluation.texts import BUILT_IN, evaluation_text
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.measures.divergence import Comparison
from llm_quantize.measures.perplexity import scored
from llm_quantize.models.opening import Source, open_source
from llm_quantize.pipeline import Options, quantize
from llm_quantize.runtimes import RUNTIMES
from llm_quantize.runtimes.llama_cpp import LlamaCpp
from llm_quantize.streams.reordered import Reordered
from tests.hearing import into

from ..oracles import divergence as oracle
from ..oracles.rounded_linear import rounding
from ..oracles.whole_model import load_decoded, whole_logits
from ..tiny_models import VOCABULARY, make_tiny, reference_model, row_lengths_of_256


def artifacts(model: Path, output: Path, *levels: str, **options: Any) -> list[Path]:
    results = quantize(str(model), "gguf", levels=levels, output_dir=output, options=Options(threads=1, **options))
    return [result.path for result in results]


@pytest.fixture
def opened() -> Iterator[Any]:
    sources: list[Source] = []

    def open_it(path: Path) -> Source:
        sources.append(open_source(str(path)))
        return sources[-1]

    yield open_it
    for source in sources:
        source.checkpoint.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The built-in model, three levels of it, and some windows."""
    source = open_source(str(data.demo_model()))
    files = artifacts(data.demo_model(), tmp_path_factory.mktemp("demo"), "F32", "Q8_0", "Q4_K_M")
    text = evaluation_text(TextTokenizer(source), context=64, limit=6)
    yield SimpleNamespace(source=source, f32=files[0], q8=files[1], q4=files[2], windows=text.windows, text=text)
    source.checkpoint.close()


def windows_of(count: int, length: int = 40) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(7)).integers(0, VOCABULARY, (count, length)).astype(np.int32)


def figures(result: QualityResult) -> list[dict[str, Any]]:
    return [one.divergence.to_dict() for one in result.artifacts]


def soften(model: Path) -> None:
    """A smaller embedding where it is the head too, so that its predictions are not all but certain."""
    if not json.loads((model / "config.json").read_text()).get("tie_word_embeddings"):
        return
    values = load_file(model / "model.safetensors")
    for name in values:
        if "embed_tokens" in name:
            values[name] = values[name] * 0.15
    save_file(values, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("variant", "overrides"),
    [
        ("llama", {}),
        ("gemma2", {}),
        ("gpt2", {}),
        ("phi3", {}),
        ("qwen3_moe", {}),
        ("qwen2_moe", {"tie_word_embeddings": True}),
        ("granite", {}),
        ("gpt_neox", {}),
    ],
)
def test_equals_whole_models(variant: str, overrides: dict[str, Any], tmp_path: Path, opened: Any) -> None:
    model = make_tiny(variant, tmp_path / "model", **row_lengths_of_256(variant), **overrides)
    soften(model)
    source, windows = opened(model), windows_of(2)
    (path,) = artifacts(model, tmp_path / "out", "Q4_K_M")
    result = measure_quality(source, [path], windows, threads=1)
    base = whole_logits(reference_model(model), windows)
    other = whole_logits(load_decoded(DecodedArtifact(source, path), tmp_path / "decoded", model), windows)
    expected = oracle.divergence([rows.tolist() for rows in base], [rows.tolist() for rows in other], windows.tolist())
    assert expected["kld"] > 1e-3, "nothing to measure"
    for name, value in figures(result)[0].items():
        assert value == pytest.approx(expected[name], rel=2e-4, abs=1e-9), name


def test_the_unquantized_artifact_is_the_source(demo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []

    class Counted(Reordered):
        def __enter__(self) -> Any:
            entered.append(1)
            return super().__enter__()

    monkeypatch.setattr(streamed, "Reordered", Counted)
    result = measure_quality(demo.source, [demo.f32], demo.windows, threads=1)
    (found,) = result.artifacts
    assert found.divergence.kld == 0
    assert found.divergence.same_top == 1
    assert found.divergence.perplexity == found.divergence.reference_perplexity
    assert found.grade == "indistinguishable"
    assert found.size == demo.f32.stat().st_size
    weights = sum(math.prod(output.shape) for output in demo.source.tensors.outputs)
    assert found.bits_per_weight == 8 * found.size / weights > 32  # as a plan has it, header included
    assert 0 < result.noise.kld < 1e-9
    assert result.noise.kld <= result.noise.kld_max < 1e-8
    assert result.noise.tokens == 4 * 31
    # Four windows through every block and the head.
    assert len(entered) == 4 * (demo.source.architecture.hyper.n_layer + 1)


def test_threads_disk_and_groups_change_nothing(
    demo: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [demo.q8, demo.q4]
    heard: list[Any] = []
    expected = measure_quality(demo.source, files, demo.windows, threads=1, on_event=into(heard))
    assert expected.memory.together == 2
    assert not expected.memory.on_disk
    progress = [event for event in heard if event["event"] == "measure"]
    assert progress[-1]["done"] == progress[-1]["total"]
    monkeypatch.setattr(memory, "HIDDEN_BYTES", 0)
    monkeypatch.setattr(streamed, "SLICE_VALUES", 1 << 14)
    fit, tried = memory.fit, []

    def one_head(sizes: memory.Sizes, **limits: Any) -> memory.Fitted:
        tried.append(sizes.ends)
        if len(tried) == 1:
            raise ResourceError("no room for three heads")
        return fit(sizes, **limits)

    monkeypatch.setattr(memory, "fit", one_head)
    heard.clear()
    found = measure_quality(demo.source, files, demo.windows, threads=3, scratch=tmp_path, on_event=into(heard))
    assert found.memory.on_disk
    assert found.memory.together == 1
    assert found.memory.threads == 3
    assert figures(found) == figures(expected)
    assert found.pairs == expected.pairs
    assert found.noise == expected.noise
    assert heard[-1]["done"] == heard[-1]["total"]
    assert tried[0] > tried[1]
    assert list(tmp_path.iterdir()) == []


def test_no_place_for_hidden_states(demo: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "HIDDEN_BYTES", 0)
    with pytest.raises(LlmQuantizeError, match="no place for hidden states"):
        measure_quality(demo.source, [demo.q8], demo.windows, threads=1, scratch=tmp_path / "absent")


def test_pairs_and_order(demo: SimpleNamespace) -> None:
    result = measure_quality(demo.source, [demo.q8, demo.q4], demo.windows, threads=1)
    (found,) = result.pairs
    one, two = (artifact.divergence.kld for artifact in result.artifacts)
    assert one < two
    assert (found.first, found.second) == (0, 1)
    assert found.kld_difference == pytest.approx(one - two, rel=1e-9)
    assert 0 < found.kld_ratio < 0.1
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["artifacts"][1]["divergence"]["kld"] == two
    assert written["grades"][0] == {"name": "indistinguishable", "max_kld": 0.002}


def test_agrees_with_llama_cpp(demo: SimpleNamespace) -> None:
    """What the runtime adds is its rounding of activations to 8 bits: as much as the same rounding does here."""
    result = measure_quality(demo.source, [demo.f32, demo.q8, demo.q4], demo.windows, threads=1, runtime="llama.cpp")
    exact, q8, q4 = (artifact.runtime for artifact in result.artifacts)
    assert exact is not None
    assert q8 is not None
    assert q4 is not None
    assert exact.rounding.kld < 1e-9
    assert exact.divergence.kld < 1e-9
    for streamed_kld, found in zip((one.divergence.kld for one in result.artifacts), (exact, q8, q4), strict=True):
        assert found.explained
        assert found.difference == pytest.approx(found.divergence.kld - streamed_kld, abs=1e-12)
    assert 0.8 < q4.divergence.kld / result.artifacts[2].divergence.kld < 1.25

    model = reference_model(data.demo_model())
    plain = whole_logits(model, demo.windows)
    with rounding(model, "Q8_0"):
        rounded = whole_logits(model, demo.windows)
    # The same rounding over weights that were rounded already: what the activations' rounding alone does.
    weights_only = DecodedArtifact(demo.source, demo.q8)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(weights_only.read(name))
    unrounded = whole_logits(model, demo.windows)
    comparison = Comparison()
    for window, one, two in zip(demo.windows, unrounded, rounded, strict=True):
        where, targets = scored(window)
        comparison.add(one[where], two[where], targets)
    assert len(plain) == len(demo.windows)
    emulated = comparison.result().kld
    assert emulated > 1e-6
    assert q8.rounding.kld == pytest.approx(emulated, rel=0.35)


def test_a_runtime_that_computes_something_else_is_noticed(demo: SimpleNamespace, tmp_path: Path, opened: Any) -> None:
    """The artifact of a model with other positions: streamed, the reference's configuration is used; the runtime uses
    the artifact's own."""
    model = tmp_path / "model"
    shutil.copytree(data.demo_model(), model)
    config = json.loads((model / "config.json").read_text())
    rope = config.get("rope_parameters") or config
    rope["rope_theta"] = 100.0
    (model / "config.json").write_text(json.dumps(config))
    heard: list[Any] = []
    result = measure_quality(
        opened(model), [demo.q8], demo.windows, threads=1, runtime="llama.cpp", on_event=into(heard)
    )
    (found,) = result.artifacts
    assert found.runtime is not None
    assert not found.runtime.explained
    assert "rope.freq_base" in found.notes[0]
    warnings = [event["text"] for event in heard if event["event"] == "warning"]
    assert any("rope.freq_base" in text for text in warnings)
    assert any("not what its weights say" in text for text in warnings)


@pytest.mark.parametrize("tensor", ["token_embd.weight", "blk.1.ffn_up.weight", "output.weight"])
def test_nan_weights(tensor: str, tmp_path: Path, opened: Any) -> None:
    model = make_tiny("llama", tmp_path / "model")
    good, bad = artifacts(model, tmp_path / "out", "F32", "F16")
    entry = next(one for one in read_gguf(bad).tensors if one.name == tensor)
    with bad.open("r+b") as file:
        file.seek(entry.offset)
        file.write(np.full(entry.nbytes // 2, np.nan, np.float16).tobytes())
    with pytest.raises(NumericPolicyError, match="not finite") as caught:
        measure_quality(opened(model), [good, bad], windows_of(2), threads=1)
    assert caught.value.file == str(bad)
    if tensor.startswith("blk.1"):
        assert "after block 1" in str(caught.value)


def test_infinite_weights_of_the_reference(tmp_path: Path, opened: Any) -> None:
    model = make_tiny("llama", tmp_path / "model", dtype="float32")
    (good,) = artifacts(model, tmp_path / "out", "F32")
    whole = bytearray((model / "model.safetensors").read_bytes())
    whole[-64 * 4 :] = np.full(64, np.inf, np.float32).tobytes()
    (model / "model.safetensors").write_bytes(whole)
    with pytest.raises(NumericPolicyError, match="not finite") as caught:
        measure_quality(opened(model), [good], windows_of(2), threads=1)
    assert caught.value.file == str(model)


def test_another_models_artifact(demo: SimpleNamespace, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    (path,) = artifacts(model, tmp_path / "out", "F32")
    with pytest.raises(IntegrityError, match="not made from this reference"):
        measure_quality(demo.source, [demo.q8, path], demo.windows)


def test_refusals(demo: SimpleNamespace) -> None:
    with pytest.raises(UsageError, match="no artifact"):
        measure_quality(demo.source, [], demo.windows)
    with pytest.raises(UsageError, match="no window"):
        measure_quality(demo.source, [demo.q8], demo.windows[:0])
    with pytest.raises(UsageError, match="longer than the model's context"):
        measure_quality(demo.source, [demo.q8], np.zeros((1, 1 << 20), np.int32))
    with pytest.raises(UsageError, match="no such runtime"):
        measure_quality(demo.source, [demo.q8], demo.windows, runtime="ollama")
    with pytest.raises(UsageError, match="vllm does not run this artifact"):
        measure_quality(demo.source, [demo.q8], demo.windows, runtime="vllm")
    with pytest.raises(ResourceError, match="memory limit"):
        measure_quality(demo.source, [demo.q8], demo.windows, max_ram=1 << 20)
    with pytest.raises(UsageError, match="embedding"):
        measure_quality(demo.source, [demo.q8], np.full((1, 8), 8192, np.int32))


def test_a_runtime_with_another_vocabulary(demo: SimpleNamespace) -> None:
    with (
        pytest.raises(IntegrityError, match="vocabulary"),
        RUNTIMES["llama.cpp"].predictions(demo.q8, demo.windows, vocab_size=8, threads=1),
    ):
        pass


def test_the_gate(demo: SimpleNamespace) -> None:
    result = measure_quality(demo.source, [demo.q8, demo.q4], demo.windows, threads=1)
    assert result.gate(1.0) is None
    error = result.gate(0.001)
    assert error is not None
    assert error.exit_code == 9
    assert "Q4_K_M" in str(error)
    assert "Q8_0" not in str(error)


def test_tokens_and_windows_are_llama_cpps(demo: SimpleNamespace, tmp_path: Path, opened: Any) -> None:
    with LlamaCpp(demo.f32, context=8, threads=1) as llama:
        expected = llama.tokenize(data.evaluation_text())
    windows = evaluation_text(TextTokenizer(demo.source), context=64).windows
    assert windows.ravel().tolist() == expected[: windows.size]


class Letters:
    """A tokenizer of one token per letter."""

    bos = 1

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_texts_are_cut_by_themselves(tmp_path: Path) -> None:
    for name, text in (("a.txt", "a" * 23), ("b.txt", "b" * 9), ("c.txt", "c" * 3)):
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt")]
    heard: list[Any] = []
    tokenizer: Any = Letters()
    found = evaluation_text(tokenizer, files, context=10, on_event=into(heard))
    a, b = ord("a"), ord("b")
    assert found.windows.tolist() == [[1, *[a] * 9], [1, *[a] * 9], [1, *[b] * 9]]
    assert found.names == tuple(files[:2])
    assert "c.txt (4 tokens) is shorter than one window" in heard[0]["text"]
    assert evaluation_text(tokenizer, files, context=10, limit=2).windows.tolist() == found.windows[:2].tolist()
    with pytest.raises(UsageError, match="shorter than one window"):
        evaluation_text(tokenizer, files[2:], context=10)
    with pytest.raises(UsageError, match="at least 4 tokens"):
        evaluation_text(tokenizer, files, context=3)
    assert evaluation_text(tokenizer, context=4, limit=1).names == (BUILT_IN,)
