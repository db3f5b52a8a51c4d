"""GPTQ: bytes computed by hand, round trips through every width and both formats, and what must be refused."""

from __future__ import annotations

import numpy as np
import pytest

from llm_quantize.errors import NumericPolicyError, UnsupportedError, UsageError
from llm_quantize.formats import gptq
from llm_quantize.formats.base import Coverage, Scheme, SchemeOptions, scheme_from_dict
from llm_quantize.qtypes.integer import IntegerType
from tests.formats.grids import make_grid, random_matrix, unpacked

V1_ASYMMETRIC = Scheme("gptq", "4bit", IntegerType(4, 32, False), "gptq")


def arrays(scheme: Scheme, packed: list[np.ndarray], rows: int, columns: int) -> dict[str, np.ndarray]:
    """The packed arrays by suffix, their shapes and types being what the fields promise."""
    found = {}
    for field, array in zip(gptq.fields(scheme, rows, columns), packed, strict=True):
        assert (array.dtype.name, array.shape) == (field.dtype, field.shape)
        assert array.nbytes == field.nbytes
        assert array.flags.c_contiguous
        found[field.suffix] = array
    return found


def test_bytes_by_hand() -> None:
    """Row 0 has codes 0..15, 0..15; row 1 has 15 throughout; the other rows 8, which is zero."""
    scheme = gptq.scheme("4bit", SchemeOptions(group_size=32))
    codes = np.full((8, 32), 8, np.uint8)
    codes[0] = np.arange(32) % 16
    codes[1] = 15
    grid = make_grid(scheme, np.full((8, 1), 0.5))
    found = arrays(scheme, gptq.pack(scheme, grid, codes), 8, 32)
    assert [f"{word:08x}" for word in found["qweight"].view(np.uint32)[:, 0]] == ["76543210", "fedcba98"] * 2
    assert [f"{word:08x}" for word in found["qweight"].view(np.uint32)[:, 1]] == ["ffffffff"] * 4
    assert found["qzeros"].view(np.uint32).tolist() == [[0x77777777]]
    assert found["scales"].tolist() == [[0.5] * 8]
    assert found["g_idx"].tolist() == [0] * 32
    values = unpacked(gptq, scheme, found, 8, 32)
    assert values[0, :16].tolist() == [(code - 8) / 2 for code in range(16)]
    assert values[2:].any() == 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("level", gptq.LEVELS)
def test_every_width_comes_back(level: str, symmetric: bool) -> None:
    scheme = gptq.scheme(level, SchemeOptions(group_size=32, symmetric=symmetric))
    assert scheme.variant == ("gptq" if symmetric else "gptq_v2")
    assert scheme_from_dict(scheme.to_dict()) == scheme
    grid, codes = random_matrix(scheme, 64, 96)
    found = arrays(scheme, gptq.pack(scheme, grid, codes), 64, 96)
    assert found["g_idx"].tolist() == [column // 32 for column in range(96)]
    assert np.array_equal(unpacked(gptq, scheme, found, *codes.shape), grid.decode(codes).numpy())


def test_format_1_stores_zero_points_less_one_and_refuses_zero() -> None:
    scheme = V1_ASYMMETRIC
    assert gptq.least_zero(scheme) == 1
    grid, codes = random_matrix(scheme, 16, 64, least=1)
    grid.z[0, 0], grid.z[1, 1] = 1, 16
    found = arrays(scheme, gptq.pack(scheme, grid, codes), 16, 64)
    assert found["qzeros"].view(np.uint32)[0, 0] & 15 == int(grid.z[0, 0]) - 1
    assert np.array_equal(unpacked(gptq, scheme, found, *codes.shape), grid.decode(codes).numpy())
    zeros = grid.z.clone()
    zeros[3, 1] = 0
    with pytest.raises(UnsupportedError, match="zero point of 0") as caught:
        gptq.pack(scheme, make_grid(scheme, grid.d, zeros), codes)
    assert "row 3, group 1" in str(caught.value)


def test_groups_in_any_order_are_read() -> None:
    """What other tools write for desc_act: g_idx is no longer sequential."""
    scheme = gptq.scheme("4bit", SchemeOptions(group_size=32))
    grid, codes = random_matrix(scheme, 32, 64)
    found = arrays(scheme, gptq.pack(scheme, grid, codes), 32, 64)
    found["g_idx"] = np.array([(column + 1) % 2 for column in range(64)], np.int32)
    steps = codes.numpy().astype(np.float32) - 8
    expected = grid.scale().numpy()[:, found["g_idx"]] * steps
    assert np.array_equal(unpacked(gptq, scheme, found, 32, 64), expected)


def test_sizes_that_do_not_fit_name_the_module() -> None:
    scheme = gptq.scheme("4bit", SchemeOptions())
    with pytest.raises(UsageError, match=r"whole groups of 128[\s\S]*model\.x[\s\S]*--group-size 32"):
        gptq.fields(scheme, 64, 96, name="model.x")
    with pytest.raises(UsageError, match=r"60 rows of 4 bits[\s\S]*multiple of 8"):
        gptq.fields(scheme, 60, 128, name="model.x")
    with pytest.raises(UsageError, match=r"48 columns of 3 bits[\s\S]*multiple of 32"):
        gptq.fields(gptq.scheme("3bit", SchemeOptions(group_size=-1)), 64, 48)
    whole = gptq.fields(gptq.scheme("8bit", SchemeOptions(group_size=-1)), 64, 48)
    assert [field.shape for field in whole] == [(12, 64), (1, 16), (1, 64), (48,)]
    with pytest.raises(UsageError, match="no gptq level"):
        gptq.scheme("5bit", SchemeOptions())


def test_scales_that_are_not_numbers_are_refused() -> None:
    scheme = gptq.scheme("4bit", SchemeOptions(group_size=32))
    scales = np.ones((8, 2))
    scales[5, 1] = np.nan
    with pytest.raises(NumericPolicyError, match="nan at row 5, group 1"):
        gptq.pack(scheme, make_grid(scheme, scales), np.zeros((8, 64), np.uint8))
    other = gptq.scheme("4bit", SchemeOptions(group_size=64))
    with pytest.raises(ValueError, match="groups of 32"):
        gptq.pack(other, make_grid(scheme, np.ones((8, 2))), np.zeros((8, 64), np.uint8))
    exact = make_grid(Scheme("gptq", "4bit", IntegerType(4, 32, True, "float32"), "gptq"), np.full((8, 2), 0.1))
    with pytest.raises(ValueError, match="not rounded to float16"):
        gptq.pack(scheme, exact, np.zeros((8, 64), np.uint8))


def test_config() -> None:
    scheme = gptq.scheme("4bit", SchemeOptions())
    modules = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
    plain = gptq.config(scheme, Coverage(modules))
    assert plain["quant_method"] == "gptq"
    assert plain["checkpoint_format"] == "gptq"
    assert plain["sym"] is True
    assert plain["bits"] == 4
    assert plain["group_size"] == 128
    assert plain["desc_act"] is False
    assert "dynamic" not in plain
    assert "modules_in_block_to_quantize" not in plain
    kept = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)]
    ignoring = gptq.config(scheme, Coverage(modules, kept))
    assert ignoring["dynamic"] == {rf"-:^model\.layers\.{n}\.mlp\.up_proj$": {} for n in (0, 1)}
    assert ignoring["modules_in_block_to_quantize"] == [["self_attn.q_proj", "mlp.down_proj"]]
    uneven = gptq.config(scheme, Coverage(modules[:3], [*kept, modules[3]]))
    assert "modules_in_block_to_quantize" not in uneven
    experts = [f"model.layers.0.mlp.experts.{e}.up_proj" for e in range(4)]
    assert gptq.config(scheme, Coverage(modules, experts))["dynamic"] == {
        r"-:^model\.layers\.0\.mlp\.experts(\..*)?$": {}
    }
