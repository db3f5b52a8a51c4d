"""Rounded inputs: those of compressed-tensors' own fake quantization, and of the slow twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.quant_config import QuantizationStatus
from compressed_tensors.quantization.utils import generate_gparam

from llm_quantize.errors import UsageError
from llm_quantize.formats.compressed_inputs import read_inputs
from llm_quantize.grids.inputs import calibrated, rounded_inputs
from llm_quantize.qtypes.inputs import InputGrid
from tests.oracles import rounded_inputs as twin

PRESETS = ["W8A8", "W4A8", "W4A4", "W4AFP8", "FP8_DYNAMIC", "FP8_BLOCK", "FP8", "NVFP4", "MXFP4", "MXFP8", "MXFP6A8"]


def inputs(seed: int = 0, columns: int = 256) -> torch.Tensor:
    """float32 (1, 24, columns): loud channels, a token of zeros, a group of zeros, a tiny token, exact ties."""
    x = torch.randn(1, 24, columns, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 50
    x[0, 1] = 0
    x[0, 2, :128] = 0
    x[0, 3] *= 1e-30
    x[0, 4, :8] = torch.tensor([6.0, 5.0, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25])
    x[0, 4, 8:] = 0
    return x


def known(preset: str, x: torch.Tensor) -> tuple[InputGrid, torch.Tensor]:
    """Our grid of a preset, with its calibrated number, and what the package makes of ``x``."""
    args = preset_name_to_scheme(preset, ["Linear"]).input_activations
    assert args is not None
    grid = read_inputs(args.model_dump(mode="json"))
    assert grid is not None
    grid = calibrated(grid, float(x.abs().max()))
    module = torch.nn.Linear(x.shape[-1], 8)
    module.quantization_status = QuantizationStatus.FROZEN
    if grid.static and grid.nested:
        whole = generate_gparam(x.min(), x.max())
        assert float(whole) == pytest.approx(grid.whole, rel=1e-6)
        grid = replace(grid, whole=float(whole))  # a number over a tensor is its reciprocal times it there
        module.register_parameter("input_global_scale", torch.nn.Parameter(whole, requires_grad=False))
    elif grid.static:
        module.register_parameter("input_scale", torch.nn.Parameter(torch.tensor([grid.whole]), requires_grad=False))
    return grid, forward_quantize(module, x, "input", args)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_packages_own_numbers(preset: str) -> None:
    x = inputs()
    grid, theirs = known(preset, x)
    assert torch.equal(rounded_inputs(x, grid), theirs)
    assert not torch.equal(theirs, x)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_slow_twin(preset: str) -> None:
    x = inputs(1, 128)
    grid, _ = known(preset, x)
    slow = torch.tensor([twin.rounded(row, grid) for row in x[0].double().tolist()])
    ours = rounded_inputs(x, grid)[0].double()
    different = (ours - slow).abs() > 1e-5 * slow.abs() + 1e-38
    assert different.double().mean() < 2e-3  # a quotient on an edge, in float32 and in float64


def test_tokens_do_not_depend_on_one_another_and_types_are_kept() -> None:
    x = inputs(2).to(torch.bfloat16)
    for grid in (InputGrid("int8"), InputGrid("e4m3", 128), InputGrid("e2m1", 32, "e8m0")):
        whole = rounded_inputs(x, grid)
        assert whole.dtype == torch.bfloat16
        assert torch.equal(whole[:, 5:9], rounded_inputs(x[:, 5:9], grid))


def test_what_cannot_be_rounded() -> None:
    with pytest.raises(UsageError, match="not whole groups of 128"):
        rounded_inputs(torch.ones(2, 64), InputGrid("e4m3", 128))
    with pytest.raises(ValueError, match="not calibrated"):
        rounded_inputs(torch.ones(2, 64), InputGrid("e4m3", static=True))


def test_words() -> None:
    assert InputGrid("int8").text == "8-bit integers, a scale for each token"
    assert InputGrid("e2m1", 32, "e8m0").text == "4-bit floats, a scale for each group of 32"
    assert InputGrid("e4m3", static=True).text == "8-bit floats, one calibrated scale"
