"""Quantized directories in transformers: log-probabilities of the decoded weights. Those of GPTQ and AWQ are marked
gptqmodel (make test-transformers), as they need packages that ask for another torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llm_quantize import api
from llm_quantize.errors import AccessError, UnsupportedError
from llm_quantize.events import Event, Generated
from llm_quantize.options import Options
from llm_quantize.runtimes import generate, transformers
from llm_quantize.runtimes.base import Reply, Request
from llm_quantize.runtimes.workers.telling import Pieces
from tests.oracles.packed_formats import Form, is_linear, write_packed
from tests.oracles.reference_directories import Layout, divergence, logprobs, write_directory
from tests.tiny_models import make_tiny

WINDOWS = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (2, 24)).astype(np.int32)
ASK = Request(WINDOWS, ("The night in the",), max_tokens=6, dtype="float32", threads=1)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {variant: make_tiny(variant, folder / variant, **WIDE) for variant in ("llama", "qwen3")}


def check(source: Path, directory: Path, layout: Layout, request: Request = ASK) -> tuple[float, Reply]:
    """The divergence of transformers' answer from plain torch with the decoded weights, and that answer."""
    decoded = write_directory(source, directory, layout)
    reply = transformers.run(directory, request)
    assert reply.logprobs is not None
    assert reply.logprobs.shape[:2] == WINDOWS.shape
    np.testing.assert_allclose(np.exp(reply.logprobs.astype(np.float64)).sum(-1), 1, atol=1e-5)
    assert len(reply.texts) == len(reply.tokens) == 1
    assert 0 < len(reply.tokens[0]) <= request.max_tokens
    return divergence(logprobs(source, decoded, WINDOWS), reply.logprobs), reply


def test_compressed_tensors_are_exact(tiny: dict[str, Path], tmp_path: Path) -> None:
    layout = Layout("compressed-tensors", scale="bfloat16", signed_scales=True)
    kld, reply = check(tiny["llama"], tmp_path / "model", layout)
    assert abs(kld) < 1e-9
    assert reply.versions["compressed-tensors"]
    heard: list[Event] = []
    # What `llm-quantize run` does, in the dtype of the model.
    pieces = list(generate(tmp_path / "model", "The night in the", max_tokens=6, threads=1, on_event=heard.append))
    whole = transformers.run(tmp_path / "model", replace(ASK, windows=None, dtype="auto"))
    assert "".join(pieces) == whole.texts[0]
    (told,) = heard
    assert isinstance(told, Generated)
    assert (told.tokens, told.threads) == (len(whole.tokens[0]), 1)


def test_a_plain_directory_writes_piece_by_piece(tiny: dict[str, Path]) -> None:
    """The pieces are the text of all tokens together; a sampled text is that of its seed and share."""
    heard: list[Event] = []
    pieces = list(generate(tiny["llama"], "The night in the", max_tokens=40, threads=2, on_event=heard.append))
    whole = transformers.run(tiny["llama"], replace(ASK, windows=None, max_tokens=40, dtype="auto"))
    assert "".join(pieces) == whole.texts[0]
    assert len(pieces) > 5
    (told,) = heard
    assert isinstance(told, Generated)
    assert (told.tokens, told.threads) == (len(whole.tokens[0]), 2)
    warm = {"max_tokens": 12, "threads": 1, "temperature": 3.0}
    drawn = ["".join(generate(tiny["llama"], "The night", **warm, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    narrow = "".join(generate(tiny["llama"], "The night", **warm, seed=1, top_p=1e-6))
    assert narrow == "".join(generate(tiny["llama"], "The night", max_tokens=12, threads=1))


def test_pieces_are_the_text_of_all_tokens() -> None:
    """A tokenizer that drops the first space of a text, and characters of several tokens."""
    words = ["\u2581One", "\u2581two", "\n", "\u2581three", b"\xe6", b"\xb5", b"\xb7", "!", b"\xff"]

    def decode(ids: list[int]) -> str:
        raw = b"".join(word if isinstance(word, bytes) else word.encode() for word in (words[i] for i in ids))
        return raw.decode("utf-8", "replace").replace("\u2581", " ").removeprefix(" ")

    said: list[str] = []
    pieces = Pieces(decode, said.append)
    for token in range(len(words)):
        pieces.add([token])
    pieces.end()
    assert said == ["One", " two", "\n", " three", "海", "!", "\ufffd"]
    assert "".join(said) == decode(list(range(len(words))))
    assert pieces.count == 9


@pytest.mark.heavy
@pytest.mark.parametrize(
    "layout",
    [
        Layout("compressed-tensors", scale="bfloat16", bits=8, group=-1),
        Layout("compressed-tensors", scale="bfloat16", bits=3, group=64),
        Layout("compressed-tensors", bits=2, group=32),
        Layout("compressed-tensors", bits=4, group=-1, signed_scales=True),
    ],
    ids=lambda layout: f"W{layout.bits}A16-{layout.group}",
)
def test_other_widths_are_exact(tiny: dict[str, Path], tmp_path: Path, layout: Layout) -> None:
    assert abs(check(tiny["qwen3"], tmp_path / "model", layout)[0]) < 1e-9


@pytest.mark.heavy
def test_zero_points_of_compressed_tensors_need_floats(tiny: dict[str, Path], tmp_path: Path) -> None:
    layout = Layout("compressed-tensors", symmetric=False)
    kld, _ = check(tiny["qwen3"], tmp_path / "model", layout)
    assert abs(kld) < 1e-5  # weights rounded to the dtype of the scales
    with pytest.raises(UnsupportedError) as caught:
        transformers.run(tmp_path / "model", ASK, backend="packed")
    assert caught.value.found


@pytest.mark.gptqmodel
@pytest.mark.parametrize("variant", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout("gptq"),
        Layout("gptq", group=32, symmetric=False),
        Layout("gptq", group=-1, signed_scales=True),
        Layout("gptq", bits=8, group=64),
        Layout("gptq", bits=3),
        Layout("gptq", bits=2, group=32, symmetric=False),
        Layout("gptq", version="gptq_v2", symmetric=False),
        Layout("awq", symmetric=False),
        Layout("awq", group=32, signed_scales=True),
    ],
    ids=lambda x: f"{x.version if x.format == 'gptq' else x.format}-{x.bits}-{x.group}-{'s' if x.symmetric else 'a'}",
)
def test_kernels_in_plain_torch(tiny: dict[str, Path], tmp_path: Path, layout: Layout, variant: str) -> None:
    kld, reply = check(tiny[variant], tmp_path / "model", layout)
    # Weights, and for AWQ inputs, are rounded to float16.
    assert abs(kld) < (1e-4 if layout.format == "awq" else 1e-5)
    assert reply.kernels == (("AwqTorchLinear",) if layout.format == "awq" else ("TorchLinear",))


@pytest.mark.gptqmodel
@pytest.mark.parametrize(
    "form",
    [
        Form("gptq", group=64, act_order=True),
        Form("gptq", group=64, act_order=True, symmetric=False),
        Form("compressed-tensors", bits=8, group=128, act_order=True),
    ],
    ids=["gptq", "gptq_v2", "compressed-tensors"],
)
def test_act_order_that_was_kept(tiny: dict[str, Path], tmp_path: Path, form: Form) -> None:
    """What ``convert`` makes of directories whose groups are spread over the columns: their own values."""
    decoded = write_packed(tiny["llama"], tmp_path / "source", form)
    made = api.convert(tmp_path / "source", "gptq", output_dir=tmp_path, options=Options(threads=1, exact=True))
    reply = transformers.run(made.path, ASK)
    assert reply.logprobs is not None
    weights = {name: rows.numpy() for name, rows in decoded.items() if is_linear(name)}
    assert abs(divergence(logprobs(tiny["llama"], weights, WINDOWS), reply.logprobs)) < 1e-5
    assert reply.kernels == ("TorchLinear",)


@pytest.mark.gptqmodel
def test_a_wrong_layout_shows(tiny: dict[str, Path], tmp_path: Path) -> None:
    write_directory(tiny["llama"], tmp_path / "a", Layout("gptq"))
    decoded = write_directory(tiny["llama"], tmp_path / "b", Layout("gptq", group=64))
    reply = transformers.run(tmp_path / "a", ASK)
    assert reply.logprobs is not None
    assert divergence(logprobs(tiny["llama"], decoded, WINDOWS), reply.logprobs) > 1e-3


def test_what_transformers_cannot_load_is_refused_in_our_words(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(UnsupportedError, match="does not run this model"):
        list(generate(model, "Once", max_tokens=1, threads=1))
    (tmp_path / "elsewhere").write_text("{}")
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AccessError, match="outside the model directory"):
        list(generate(model, "Once", max_tokens=1, threads=1))
