"""Stored grids as they are held: decoded, they are the values that rows are read as, bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.architectures.base import OutputTensor, Piece
from llm_quantize.architectures.rows import held_output_rows, read_output_rows, to_float32
from llm_quantize.errors import UsageError
from llm_quantize.grids.held import joined
from llm_quantize.kernels.reference import repack as reference
from llm_quantize.models.opening import open_model, open_source
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import quantize
from llm_quantize.qtypes.held import Held
from tests.oracles.peer_layouts import write_peer
from tests.oracles.reference_directories import Layout, write_directory
from tests.tiny_models import make_tiny, row_lengths_of_256

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("source") / "tiny", **row_lengths_of_256("llama"))


def made(model: Path, place: Path, format: str, level: str, **method: Any) -> Path:
    options = Options(threads=1, method=MethodOptions(method="rtn", **method))
    (result,) = quantize(str(model), format, levels=[level], output_dir=place, options=options)
    return result.path


def same(values: np.ndarray, expected: np.ndarray) -> bool:
    """Bit for bit, the sign of zero too."""
    return np.array_equal(values.view(np.uint32), np.ascontiguousarray(expected, np.float32).view(np.uint32))


OURS = [
    ("gptq", "4bit", {"group_size": 64}, "int4_g64", "float16"),
    ("gptq", "3bit", {"symmetric": False}, "int3_g128_asym", "float16"),
    ("gptq", "8bit", {"group_size": -1}, "int8", "float16"),
    ("awq", "4bit", {}, "int4_g128_asym", "float16"),
    ("compressed-tensors", "W4A16", {}, "int4_g128", "bfloat16"),
    ("compressed-tensors", "W5A16_ASYM", {"group_size": 32}, "int5_g32_asym", "bfloat16"),
    ("compressed-tensors", "W8A8", {}, "int8", "bfloat16"),
    ("compressed-tensors", "NVFP4A16", {}, "e2m1_b16_e4m3", "float32"),
    ("compressed-tensors", "MXFP4A16", {}, "e2m1_b32_e8m0", "float32"),
    ("compressed-tensors", "FP8_DYNAMIC", {}, "e4m3", "bfloat16"),
    ("compressed-tensors", "FP8_BLOCK", {}, "e4m3_b128_rows128", "bfloat16"),
    ("bitsandbytes", "NF4", {}, "nf4_b64", "float32"),
    ("bitsandbytes", "FP4", {"double_quant": True}, "fp4_b64_dq", "float32"),
    ("bitsandbytes", "INT8", {}, "row8", "float32"),
    ("mlx", "4bit", {}, "affine4_g64", "bfloat16"),
    ("mlx", "nvfp4", {}, "e2m1_b16_e4m3alone", "float32"),
    ("mlx", "mxfp4", {}, "e2m1_b32_e8m0up", "float32"),
    ("mlx", "mxfp8", {}, "e4m3_b32_e8m0up", "float32"),
]


@pytest.mark.parametrize(("format", "level", "method", "qtype", "scale"), OURS)
def test_what_is_held_decodes_to_what_is_read(
    llama: Path, tmp_path: Path, format: str, level: str, method: dict[str, Any], qtype: str, scale: str
) -> None:
    with open_model(str(made(llama, tmp_path, format, level, **method))) as model:
        for name in (UP, DOWN):
            held = model.held(name)
            assert held is not None
            assert (held.qtype, held.scale if scale != "float32" else scale) == (qtype, scale)
            rows, columns = model.matrix(name)
            for start, stop in ((0, rows), (3, rows - 1), (32, 64)):
                found = model.held_grid(name, start, stop)
                assert found is not None
                grid, codes = found
                assert (codes.dtype, codes.shape) == (torch.uint8, (stop - start, columns))
                assert same(grid.decode(codes).numpy(), model.read_rows(name, start, stop))
        assert model.held("model.norm.weight") is None
        assert model.held_grid("model.norm.weight", 0, 1) is None


def test_scales_that_divide_are_factors_but_for_their_last_bits(llama: Path, tmp_path: Path) -> None:
    """CTranslate2: a division is not a product with the inverse; the codes are."""
    with open_model(str(made(llama, tmp_path, "ctranslate2", "int8"))) as model:
        rows, columns = model.matrix(UP)
        assert (model.held(UP), model.block_type(UP)) == (Held("line8", "float32"), "line8")
        found = model.held_grid(UP, 3, rows)
        assert found is not None
        wanted = model.read_rows(UP, 3, rows)
        assert np.allclose(found[0].decode(found[1]).numpy(), wanted, rtol=2.0**-22, atol=0)
        blocks = model.block_rows(UP, 3, rows)
        assert blocks.shape == (rows - 3, columns + 4)
        codes = blocks[:, :columns].view(np.int8)
        assert np.array_equal(codes.astype(np.int16) + 127, found[1].numpy())
        scales = np.ascontiguousarray(blocks[:, columns:]).view("<f4")
        assert same(codes.astype(np.float32) / scales, wanted)
        assert model.held("model.norm.weight") is model.block_type("model.norm.weight") is None
        with pytest.raises(ValueError, match="not stored in blocks"):
            model.block_rows("model.norm.weight", 0, 1)


@pytest.mark.parametrize(("format", "level", "method", "qtype", "scale"), OURS)
def test_words_and_numbers_are_what_is_read(
    llama: Path, tmp_path: Path, format: str, level: str, method: dict[str, Any], qtype: str, scale: str
) -> None:
    """Integers in words; nothing of what is stored otherwise, or is not packed."""
    with open_model(str(made(llama, tmp_path, format, level, **method))) as model:
        for name in (UP, DOWN):
            held = model.held_words(name)
            packs = format in ("gptq", "awq", "mlx") or (format == "compressed-tensors" and "A16" in level)
            assert (held is not None) == (packs and qtype.startswith(("int", "affine")))
            if held is None:
                continue
            assert held.storage == scale
            codes = reference.codes(held.words, held.layout, held.bits)
            values = np.stack([held.value(place) for place in range(1 << held.bits)])
            rows, groups = held.scales.shape
            places = codes.reshape(rows, groups, held.group)
            found = values[places, np.arange(rows)[:, None, None], np.arange(groups)[None, :, None]]
            assert same(found.reshape(rows, -1), model.read_rows(name, 0, rows))
        assert model.held_words("model.norm.weight") is None


def test_scales_of_scales_are_their_rungs(llama: Path, tmp_path: Path) -> None:
    with open_model(str(made(llama, tmp_path, "bitsandbytes", "NF4", double_quant=True))) as model:
        found = model.held_grid(UP, 0, model.matrix(UP)[0])
        assert found is not None
        assert found[0].ladder is not None
        assert torch.equal(found[0].ladder.decode(), found[0].d)


def test_fp8_is_planned_as_the_float32_that_it_is_read_as(llama: Path, tmp_path: Path) -> None:
    """Rows of FP8 are decoded on reading: chunks of them are four times as large as they are stored."""
    write_peer(llama, tmp_path / "fp8", "FP8 blocks")
    sources = [open_source(str(path), headers_only=True) for path in (tmp_path / "fp8", llama)]
    assert [source.itemsize for source in sources] == [4, 2]
    for source in sources:
        with source.checkpoint as model:
            assert source.itemsize == max(model.stored_dtype(name).itemsize for name in model.tensors)


def test_fp8_with_scales_beside_is_held(llama: Path, tmp_path: Path) -> None:
    """The forms that releases have: a scale for each block of 128 by 128, or one for a matrix."""
    generator = torch.Generator().manual_seed(1)
    for shape, qtype in (((-1, -1), "e4m3_b128_rows128"), ((), "e4m3_whole")):
        place = tmp_path / qtype
        shutil.copytree(llama, place)
        tensors = load_file(place / "model.safetensors")
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            rows, columns = tensors[name].shape
            tensors[name] = torch.randn((rows, columns), generator=generator).to(torch.float8_e4m3fn)
            each = (-(-rows // 128), -(-columns // 128)) if shape else ()
            tensors[f"{name}_scale_inv"] = torch.rand(each, generator=generator) + 0.5
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((place / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (place / "config.json").write_text(json.dumps(config))
        with open_model(str(place)) as model:
            held, found = model.held(UP), model.held_grid(UP, 5, 130)
            assert held is not None
            assert (held.qtype, held.scale) == (qtype, "float32")
            assert found is not None
            assert same(found[0].decode(found[1]).numpy(), model.read_rows(UP, 5, 130))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_directories_of_other_writers(llama: Path, tmp_path: Path, bits: int) -> None:
    """GPTQ of the first format with signed scales; with columns in an order of their own too."""
    expected = write_directory(llama, tmp_path / "gptq", Layout("gptq", bits, group=32, signed_scales=True))
    with open_model(str(tmp_path / "gptq")) as model:
        for name, values in expected.items():
            found = model.held_grid(name, 0, len(values))
            assert found is not None
            assert same(found[0].decode(found[1]).numpy(), values)
        assert not model.held(UP).act_order
    write_directory(llama, tmp_path / "ordered", Layout("gptq", bits, group=32, desc_act=True))
    tensors = load_file(tmp_path / "ordered" / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        tensors[name] = tensors[name][torch.from_numpy(np.random.default_rng(3).permutation(len(tensors[name])))]
    save_file(tensors, tmp_path / "ordered" / "model.safetensors", metadata={"format": "pt"})
    with open_model(str(tmp_path / "ordered")) as model:
        assert model.held(UP).act_order
        assert model.held_words(UP) is None
        for start, stop in ((0, 32), (3, 90)):
            found = model.held_grid(UP, start, stop)
            assert found is not None
            assert found[0].index is not None
            assert same(found[0].decode(found[1]).numpy(), model.read_rows(UP, start, stop))
    with open_model(str(tmp_path / "gptq")) as one, open_model(str(tmp_path / "ordered")) as other:
        parts = [model.held_grid(UP, 0, 32) for model in (one, other)]
        assert None not in parts
        assert joined(parts) is None  # type: ignore[arg-type]
    grid, codes = parts[1]
    assert joined([(grid, codes), (replace(grid, index=grid.index.flip(0)), codes)]) is None
    assert joined([(grid, codes), (grid, codes)]) is not None


def test_rows_follow_the_map(llama: Path, tmp_path: Path) -> None:
    """Stacked and reordered rows are held by row; what touches columns or adds a number is not."""
    with open_model(str(made(llama, tmp_path, "awq", "4bit"))) as model:
        rows, columns = model.matrix(UP)
        order = np.random.default_rng(0).permutation(64)
        gate = UP.replace("up", "gate")
        stacked = OutputTensor("x", (64 + rows, columns), (Piece(UP, 32, 64, order=order), Piece(gate)))
        for start, stop in ((0, 64 + rows), (10, 100), (70, 90)):
            found = held_output_rows(model, stacked, start, stop)
            assert found is not None
            assert same(found[0].decode(found[1]).numpy(), to_float32(read_output_rows(model, stacked, start, stop)))
        reversed_columns = np.arange(columns)[::-1]
        for piece in (Piece(UP, add=1.0), Piece(UP, columns=reversed_columns), Piece("model.norm.weight")):
            assert held_output_rows(model, OutputTensor("x", (rows, columns), (piece,)), 0, 4) is None
        assert held_output_rows(model, OutputTensor("x", (columns, rows), (Piece(UP, transpose=True),)), 0, 4) is None


def test_headers_alone_hold_no_numbers(llama: Path, tmp_path: Path) -> None:
    with open_model(str(made(llama, tmp_path, "gptq", "4bit")), headers_only=True) as model:
        assert model.held(UP) is not None
        with pytest.raises(UsageError, match="headers only"):
            model.held_grid(UP, 0, 1)
