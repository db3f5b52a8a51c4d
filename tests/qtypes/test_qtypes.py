"""The table of types against the owner of the format."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from llm_quantize import kernels
from llm_quantize.errors import UsageError
from llm_quantize.qtypes import QTYPES


def test_rows_are_the_owners():
    for name, qtype in QTYPES.items():
        assert qtype.name == name == qtype.ggml_type.name.lower()
        if name == "q2_0":
            continue  # gguf lacks it: tests/kernels/test_few_bits.py asks ggml
        assert (qtype.block_size, qtype.block_bytes) == gguf.GGML_QUANT_SIZES[qtype.ggml_type]
        columns = 3 * qtype.block_size
        assert qtype.row_bytes(columns) == gguf.quants.quant_shape_to_byte_shape((columns,), qtype.ggml_type)[0]


def test_bits_per_weight():
    assert QTYPES["q4_k"].bits_per_weight == 4.5
    assert QTYPES["f16"].bits_per_weight == 16


@pytest.mark.parametrize("columns", [-256, 1, 255, 300])
def test_a_broken_row_is_refused(columns):
    with pytest.raises(UsageError, match="cannot be stored as q4_k"):
        QTYPES["q4_k"].row_bytes(columns)


def test_importance_flags():
    assert not QTYPES["q8_0"].uses_importance
    assert QTYPES["q4_k"].uses_importance
    needing = {name for name, q in QTYPES.items() if q.needs_importance}
    assert needing - {"iq1_s"} == {"iq2_xxs", "iq2_xs"}
    assert all(QTYPES[name].uses_importance for name in needing)


@pytest.mark.parametrize("name", [name for name, q in QTYPES.items() if q.half_exponents])
def test_the_exponent_bits_tell_an_infinite_block(name):
    qtype = QTYPES[name]
    rows = np.random.default_rng(2).standard_normal((1, 4 * qtype.block_size)).astype(np.float32)
    rows[0, 2 * qtype.block_size : 3 * qtype.block_size] = 1e9
    blocks = kernels.quantize(name, rows, np.ones(rows.shape[1], np.float32)).reshape(4, -1)
    full = [[(blocks[:, byte] & mask) == mask for byte, mask in exponent] for exponent in qtype.half_exponents]
    assert np.any([np.all(masks, axis=0) for masks in full], axis=0).tolist() == [False, False, True, False]
