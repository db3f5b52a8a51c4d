"""MLX: its encoder's rule in numpy, embedding and head packed like the rest, damaged fields, what a plan refuses.

That mlx writes and loads the same bytes is seen where mlx is: tests/runtimes/test_mlx.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.advice.describe import describe
from llm_quantize.artifacts.verify import verify
from llm_quantize.blockwise import measure
from llm_quantize.blockwise import run as run_blocks
from llm_quantize.calibration.collect import calibrate
from llm_quantize.conversion import convert
from llm_quantize.data import demo_model
from llm_quantize.errors import IntegrityError, LlmQuantizeError, MalformedInputError, UnsupportedError, UsageError
from llm_quantize.formats import mlx as form
from llm_quantize.formats import mlx_floats as floats
from llm_quantize.formats.base import Scheme, SchemeOptions, scheme_from_dict
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.packed_store import DirectoryStore
from llm_quantize.formats.recipe import Recipe
from llm_quantize.grids import grid_type
from llm_quantize.grids.codebook import CodebookGridType, block_maxima, ladder_of
from llm_quantize.models.opening import open_source
from llm_quantize.models.recipes import recipe_from
from llm_quantize.options import CalibrationOptions, MethodOptions, Options
from llm_quantize.pipeline import plan, quantize
from llm_quantize.qtypes.affine import GROUPS, WIDTHS
from tests.formats.grids import unpacked
from tests.tiny_models import make_tiny

ROWS, COLUMNS = 64, 256
EMBEDDING = "model.embed_tokens"


def weights(seed: int = 0) -> torch.Tensor:
    """float32 (ROWS, COLUMNS), in bfloat16's values; rows of zeros, of one value, of one sign and of small numbers."""
    found = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.02
    found[0], found[1], found[2] = 0, 0.3, found[2].abs()
    found[3], found[4] = -found[3].abs(), found[4] * 1e-6
    return found.to(torch.bfloat16).float()


def scheme_of(bits: int, group: int, scale: str = "bfloat16") -> Scheme:
    return form.scheme(f"{bits}bit", SchemeOptions(group_size=group, scale=scale))


def encoded(weight: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mlx's rule: words uint32, scales and offsets in float32, before they are stored."""
    groups = weight.reshape(len(weight), -1, group)
    last = np.float32((1 << bits) - 1)
    low, high = groups.min(-1), groups.max(-1)
    scale = np.maximum((high - low) / last, np.float32(1e-7))
    scale = np.where(np.abs(low) > np.abs(high), scale, -scale)
    edge = np.where(np.abs(low) > np.abs(high), low, high)
    steps = np.rint(edge / scale)
    offset = np.where(steps != 0, edge, 0)
    scale = np.where(steps != 0, edge / np.where(steps != 0, steps, 1), scale)
    codes = np.clip(np.rint((groups - offset[..., None]) / scale[..., None]), 0, last).astype(np.uint8)
    flat = codes.reshape(len(weight), -1, 1) >> np.arange(bits, dtype=np.uint8) & 1
    words = np.packbits(flat.reshape(len(weight), -1), axis=1, bitorder="little").view(np.uint32)
    return words, scale, offset


def fields_of(scheme: Scheme, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for field, array in zip(form.fields(scheme, ROWS, COLUMNS), arrays, strict=True):
        stored = "uint16" if field.dtype == "bfloat16" else field.dtype
        assert (array.dtype.name, array.shape) == (stored, field.shape), field.suffix
        found[field.suffix] = array
    return found


@pytest.mark.parametrize("scale", ["bfloat16", "float16"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_rounding_is_the_owners(bits: int, group: int, scale: str) -> None:
    weight, scheme = weights(), scheme_of(bits, group, scale)
    grid, codes = grid_type(scheme.qtype.name, scale=scale).plain(weight, None)
    found = fields_of(scheme, form.pack(scheme, grid, codes))
    words, scales, offsets = encoded(weight.numpy(), bits, group)
    assert np.array_equal(found["weight"], words)
    for name, values in (("scales", scales), ("biases", offsets)):
        held = torch.from_numpy(np.asarray(values, np.float32)).to(getattr(torch, scale))
        assert found[name].tobytes() == held.view(torch.int16).numpy().tobytes(), name
    assert np.array_equal(unpacked(form, scheme, found, ROWS, COLUMNS), grid.decode(codes).numpy())


@pytest.mark.parametrize("bits", WIDTHS)
def test_fitted_grids_lose_less(bits: int) -> None:
    weight = weights(2)
    kind = grid_type(f"affine{bits}_g64", scale="bfloat16")
    plain, codes = kind.plain(weight, None)
    fitted = kind.fit(weight, None)
    lost = [float((g.decode(c) - weight).norm()) for g, c in ((plain, codes), (fitted, fitted.nearest(weight)))]
    assert lost[1] < 0.93 * lost[0]
    part = kind.fit(weight[32:64], None)
    assert torch.equal(part.d, fitted.d[32:64])
    assert torch.equal(part.offset(), fitted.offset()[32:64])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = Options(threads=1, method=MethodOptions(method="rtn"))
    (result,) = quantize(
        str(demo_model()), "mlx", levels=["3bit"], output_dir=tmp_path_factory.mktemp("made"), options=options
    )
    return result.path


def test_every_matrix_is_packed_and_the_configuration_says_so(made: Path) -> None:
    stored = load_file(made / "model.safetensors")
    left = {
        name for name in stored if name.endswith(".weight") and f"{name.removesuffix('weight')}scales" not in stored
    }
    assert all(stored[name].ndim == 1 for name in left)
    source = load_file(demo_model() / "model.safetensors")
    words, scales, _ = encoded(source["lm_head.weight"].float().numpy(), 3, 64)
    assert np.array_equal(stored["lm_head.weight"].view(torch.int32).numpy().view(np.uint32), words)
    assert torch.equal(stored["lm_head.scales"], torch.from_numpy(scales).bfloat16())
    config = json.loads((made / "config.json").read_text())
    said = {"group_size": 64, "bits": 3, "mode": "affine"}
    assert (config["quantization"], config["quantization_config"]) == (said, said)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert "from mlx_lm import load" in (made / "README.md").read_text()
    manifest = json.loads((made / "manifest.json").read_text())
    assert scheme_from_dict(manifest["identity"]["scheme"]) == scheme_of(3, 64)


def test_sound_to_verify_and_a_model_to_start_from(made: Path) -> None:
    outcome = verify(made, source=str(demo_model()))
    assert outcome.ok, outcome.all_problems()
    assert describe(str(made))["quantization"]["format"] == "mlx"
    source = open_source(str(made))
    with source.checkpoint:
        assert source.checkpoint.kind == "MLX-3bit"
        assert "quantization" not in source.checkpoint.config
        assert source.checkpoint.tensors[f"{EMBEDDING}.weight"].dtype == "affine3_g64"
        (again,) = plan(str(made), "gguf", levels=["Q8_0"], options=Options())
        assert again.weights > 0


def test_feedback_makes_up_for_the_embedding_and_a_tied_one_is_stored_once(tmp_path: Path) -> None:
    model = make_tiny("qwen3", tmp_path / "model")
    options = Options(
        threads=1, calibration=CalibrationOptions(samples=4, length=64), method=MethodOptions(group_size=32)
    )
    (result,) = quantize(str(model), "mlx", levels=["4bit"], output_dir=tmp_path, options=options)
    stored = load_file(result.path / "model.safetensors")
    assert f"{EMBEDDING}.scales" in stored
    assert not any(name.startswith("lm_head") for name in stored)
    outcome = verify(result.path, source=str(model))
    assert outcome.ok, outcome.all_problems()
    plain, codes = grid_type("affine4_g32", scale="bfloat16").plain(
        load_file(model / "model.safetensors")[f"{EMBEDDING}.weight"].float(), None
    )
    scheme = scheme_of(4, 32)
    assert not np.array_equal(
        form.pack(scheme, plain, codes)[0], stored[f"{EMBEDDING}.weight"].view(torch.int32).numpy().view(np.uint32)
    )
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert "measured" in json.dumps(manifest)


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_the_quantized_stream_begins_and_ends_with_what_is_stored(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: dict[str, Any] = {}
    for module, way in ((run_blocks, "embedding"), (measure, "head")):
        own = getattr(module, f"written_{way}")

        def kept(matrices: Any, way: str = way, own: Any = own) -> Any:
            tables[way] = own(matrices)
            return tables[way]

        monkeypatch.setattr(module, f"written_{way}", kept)
    model = make_tiny(variant, tmp_path / "model")
    options = Options(
        threads=1, calibration=CalibrationOptions(samples=4, length=64), method=MethodOptions(group_size=32)
    )
    (result,) = quantize(str(model), "mlx", levels=["3bit"], output_dir=tmp_path, options=options)
    head = "lm_head" if variant == "llama" else EMBEDDING
    with open_source(str(result.path)).checkpoint as stored:
        for way, name in (("embedding", EMBEDDING), ("head", head)):
            wanted = np.asarray(stored.read_rows(f"{name}.weight", 0, 40), np.float32)
            assert np.array_equal(tables[way].read_rows(f"{name}.weight", torch.arange(40)).numpy(), wanted)


def test_known_statistics_serve_the_blocks(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    chosen = CalibrationOptions(samples=4, length=64, collect=("imatrix", "hessian"), threads=1)
    with (source := open_source(str(model))).checkpoint:
        statistics = calibrate(source, chosen).path
    method = MethodOptions(inputs="source", group_size=32)
    options = Options(statistics=statistics, method=method, threads=1)
    (result,) = quantize(str(model), "mlx", levels=["4bit"], output_dir=tmp_path, options=options)
    outcome = verify(result.path, source=str(model))
    assert outcome.ok, outcome.all_problems()
    assert "lm_head.scales" in load_file(result.path / "model.safetensors")


def altered(model: Path, place: Path, quantization: Any = None, **tensors: torch.Tensor | None) -> Path:
    """A copy of an artifact without its manifest, with other settings or tensors (their names with __ for a dot)."""
    place.mkdir()
    for file in model.iterdir():
        if file.name != "manifest.json":
            (place / file.name).write_bytes(file.read_bytes())
    config = json.loads((place / "config.json").read_text())
    if quantization is not None:
        (place / "config.json").write_text(json.dumps(config | {"quantization": quantization}))
    stored: dict[str, Any] = load_file(place / "model.safetensors")
    stored |= {name.replace("__", "."): value for name, value in tensors.items()}
    kept = {name: value for name, value in stored.items() if value is not None}
    save_file(kept, place / "model.safetensors", {"format": "mlx"})
    return place


@pytest.mark.parametrize(
    ("quantization", "kind", "message"),
    [
        ({"group_size": 64, "bits": 4}, IntegrityError, "not what the quantization's configuration says"),
        ({"group_size": 64, "bits": 7}, MalformedInputError, "bits of quantization"),
        ({"group_size": "64", "bits": 3}, MalformedInputError, "group_size of quantization"),
        ({"group_size": 64, "bits": 3, "mode": "mxfp5"}, UnsupportedError, "not decoded"),
        ({"group_size": 64, "bits": 3, "lm_head": {"mode": "nvfp5"}}, UnsupportedError, "not decoded"),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, IntegrityError, "does not fit"),
        ({"group_size": 64, "bits": 3, "mode": "mxfp4"}, IntegrityError, "not what the quantization"),
        ({"group_size": 64, "bits": 3, "lm_head": {"mode": "nvfp4"}}, IntegrityError, "not what the quantization"),
        ({"group_size": 64, "bits": 3, "lm_head": {"bits": 4}}, IntegrityError, "not what the quantization"),
        ({"bits": 3}, UnsupportedError, "already quantized"),
    ],
)
def test_settings_that_contradict_the_tensors(
    quantization: dict[str, Any], kind: type[LlmQuantizeError], message: str, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        open_source(str(altered(made, tmp_path / "model", quantization)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lm_head__biases", None, "absent"),
        ("lm_head__scales", torch.zeros(2048, 5).bfloat16(), "fit"),
        ("lm_head__weight", torch.zeros(2048, 24, dtype=torch.int32), "fit"),
        ("lm_head__biases", torch.zeros(2048, 4), "fit"),
    ],
)
def test_damaged_fields_are_named(
    name: str, value: torch.Tensor | None, message: str, made: Path, tmp_path: Path
) -> None:
    model = altered(made, tmp_path / "model", **{name: value})
    with pytest.raises(IntegrityError, match=message) as caught:
        open_source(str(model))
    assert "lm_head" in str(caught.value.tensor)


def test_an_offset_that_is_no_number_is_noticed(made: Path, tmp_path: Path) -> None:
    offsets = load_file(made / "model.safetensors")["lm_head.biases"]
    offsets[3, 1] = torch.nan
    model = altered(made, tmp_path / "model", lm_head__biases=offsets)
    assert any("offsets are NaN" in problem for problem in verify(model).all_problems())


def test_modules_of_another_width_as_mlx_lm_mixes_them(tmp_path: Path) -> None:
    options = Options(threads=1, method=MethodOptions(method="rtn"))
    paths = [
        quantize(str(demo_model()), "mlx", levels=[level], output_dir=tmp_path, options=options)[0].path
        for level in ("4bit", "8bit")
    ]
    eight = load_file(paths[1] / "model.safetensors")
    mixed = altered(
        paths[0],
        tmp_path / "mixed",
        {"group_size": 64, "bits": 4, "mode": "affine", "lm_head": {"group_size": 64, "bits": 8}},
        **{f"lm_head__{suffix}": eight[f"lm_head.{suffix}"] for suffix in ("weight", "scales", "biases")},
    )
    outcome = verify(mixed, source=str(demo_model()))
    assert outcome.ok, outcome.all_problems()
    source = open_source(str(mixed))
    with source.checkpoint:
        assert source.checkpoint.kind == "MLX-4+8bit"


def mix(path: Path, grids: Mapping[str, str], level: str = "4bit") -> Path:
    """The demo model with these modules on grids of their own."""
    recipe = Recipe("mix", level, grids, form="mlx")
    options = Options(threads=1, method=MethodOptions(method="rtn"), overrides=Overrides(recipe=recipe))
    return quantize(str(demo_model()), "mlx", levels=[level], output_dir=path, options=options)[0].path


def test_a_recipe_mixes_grids_and_a_conversion_keeps_them(tmp_path: Path) -> None:
    down, query = "model.layers.2.mlp.down_proj", "model.layers.0.self_attn.{}_proj"
    grids = {down: "affine6_g32", EMBEDDING: "affine8_g64", **{query.format(part): "affine3_g128" for part in "qkv"}}
    path = mix(tmp_path, grids)
    told = json.loads((path / "config.json").read_text())["quantization"]
    assert (told.pop("group_size"), told.pop("bits"), told.pop("mode")) == (64, 4, "affine")
    assert {name: f"affine{own['bits']}_g{own['group_size']}" for name, own in told.items()} == grids
    outcome = verify(path, source=str(demo_model()))
    assert outcome.ok, outcome.all_problems()
    kept = convert(str(path), "mlx", output_dir=tmp_path / "kept", options=Options(threads=1)).path
    stored, again = (load_file(one / "model.safetensors") for one in (path, kept))
    assert stored.keys() == again.keys()
    assert all(torch.equal(value.view(torch.uint8), again[name].view(torch.uint8)) for name, value in stored.items())
    assert json.loads((kept / "config.json").read_text())["quantization"][down] == {"group_size": 32, "bits": 6}
    narrow = make_tiny("llama", tmp_path / "narrow", intermediate_size=96)
    recipe = Recipe("mix", "4bit", {down.replace("2", "0"): "affine4_g64"}, form="mlx")
    asked = Options(overrides=Overrides(recipe=recipe))
    with pytest.raises(UsageError, match="asks for affine4_g64 where it cannot be"):
        plan(str(narrow), "mlx", levels=["4bit"], options=asked)
    again = recipe_from(path)
    assert {name: again.tensors[name] for name in grids} == grids
    assert (again.form, again.level) == ("mlx", "4bit")


@pytest.mark.parametrize(
    ("grids", "level", "message"),
    [
        ({"lm_head": "int4_g64"}, "4bit", "No such affine type"),
        ({"lm_head": "affine4_g64"}, "mxfp4", "no MLX level"),
        ({"model.layers.0.self_attn.q_proj": "affine3_g64"}, "4bit", "splits modules"),
    ],
)
def test_recipes_that_there_are_not(grids: dict[str, str], level: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        mix(tmp_path, grids, level)


@pytest.mark.parametrize(
    ("level", "options", "message"),
    [
        ("7bit", SchemeOptions(), "no MLX level"),
        ("4bit", SchemeOptions(group_size=48), "no groups of this size"),
        ("4bit", SchemeOptions(group_size=-1), "no groups of this size"),
        ("4bit", SchemeOptions(symmetric=True), "an offset in every group"),
    ],
)
def test_levels_that_there_are_not(level: str, options: SchemeOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        form.scheme(level, options)


@pytest.mark.parametrize(
    ("variant", "message"),
    [("qwen3_moe", "experts of a layer in one tensor"), ("falcon", "family falcon"), ("gpt2", "stored")],
)
def test_what_mlx_lm_lays_out_otherwise_is_refused_by_name(variant: str, message: str, tmp_path: Path) -> None:
    model = make_tiny(variant, tmp_path / "model")
    with pytest.raises(UnsupportedError, match=message):
        plan(str(model), "mlx", levels=["4bit"], options=Options(method=MethodOptions(group_size=32)))


def of_floats(weight: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8, one a byte, scales uint8) by the rule of MLX's GPU kernels, in plain loops over candidates."""
    bits, exponent, group = {"mxfp4": (4, True, 32), "nvfp4": (4, False, 16), "mxfp8": (8, True, 32)}[mode]
    levels = (
        np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        if bits == 4
        else torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    )
    eighths = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    codes, scales = np.zeros(weight.shape, np.uint8), np.zeros((len(weight), weight.shape[1] // group), np.uint8)
    for row, group_index in np.ndindex(*scales.shape):
        block = weight[row, group_index * group : (group_index + 1) * group].astype(np.float64)
        wanted = float(np.float32(np.abs(block).max()) / np.float32(levels[-1]))
        if exponent:
            power = 0 if wanted == 0 else next(e for e in range(-127, 128) if 2.0**e >= wanted)
            scale, scales[row, group_index] = 2.0**power, power + 127
        else:
            place = nearest_even(wanted, eighths)
            scale, scales[row, group_index] = eighths[place], place
        for column, value in enumerate(block):
            place = nearest_even(abs(value) / scale if scale else 0.0, levels)
            sign = int(np.signbit(value)) << (bits - 1)
            codes[row, group_index * group + column] = place | sign
    return codes, scales


def nearest_even(value: float, levels: np.ndarray) -> int:
    """The place of the nearest level; of two, the even one."""
    away = np.abs(levels - value)
    return min(np.flatnonzero(away == away.min()), key=lambda place: place % 2)


@pytest.mark.parametrize("mode", floats.MODES)
def test_rounding_to_floats_is_that_of_its_kernels(mode: str) -> None:
    weight, scheme = weights(3), form.scheme(mode, SchemeOptions())
    weight[5], weight[6, :32] = torch.linspace(-6, 6, COLUMNS), torch.tensor([0.25, -0.75, 5.0, 6.0] * 8)
    kind = DirectoryStore(form, scheme).grid_type(scheme.qtype.name)
    assert isinstance(kind, CodebookGridType)
    ladder = ladder_of(kind.qtype, block_maxima(kind.qtype, weight), float(weight.abs().max()))
    grid, codes = replace(kind, ladder=ladder).plain(weight, None)
    found = fields_of(scheme, form.pack(scheme, grid, codes))
    wanted, scales = of_floats(weight.numpy(), mode)
    if scheme.qtype.bits == 4:
        wanted = wanted[:, ::2] | (wanted[:, 1::2] << 4)
    assert np.array_equal(found["scales"], scales)
    assert found["weight"].tobytes() == wanted.tobytes()
    assert np.array_equal(unpacked(form, scheme, found, ROWS, COLUMNS), grid.decode(codes).numpy())


@pytest.mark.parametrize("mode", floats.MODES)
def test_modes_of_floats_are_made_verified_and_opened(mode: str, tmp_path: Path) -> None:
    options = Options(threads=1, method=MethodOptions(method="rtn"))
    (result,) = quantize(str(demo_model()), "mlx", levels=[mode.upper()], output_dir=tmp_path, options=options)
    grid = floats.grid_of(mode)
    said = {"group_size": grid.group_size, "bits": grid.bits, "mode": mode}
    config = json.loads((result.path / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == said
    stored = load_file(result.path / "model.safetensors")
    assert not [name for name in stored if name.endswith(".biases")]
    assert stored["lm_head.scales"].dtype == stored[f"{EMBEDDING}.scales"].dtype == torch.uint8
    outcome = verify(result.path, source=str(demo_model()))
    assert outcome.ok, outcome.all_problems()
    with open_source(str(result.path)).checkpoint as model:
        assert model.kind == f"MLX-{mode}"
        assert {info.dtype for info in model.tensors.values()} >= {grid.name}


def test_scales_of_floats_that_are_no_number_are_noticed(tmp_path: Path) -> None:
    options = Options(threads=1, method=MethodOptions(method="rtn"))
    (result,) = quantize(str(demo_model()), "mlx", levels=["mxfp4"], output_dir=tmp_path, options=options)
    scales = load_file(result.path / "model.safetensors")["lm_head.scales"]
    scales[3, 1] = 255
    model = altered(result.path, tmp_path / "model", lm_head__scales=scales)
    assert any("lm_head" in problem for problem in verify(model).all_problems())


def test_one_module_in_a_mode_of_floats(tmp_path: Path) -> None:
    options = Options(threads=1, method=MethodOptions(method="rtn"))
    four, eight = (
        quantize(str(demo_model()), "mlx", levels=[level], output_dir=tmp_path, options=options)[0].path
        for level in ("4bit", "mxfp8")
    )
    other = load_file(eight / "model.safetensors")
    mixed = altered(
        four,
        tmp_path / "mixed",
        {"group_size": 64, "bits": 4, "mode": "affine", "lm_head": {"group_size": 32, "bits": 8, "mode": "mxfp8"}},
        lm_head__weight=other["lm_head.weight"],
        lm_head__scales=other["lm_head.scales"],
        lm_head__biases=None,
    )
    outcome = verify(mixed, source=str(demo_model()))
    assert outcome.ok, outcome.all_problems()
    with open_source(str(mixed)).checkpoint as model:
        assert model.kind == "MLX-mxfp8+4bit"


@pytest.mark.parametrize("options", [SchemeOptions(group_size=64), SchemeOptions(symmetric=False)])
def test_modes_of_floats_have_fixed_grids(options: SchemeOptions) -> None:
    with pytest.raises(UsageError, match="is fixed"):
        form.scheme("mxfp4", options)
