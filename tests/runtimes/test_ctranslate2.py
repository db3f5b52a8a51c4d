"""CTranslate2 models in the real runtime: it computes what our decoder reads, and what transformers computes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.cli import run as cli
from llm_quantize.errors import MalformedInputError, MissingExtraError
from llm_quantize.evaluation.quality import measure_quality
from llm_quantize.io.ctranslate2_file import MODEL_FILE
from llm_quantize.models.opening import open_source
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import quantize
from llm_quantize.runtimes import RUNTIMES, artifact_at, ctranslate2, runtime_for, transformers, vllm
from llm_quantize.runtimes.base import Request
from tests.tiny_models import make_tiny, reference_logits, reference_model

RTN = Options(threads=1, method=MethodOptions(method="rtn"))
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "llama-bias", "llama3", "llama-linear", "mistral", "qwen2", "qwen3")},
    "llama-linear": {"head_dim": 16},
    "gemma3_text": {"sliding_window": 64},
    "gemma3": {"sliding_window": 64},
    **{name: {} for name in ("phi3", "gpt2", "gpt_neox", "gpt_neox-serial", "falcon")},
}
IDS = np.array(
    [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7, 9, 5]], np.int32
)


@pytest.fixture(autouse=True)
def own_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_QUANTIZE_CTRANSLATE2", raising=False)


def made(model: Path, place: Path, level: str) -> Path:
    return quantize(str(model), "ctranslate2", levels=[level], output_dir=place, options=RTN)[0].path


def log_softmax(logits: Any) -> Any:
    return torch.log_softmax(torch.from_numpy(np.asarray(logits, np.float64)), -1).numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_computes_what_transformers_computes(variant: str, tmp_path: Path) -> None:
    """Scalings, windows, joined rows, norms less one: float32 on both sides."""
    model = make_tiny(variant, tmp_path / "model", **VARIANTS[variant])
    reply = ctranslate2.run(made(model, tmp_path, "float32"), Request(windows=IDS, threads=1))
    assert reply.logprobs is not None
    wanted = log_softmax(reference_logits(reference_model(model), IDS[0].tolist()))
    assert np.abs(reply.logprobs[0] - wanted).max() < 2e-4
    assert reply.versions["ctranslate2"]
    assert reply.kernels == ("float32",)


@pytest.mark.parametrize("level", ["int8", "int16", "bfloat16"])
def test_codes_are_what_our_decoder_reads(level: str, tmp_path: Path) -> None:
    """Inputs of matrices are rounded to 8 bits too, so int8 is near, not equal; where the processor's library has no
    int16, the runtime rounds such matrices to int8 when it loads them."""
    model = make_tiny("qwen2", tmp_path / "model", intermediate_size=512)
    path = made(model, tmp_path, level)
    source = open_source(str(model))
    network = reference_model(model)
    with source.checkpoint:
        artifact = open_decoded(source, path)
        exact = log_softmax(reference_logits(network, IDS[0].tolist()))
        for name, value in network.state_dict().items():
            if name in artifact.names:
                value.copy_(artifact.read(name))
    decoded = log_softmax(reference_logits(network, IDS[0].tolist()))
    reply = ctranslate2.run(path, Request(windows=IDS, threads=1))
    assert reply.logprobs is not None
    kernels = {"int8": {"int8_float32"}, "int16": {"int16", "int8_float32"}, "bfloat16": {"float32", "bfloat16"}}
    assert reply.kernels[0] in kernels[level]
    apart = np.sum(np.exp(decoded) * (decoded - reply.logprobs[0]), -1).mean()
    assert apart < (2e-3 if reply.kernels[0].startswith("int8") else 1e-5)
    if level != "bfloat16":
        assert 0 < np.sum(np.exp(exact) * (exact - decoded), -1).mean() < 2e-3


def test_quality_in_the_runtime(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    path, source = made(model, tmp_path, "int8_float32"), open_source(str(model))
    windows = np.random.default_rng(0).integers(0, 256, (2, 32)).astype(np.int32)
    with source.checkpoint:
        found = measure_quality(source, [path], windows, threads=1, runtime="ctranslate2").artifacts[0]
    assert found.runtime is not None
    assert found.divergence.kld < 1e-2


def test_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny("llama", tmp_path / "model")
    path = made(model, tmp_path, "float32")
    assert cli(["run", str(path), "the cat", "-n", "8", "--json", "--threads", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    (answer,) = ctranslate2.write(path, Request(prompts=("the cat",), max_tokens=8, threads=1))
    assert told["text"].endswith(answer.text)
    assert len(answer.ids) <= 8
    network, ids = reference_model(model), json.loads((path / "vocabulary.json").read_text())
    prompt = [ids.index(word) for word in ("the", "Ġ", "c", "a", "t")]
    for index in answer.ids:
        assert int(np.argmax(reference_logits(network, prompt)[-1])) == index
        prompt.append(index)
    warm = Request(prompts=("the cat",), max_tokens=8, threads=1, temperature=1.0, seed=4)
    assert ctranslate2.write(path, warm) == ctranslate2.write(path, warm)


def test_who_opens_it(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    path = made(model, tmp_path, "int8")
    assert runtime_for(path) is RUNTIMES["ctranslate2"]
    assert not transformers.opens(path)
    assert not vllm.opens(path)
    assert not RUNTIMES["llama.cpp"].opens(path)
    assert not ctranslate2.opens(model)
    assert artifact_at(path) == path
    (path / MODEL_FILE).write_bytes(b"\x06\0\0\0")
    with pytest.raises(MalformedInputError, match="cut off"):
        ctranslate2.run(path, Request(prompts=("a",)))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_quantize.runtimes.isolated.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"CTranslate2[\s\S]*\[ctranslate2\]"):
        ctranslate2.require()
    assert "LLM_QUANTIZE_CTRANSLATE2" not in os.environ
