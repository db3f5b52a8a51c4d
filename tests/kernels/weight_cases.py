"""Rows and importances of every character that a quantizer may meet, from two small integers each."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

ROW_KINDS = (
    *("normal", "heavy", "constant", "zero", "denormal", "huge", "tiny", "few-values", "sparse"),
    *("positive", "negative", "near-constant", "outliers", "every-magnitude", "mixed-blocks"),
)
IMPORTANCE_KINDS = (None, "uniform", "zero", "constant", "heavy", "mostly-zero", "extreme")


def make_rows(kind: str, seed: int, shape: tuple[int, int]) -> np.ndarray:
    """float32 rows, all finite."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    magnitudes = 10.0 ** rng.uniform(-45, 30, shape)
    blocks = 10.0 ** rng.uniform(-46, 3, (shape[0], shape[1] // 16)).repeat(16, axis=1)
    rows = {
        "normal": x * 0.02,
        "heavy": rng.standard_t(2, shape) * 0.02,
        "constant": np.repeat(x[:, :1], shape[1], axis=1),
        "zero": x * 0,
        "denormal": x * 1e-41,
        "huge": x * 1e30,
        "tiny": x * 10.0 ** rng.uniform(-16, -6, (shape[0], 1)),
        "few-values": rng.choice([-1.0, -0.5, 0.0, -0.0, 0.25, 1.0], shape),
        "sparse": x * (rng.random(shape) < 0.05),
        "positive": np.abs(x) + 3,
        "negative": -np.abs(x) * 10.0 ** rng.uniform(-6, 0, shape),
        "near-constant": 1 + x * 1e-7,
        "outliers": x * 1e-3 + 1e3 * x * (rng.random(shape) < 0.01),
        "every-magnitude": x * magnitudes,
        "mixed-blocks": x * blocks,
    }[kind]
    return np.ascontiguousarray(rows, dtype=np.float32)


def make_importance(kind: str | None, seed: int, columns: int) -> np.ndarray | None:
    """float32, finite and not negative; or None."""
    if kind is None:
        return None
    rng = np.random.default_rng(seed + 1)
    values = {
        "uniform": rng.random(columns),
        "zero": np.zeros(columns),
        "constant": np.ones(columns),
        "heavy": 10.0 ** rng.uniform(-6, 3, columns),
        "mostly-zero": rng.random(columns) * (rng.random(columns) < 0.1),
        "extreme": 10.0 ** rng.uniform(-30, 15, columns) * (rng.random(columns) < 0.7),
    }[kind]
    return values.astype(np.float32)


@st.composite
def cases(draw: st.DrawFn, most_rows: int, most_superblocks: int = 4) -> tuple[np.ndarray, np.ndarray | None]:
    """(rows, importance) of one kind each."""
    seed = draw(st.integers(0, 2**32 - 1))
    shape = (draw(st.integers(1, most_rows)), 256 * draw(st.integers(1, most_superblocks)))
    rows = make_rows(draw(st.sampled_from(ROW_KINDS)), seed, shape)
    return rows, make_importance(draw(st.sampled_from(IMPORTANCE_KINDS)), seed, shape[1])
