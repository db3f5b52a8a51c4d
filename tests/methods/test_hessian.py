"""Conditioning and factoring: the dense twin, fallbacks that are told, the correction, mixing, memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_quantize.errors import NumericPolicyError, UsageError
from llm_quantize.methods import cholesky, hessian
from llm_quantize.methods.gptq_options import GptqOptions
from llm_quantize.methods.hessian import factorize, mix
from tests.grids.small_grids import inputs, weights

from ..oracles import dense_gptq


def moments(columns=150, tokens=600, seed=0):
    x = inputs(columns, tokens, seed)
    return x.T @ x, tokens


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 700])
def test_cholesky_in_place_is_the_factor(n):
    g = torch.Generator().manual_seed(n)
    root = torch.randn(n, n, generator=g, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(n)
    work = torch.where(torch.ones(n, n).tril().bool(), matrix, torch.nan)
    assert cholesky.factor_in_place(work)
    torch.testing.assert_close(work.tril(), torch.linalg.cholesky(matrix), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("place", [0, 300, 599])
@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan")])
def test_cholesky_says_when_there_is_none(place, value):
    matrix = torch.eye(600, dtype=torch.float64)
    matrix[place, place] = value
    assert not cholesky.factor_in_place(matrix)


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("order", ["descending", "natural"])
@pytest.mark.parametrize("tokens", [40, 600])
def test_factor_is_that_of_the_conditioned_hessian(order, shrink, tokens):
    h, tokens = moments(tokens=tokens)
    h[:, 7] = h[7] = 0
    options = GptqOptions(order=order, shrink=shrink)
    factor = factorize(h.clone(), tokens, options)
    expected = dense_gptq.condition(h.numpy(), tokens, damp=options.damp, shrink=shrink)
    np.testing.assert_allclose(factor.hessian.numpy(), expected, rtol=1e-5, atol=1e-6 * expected.max())
    assert torch.equal(factor.hessian, factor.hessian.T)
    p = factor.order
    assert torch.equal(p.sort().values, torch.arange(len(h)))
    if order == "descending":
        assert (h.diagonal()[p].diff() <= 0).all()
    unit = torch.eye(len(h), dtype=torch.float64) + factor.lower.double().T
    middle = torch.linalg.solve(unit, torch.from_numpy(expected)[p][:, p]) @ torch.linalg.inv(unit).T
    assert (middle.diagonal() > 0).all()
    off = middle - torch.diag(middle.diagonal())
    assert off.abs().max() < 1e-4 * middle.diagonal().max()
    assert factor.mode == "full"
    assert factor.dead == 1
    assert "1 of 150 channels" in factor.notes[0]
    assert not factor.lower.triu().any()


def test_scale_of_the_hessian_and_count_of_tokens_cancel():
    h, tokens = moments()
    one = factorize(h.clone(), tokens, GptqOptions(shrink=False))
    two = factorize(h * 4, 4 * tokens, GptqOptions(shrink=False))
    assert torch.equal(one.hessian, two.hessian)
    assert torch.equal(one.lower, two.lower)
    torch.testing.assert_close(one.importance, h.diagonal() / tokens)


def test_importance_has_a_floor():
    h, tokens = moments()
    h[:, 3] = h[3] = 0
    importance = factorize(h, tokens, GptqOptions()).importance
    median = (h.diagonal()[h.diagonal() > 0] / tokens).median()
    torch.testing.assert_close(importance[3], median * 1e-3)
    assert (importance > 0).all()


def test_an_outlier_does_not_set_the_damping():
    h, tokens = moments()
    usual = factorize(h.clone(), tokens, GptqOptions()).damp
    h[5, 5] *= 1e8
    assert factorize(h, tokens, GptqOptions()).damp < 20 * usual


def coupled(n, i, j, strength):
    """Not positive: two columns that vary together more than they vary."""
    h = torch.eye(n) * torch.linspace(2, 1, n)[:, None]
    h[i, j] = h[j, i] = strength
    return h * 1000


def test_more_damping_is_told():
    factor = factorize(coupled(50, 3, 4, 2.05), 1000, GptqOptions(shrink=False))
    assert factor.mode == "full"
    assert factor.damp > 0.1
    assert "10 times the damping" in factor.notes[0]


def test_blocks_are_the_first_fallback():
    n = hessian.PART + 40
    factor = factorize(coupled(n, 3, n - 2, 50.0), 1000, GptqOptions(shrink=False, order="natural"))
    assert factor.mode == "block-diagonal"
    assert "could not be factored" in factor.notes[0]
    assert factor.hessian[3, n - 2] == 0
    assert not factor.lower[hessian.PART :, : hessian.PART].any()
    h = factor.hessian.double()
    assert torch.linalg.cholesky_ex(h).info == 0


def test_the_diagonal_is_the_last_fallback():
    factor = factorize(coupled(50, 3, 4, 50.0), 1000, GptqOptions(shrink=False))
    assert factor.mode == "diagonal"
    assert "only the diagonal" in factor.notes[-1]
    assert torch.equal(factor.hessian, torch.diag(factor.hessian.diagonal()))
    assert not factor.lower.any()


def test_nothing_seen_is_told():
    factor = factorize(torch.zeros(20, 20), 0, GptqOptions(), cross=torch.zeros(20, 20))
    assert factor.mode == "diagonal"
    assert factor.correction is None
    assert "no input was ever seen" in factor.notes[0]
    assert torch.equal(factor.importance, torch.ones(20))


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_correction_is_the_ridge_regression_of_the_dense_twin(alpha):
    n, tokens = 120, 500
    x = inputs(n, tokens, 1)
    full = x + 0.2 * inputs(n, tokens, 2)
    h, cross = x.T @ x, (full - x).T @ x
    base = float((h.diagonal() / tokens).clamp(max=100 * (h.diagonal() / tokens).median()).mean())
    options = GptqOptions(correction=alpha)
    weight = weights(9, n, 3)
    expected = dense_gptq.corrected(
        weight.double().numpy(),
        h.double().numpy(),
        cross.double().numpy(),
        tokens,
        damp=0.01,
        ridge_base=base,
        alpha=alpha,
    )
    factor = factorize(h, tokens, options, cross=cross)
    assert factor.correction.data_ptr() == cross.data_ptr()  # no second matrix
    ours = (weight + weight @ factor.correction).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_correction_can_be_left_out():
    h, tokens = moments()
    cross = torch.ones_like(h)
    assert factorize(h, tokens, GptqOptions(correction=0.0), cross=cross).correction is None
    assert torch.equal(cross, torch.ones_like(h))


def test_mix_weighs_means_by_tokens():
    (h, n), (prior, many) = moments(tokens=50, seed=1), moments(tokens=4000, seed=2)
    mixed, tokens = mix(h, n, prior, many)
    k = 2 * len(h)
    torch.testing.assert_close(mixed / tokens, n / (n + k) * h / n + k / (n + k) * prior / many, rtol=1e-5, atol=1e-4)
    assert tokens == n + k
    assert mix(h, n, prior, 100)[1] == n + 100
    assert mix(h, n, prior, many, strength=7)[1] == n + 7
    assert mix(h, n, prior, 0) == (h, n)
    unseen, tokens = mix(torch.zeros_like(h), 0, prior, many)
    torch.testing.assert_close(unseen / tokens, prior / many)
    factor = factorize(torch.zeros_like(h), 0, GptqOptions(), prior=prior, prior_tokens=many)
    assert factor.mode == "full"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["hessian", "cross"])
def test_missing_numbers_are_refused(which, value):
    h, tokens = moments()
    cross = torch.zeros_like(h)
    (h if which == "hessian" else cross)[40, 90] = value
    with pytest.raises(NumericPolicyError, match="NaN"):
        factorize(h, tokens, GptqOptions(), cross=cross)


def test_wrong_forms_are_refused():
    h, tokens = moments()
    with pytest.raises(UsageError):
        factorize(h[:, :9], tokens, GptqOptions())
    with pytest.raises(UsageError):
        factorize(h, -1, GptqOptions())
    with pytest.raises(UsageError):
        factorize(h, tokens, GptqOptions(), cross=h[:9, :9])
    with pytest.raises(UsageError):
        factorize(h, tokens, GptqOptions(), prior=h[:9, :9], prior_tokens=9)
    h[4, 4] = -1
    with pytest.raises(NumericPolicyError, match="negative"):
        factorize(h, tokens, GptqOptions())
