"""Rows and importance vectors that provoke quantizers, and the comparison of all implementations on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from llm_quantize import kernels
from llm_quantize.kernels import reference

from ..oracles import ggml

KINDS = (
    "normal", "heavy", "constant", "zero", "signed zero", "subnormal", "tiniest", "tiny", "near 1e-15", "huge",
    "overflowing squares", "positive", "negative", "few values", "sparse", "mixed", "ternary", "almost constant",
)  # fmt: skip
IMPORTANCE = ("none", "plain", "zero", "subnormal", "wild", "sparse")
quickly = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def make_rows(kind: str, seed: int, shape: tuple[int, int]) -> np.ndarray:
    """float32 rows of one kind."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(shape)
    rows = {
        "normal": lambda: normal * 0.02,
        "heavy": lambda: rng.standard_t(2, shape),
        "constant": lambda: np.full(shape, rng.choice([0.37, -0.37, 1e-6, -5e4])),
        "zero": lambda: np.zeros(shape),
        "signed zero": lambda: np.where(rng.random(shape) < 0.5, -0.0, 0.0),
        "subnormal": lambda: normal * 1e-40,
        "tiniest": lambda: normal * 3e-44,
        "tiny": lambda: normal * 10.0 ** rng.uniform(-38, -20),
        "near 1e-15": lambda: normal * 1e-15,
        "huge": lambda: rng.uniform(-3.4e38, 3.4e38, shape),
        "overflowing squares": lambda: normal * 10.0 ** rng.uniform(15, 30),
        "positive": lambda: rng.random(shape) + 1,
        "negative": lambda: -rng.random(shape) - 1,
        "few values": lambda: rng.integers(-8, 9, shape) / 8,
        "sparse": lambda: np.where(rng.random(shape) < 0.05, normal, np.copysign(0, normal)),
        "mixed": lambda: normal * 10.0 ** rng.integers(-44, 38, shape),
        "ternary": lambda: rng.integers(-1, 2, shape) * 0.5,
        "almost constant": lambda: -1 - normal * 10.0 ** rng.uniform(-8, -2),
    }[kind]()
    return np.clip(rows, -3.4e38, 3.4e38).astype(np.float32)


def make_importance(kind: str, seed: int, columns: int) -> np.ndarray | None:
    """float32 (columns,), or None."""
    rng = np.random.default_rng(seed + 1)
    values = rng.random(columns)
    made = {
        "none": None,
        "plain": values**2 + 0.01,
        "zero": np.zeros(columns),
        "subnormal": values * 1e-42,
        "wild": 10.0 ** rng.uniform(-30, 30, columns),
        "sparse": np.where(values < 0.1, values, 0),
    }[kind]
    return None if made is None else made.astype(np.float32)


@st.composite
def cases(draw: st.DrawFn, block: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows of one kind, or of several, and an importance vector or None; any number of blocks and rows."""
    rows = draw(st.integers(1, 10))
    columns = block * draw(st.integers(1, 512 // block + 3))
    seed = draw(st.integers(0, 2**32 - 1))
    chosen = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    made = [make_rows(kind, seed + i, (rows, columns)) for i, kind in enumerate(chosen)]
    x = np.concatenate(made)[np.random.default_rng(seed).permutation(rows * len(chosen))]
    return x, make_importance(draw(st.sampled_from(IMPORTANCE)), seed, columns)


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """Kernels at one SIMD level."""
    before = kernels.simd_level()
    kernels.set_simd_level(level)
    try:
        yield
    finally:
        kernels.set_simd_level(before)


def assert_same_bytes(qtype: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """ggml, the numpy reference and the native kernel at every SIMD level agree; gives the bytes."""
    expected = ggml.quantize(qtype, rows, importance)
    assert_equal(reference.QUANTIZE[qtype](rows, importance), expected, f"reference {qtype}")
    for level in kernels.simd_levels():
        with at_level(level):
            assert_equal(kernels.quantize(qtype, rows, importance), expected, f"{level} {qtype}")
    return expected


def assert_equal(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Equal bytes, with the first difference in the message."""
    assert found.shape == expected.shape
    differing = np.argwhere(found != expected)
    assert len(differing) == 0, (
        f"{what}: {len(differing)} of {expected.size} bytes differ, first at {differing[0].tolist()}: "
        f"{found[tuple(differing[0])]} instead of {expected[tuple(differing[0])]}"
    )


def assert_same_values(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal float32 bit patterns, except that every NaN equals every NaN."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == np.float32
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), ~numbers)
    np.testing.assert_array_equal(found.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])


def random_packed(qtype: str, seed: int, rows: int, columns: int) -> np.ndarray:
    """Any bytes at all are valid codes; half of the rows are made by a quantizer, the others are noise."""
    rng = np.random.default_rng(seed)
    made = kernels.quantize(qtype, make_rows("heavy", seed, (rows, columns)))
    return np.concatenate([made, rng.integers(0, 256, made.shape, dtype=np.uint8)])
