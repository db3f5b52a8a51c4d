"""compressed-tensors' levels of floats and of quantized inputs, with the package of that name as encoder and reader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_quantize.artifacts.verify import verify
from llm_quantize.data import demo_model
from llm_quantize.errors import UsageError
from llm_quantize.formats import compressed_tensors as form
from llm_quantize.formats.base import Coverage, Scheme, SchemeOptions
from llm_quantize.formats.packed_store import DirectoryStore
from llm_quantize.grids.codebook import CodebookGridType, block_maxima, ladder_of
from llm_quantize.grids.grid import GridType
from llm_quantize.models.quantized import open_directory
from llm_quantize.options import CalibrationOptions, MethodOptions, Options
from llm_quantize.pipeline import plan, quantize
from tests.formats.grids import unpacked
from tests.tiny_models import make_tiny

LEVELS = ["W8A8", "W4AFP8", "FP8_DYNAMIC", "FP8_BLOCK", "FP8", "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4"]
STATIC = ["FP8", "NVFP4"]
ROWS, COLUMNS = 200, 256
_BITS = {"float8_e4m3": torch.float8_e4m3fn, "bfloat16": torch.bfloat16}


def weights(seed: int = 0) -> torch.Tensor:
    """float32 (ROWS, COLUMNS), in bfloat16's values: zeros among them, a large row and a small one."""
    found = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.02
    found[0, :64] = 0
    found[5] *= 40
    found[7] *= 1e-3
    return found.to(torch.bfloat16).float()


def kind_of(scheme: Scheme, weight: torch.Tensor) -> GridType:
    kind = DirectoryStore(form, scheme).grid_type(scheme.qtype.name)
    if isinstance(kind, CodebookGridType) and kind.qtype.nested:
        maxima = block_maxima(kind.qtype, weight)
        return replace(kind, ladder=ladder_of(kind.qtype, maxima, float(maxima.amax())))
    return kind


def packed_of(level: str, weight: torch.Tensor, *, fitted: bool = False) -> tuple[Scheme, dict[str, torch.Tensor]]:
    """The scheme and the fields as torch sees them."""
    scheme = form.scheme(level, SchemeOptions(scale="bfloat16"))
    kind = kind_of(scheme, weight)
    grid, codes = kind.plain(weight, None)
    if fitted:
        grid = kind.fit(weight, torch.rand(COLUMNS, generator=torch.Generator().manual_seed(4)) + 0.1)
        codes = grid.nearest(weight)
    fields = form.fields(scheme, ROWS, COLUMNS)
    assert fields[len(fields) - len(form.input_fields(scheme)) :] == form.input_fields(scheme)
    fields = fields[: len(fields) - len(form.input_fields(scheme))]
    found = {}
    for field, array in zip(fields, form.pack(scheme, grid, codes), strict=True):
        assert (array.shape, array.nbytes) == (field.shape, field.nbytes), field.suffix
        tensor = torch.from_numpy(np.array(array))
        found[field.suffix] = tensor.view(_BITS[field.dtype]) if field.dtype in _BITS else tensor
    return scheme, found


def raw(tensor: torch.Tensor) -> np.ndarray:
    """As the reader gets it."""
    if tensor.dtype in (torch.float8_e4m3fn, torch.bfloat16):
        return tensor.view(torch.uint8 if tensor.dtype == torch.float8_e4m3fn else torch.uint16).numpy()
    return tensor.numpy()


def package(scheme: Scheme) -> tuple[type[BaseCompressor], QuantizationScheme]:
    config = form.config(scheme, Coverage([]))
    group = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    return BaseCompressor.get_value_from_registry(config["format"]), group


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_the_package_decodes_what_we_decode(level: str, fitted: bool) -> None:
    scheme, tensors = packed_of(level, weights(), fitted=fitted)
    compressor, group = package(scheme)
    ours = torch.from_numpy(unpacked(form, scheme, {name: raw(one) for name, one in tensors.items()}, ROWS, COLUMNS))
    exact = {name: one.float() if one.dtype == torch.bfloat16 else one for name, one in tensors.items()}
    theirs = compressor.decompress(exact, group)["weight"].float()
    # Floats of four bits are multiplied in bfloat16 there: one rounding of the scale, one of the product.
    tolerance = 2**-7 if level.startswith("NVFP4") else 1e-6
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("level", ["FP8_BLOCK", "FP8"])
def test_rounding_on_scales_that_rows_have_in_common_is_the_packages(level: str) -> None:
    weight = weights(3)
    scheme, tensors = packed_of(level, weight)
    compressor, group = package(scheme)
    step = 128 if level == "FP8_BLOCK" else None
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -ROWS % (step or 1)))
    tiles = padded.reshape(-1, step, COLUMNS // step, step).transpose(1, 2) if step else padded[None, None]
    scales, _ = calculate_qparams(tiles.amin((-1, -2)), tiles.amax((-1, -2)), group.weights)
    scales = (scales if step else scales.reshape(1)).to(torch.bfloat16)
    theirs = compressor.compress({"weight": weight, "weight_scale": scales}, group)
    assert torch.equal(tensors["weight_scale"], theirs["weight_scale"])
    assert np.array_equal(raw(tensors["weight"]), raw(theirs["weight"]))
    assert tensors["weight_scale"].shape == ((2, 2) if step else (1,))


def test_rows_that_do_not_share_their_scale_are_not_stored() -> None:
    weight = weights(4)
    scheme = form.scheme("FP8_BLOCK", SchemeOptions(scale="bfloat16"))
    grid, codes = kind_of(scheme, weight).plain(weight, None)
    grid.d[3, 0] *= 2
    with pytest.raises(ValueError, match="in common"):
        form.pack(scheme, grid, codes)


@pytest.mark.parametrize("level", STATIC)
def test_calibrated_levels_need_text(level: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="calibrated scales of activations") as refusal:
        plan(str(demo_model()), "compressed-tensors", levels=[level], options=Options(method=MethodOptions("rtn")))
    assert "FP8_DYNAMIC" in str(refusal.value)
    with pytest.raises(UsageError, match="calibrated scales of activations") as refusal:
        plan(str(demo_model()), "compressed-tensors", levels=[level], options=Options(calibrate=False))
    assert refusal.value.found == "--no-calibration"
    (planned,) = plan(str(demo_model()), "compressed-tensors", levels=[level])
    assert planned.name == {"FP8": "demo-llama-FP8", "NVFP4": "demo-llama-NVFP4-g16"}[level]


def test_inputs_that_are_no_whole_groups_are_refused(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    with pytest.raises(UsageError, match="whole groups of 128, in which FP8_BLOCK rounds them"):
        plan(str(model), "compressed-tensors", levels=["FP8_BLOCK"])


@pytest.mark.parametrize("level", ["FP8_DYNAMIC", "NVFP4A16", "MXFP4A16", "MXFP4"])
def test_rounding_is_the_packages(level: str) -> None:
    weight = weights(1)
    scheme, tensors = packed_of(level, weight)
    compressor, group = package(scheme)
    args = group.weights
    assert args is not None
    blocks = weight.reshape(ROWS, -1, args.group_size or COLUMNS)
    whole = generate_gparam(weight.min(), weight.max()) if level == "NVFP4A16" else None
    scales, _ = calculate_qparams(blocks.amin(2), blocks.amax(2), args, global_scale=whole)
    state = {"weight": weight, "weight_scale": scales.to(torch.bfloat16) if level == "FP8_DYNAMIC" else scales}
    theirs = compressor.compress(state | ({} if whole is None else {"weight_global_scale": whole}), group)
    for name, value in tensors.items():
        if name == "weight_global_scale":
            torch.testing.assert_close(value, theirs[name], rtol=2e-7, atol=0)
            continue
        # The one scale of NVFP4 is a ratio that rounds otherwise: a scale on the edge may be the next one.
        different = (raw(value) != raw(theirs[name]).reshape(value.shape)).mean()
        assert different <= (0.01 if level == "NVFP4A16" else 0), name


@pytest.mark.parametrize("level", ["W8A8", "FP8_DYNAMIC", "NVFP4A16"])
def test_fitted_scales_lose_less(level: str) -> None:
    weight = weights(2)
    kind = kind_of(form.scheme(level, SchemeOptions()), weight)
    plain, codes = kind.plain(weight, None)
    fitted = kind.fit(weight, None)
    lost = [float((g.decode(c) - weight).norm()) for g, c in ((plain, codes), (fitted, fitted.nearest(weight)))]
    assert lost[1] < 0.99 * lost[0]


@pytest.mark.parametrize("level", LEVELS)
def test_made_sound_and_loaded_by_transformers(level: str, tmp_path: Path) -> None:
    method = MethodOptions(method=None if level in STATIC else "rtn")
    options = Options(threads=1, method=method, calibration=CalibrationOptions(samples=4, length=128))
    (result,) = quantize(str(demo_model()), "compressed-tensors", levels=[level], output_dir=tmp_path, options=options)
    outcome = verify(result.path, source=str(demo_model()))
    assert outcome.ok, outcome.all_problems()
    ids = torch.arange(5, 45)[None]
    source = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    model, told = AutoModelForCausalLM.from_pretrained(result.path, output_loading_info=True)
    assert not told["missing_keys"], told
    assert not told["unexpected_keys"], told
    with torch.inference_mode():
        wanted, found = (torch.log_softmax(one(input_ids=ids).logits.float(), -1) for one in (source, model))
    lost = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert 0 < lost < {"W8A8": 0.01, "MXFP4": 0.3}.get(level, 0.02 if level.startswith("FP8") else 0.15)
    with open_directory(result.path) as packed:
        assert packed.label == level


def test_matrices_that_runtimes_join_have_one_scale_in_common(tmp_path: Path) -> None:
    options = Options(threads=1, method=MethodOptions(method="rtn"))
    (result,) = quantize(
        str(demo_model()), "compressed-tensors", levels=["NVFP4A16"], output_dir=tmp_path, options=options
    )
    tensors = load_file(result.path / "model.safetensors")
    for parts in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        common = {float(tensors[f"model.layers.1.{part}.weight_global_scale"]) for part in parts}
        assert len(common) == 1
    assert len({float(value) for name, value in tensors.items() if name.endswith("weight_global_scale")}) > 4


def test_grids_that_are_fixed(tmp_path: Path) -> None:
    for level in LEVELS:
        with pytest.raises(UsageError, match="is fixed"):
            form.scheme(level, SchemeOptions(group_size=64))
        with pytest.raises(UsageError, match="is fixed"):
            form.scheme(level, SchemeOptions(symmetric=False))
    for level, shared in (("FP8", "one scale for each matrix"), ("FP8_BLOCK", "blocks of 128 rows and 128 columns")):
        with pytest.raises(UsageError) as refused:
            form.scheme(level, SchemeOptions(group_size=64))
        assert (refused.value.expected, refused.value.found) == (f"symmetric, {shared}", "--group-size 64")
    with pytest.raises(UsageError) as refused:  # its own group is no fault
        form.scheme("NVFP4", SchemeOptions(group_size=16, symmetric=False))
    assert refused.value.found == "--asym"
    model = make_tiny("llama", tmp_path / "odd", hidden_size=24, head_dim=8, intermediate_size=40)
    with pytest.raises(UsageError, match="not whole groups of 16"):
        plan(str(model), "compressed-tensors", levels=["NVFP4A16"], options=Options())


def test_devices_get_whole_blocks_of_rows(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "tiny", hidden_size=256, intermediate_size=512)  # keys: 128 rows
    refused = "cannot split this artifact over several devices"
    for level, split in (("FP8_DYNAMIC", True), ("FP8_BLOCK", False)):
        (found,) = plan(str(model), "compressed-tensors", levels=[level], options=Options())
        told = [text for text in found.warnings if refused in text]
        assert (not told) == split
        assert split or "k_proj" in told[0]
