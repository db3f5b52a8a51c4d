"""Sums of products of bfloat16: every SIMD level gives the bits that the definition says; tiles make up the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_quantize.kernels.gram import DEPTH, add_gram, serves


def drawn(tokens: int, columns: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(tokens * columns)
    return (torch.randn(tokens, columns, generator=g) * torch.randn(columns, generator=g).exp()).bfloat16()


def dense(start: np.ndarray, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> np.ndarray:
    """The twin: token after token, DEPTH of them summed up from zero and then added."""
    values, total = inputs.float().numpy(), start.copy()
    counts = np.ones(len(values), np.float32) if weights is None else weights.numpy()
    for first in range(0, len(values), DEPTH):
        sums = np.zeros_like(total)
        for row, count in zip(values[first : first + DEPTH], counts[first : first + DEPTH], strict=True):
            sums += np.outer(row * count, row)
        total += sums
    return total


@pytest.mark.parametrize(("tokens", "columns", "side"), [(300, 96, 40), (1, 1, 8), (128, 33, 33), (129, 70, 64)])
def test_the_upper_triangle_is_the_twin_s_bit_for_bit(level, tokens, columns, side):
    inputs = drawn(tokens, columns)
    sums = torch.ones(columns, columns)
    expected = dense(sums.numpy(), inputs)
    for top in range(0, columns, side):
        for left in range(top, columns, side):
            add_gram(sums, inputs, None, slice(top, min(columns, top + side)), slice(left, min(columns, left + side)))
    np.testing.assert_array_equal(np.triu(sums.numpy()), np.triu(expected))
    exact = inputs.double().T @ inputs.double() + 1
    np.testing.assert_allclose(np.triu(sums.numpy()), np.triu(exact.numpy()), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("tokens", "columns", "side"), [(300, 96, 40), (129, 33, 33)])
def test_tokens_that_count_otherwise_are_the_twin_s_bit_for_bit(level, tokens, columns, side):
    inputs, sums = drawn(tokens, columns), torch.ones(columns, columns)
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    expected = dense(sums.numpy(), inputs, weights)
    assert not np.array_equal(expected, dense(sums.numpy(), inputs))
    for top in range(0, columns, side):
        for left in range(top, columns, side):
            tile = slice(top, min(columns, top + side)), slice(left, min(columns, left + side))
            add_gram(sums, inputs, weights, *tile)
    np.testing.assert_array_equal(np.triu(sums.numpy()), np.triu(expected))


def test_a_tile_leaves_the_others_alone(level):
    inputs, sums = drawn(40, 64), torch.full((64, 64), 7.0)
    add_gram(sums, inputs, None, slice(0, 20), slice(30, 47))
    expected = torch.full((64, 64), 7.0)
    expected[:20, 30:47] = torch.from_numpy(dense(expected.numpy(), inputs))[:20, 30:47]
    assert torch.equal(sums, expected)


def test_what_is_not_finite_shows(level):
    inputs, sums = drawn(10, 16), torch.zeros(16, 16)
    inputs[3, 5] = float("nan")
    add_gram(sums, inputs, None, slice(0, 16), slice(0, 16))
    assert not torch.isfinite(sums[5, 5])
    assert torch.isfinite(sums[4, 4])


def test_what_it_serves_and_what_it_refuses():
    assert serves(drawn(2, 2))
    assert not serves(drawn(2, 2).float())
    for rows, columns in ((slice(0, 5), slice(0, 4)), (slice(2, 2), slice(0, 4)), (slice(-1, 2), slice(0, 4))):
        with pytest.raises(ValueError, match="a tile has rows and columns of the sums"):
            add_gram(torch.zeros(4, 4), drawn(2, 4), None, rows, columns)
    with pytest.raises(ValueError, match="weights has the wrong"):
        add_gram(torch.zeros(4, 4), drawn(2, 4), torch.ones(3), slice(0, 4), slice(0, 4))
    with pytest.raises(ValueError, match="sums has the wrong shape"):
        add_gram(torch.zeros(4, 5), drawn(2, 4), None, slice(0, 4), slice(0, 4))
