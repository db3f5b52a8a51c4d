"""bitsandbytes: its own encoder's bytes, its own decoder's values, damaged fields, and what a plan refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import bitsandbytes.functional as owner
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llm_quantize.artifacts.verify import verify
from llm_quantize.data import demo_model
from llm_quantize.errors import LlmQuantizeError, UnsupportedError, UsageError
from llm_quantize.formats import bitsandbytes as form
from llm_quantize.formats.base import Coverage, Scheme, SchemeOptions, scheme_from_dict
from llm_quantize.formats.packed import Settings
from llm_quantize.grids import grid_type
from llm_quantize.grids.codebook import CodebookGridType, block_maxima, dynamic_map, ladder_of
from llm_quantize.io.safetensors_file import read_header
from llm_quantize.models.opening import open_source
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import plan, quantize
from llm_quantize.qtypes.codebook import codebook_type
from tests.formats.grids import unpacked
from tests.tiny_models import make_tiny

LEVELS = [("NF4", False), ("NF4", True), ("FP4", False), ("FP4", True), ("INT8", False)]
CONFIGS: dict[str, dict[str, Any]] = {
    "NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "FP4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "INT8": {"load_in_8bit": True},
}
ROWS, COLUMNS = 96, 192


def weights(seed: int = 0) -> torch.Tensor:
    """float32 (ROWS, COLUMNS), in bfloat16's values; zeros, a block of zeros, and very small numbers among them."""
    found = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.02
    found[0, :4], found[1, 0], found[1, 1], found[3, 64:128] = 0, 1e-6, -1e-6, 0
    return found.to(torch.bfloat16).float()


def scheme_of(level: str, nested: bool) -> Scheme:
    return form.scheme(level, SchemeOptions(double_quant=nested or None))


def kind_of(scheme: Scheme, weight: torch.Tensor) -> CodebookGridType:
    kind = grid_type(scheme.qtype.name)
    assert isinstance(kind, CodebookGridType)
    return (
        replace(kind, ladder=ladder_of(kind.qtype, block_maxima(kind.qtype, weight), 0.0))
        if kind.qtype.nested
        else kind
    )


def fields_of(scheme: Scheme, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for field, array in zip(form.fields(scheme, ROWS, COLUMNS), arrays, strict=True):
        assert (array.dtype.name, array.shape) == (field.dtype, field.shape), field.suffix
        found[field.suffix] = array
    return found


def owners(weight: torch.Tensor, level: str, nested: bool) -> dict[str, torch.Tensor]:
    """What bitsandbytes stores of ``weight``."""
    if level == "INT8":
        parameter = bitsandbytes.nn.Int8Params(weight.bfloat16(), has_fp16_weights=False, requires_grad=False)
        parameter._quantize("cpu")
        return {"weight": parameter.CB, "SCB": parameter.SCB}
    codes, state = owner.quantize_4bit(
        weight.bfloat16(), blocksize=64, quant_type=level.lower(), compress_statistics=nested
    )
    return {"weight": codes} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}


@pytest.mark.parametrize(("level", "nested"), LEVELS)
def test_rounding_gives_the_owners_bytes(level: str, nested: bool) -> None:
    weight, scheme = weights(), scheme_of(level, nested)
    grid, codes = kind_of(scheme, weight).plain(weight, None)
    found, theirs = fields_of(scheme, form.pack(scheme, grid, codes)), owners(weight, level, nested)
    assert found.keys() - {"weight_format"} == theirs.keys()
    for name, value in theirs.items():
        if "quant_state" in name:
            assert json.loads(found[name].tobytes()) == json.loads(bytes(value.tolist()))
        else:
            assert np.array_equal(found[name], value.numpy()), name


def test_scales_of_scales_are_nearest_where_the_owners_cpu_encoder_looks_them_up() -> None:
    """It finds codes in a table of 65,536 cells: one in some hundred scales gets the neighbour. Ours is nearest."""
    maxima = torch.rand(400, 256, generator=torch.Generator().manual_seed(1))
    ladder = ladder_of(codebook_type("nf4_b64_dq"), maxima, 0.0).at(maxima)
    theirs, _ = owner.quantize_blockwise((maxima - ladder.base).reshape(-1), blocksize=256)
    away = maxima - ladder.base
    ours = (ladder.decode() - maxima).abs()
    other = (dynamic_map()[theirs.long()].reshape(maxima.shape) * ladder.steps - away).abs()
    different = ladder.codes.reshape(-1) != theirs
    assert 0 < different.float().mean() < 0.01
    assert bool((ours <= other + 1e-7).all())


@pytest.mark.parametrize(("level", "nested"), LEVELS)
@pytest.mark.parametrize("fitted", [False, True])
def test_the_owner_decodes_what_we_decode(level: str, nested: bool, fitted: bool) -> None:
    weight, scheme = weights(1), scheme_of(level, nested)
    kind = kind_of(scheme, weight)
    grid, codes = kind.plain(weight, None)
    if fitted:
        grid = kind.fit(weight, torch.rand(COLUMNS) + 0.1)
        codes = grid.nearest(weight)
    found = fields_of(scheme, form.pack(scheme, grid, codes))
    ours = torch.from_numpy(unpacked(form, scheme, found, ROWS, COLUMNS))
    torch.testing.assert_close(ours, grid.decode(codes), rtol=1e-6, atol=0)
    tensors = {name.removeprefix("weight."): torch.from_numpy(value.copy()) for name, value in found.items()}
    if level == "INT8":
        theirs = owner.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
    else:
        packed = tensors.pop("weight")
        state = owner.QuantState.from_dict(tensors, torch.device("cpu"))
        state.dtype = torch.float32
        theirs = owner.dequantize_4bit(packed, state)
    torch.testing.assert_close(ours, theirs.float(), rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize(("level", "nested"), LEVELS)
def test_fitted_scales_lose_less(level: str, nested: bool) -> None:
    weight = weights(2)
    kind = kind_of(scheme_of(level, nested), weight)
    plain, codes = kind.plain(weight, None)
    fitted = kind.fit(weight, None)
    lost = [float((g.decode(c) - weight).norm()) for g, c in ((plain, codes), (fitted, fitted.nearest(weight)))]
    assert lost[1] < (0.995 if level == "INT8" else 0.96) * lost[0]
    part = kind.rows(32, 64).fit(weight[32:64], None)
    assert torch.equal(part.d, fitted.d[32:64])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    paths = {}
    for level, nested in LEVELS:
        options = Options(threads=1, method=MethodOptions(method="rtn", double_quant=nested or None))
        place = folder / f"{level}{nested}"
        (result,) = quantize(str(demo_model()), "bitsandbytes", levels=[level], output_dir=place, options=options)
        paths[f"{level}{nested}"] = result.path
    return paths


@pytest.mark.parametrize(("level", "nested"), LEVELS)
def test_transformers_loads_it_with_no_arguments_and_writes_the_same(
    level: str, nested: bool, made: dict[str, Path], tmp_path: Path
) -> None:
    path = made[f"{level}{nested}"]
    config = CONFIGS[level] | ({"bnb_4bit_use_double_quant": True} if nested else {})
    theirs = AutoModelForCausalLM.from_pretrained(
        demo_model(), quantization_config=BitsAndBytesConfig(**config), dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "theirs")
    stored, wanted = load_file(path / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert stored.keys() == wanted.keys()
    for name, value in wanted.items():
        if "quant_state" in name:
            said, asked = (json.loads(bytes(one.tolist())) for one in (stored[name], value))
            assert said == asked
        elif not nested or not name.endswith(".absmax"):
            assert torch.equal(stored[name], value), name
    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert settings | {"llm_int8_skip_modules": None} == written
    ours, told = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(told.values()), told
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        expected, found = theirs(input_ids=ids).logits.float(), ours(input_ids=ids).logits.float()
    assert float((found - expected).norm() / expected.norm()) < (0.02 if nested else 1e-6)


@pytest.mark.parametrize(("level", "nested"), LEVELS)
def test_sound_to_verify_and_a_model_to_start_from(level: str, nested: bool, made: dict[str, Path]) -> None:
    path = made[f"{level}{nested}"]
    outcome = verify(path, source=str(demo_model()))
    assert outcome.ok, outcome.all_problems()
    source = open_source(str(path))
    with source.checkpoint:
        assert source.checkpoint.kind == f"BNB-{level}"
        (again,) = plan(str(path), "gguf", levels=["Q8_0"], options=Options())
        assert again.weights > 0
    manifest = json.loads((path / "manifest.json").read_text())
    assert scheme_from_dict(manifest["identity"]["scheme"]) == replace(scheme_of(level, nested), variant="bfloat16")


def test_blocks_that_do_not_end_with_rows_are_read(tmp_path: Path) -> None:
    """Others write such: 96 x 100 in blocks of 64."""
    weight = torch.randn(96, 100, generator=torch.Generator().manual_seed(3))
    for nested in (False, True):
        codes, state = owner.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
        tensors = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()} | {"weight": codes}
        save_file({f"m.{name}": value for name, value in tensors.items()}, tmp_path / "m.safetensors")
        header = read_header(tmp_path / "m.safetensors")
        arrays = {name: value.numpy() for name, value in tensors.items()}
        (matrix,) = form.read(
            header.tensors,
            Settings({"load_in_4bit": True}, tmp_path / "config.json"),
            lambda info, arrays=arrays: arrays[info.name.removeprefix("m.")],
        )
        found = form.unpack(matrix, arrays, 0, 96)
        assert np.array_equal(
            np.concatenate([form.unpack(matrix, arrays, 0, 32), form.unpack(matrix, arrays, 32, 96)]), found
        )
        torch.testing.assert_close(torch.from_numpy(found), owner.dequantize_4bit(codes, state), rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight.quant_state.bitsandbytes__nf4", b"{", "JSON"),
        ("weight.quant_state.bitsandbytes__nf4", b'{"shape": [1, -1], "blocksize": 64}', "two sizes"),
        ("weight.quant_state.bitsandbytes__nf4", b'{"shape": [256, 256], "blocksize": 65}', "two sizes"),
        ("weight.absmax", b"\x00" * 4, "fit"),
        ("weight.quant_map", None, "absent"),
    ],
)
def test_damaged_fields_are_named(
    name: str, value: bytes | None, message: str, made: dict[str, Path], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in made["NF4False"].iterdir():
        if file.name != "manifest.json":
            (damaged / file.name).write_bytes(file.read_bytes())
    tensors = load_file(damaged / "model.safetensors")
    key = f"model.layers.0.self_attn.q_proj.{name}"
    if value is None:
        del tensors[key]
    else:
        kind = torch.float32 if name == "weight.absmax" else torch.uint8
        tensors[key] = torch.frombuffer(bytearray(value), dtype=kind)
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlmQuantizeError) as caught:
        open_source(str(damaged))
    assert message in str(caught.value)
    assert "q_proj" in str(caught.value)
    assert caught.value.exit_code in (3, 8)


def test_other_levels_of_a_map_are_noticed(made: dict[str, Path], tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in made["NF4False"].iterdir():
        if file.name != "manifest.json":
            (changed / file.name).write_bytes(file.read_bytes())
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight.quant_map"][3] = -0.3
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    assert any("kernels compute with" in problem for problem in verify(changed).all_problems())


@pytest.mark.parametrize(
    ("level", "options", "message"),
    [
        ("NF5", SchemeOptions(), "no bitsandbytes level"),
        ("NF4", SchemeOptions(group_size=48), "blocks of this size"),
        ("NF4", SchemeOptions(symmetric=False), "zero points"),
        ("INT8", SchemeOptions(group_size=64), "one float32 scale"),
        ("INT8", SchemeOptions(double_quant=True), "one float32 scale"),
        ("NF4", SchemeOptions(compute_dtype="int8"), "compute"),
    ],
)
def test_levels_that_there_are_not(level: str, options: SchemeOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        form.scheme(level, options)


def test_rows_that_are_not_whole_blocks_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="not whole groups of 64") as caught:
        form.fields(form.scheme("NF4", SchemeOptions()), 8, 96, name="layer.q")
    assert caught.value.tensor == "layer.q"


def test_packed_experts_are_refused_as_nothing_reads_them(tmp_path: Path) -> None:
    model = make_tiny("qwen3_moe", tmp_path / "moe")
    options = Options(method=MethodOptions(group_size=32))
    with pytest.raises(UnsupportedError, match="read by nothing"):
        plan(str(model), "bitsandbytes", levels=["NF4"], options=options)
    kept = Options(method=MethodOptions(group_size=32, ignore=(r"\.experts\.",)))
    assert plan(str(model), "bitsandbytes", levels=["NF4"], options=kept)


def test_what_is_not_packed_is_named_in_the_configuration() -> None:
    coverage = Coverage(["a"], ["model.layers.0.mlp.gate"], ["vision.proj"], "lm_head")
    config = form.config(form.scheme("NF4", SchemeOptions(double_quant=True)), coverage)
    assert config["llm_int8_skip_modules"] == ["model.layers.0.mlp.gate", "vision.proj", "lm_head"]
    assert config["bnb_4bit_use_double_quant"] is True
