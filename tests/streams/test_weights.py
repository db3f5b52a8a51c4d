"""Tensors of a checkpoint as torch has them, whole, in place and by rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.errors import MalformedInputError, NumericPolicyError, UnsupportedError
from llm_quantize.models.safetensors import open_checkpoint
from llm_quantize.streams import weights as module
from llm_quantize.streams.weights import CheckpointWeights, fill
from tests.tiny_models import make_tiny


@pytest.fixture
def stored(tmp_path: Path) -> tuple[CheckpointWeights, dict[str, torch.Tensor]]:
    """A checkpoint with every element type that is read; the reader sees it as its files are."""
    directory = make_tiny("llama", tmp_path / "model")
    generator = torch.Generator().manual_seed(3)
    values = torch.randn((7, 5), generator=generator)
    tensors = {
        "bf16": values.bfloat16(),
        "f16": values.half(),
        "f32": values,
        "f64": values.double() * (1 + 1e-12),
        "f8": values.to(torch.float8_e4m3fn),
        "cube": torch.randn((3, 4, 5), generator=generator).bfloat16(),
        "vector": torch.randn(11, generator=generator).half(),
        "scalar": torch.tensor(2.5),
        "integers": torch.arange(4),
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return CheckpointWeights(open_checkpoint(str(directory))), load_file(directory / "model.safetensors")


FLOATS = ("bf16", "f16", "f32", "f64", "f8", "cube", "vector", "scalar")


@pytest.mark.parametrize("chunk", [1, 12, 1 << 20])
@pytest.mark.parametrize("name", FLOATS)
def test_tensors_are_those_of_the_file(
    name: str, chunk: int, stored: tuple[CheckpointWeights, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_WEIGHTS", chunk)
    weights, tensors = stored
    value = tensors[name]
    kept = value.dtype in (torch.float16, torch.bfloat16)
    found = weights.read(name)
    assert found.dtype == (value.dtype if kept else torch.float32)
    assert torch.equal(found, value.to(found.dtype))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.full(value.shape, torch.nan, dtype=dtype)
        weights.read_into(name, out)
        assert torch.equal(out, value.to(torch.float32).to(dtype))


def test_part_of_a_tensor_is_filled_and_nothing_else(
    stored: tuple[CheckpointWeights, dict[str, torch.Tensor]],
) -> None:
    weights, tensors = stored
    for dtype in (torch.bfloat16, torch.float32):
        whole = torch.zeros((2, 9, 5), dtype=dtype)
        fill(weights, "bf16", whole[1, 2:9])
        assert torch.equal(whole[1, 2:], tensors["bf16"].to(dtype))
        assert not whole[0].any()
        assert not whole[1, :2].any()
        wide = torch.zeros((7, 8), dtype=dtype)
        fill(weights, "bf16", wide[:, 1:6])
        assert torch.equal(wide[:, 1:6], tensors["bf16"].to(dtype))
        assert not wide[:, 6:].any()


@pytest.mark.parametrize("chunk", [1, 12, 1 << 20])
@pytest.mark.parametrize("rows", [[], [0], [6], [0, 1, 2, 5], [1, 3, 4, 6], list(range(7))])
def test_rows_are_those_of_the_file(
    rows: list[int],
    chunk: int,
    stored: tuple[CheckpointWeights, dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_CHUNK_WEIGHTS", chunk)
    weights, tensors = stored
    for name in ("bf16", "f16", "f32", "f8"):
        wanted = tensors[name].float()[torch.tensor(rows, dtype=torch.int64)]
        assert torch.equal(weights.read_rows(name, torch.tensor(rows, dtype=torch.int64)).float(), wanted)


def test_what_cannot_be_weights_is_refused(
    stored: tuple[CheckpointWeights, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    weights, _ = stored
    with pytest.raises(UnsupportedError):
        weights.read("integers")
    with pytest.raises(ValueError, match="shape"):
        weights.read_into("bf16", torch.zeros(5, 7))
    directory = make_tiny("llama", tmp_path / "wide")
    save_file({"wide": torch.tensor([[1e300]], dtype=torch.float64)}, directory / "model.safetensors")
    with pytest.raises(NumericPolicyError):
        CheckpointWeights(open_checkpoint(str(directory))).read("wide")


def test_another_shape_is_named() -> None:
    class Given:
        names = ("a",)

        def read(self, name: str) -> torch.Tensor:
            return torch.zeros(2, 3)

    with pytest.raises(MalformedInputError) as caught:
        fill(Given(), "a", torch.zeros(3, 2))
    assert (caught.value.tensor, caught.value.expected, caught.value.found) == ("a", "(3, 2)", "(2, 3)")
