"""A directory that lacks a weight is refused by every runtime: none computes with what happens to stand there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from llm_quantize.cli import run
from llm_quantize.errors import IntegrityError, MalformedInputError, UnsupportedError
from llm_quantize.models.opening import open_source
from llm_quantize.runtimes import generate, transformers, vllm
from llm_quantize.runtimes.base import Request, refuse_incomplete
from llm_quantize.runtimes.workers.telling import IncompleteError, refuse_unfilled
from tests.oracles.reference_directories import Layout, write_directory
from tests.tiny_models import make_tiny

UP = "model.layers.1.mlp.up_proj"
ASK = Request(prompts=("Once",), max_tokens=2, threads=1)


def without(model: Path, *names: str) -> Path:
    """The same directory less some tensors."""
    file = model / "model.safetensors"
    values = {name: value for name, value in load_file(file).items() if name not in names}
    save_file(values, file, {"format": "pt"})
    return model


def stranger(folder: Path) -> Path:
    """A model of a family that no reader here knows, with the tokenizer of another."""
    make_tiny("llama", folder)
    (folder / "model.safetensors").unlink()
    config = hf.OPTConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=2, word_embed_proj_dim=32
    )
    hf.OPTForCausalLM(config).save_pretrained(folder)
    with pytest.raises(UnsupportedError):
        open_source(str(folder))
    return folder


@pytest.mark.parametrize("name", [f"{UP}.weight", "model.norm.weight", "lm_head.weight"])
def test_a_plain_directory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = without(make_tiny("llama", tmp_path / "model"), name)
    monkeypatch.setenv("LLM_QUANTIZE_VLLM", sys.executable)  # refused before it is asked
    for answer in (lambda: list(generate(model, "Once", max_tokens=2, threads=1)), lambda: transformers.run(model, ASK),
                   lambda: vllm.run(model, ASK)):  # fmt: skip
        with pytest.raises(MalformedInputError, match="not in the checkpoint") as caught:
            answer()
        assert caught.value.tensor == name


@pytest.mark.parametrize(
    ("layout", "names", "kind"),
    [
        (Layout("gptq", group=32), [f"{UP}.scales"], IntegrityError),
        (Layout("awq", group=32, symmetric=False), [f"{UP}.qzeros"], IntegrityError),
        (Layout("compressed-tensors", group=32), ["model.norm.weight"], MalformedInputError),
        (
            Layout("compressed-tensors", group=32),
            [f"{UP}.weight_packed", f"{UP}.weight_scale", f"{UP}.weight_shape"],
            MalformedInputError,
        ),
    ],
    ids=lambda value: value.format if isinstance(value, Layout) else "",
)
def test_a_quantized_directory(
    layout: Layout, names: list[str], kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_QUANTIZE_VLLM", sys.executable)
    write_directory(make_tiny("llama", tmp_path / "model", intermediate_size=128), tmp_path / "packed", layout)
    packed = without(tmp_path / "packed", *names)
    for runtime in (transformers.run, vllm.run):
        with pytest.raises(kind):
            runtime(packed, ASK)


def test_a_family_that_is_not_known_here(tmp_path: Path) -> None:
    """What transformers tells of its loading is all there is: in this process, and in one of its own."""
    model = stranger(tmp_path / "model")
    assert "".join(generate(model, "Once", max_tokens=2, threads=1)) is not None
    name = "model.decoder.layers.1.fc1.weight"
    without(model, name)
    refuse_incomplete(model)
    for answer in (
        lambda: list(generate(model, "Once", max_tokens=2, threads=1)),
        lambda: transformers.run(model, ASK),
    ):
        with pytest.raises(IntegrityError, match="missing from its files") as caught:
            answer()
        assert name in str(caught.value.found)


def test_what_is_there_under_another_name_is_the_runtimes_limit() -> None:
    refuse_unfilled({"missing_keys": [], "unexpected_keys": ["left.over"]})
    with pytest.raises(IncompleteError, match=r"2 parameters \(a, b\)"):
        refuse_unfilled({"missing_keys": ["b", "a"], "unexpected_keys": []})
    with pytest.raises(RuntimeError, match=r"1 tensors of the file were not used \(c\)") as caught:
        refuse_unfilled({"missing_keys": ["a"], "unexpected_keys": ["c"]})
    assert not isinstance(caught.value, IncompleteError)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = without(make_tiny("llama", tmp_path / "model"), f"{UP}.weight")
    assert run(["run", str(model), "Once", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["tensor"] == f"{UP}.weight"


def test_what_only_our_reader_does_not_understand_runs(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    values = load_file(model / "model.safetensors") | {"model.layers.0.extra.weight": torch.zeros(4)}
    save_file(values, model / "model.safetensors", {"format": "pt"})
    assert "".join(generate(model, "Once", max_tokens=2, threads=1))
