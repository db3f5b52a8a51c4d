"""compressed-tensors: bytes by hand, round trips, and the package of that name as the reader."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme

from llm_quantize.errors import UsageError
from llm_quantize.formats import compressed_levels as levels
from llm_quantize.formats import compressed_tensors as form
from llm_quantize.formats.base import Coverage, Scheme, SchemeOptions
from tests.formats.grids import make_grid, random_matrix, unpacked

SMALL = {"scale": "bfloat16", "group_size": 32}


OTHERS = [level for level in form.LEVELS if not (level[0] == "W" and "A16" in level)]


def without_observers(facts: Any) -> Any:
    """A scheme without how its scales would be found."""
    if not isinstance(facts, dict):
        return facts
    return {key: without_observers(value) for key, value in facts.items() if not key.startswith("observer")}


def named(scheme: Scheme, packed: list[np.ndarray], rows: int, columns: int) -> dict[str, np.ndarray]:
    found = {}
    for field, array in zip(form.fields(scheme, rows, columns), packed, strict=True):
        word = "uint16" if field.dtype == "bfloat16" else field.dtype
        assert (array.dtype.name, array.shape, array.nbytes) == (word, field.shape, field.nbytes)
        found[field.suffix] = array
    return found


def as_torch(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    scale = tensors["weight_scale"]
    return tensors | {"weight_scale": scale.view(torch.bfloat16) if scale.dtype == torch.uint16 else scale}


def decompress(scheme: Scheme, tensors: dict[str, torch.Tensor]) -> Any:
    """The package's own decompression, by the configuration that we write."""
    group = form.config(scheme, Coverage([]))["config_groups"]["group_0"]
    compressor = BaseCompressor.get_value_from_registry(levels.PACKED_FORM)
    return compressor.decompress(tensors, QuantizationScheme.model_validate(group))["weight"]


def test_bytes_by_hand() -> None:
    scheme = form.scheme("W4A16_ASYM", SchemeOptions(**SMALL))
    codes = np.zeros((3, 32), np.uint8)
    codes[0] = np.arange(32) % 16
    codes[2, 31] = 15
    grid = make_grid(scheme, np.full((3, 1), -0.5), [[1], [2], [15]])
    packed, scale, shape, zeros = form.pack(scheme, grid, codes)
    assert [f"{word:08x}" for word in packed.view(np.uint32)[0]] == ["76543210", "fedcba98"] * 2
    assert [f"{word:08x}" for word in packed.view(np.uint32)[2]] == ["00000000"] * 3 + ["f0000000"]
    assert scale.tolist() == [[0xBF00]] * 3
    assert shape.tolist() == [3, 32]
    assert [f"{word:08x}" for word in zeros.view(np.uint32)[0]] == ["00000f21"]
    assert zeros.shape == (1, 1)


@pytest.mark.parametrize("scale", ["bfloat16", "float16"])
@pytest.mark.parametrize("level", [level for level in form.LEVELS if "A16" in level and level[0] == "W"])
def test_the_package_decompresses_every_level(level: str, scale: str) -> None:
    scheme = form.scheme(level, SchemeOptions(group_size=32, scale=scale))
    assert scheme.level == level
    grid, codes = random_matrix(scheme, 21, 96)
    found = named(scheme, form.pack(scheme, grid, codes), 21, 96)
    ours = unpacked(form, scheme, found, 21, 96)
    assert np.array_equal(ours, grid.decode(codes).numpy())
    tensors = as_torch(found)
    rounded = decompress(scheme, tensors)
    assert rounded.dtype == tensors["weight_scale"].dtype
    # The package multiplies in the scale's type; the steps of 8 bits are exact there, so only the product is rounded.
    assert torch.equal(rounded, torch.from_numpy(ours).to(rounded.dtype))
    exact = decompress(scheme, tensors | {"weight_scale": tensors["weight_scale"].float()})
    assert torch.equal(exact, torch.from_numpy(ours))


def test_the_package_packs_the_same_bytes() -> None:
    """Both ways round: what the package makes of our values with our grid is what we wrote."""
    scheme = form.scheme("W3A16_ASYM", SchemeOptions(**SMALL))
    grid, codes = random_matrix(scheme, 20, 64)
    found = named(scheme, form.pack(scheme, grid, codes), 20, 64)
    group = form.config(scheme, Coverage([]))["config_groups"]["group_0"]
    state = {
        "weight": grid.decode(codes),
        "weight_scale": grid.scale(),
        "weight_zero_point": (grid.z - 4).to(torch.int8),
    }
    compressor = BaseCompressor.get_value_from_registry(levels.PACKED_FORM)
    theirs = compressor.compress(state, QuantizationScheme.model_validate(group))
    for name in ("weight_packed", "weight_zero_point", "weight_shape"):
        assert np.array_equal(theirs[name].numpy(), found[name]), name


def test_the_package_writes_the_same_config() -> None:
    for level in form.LEVELS:
        scheme = form.scheme(level, SchemeOptions())
        ours = form.config(scheme, Coverage([], ["model.layers.0.mlp.gate"]))
        read = QuantizationConfig.model_validate(ours)
        if level in ("W4A16", "W8A16", "W3A16", "W2A16", "W4A16_ASYM") or level in OTHERS:
            preset = preset_name_to_scheme(level, ["Linear"]).model_dump()
            group = read.config_groups["group_0"].model_dump()
            assert without_observers(group | {"format": None}) == without_observers(preset)
        written = read.model_dump()
        wrapper = {"version": levels.PACKAGE_VERSION, "sparsity_config": {}, "transform_config": {}}
        if level not in OTHERS:
            assert ours == wrapper | written
        assert read.ignore == ["model.layers.0.mlp.gate", "lm_head"]
    whole = form.config(form.scheme("W8A16", SchemeOptions(group_size=-1)), Coverage([]))
    assert QuantizationConfig.model_validate(whole).config_groups["group_0"].weights.strategy == "channel"


def test_sizes_and_levels() -> None:
    scheme = form.scheme("w4a16", SchemeOptions(symmetric=False))
    assert scheme.level == "W4A16_ASYM"
    shapes = {field.suffix: field.shape for field in form.fields(scheme, 20, 256)}
    assert shapes == {
        "weight_packed": (20, 32),
        "weight_scale": (20, 2),
        "weight_shape": (2,),
        "weight_zero_point": (3, 2),
    }
    assert form.fields(form.scheme("W3A16", SchemeOptions(group_size=-1)), 4, 40)[0].shape == (4, 4)
    with pytest.raises(UsageError, match="whole groups of 128"):
        form.fields(scheme, 64, 96)
    with pytest.raises(UsageError, match="no compressed-tensors level"):
        form.scheme("W9A9", SchemeOptions())
