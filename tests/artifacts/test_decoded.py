"""An artifact decoded under its checkpoint's names is the inverse of the map, for every family."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.architectures.rows import Arrays, matrix_shape, read_output_rows, to_float32
from llm_quantize.artifacts.decoded import DecodedArtifact
from llm_quantize.errors import IntegrityError, LlmQuantizeError, MalformedInputError, UsageError
from llm_quantize.models.opening import Source, open_source
from llm_quantize.pipeline import Options, quantize
from tests.tiny_models import TINY, make_tiny, row_lengths_of_256


def artifacts(model: Path, *levels: str, **options: Any) -> list[Path]:
    results = quantize(
        str(model), "gguf", levels=levels, output_dir=model / "out", options=Options(threads=1, **options)
    )
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


def checkpoint_values(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value.float() for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("variant", TINY)
def test_f32_gives_back_the_source(variant: str, tmp_path: Path, opened: Any) -> None:
    model = make_tiny(variant, tmp_path / "model")
    source = opened(model)
    artifact = DecodedArtifact(source, artifacts(model, "F32")[0])
    expected = checkpoint_values(model)
    assert set(artifact.names) == set(expected) - set(source.left_out)
    assert artifact.notes == ()
    offset = {piece.source for output in source.tensors.outputs for piece in output.pieces if piece.add}
    for name in artifact.names:
        found = artifact.read(name)
        assert found.dtype == torch.float32
        assert found.shape == expected[name].shape
        if name in offset:  # the file holds 1 + w in float32, and that is what comes back
            assert torch.equal(1 + found, 1 + expected[name]), name
        else:
            assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize("variant", ["llama", "gemma2", "gpt2", "phi3", "qwen3_moe", "gpt_neox"])
def test_reading_into_a_tensor_and_by_rows(variant: str, tmp_path: Path, opened: Any) -> None:
    model = make_tiny(variant, tmp_path / "model", tie_word_embeddings=True)
    artifact = DecodedArtifact(opened(model), artifacts(model, "Q8_0")[0])
    rows = torch.tensor([0, 3, 4, 5, 40])
    for weights in (artifact, artifact.for_head()):
        for name in artifact.names:
            whole = weights.read(name)
            for dtype in (torch.float32, torch.bfloat16):
                into = torch.full(whole.shape, torch.nan, dtype=dtype)
                weights.read_into(name, into)
                assert torch.equal(into, whole.to(dtype)), name
            with pytest.raises(ValueError, match="shape"):
                weights.read_into(name, torch.zeros(3, 7))
    for name in artifact.names:
        whole = artifact.read(name)
        if whole.ndim == 2 and len(whole) > 40:
            assert torch.equal(artifact.read_rows(name, rows), whole[rows]), name
            assert artifact.read_rows(name, rows[:0]).shape == (0, whole.shape[1])


@pytest.mark.parametrize("variant", TINY)
def test_quantized_values_are_those_of_the_format_owner(variant: str, tmp_path: Path, opened: Any) -> None:
    """Mapped forward again, the decoded tensors are what the gguf package reads from the file."""
    model = make_tiny(variant, tmp_path / "model", **row_lengths_of_256(variant))
    source = opened(model)
    (path,) = artifacts(model, "Q4_K_M")
    artifact = DecodedArtifact(source, path)
    assert any(name.endswith("_k") for name in artifact.types().values())
    again = Arrays({name: artifact.decode(name) for name in artifact.names}.__getitem__)
    head = Arrays({name: artifact.for_head().read(name).numpy() for name in artifact.names}.__getitem__)
    owners = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for output in source.tensors.outputs:
        if output.constant is not None:
            continue
        tensor = owners[output.name]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(matrix_shape(output.shape))
        rows = head if output.name == "output.weight" else again
        found = to_float32(read_output_rows(rows, output, 0, len(expected)))
        added = any(piece.add for piece in output.pieces)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7 if added else 0, err_msg=output.name)


def test_a_head_beside_a_tied_table(tmp_path: Path, opened: Any) -> None:
    """Where the runtime wants output.weight too, the head is decoded from that one, and it may be of another type."""
    model = make_tiny("qwen2_moe", tmp_path / "model", tie_word_embeddings=True, **row_lengths_of_256("qwen2_moe"))
    source = opened(model)
    artifact = DecodedArtifact(source, artifacts(model, "Q4_K_M")[0])
    types = artifact.types()
    assert types["token_embd.weight"] != types["output.weight"]
    name = "model.embed_tokens.weight"
    assert not torch.equal(artifact.read(name), artifact.for_head().read(name))
    assert torch.equal(artifact.read("model.norm.weight"), artifact.for_head().read("model.norm.weight"))


def test_a_split_artifact(tmp_path: Path, opened: Any) -> None:
    model = make_tiny("llama", tmp_path / "model")
    source = opened(model)
    (path,) = artifacts(model, "F32", split_max_size=200_000)
    parts = sorted(path.glob("*.gguf"))
    assert len(parts) > 1
    expected = checkpoint_values(model)
    for given in (path, parts[1]):
        artifact = DecodedArtifact(source, given)
        assert artifact.size == sum(part.stat().st_size for part in parts)
        assert all(torch.equal(artifact.read(name), expected[name]) for name in artifact.names)
    parts[0].write_bytes(parts[1].read_bytes())
    with pytest.raises(MalformedInputError, match="same tensor"):
        DecodedArtifact(source, path)


def test_wider_models_decode_in_chunks(tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_quantize.architectures.rows.CHUNK_WEIGHTS", 500)
    model = make_tiny("phi3", tmp_path / "model")
    source = opened(model)
    artifact = DecodedArtifact(source, artifacts(model, "F32")[0])
    expected = checkpoint_values(model)
    assert all(torch.equal(artifact.read(name), expected[name]) for name in artifact.names)


@pytest.mark.parametrize(
    ("other", "overrides", "words"),
    [
        ("qwen2", {}, "general.architecture = qwen2"),
        ("llama", {"intermediate_size": 128}, "shape [64, 128]"),
        ("llama", {"num_hidden_layers": 1}, "no such tensor"),
        ("llama", {"num_hidden_layers": 3}, "no such tensor"),
        ("llama", {"vocab_size": 300}, "tokens in its vocabulary"),
    ],
)
def test_an_artifact_of_another_model(
    other: str, overrides: dict[str, Any], words: str, tmp_path: Path, opened: Any
) -> None:
    model = make_tiny("llama", tmp_path / "model")
    stranger = make_tiny(other, tmp_path / "other", **overrides)
    (path,) = artifacts(stranger, "F32")
    with pytest.raises(IntegrityError, match="not made from this reference") as caught:
        DecodedArtifact(opened(model), path)
    text = str(caught.value)
    assert str(path) in text
    assert str(model) in text
    assert words in text


def test_other_hyper_parameters_are_told(tmp_path: Path, opened: Any) -> None:
    model = make_tiny("llama", tmp_path / "model")
    (path,) = artifacts(model, "F32")
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77.0
    (model / "config.json").write_text(json.dumps(config))
    notes = DecodedArtifact(opened(model), path).notes
    assert notes == ("llama.rope.freq_base is 50.0 in the artifact, 77.0 in the reference",)


def test_a_truncated_artifact(tmp_path: Path, opened: Any) -> None:
    model = make_tiny("llama", tmp_path / "model")
    (path,) = artifacts(model, "F32")
    source = opened(model)
    artifact = DecodedArtifact(source, path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(MalformedInputError, match="truncated"):
        DecodedArtifact(source, path)
    with pytest.raises(IntegrityError, match="shorter"):
        [artifact.read(name) for name in artifact.names]


@pytest.mark.parametrize("name", ["absent.gguf", ""])
def test_no_artifact(name: str, tmp_path: Path, opened: Any) -> None:
    model = make_tiny("llama", tmp_path / "model")
    with pytest.raises(UsageError):
        DecodedArtifact(opened(model), tmp_path / name)


def test_every_failure_is_of_the_tree(tmp_path: Path, opened: Any) -> None:
    """Any byte of the header flipped: an error of ours, or values that can be read."""
    model = make_tiny("llama", tmp_path / "model")
    (path,) = artifacts(model, "F32")
    source, whole = opened(model), path.read_bytes()
    for at in np.random.Generator(np.random.PCG64(0)).integers(0, 3000, 60).tolist():
        damaged = bytearray(whole)
        damaged[at] ^= 0x15
        path.write_bytes(damaged)
        try:
            artifact = DecodedArtifact(source, path)
            artifact.read("model.norm.weight")
        except LlmQuantizeError:
            continue


def test_a_duplicate_head_is_used(tmp_path: Path, opened: Any) -> None:
    """Another writer's file of a tied model may hold output.weight although ours does not."""
    untied = make_tiny("llama", tmp_path / "untied")
    (path,) = artifacts(untied, "F32")
    tied = tmp_path / "model"
    tied.mkdir()
    for file in untied.iterdir():
        if file.is_file():
            (tied / file.name).write_bytes(file.read_bytes())
    values = checkpoint_values(tied)
    head = values.pop("lm_head.weight")
    save_file(values, tied / "model.safetensors", {"format": "pt"})
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    artifact = DecodedArtifact(opened(tied), path)
    name = "model.embed_tokens.weight"
    assert torch.equal(artifact.for_head().read(name), head)
    assert torch.equal(artifact.read(name), values[name])
