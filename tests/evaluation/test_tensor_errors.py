"""Errors per tensor equal the plain formulas, in any number of threads, worst first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.architectures import rows as assemble
from llm_quantize.artifacts.decoded import DecodedArtifact
from llm_quantize.errors import UsageError
from llm_quantize.evaluation.tensor_errors import place, tensor_errors, worst
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import Options, quantize
from tests.hearing import into

from ..tiny_models import make_tiny, row_lengths_of_256


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A mixture of experts, unquantized and at Q4_K_M."""
    folder = tmp_path_factory.mktemp("tiny")
    model = make_tiny("qwen3_moe", folder / "model", **row_lengths_of_256("qwen3_moe"))
    results = quantize(str(model), "gguf", levels=["F32", "Q4_K_M"], output_dir=folder, options=Options(threads=1))
    source = open_source(str(model))
    f32, q4 = (result.path for result in results)
    yield SimpleNamespace(source=source, f32=f32, q4=q4, exact=values(f32), coarse=values(q4))
    source.checkpoint.close()


def values(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        for tensor in gguf.GGUFReader(path).tensors
    }


def importance(exact: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    random = np.random.Generator(np.random.PCG64(5))
    found = {}
    for name, matrix in exact.items():
        if name.startswith("blk") and matrix.ndim > 1:
            shape = (matrix.shape[0] if matrix.ndim == 3 else 1, matrix.shape[-1])
            found[name] = random.exponential(1, shape).astype(np.float32)
    return found


@pytest.mark.parametrize("threads", [1, 3])
def test_equal_the_formulas(threads: int, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "UNIT_WEIGHTS", 20_000)
    monkeypatch.setattr(assemble, "CHUNK_WEIGHTS", 3_000)
    rows = importance(tiny.exact)
    heard: list[Any] = []
    artifact = DecodedArtifact(tiny.source, tiny.q4)
    found = tensor_errors(tiny.source, artifact, importance=rows, threads=threads, on_event=into(heard))
    assert {loss.name for loss in found} == set(tiny.exact)
    for loss in found:
        w, q = tiny.exact[loss.name], tiny.coarse[loss.name].reshape(tiny.exact[loss.name].shape)
        error = q - w
        assert loss.relative == pytest.approx(np.linalg.norm(error) / np.linalg.norm(w), rel=1e-9)
        assert loss.largest == pytest.approx(np.abs(error).max() / np.sqrt(np.mean(w * w)), rel=1e-6)
        assert loss.weights == w.size
        assert loss.nonfinite == 0
        if loss.name in rows:
            h = rows[loss.name].astype(np.float64)
            h = h[:, None, :] if w.ndim == 3 else h
            expected = math.sqrt((h * error**2).sum() / (h * w**2).sum())
            assert loss.weighted == pytest.approx(expected, rel=1e-9)
        else:
            assert loss.weighted is None
    order = [-1 if loss.weighted is None else loss.weighted for loss in found]
    assert order == sorted(order, reverse=True)
    assert heard[-1]["done"] == heard[-1]["total"] == sum(w.size for w in tiny.exact.values())


def test_threads_change_nothing(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "UNIT_WEIGHTS", 5_000)
    artifact = DecodedArtifact(tiny.source, tiny.q4)
    assert tensor_errors(tiny.source, artifact, threads=1) == tensor_errors(tiny.source, artifact, threads=4)


def test_worst_first_without_statistics(tiny: SimpleNamespace) -> None:
    found = tensor_errors(tiny.source, DecodedArtifact(tiny.source, tiny.q4), threads=1)
    assert [loss.relative for loss in found] == sorted((loss.relative for loss in found), reverse=True)
    assert found[0].qtype == "q4_k"
    assert {loss.qtype for loss in found if loss.relative == 0} == {"f32"}
    assert len(worst(found, 3)) == 3
    assert all(loss.relative > 0 for loss in worst(found, 1000))


def test_the_unquantized_artifact_has_no_error(tiny: SimpleNamespace) -> None:
    found = tensor_errors(tiny.source, DecodedArtifact(tiny.source, tiny.f32), threads=1)
    assert all(loss.relative == loss.largest == 0 for loss in found)
    assert worst(found, 5) == []


def test_values_that_are_not_finite_are_counted(tiny: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(tiny.f32.read_bytes())
    entry = next(one for one in read_gguf(path).tensors if one.name == "blk.1.attn_v.weight")
    with path.open("r+b") as file:
        file.seek(entry.offset + 400)
        file.write(np.array([np.nan, np.inf], np.float32).tobytes())
    found = {loss.name: loss for loss in tensor_errors(tiny.source, DecodedArtifact(tiny.source, path), threads=1)}
    assert found.pop("blk.1.attn_v.weight").nonfinite == 2
    assert not any(loss.nonfinite for loss in found.values())


def test_a_tensor_of_zeros(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (result,) = quantize(str(model), "gguf", levels=["Q8_0"], output_dir=tmp_path, options=Options(threads=1))
    source = open_source(str(model))
    with source.checkpoint:
        found = {loss.name: loss for loss in tensor_errors(source, DecodedArtifact(source, result.path), threads=1)}
    assert found["blk.0.ffn_up.weight"].relative == 0
    assert found["blk.0.ffn_gate.weight"].relative > 0


def test_statistics_of_another_model(tiny: SimpleNamespace) -> None:
    artifact = DecodedArtifact(tiny.source, tiny.q4)
    wrong = {"blk.0.attn_q.weight": np.ones((1, 7), np.float32)}
    with pytest.raises(UsageError, match="another model"):
        tensor_errors(tiny.source, artifact, importance=wrong, threads=1)


def test_places() -> None:
    assert place("blk.12.attn_q.weight") == (12, "attn_q")
    assert place("blk.0.attn_q.bias") == (0, "attn_q.bias")
    assert place("token_embd.weight") == (None, "token_embd")
    assert place("output_norm.bias") == (None, "output_norm.bias")
