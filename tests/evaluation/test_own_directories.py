"""What ``llm-quantize quantize`` writes, in the runtimes that it is for: their log-probabilities are those of plain
torch with the weights as our own decoder reads them. Which runtime: see the marks (make test-vllm, test-transformers).
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.errors import UnsupportedError
from llm_quantize.models.opening import open_source
from llm_quantize.runtimes import transformers, vllm
from llm_quantize.runtimes.base import Request
from tests.oracles.reference_directories import divergence, logprobs
from tests.tiny_models import make_tiny

WINDOWS = np.random.Generator(np.random.PCG64(3)).integers(0, 256, (2, 32)).astype(np.int32)
PROMPT = "The house stood by"
TINY = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
CALIBRATE = ("--calibration-samples", "4", "--sequence-length", "128")


@dataclass(frozen=True)
class Made:
    """An artifact: the model it is made of, and the options of ``llm-quantize quantize``."""

    name: str
    model: str
    options: tuple[str, ...]

    def make(self, folder: Path, models: dict[str, Path]) -> tuple[Path, Path]:
        """The source, and the artifact in ``folder``."""
        source = models[self.model]
        command = [sys.executable, "-m", "llm_quantize", "quantize", str(source), *self.options, "-o", str(folder)]
        done = subprocess.run([*command, "--threads", "1", "-n", "m"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (artifact,) = (path for path in folder.iterdir() if (path / "config.json").is_file())
        return source, artifact


PLAIN = ("--method", "rtn", "--transform", "none")
GPTQ = (
    Made("gptq-4bit", "demo", ("gptq", "-q", "4bit", *CALIBRATE)),
    Made("gptq-4bit-g32", "qwen3", ("gptq", "-q", "4bit", "--group-size", "32", *PLAIN)),
    Made("gptq-4bit-row", "llama", ("gptq", "-q", "4bit", "--group-size", "-1", *PLAIN)),
    Made("gptq-4bit-biases", "qwen2", ("gptq", "-q", "4bit", *PLAIN)),
)
GPTQ_ELSEWHERE = (
    Made("gptq-3bit", "demo", ("gptq", "-q", "3bit", *CALIBRATE)),
    Made("gptq-2bit", "qwen3", ("gptq", "-q", "2bit", "--group-size", "32", *PLAIN)),
    Made("gptq-8bit", "llama", ("gptq", "-q", "8bit", *PLAIN)),
    Made("gptq-4bit-asym", "demo", ("gptq", "-q", "4bit", "--asym", *PLAIN)),
)
AWQ = (
    Made("awq-4bit", "demo", ("awq", "-q", "4bit", *CALIBRATE)),
    Made("awq-4bit-g64", "qwen3", ("awq", "-q", "4bit", "--group-size", "64", *PLAIN)),
)
# Its head has another name in the file than where it is loaded with its tower.
TOWER = Made("W4A16-tower", "mistral3", ("compressed-tensors", "-q", "W4A16", "--group-size", "64", *PLAIN))
PACKED = (
    TOWER,
    Made("W4A16", "demo", ("compressed-tensors", "-q", "W4A16", *CALIBRATE)),
    Made("W4A16_ASYM", "qwen3", ("compressed-tensors", "-q", "W4A16_ASYM", *PLAIN)),
)
PACKED_ELSEWHERE = (
    Made("W8A16", "llama", ("compressed-tensors", "-q", "W8A16", *PLAIN)),
    Made("W3A16", "qwen2", ("compressed-tensors", "-q", "W3A16", *PLAIN)),
)
HYBRIDS = tuple(
    Made(f"{level}-hybrid", "qwen3_5", ("compressed-tensors", "-q", level, *options, *PLAIN))
    for level, options in (("W4A16", ("--group-size", "64")), ("W8A16", ()))
)
EXPERTS = Made("W4A16-experts", "qwen3_moe", ("compressed-tensors", "-q", "W4A16", "--group-size", "64", *PLAIN))
EXPERTS_GPTQ = Made("gptq-experts", "qwen3_moe", ("gptq", "-q", "4bit", "--group-size", "64", *PLAIN))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tiny = {variant: make_tiny(variant, folder / variant, **TINY) for variant in ("llama", "qwen2", "qwen3")}
    tiny["qwen3_moe"] = make_tiny("qwen3_moe", folder / "qwen3_moe", **TINY, moe_intermediate_size=128)
    tiny["mistral3"] = make_tiny("mistral3", folder / "mistral3", **TINY)
    tiny["qwen3_5"] = make_tiny("qwen3_5", folder / "qwen3_5", **TINY, linear_num_value_heads=8)
    return {"demo": demo_model, **tiny}


def reference(model: Path, artifact: Path) -> np.ndarray:
    """float64 (windows, length, vocabulary) of torch with every weight of ``artifact`` as our decoder reads it."""
    source = open_source(str(model))
    with closing(source.checkpoint):
        decoded = open_decoded(source, artifact)
        with closing(decoded):
            weights = {name: decoded.read(name).to(torch.float32).numpy() for name in decoded.names}
    return logprobs(model, weights, WINDOWS)


def check(reply_logprobs: np.ndarray | None, expected: np.ndarray, limit: float) -> None:
    assert reply_logprobs is not None
    assert abs(divergence(expected, reply_logprobs)) < limit


def by_name(made: object) -> str:
    return made.name if isinstance(made, Made) else str(made)


def in_transformers(made: Made, folder: Path, models: dict[str, Path], limit: float) -> None:
    source, artifact = made.make(folder, models)
    reply = transformers.run(artifact, Request(WINDOWS, (PROMPT,), max_tokens=8, dtype="float32", threads=1))
    check(reply.logprobs, reference(source, artifact), limit)
    assert len(reply.tokens[0]) > 0


@pytest.mark.heavy
@pytest.mark.parametrize("made", [*PACKED, *PACKED_ELSEWHERE], ids=by_name)
def test_compressed_tensors_in_transformers(made: Made, tmp_path: Path, models: dict[str, Path]) -> None:
    in_transformers(made, tmp_path, models, 5e-5 if "ASYM" in made.name else 1e-9)


@pytest.mark.parametrize("made", HYBRIDS, ids=by_name)
def test_hybrids_of_compressed_tensors_in_transformers(made: Made, tmp_path: Path, models: dict[str, Path]) -> None:
    """A model with a tower, of which transformers loads the language model under names of another kind."""
    in_transformers(made, tmp_path, models, 1e-9)


@pytest.mark.heavy
def test_experts_of_compressed_tensors_in_transformers(tmp_path: Path, models: dict[str, Path]) -> None:
    in_transformers(EXPERTS, tmp_path, models, 1e-4)


@pytest.mark.gptqmodel
def test_experts_that_transformers_leaves_at_random_values_are_an_error(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    _, artifact = EXPERTS_GPTQ.make(tmp_path, models)
    with pytest.raises(UnsupportedError) as caught:
        transformers.run(artifact, Request(WINDOWS, dtype="float32", threads=1))
    assert "4 tensors were left at random values (model.layers.0.mlp.experts.down_proj" in str(caught.value.found)


@pytest.mark.gptqmodel
@pytest.mark.parametrize("made", [*GPTQ, *GPTQ_ELSEWHERE], ids=by_name)
def test_gptq_in_transformers(made: Made, tmp_path: Path, models: dict[str, Path]) -> None:
    in_transformers(made, tmp_path, models, 1e-5)


@pytest.mark.gptqmodel
@pytest.mark.parametrize("made", AWQ, ids=by_name)
def test_awq_in_transformers(made: Made, tmp_path: Path, models: dict[str, Path]) -> None:
    in_transformers(made, tmp_path, models, 1e-4)


@pytest.mark.vllm
@pytest.mark.parametrize("made", [*GPTQ, *AWQ, *PACKED], ids=by_name)
def test_all_four_bits_in_vllm(made: Made, tmp_path: Path, models: dict[str, Path]) -> None:
    source, artifact = made.make(tmp_path, models)
    request = Request(WINDOWS, (PROMPT,), max_tokens=8, dtype="float16", threads=1, timeout=500)
    reply = vllm.run(artifact, request)
    check(reply.logprobs, reference(source, artifact), 1e-4)
    assert reply.kernels == ("CPUWNA16LinearKernel",)
    assert len(reply.tokens[0]) > 0


@pytest.mark.vllm
@pytest.mark.parametrize("made", [*GPTQ_ELSEWHERE, *PACKED_ELSEWHERE], ids=by_name)
def test_vllm_says_what_it_has_no_kernel_for(made: Made, tmp_path: Path, models: dict[str, Path]) -> None:
    _, artifact = made.make(tmp_path, models)
    with pytest.raises(UnsupportedError) as caught:
        vllm.run(artifact, Request(WINDOWS, threads=1, timeout=500))
    said = str(caught.value.found)
    assert any(
        words in said for words in ("Unsupported quantization config", "desc_act=True", "does not support", "CPUWNA16")
    )
