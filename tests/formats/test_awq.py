"""AWQ's gemm layout: bytes computed by hand, and round trips."""

from __future__ import annotations

import numpy as np
import pytest

from llm_quantize.errors import UsageError
from llm_quantize.formats import awq
from llm_quantize.formats.base import Coverage, SchemeOptions
from tests.formats.grids import make_grid, random_matrix, unpacked


def test_bytes_by_hand() -> None:
    """Input channel 0 has codes 0..7 in output rows 0..7: nibble i is row (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    scheme = awq.scheme("4bit", SchemeOptions(group_size=32))
    codes = np.zeros((8, 32), np.uint8)
    codes[:, 0] = np.arange(8)
    codes[:, 1] = 15 - np.arange(8)
    grid = make_grid(scheme, np.full((8, 1), 0.25), np.arange(8)[:, None])
    qweight, qzeros, scales = awq.pack(scheme, grid, codes)
    assert [f"{word:08x}" for word in qweight.view(np.uint32)[:3, 0]] == ["75316420", "8ace9bdf", "00000000"]
    assert [f"{word:08x}" for word in qzeros.view(np.uint32)[0]] == ["75316420"]
    assert scales.dtype == np.float16
    assert scales.tolist() == [[0.25] * 8]


@pytest.mark.parametrize("symmetric", [None, True])
def test_comes_back(symmetric: bool | None) -> None:
    scheme = awq.scheme("4bit", SchemeOptions(group_size=32, symmetric=symmetric))
    assert scheme.qtype.symmetric is (symmetric is True)
    grid, codes = random_matrix(scheme, 40, 96)
    packed = awq.pack(scheme, grid, codes)
    found = {}
    for field, array in zip(awq.fields(scheme, 40, 96), packed, strict=True):
        assert (array.dtype.name, array.shape, array.nbytes) == (field.dtype, field.shape, field.nbytes)
        found[field.suffix] = array
    assert np.array_equal(unpacked(awq, scheme, found, 40, 96), grid.decode(codes).numpy())
    if symmetric:
        assert (found["qzeros"].view(np.uint32) == 0x88888888).all()


def test_sizes_and_levels() -> None:
    scheme = awq.scheme("4BIT", SchemeOptions())
    assert [field.shape for field in awq.fields(scheme, 16, 256)] == [(256, 2), (2, 2), (2, 16)]
    with pytest.raises(UsageError, match="12 rows of 4 bits"):
        awq.fields(scheme, 12, 256)
    with pytest.raises(UsageError, match="no awq level"):
        awq.scheme("3bit", SchemeOptions())


def test_config() -> None:
    scheme = awq.scheme("4bit", SchemeOptions())
    plain = awq.config(scheme, Coverage(["model.layers.0.mlp.up_proj"]))
    assert plain == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    experts = [f"model.layers.0.mlp.experts.{e}.up_proj" for e in range(3)]
    ignoring = awq.config(scheme, Coverage([], experts))
    assert ignoring["modules_to_not_convert"] == ["model.layers.0.mlp.experts", "lm_head"]
    routed = awq.config(scheme, Coverage([], ["model.layers.0.mlp.gate"]))
    assert routed["modules_to_not_convert"] == ["model.layers.0.mlp.gate", "lm_head"]
