"""Names, groups and bounds of integer types."""

from __future__ import annotations

import pytest

from llm_quantize.errors import UsageError
from llm_quantize.qtypes.integer import IntegerType, integer_type, is_integer


@pytest.mark.parametrize(
    ("name", "bits", "group", "symmetric"),
    [
        ("int4_g128", 4, 128, True),
        ("int4_g128_asym", 4, 128, False),
        ("int3_g64", 3, 64, True),
        ("int8", 8, -1, True),
        ("int2_asym", 2, -1, False),
    ],
)
def test_a_name_is_read_and_written(name, bits, group, symmetric):
    found = integer_type(name, "bfloat16")
    assert found == IntegerType(bits, group, symmetric, "bfloat16")
    assert found.name == name
    assert is_integer(name)


@pytest.mark.parametrize("name", ["int1", "int9", "int4_g0", "int4_g", "int4_asym_g64", "q4_k", "INT4", "int4_g-1", ""])
def test_other_names_are_refused(name):
    assert not is_integer(name)
    with pytest.raises(UsageError, match="No such integer type"):
        integer_type(name)


def test_groups_divide_the_row():
    assert integer_type("int4_g128").groups(512) == 4
    assert integer_type("int8").groups(500) == 1
    assert integer_type("int8").group(500) == 500
    with pytest.raises(UsageError, match="multiple of 128"):
        integer_type("int4_g128").groups(200)
    with pytest.raises(UsageError):
        integer_type("int8").groups(0)


@pytest.mark.parametrize("wrong", [(1, 32, "float16"), (4, 0, "float16"), (4, -2, "float16"), (4, 32, "float64")])
def test_impossible_types_are_refused(wrong):
    bits, group, scale = wrong
    with pytest.raises(UsageError):
        IntegerType(bits, group, True, scale)
