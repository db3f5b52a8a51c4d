"""Quantized directories in vLLM on the CPU (make test-vllm): log-probabilities of the decoded weights, and the words
with which it refuses what it has no kernel for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llm_quantize.errors import UnsupportedError
from llm_quantize.runtimes import converse, vllm
from llm_quantize.runtimes.base import Request
from tests.oracles.reference_directories import Layout, divergence, logprobs, write_directory
from tests.runtimes.test_conversation import heard_to_the_end, talking_model
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.vllm
WINDOWS = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (2, 24)).astype(np.int32)
ASK = Request(WINDOWS, ("The night in the", "12"), max_tokens=6, dtype="float16", threads=1, timeout=500)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


@pytest.fixture(scope="module", autouse=True)
def own_vllm_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What vLLM remembers of model classes: it takes long to find out, and stays among the tests' files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("vllm")))
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {variant: make_tiny(variant, folder / variant, **WIDE) for variant in ("llama", "qwen3")}


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        ("llama", Layout("gptq")),
        ("qwen3", Layout("gptq", group=32, signed_scales=True)),
        ("qwen3", Layout("gptq", group=-1)),
        ("llama", Layout("awq", symmetric=False)),
        ("qwen3", Layout("awq", group=64, signed_scales=True)),
        ("llama", Layout("compressed-tensors", scale="bfloat16")),
        ("qwen3", Layout("compressed-tensors", group=-1, signed_scales=True)),
        ("qwen3", Layout("compressed-tensors", group=64, symmetric=False)),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.format}-{x.group}-{'sym' if x.symmetric else 'asym'}",
)
def test_four_bits(tiny: dict[str, Path], tmp_path: Path, variant: str, layout: Layout) -> None:
    decoded = write_directory(tiny[variant], tmp_path / "model", layout)
    reply = vllm.run(tmp_path / "model", ASK)
    assert reply.logprobs is not None
    kld = divergence(logprobs(tiny[variant], decoded, WINDOWS), reply.logprobs)
    assert abs(kld) < 5e-5  # float16 all the way
    assert reply.kernels == ("CPUWNA16LinearKernel",)
    assert len(reply.texts) == 2
    assert all(0 < len(tokens) <= 6 for tokens in reply.tokens)


def test_a_wrong_layout_shows(tiny: dict[str, Path], tmp_path: Path) -> None:
    write_directory(tiny["llama"], tmp_path / "a", Layout("gptq"))
    decoded = write_directory(tiny["llama"], tmp_path / "b", Layout("gptq", group=64))
    reply = vllm.run(tmp_path / "a", ASK)
    assert reply.logprobs is not None
    assert divergence(logprobs(tiny["llama"], decoded, WINDOWS), reply.logprobs) > 1e-3


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout("gptq", symmetric=False), "Unsupported quantization config: bits=4, sym=False"),
        (Layout("gptq", bits=3), "Unsupported quantization config: bits=3, sym=True"),
        (Layout("gptq", desc_act=True), "GPTQ group activation ordering (desc_act=True) is no longer supported"),
        (Layout("gptq", bits=8), "Marlin does not support weight_bits = uint8b128"),
        (Layout("compressed-tensors", bits=8, group=-1), "Quant type (uint8b128) not supported by CPUWNA16"),
    ],
    ids=["asym", "3bit", "desc_act", "8bit", "W8A16"],
)
def test_refusals_keep_its_words(tiny: dict[str, Path], tmp_path: Path, layout: Layout, words: str) -> None:
    write_directory(tiny["llama"], tmp_path / "model", layout)
    with pytest.raises(UnsupportedError) as caught:
        vllm.run(tmp_path / "model", ASK)
    assert words in str(caught.value.found)


def test_a_conversation(demo_model: Path, tmp_path: Path) -> None:
    """The engine is asked step by step; a stopped answer is kept, and the next one is to the next question."""
    with converse(talking_model(demo_model, tmp_path), runtime="vllm", max_tokens=8, context=256, threads=1) as told:
        first, answered = heard_to_the_end(told.say("The old man"))
        assert answered.told.tokens <= 8
        heard: list[str] = []
        writing = told.say("on", lambda: bool(heard))
        heard.append(next(writing))
        more, _ = heard_to_the_end(writing)
        assert told.messages[-1]["content"] == "".join([*heard, *more])
        told.reset()
        assert "".join(heard_to_the_end(told.say("The old man"))[0]) == "".join(first)
