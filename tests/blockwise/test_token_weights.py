"""Tokens whose inputs are far larger than the others' count as much as large ones, and no more."""

from __future__ import annotations

import pytest
import torch

from llm_quantize.blockwise.gram import CAP, Gram, token_weights


def drawn(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The first token is a thousand times as large as the others, another ten times."""
    values = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
    values[0] *= 1000
    values[tokens // 2] *= 10
    return values.to(dtype)


def slow(inputs: torch.Tensor) -> list[float]:
    """Token by token, from the definition."""
    squares = [sum(float(value) ** 2 for value in row) / len(row) for row in inputs]
    living = sorted(one for one in squares if one > 0)
    most = CAP * living[(len(living) - 1) // 2]
    return [float(torch.tensor(min(1.0, most / max(one, 1e-30))).bfloat16()) for one in squares]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_large_counts_as_if_it_were_at_the_cap(dtype: torch.dtype) -> None:
    inputs = drawn(200, 24, dtype)
    inputs[5] = 0
    weights = token_weights(inputs)
    assert weights is not None
    assert weights.tolist() == slow(inputs)
    assert 0 < weights[0] < 1e-5 < 0.02 < weights[100] < 0.1
    assert (weights[torch.arange(200) % 100 != 0] == 1).float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_of_what_counts(dtype: torch.dtype) -> None:
    """Held back or not; a token alone no longer makes up the sums."""
    inputs = drawn(300, 40, dtype)
    full = (inputs.float() * 1.25).to(dtype)
    gram, other = Gram(40, cross=True), torch.zeros(40, 40)
    for job in gram.jobs(inputs, full):
        job()
    gram.finish()
    weights = torch.tensor(slow(inputs)).double()[:, None]
    wide, away = inputs.double(), (full - inputs).double()
    expected, crossed = wide.T @ (weights * wide), (weights * away).T @ wide
    torch.testing.assert_close(gram.hessian.double(), expected, rtol=1e-4, atol=1e-2)
    assert gram.cross is not None
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert (gram.cross.double() - crossed).norm() < tolerance * crossed.norm()
    assert gram.tokens == 300
    gram.hold(inputs, full)
    ((_, _, counts),) = gram.held
    assert counts is not None
    assert counts.tolist() == weights[:, 0].tolist()
    for jobs in gram.release(other):
        for job in jobs:
            job()
    assert torch.equal(other.triu(), gram.hessian.triu())
    assert float(expected.diagonal().sum()) < 0.01 * float((wide * wide).sum())


def test_nothing_is_weighed_where_nothing_is_large() -> None:
    assert token_weights(torch.ones(10, 4)) is None
    assert token_weights(torch.zeros(10, 4)) is None
    assert token_weights(torch.empty(0, 4)) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_is_not_weighed_away(value: float) -> None:
    inputs = torch.ones(10, 4)
    inputs[2, 1] = value
    gram = Gram(4, cross=False)
    for job in gram.jobs(inputs):
        job()
    assert not gram.finite()
