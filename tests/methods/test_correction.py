"""How much of the correction serves text held back: the dense twin, what must come out, what must not be learnt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llm_quantize.methods import correction
from llm_quantize.methods.correction import (
    RIDGES,
    ROWS,
    UNTRIED,
    Correction,
    Part,
    decide,
    mean_square,
    moment,
    sampled,
)
from llm_quantize.methods.gptq_options import GptqOptions, held_back
from llm_quantize.methods.hessian import factorize

from ..oracles import dense_correction


def drawn(tokens: int, columns: int, seed: int, *, learnable: float, noise: float):
    """(own, full): inputs of a wide spectrum, and the source's, away from them by a map and by noise."""
    numbers = np.random.default_rng(seed)
    mixing = numbers.normal(size=(columns, columns)) / np.sqrt(columns) * np.geomspace(3, 0.1, columns)
    own = numbers.normal(size=(tokens, columns)) @ mixing.T
    moved = numbers.normal(size=(columns, columns)) / np.sqrt(columns)
    return own, own + learnable * own @ moved.T + noise * numbers.normal(size=own.shape)


def asked(own, full, weights, held: int) -> Correction:
    own, full, weights = (torch.from_numpy(values).float() for values in (own, full, weights))
    fit = len(own) - held
    parts = []
    for inputs, theirs in ((own[:fit], full[:fit]), (own[fit:], full[fit:])):
        parts.append(Part(inputs.T @ inputs, moment([(inputs, theirs, None)], weights), len(inputs)))
    return decide(*parts)


@pytest.mark.parametrize(("learnable", "noise"), [(0.2, 0.0), (0.2, 0.5), (0.05, 0.5), (0.02, 1.0)])
def test_it_is_what_the_dense_twin_decides(learnable: float, noise: float) -> None:
    own, full = drawn(400, 48, 1, learnable=learnable, noise=noise)
    weights = np.random.default_rng(2).normal(size=(30, 48))
    found = asked(own, full, weights, 100)
    share, ridge = dense_correction.decided(weights, own, full, 100)
    assert found.ridge == ridge
    assert found.share == pytest.approx(share, rel=1e-4)


def test_what_can_be_learnt_is_taken_whole_and_noise_is_not() -> None:
    weights = np.random.default_rng(2).normal(size=(30, 48))
    clear = asked(*drawn(4000, 48, 3, learnable=0.2, noise=0.0), weights, 1000)
    blurred = asked(*drawn(400, 48, 3, learnable=0.03, noise=1.0), weights, 100)
    nothing = [asked(*drawn(400, 48, seed, learnable=0.0, noise=1.0), weights, 100) for seed in range(10, 30)]
    assert clear.share > 0.97
    assert 0 < blurred.share < 0.7
    assert np.mean([one.share for one in nothing]) < 0.2
    assert any(one.share == 0 for one in nothing)


def test_less_text_beside_the_columns_wants_a_larger_ridge() -> None:
    weights = np.random.default_rng(2).normal(size=(30, 96))
    few, many = (asked(*drawn(n, 96, 5, learnable=0.2, noise=0.3), weights, n // 4) for n in (200, 8000))
    assert few.ridge > many.ridge


def test_inputs_that_do_not_differ_need_nothing() -> None:
    own, _ = drawn(200, 16, 1, learnable=0.0, noise=0.0)
    assert asked(own, own, np.eye(16), 50) == Correction(0.0, RIDGES[0])
    assert asked(0 * own, 0 * own, np.eye(16), 50) == Correction(0.0, RIDGES[0])


@pytest.mark.parametrize("seed", range(6))
def test_climbing_finds_the_best_of_all_ridges(seed: int) -> None:
    """Noise of many sizes: peaks at both ends of the ridges and between them."""
    own, full = drawn(300, 40, seed, learnable=0.05 * (1 + seed % 3), noise=(0.05, 0.3, 2.0)[seed % 3])
    weights = np.random.default_rng(seed).normal(size=(24, 40))
    found = asked(own, full, weights, 75)
    share, ridge = dense_correction.decided(weights, own, full, 75)
    assert (found.ridge, found.share) == (ridge, pytest.approx(share, rel=1e-3, abs=1e-6))


def test_what_is_held_back_is_summed_up_in_float32_a_few_tokens_at_a_time() -> None:
    """bfloat16 in many chunks, one channel far larger than the others: sums are exact, and copies do not grow."""
    own, full = (torch.from_numpy(one).bfloat16() for one in drawn(5000, 64, 9, learnable=0.2, noise=0.3))
    own[:, 3], full[:, 3] = own[:, 3] * 300, full[:, 3] * 300
    weights, largest = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)), 0
    exact = weights.double() @ ((full.double() - own.double()).T @ own.double())

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype == torch.float32:
                largest = max(largest, *found.shape)
            return found

    with Seen():
        chunks = zip(own.split(2000), full.split(2000), strict=True)
        found = moment([(*chunk, None) for chunk in chunks], weights)
    assert largest == 1024
    error = (found.double() - exact).abs().amax(0) / exact.abs().amax(0)
    assert error.max() < 1e-3


def test_tokens_count_as_much_as_is_said() -> None:
    """A token that counts twice is there twice, in any chunk."""
    own, full = (torch.from_numpy(one).float() for one in drawn(2500, 16, 9, learnable=0.2, noise=0.3))
    weights, twice = torch.eye(16)[:4], torch.arange(0, 2500, 7)
    counts = torch.ones(2500)
    counts[twice] = 2
    found = moment([(own, full, counts)], weights)
    rows = torch.cat([torch.arange(2500), twice])
    torch.testing.assert_close(found, moment([(own[rows], full[rows], None)], weights), rtol=1e-4, atol=1e-3)


def test_most_ridges_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def counted(known, held, ridge, mean, work):
        tried.append(ridge)
        return real(known, held, ridge, mean, work)

    real = correction._tried
    monkeypatch.setattr(correction, "_tried", counted)
    own, full = drawn(400, 48, 1, learnable=0.05, noise=0.5)
    found = asked(own, full, np.random.default_rng(2).normal(size=(30, 48)), 100)
    assert len(tried) == len(set(tried)) < len(RIDGES)
    assert found.ridge in tried


def test_the_share_and_the_ridge_are_what_is_applied() -> None:
    own, full = drawn(400, 24, 7, learnable=0.1, noise=0.2)
    weight = np.random.default_rng(2).normal(size=(5, 24))
    how = Correction(0.6, 0.3)
    inputs, away = torch.from_numpy(own).float(), torch.from_numpy(full - own).float()
    factor = factorize(inputs.T @ inputs, 400, GptqOptions(), cross=away.T @ inputs, correction=how)
    assert factor.correction is not None
    found = weight + weight @ factor.correction.numpy().astype(np.float64)
    np.testing.assert_allclose(found, dense_correction.corrected(weight, own, full, 0.6, 0.3), rtol=1e-4, atol=1e-5)
    untold = factorize(inputs.T @ inputs, 400, GptqOptions(), cross=away.T @ inputs).correction
    told = factorize(inputs.T @ inputs, 400, GptqOptions(), cross=away.T @ inputs, correction=UNTRIED).correction
    assert untold is not None
    assert torch.equal(untold, told)


def test_rows_that_tell_are_spread_over_all_matrices() -> None:
    assert sampled([3, 5]) == [[0, 1, 2], [0, 1, 2, 3, 4]]
    some = sampled([4096, 1024, 1024])
    assert [len(rows) for rows in some] == [170, 42, 42]
    assert some[1][:2] == [0, 24]
    assert sum(len(rows) for rows in sampled([7] * 1000)) == 1000  # one of each at least
    assert sum(len(rows) for rows in sampled([ROWS // 2, ROWS // 2])) == ROWS


def test_a_quarter_of_the_windows_is_held_back() -> None:
    assert [held_back(windows) for windows in (1, 3, 4, 48)] == [0, 0, 1, 12]


def test_outliers_do_not_set_the_ridge() -> None:
    squares = torch.ones(1000, dtype=torch.float64)
    squares[0], squares[1] = 1e9, 0.0
    assert mean_square(squares) == pytest.approx((998 + 100) / 999)
    assert mean_square(torch.zeros(4)) == 0.0
