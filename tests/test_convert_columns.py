"""Matrices whose columns stand in another order in GGUF (the value heads of Qwen 3.5): codes are kept where the groups
move as a whole, and where they do not, the plan says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize import api
from llm_quantize.architectures.rows import read_output_rows
from llm_quantize.artifacts.verify import verify
from llm_quantize.conversion import foresee
from llm_quantize.errors import UnsupportedError
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.grids.grid import Grid
from llm_quantize.grids.held import moved
from llm_quantize.models.opening import open_source
from llm_quantize.options import Options
from llm_quantize.qtypes.held import move_whole
from tests.oracles.packed_formats import Form, write_packed
from tests.tiny_models import make_tiny

EXACT, OUT = Options(threads=1, exact=True), "model.layers.0.linear_attn.out_proj.weight"


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "linear_num_value_heads": 4}
    return make_tiny("qwen3_5_text", tmp_path_factory.mktemp("source") / "tiny", dtype="float16", **sizes)


def test_the_order_is_another(hybrid: Path) -> None:
    with (source := open_source(str(hybrid))).checkpoint:
        (piece,) = next(one for one in source.tensors.outputs if one.name == "blk.0.ssm_out.weight").pieces
    assert piece.columns is not None
    assert piece.columns.tolist() != sorted(piece.columns.tolist())


@pytest.mark.parametrize("form", [Form("gptq"), Form("compressed-tensors", symmetric=False), Form("gptq", group=-1)])
def test_groups_that_move_as_a_whole_are_kept(hybrid: Path, tmp_path: Path, form: Form) -> None:
    expected = write_packed(hybrid, tmp_path / "source", form)
    foreseen = foresee(str(tmp_path / "source"), "gguf")
    assert (foreseen.verdict, foreseen.never) == ("exact", ())
    made = api.convert(tmp_path / "source", "gguf", output_dir=tmp_path, options=EXACT)
    assert made.conversion is not None
    assert set(made.conversion["tensors"]) == {"exact"}
    assert verify(made.path, source=str(tmp_path / "source")).ok
    with (back := open_source(str(made.path))).checkpoint as model:
        assert np.array_equal(model.read_rows(OUT, 0, model.matrix(OUT)[0]), expected[OUT].numpy())
        found = model.held_grid(OUT, 3, 40)
        assert found is not None
        assert np.array_equal(found[0].decode(found[1]).numpy(), expected[OUT].numpy()[3:40])
        output = next(one for one in back.tensors.outputs if one.name == "blk.0.ssm_out.weight")
        assert read_output_rows(model, output, 0, 1).shape == (1, expected[OUT].shape[1])
    again = api.convert(made.path, "gguf", output_dir=tmp_path / "again", options=EXACT)
    assert again.conversion is not None
    assert set(again.conversion["tensors"]) == {"exact"}


def test_groups_that_are_parted_are_told_before(hybrid: Path, tmp_path: Path) -> None:
    """Groups of 64 over heads of 32."""
    write_packed(hybrid, tmp_path / "source", Form("gptq", group=64))
    foreseen = foresee(str(tmp_path / "source"), "gguf")
    assert foreseen.verdict == "rounded"
    assert foreseen.never == tuple(f"blk.{layer}.ssm_out.weight" for layer in (0, 1, 2, 4))
    with pytest.raises(UnsupportedError, match="cannot hold this model exactly") as caught:
        api.convert(tmp_path / "source", "gguf", output_dir=tmp_path / "made", options=EXACT)
    assert caught.value.tensor == "blk.0.ssm_out.weight"
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("level", "kept"), [("q8_0", True), ("q5_1", True), ("iq4_nl", True), ("tq2_0", False)])
def test_blocks_of_a_file(hybrid: Path, tmp_path: Path, level: str, kept: bool) -> None:
    """Blocks of 32 move with heads of 32, those of 256 do not."""
    types = Overrides(tensor_types=(("blk", level),), embedding_type="bf16", output_type="bf16")
    sizes: dict[str, Any] = {"linear_num_value_heads": 16, "hidden_size": 256, "intermediate_size": 256}
    model = make_tiny("qwen3_5_text", tmp_path / "model", dtype="bfloat16", **sizes)
    options = Options(threads=1, calibrate=False, overrides=types)
    (file,) = api.quantize(model, "gguf", levels="Q8_0", output_dir=tmp_path, options=options)
    with open_source(str(file.path)).checkpoint as source:
        assert (source.held(OUT) is not None) == kept
        found = source.held_grid(OUT, 0, 33)
        assert (found is not None) == kept
        if found is not None:
            assert np.array_equal(found[0].decode(found[1]).numpy(), source.read_rows(OUT, 0, 33))
    foreseen = foresee(str(file.path), "gguf")
    assert (not foreseen.never) == kept


def test_decays_are_verified_as_they_are_stored(tmp_path: Path) -> None:
    """-exp(A_log) in the file, A_log in the directory, rounded to 16 bits there: the verdict is of A_log."""
    model = make_tiny("qwen3_5_text", tmp_path / "model", dtype="float16", linear_num_value_heads=4)
    options = Options(threads=1, calibrate=False)
    (file,) = api.quantize(model, "gguf", levels="Q4_0", output_dir=tmp_path, options=options)
    made = api.convert(file.path, "gptq", output_dir=tmp_path, options=Options(threads=1))
    assert made.conversion is not None
    outcome = verify(made.path, source=str(file.path))
    assert outcome.ok, outcome.all_problems()
    name = "model.layers.0.linear_attn.A_log"
    (check,) = [one for one in outcome.tensors if one.name == name]
    values = load_file(made.path / "model.safetensors")
    with open_source(str(file.path)).checkpoint as source:
        wanted = source.read_rows(name, 0, 1).reshape(-1)
    off = np.linalg.norm(values[name].float().numpy() - wanted) / np.linalg.norm(wanted)
    assert check.relative_error == pytest.approx(off, rel=1e-4)
    assert off > 0
    values[name] += 0.25
    save_file(values, made.path / "model.safetensors")
    assert any(
        "A_log" in text and "manifest says" in text for text in verify(made.path, source=str(file.path)).all_problems()
    )


@pytest.mark.parametrize("span", [4, 8])
def test_a_grid_moved(span: int) -> None:
    """Whole superblocks of two groups, against the values."""
    rng = torch.Generator().manual_seed(1)

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=rng)

    codes = torch.randint(0, 16, (3, 24), generator=rng, dtype=torch.uint8)
    d, m, u, v, z = some(3, 24 // span), some(3, 24 // span), some(3, 6), some(3, 6), some(3, 6)
    grid = Grid(torch.arange(16.0), 4, span, d, u, z=z, m=m, v=v)
    order = np.arange(24).reshape(3, 8)[[2, 0, 1]].reshape(-1)
    found = moved((grid, codes), order)
    assert found is not None
    assert torch.equal(found[0].decode(found[1]), grid.decode(codes)[:, torch.from_numpy(order)])
    assert moved((grid, codes), np.roll(np.arange(24), 2)) is None
    assert (moved((grid, codes), np.roll(np.arange(24), 4)) is None) == (span == 8)


def test_what_moves_whole() -> None:
    order = np.arange(12)
    assert move_whole(order[::-1], 12)
    assert not move_whole(order[::-1], 4)
    assert not move_whole(order, 5)
    assert move_whole(np.roll(order, 4), 4)
    assert not move_whole(np.roll(order, 2), 4)
    assert not move_whole(np.array([0, 1, 3, 2, 4, 5, 6, 7]), 4)
