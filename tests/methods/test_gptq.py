"""The solver: codes of the dense twin, each stage no worse than the one before, and the odd Hessians."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from llm_quantize.errors import NumericPolicyError, UsageError
from llm_quantize.grids import grid_type
from llm_quantize.methods import gptq
from llm_quantize.methods.gptq import GptqOptions, factorize, solve
from llm_quantize.methods.tile import Tile, padded_rows
from tests.grids.small_grids import IQ4, SmallType, inputs, value_table, weights

from ..oracles import dense_gptq

TYPES = {
    "symmetric": SmallType(),
    "zero points": SmallType(levels=tuple(map(float, range(8))), zero=True),
    "offsets": SmallType(levels=tuple(map(float, range(4))), offset=True, per_span=2),
    "table": SmallType(levels=IQ4, per_span=2),
    "bfloat16": SmallType(storage=torch.bfloat16),
}
PLAIN = GptqOptions(feedback=False, sweeps=0, refit=False, correction=0.0)
FEEDBACK = dataclasses.replace(PLAIN, feedback=True)
SAFE = 2e-4  # rows with a choice closer than this share of a gap may go either way in float32


def problem(kind, seed, *, columns=200, rows=21, tokens=900, options=FEEDBACK):
    x = inputs(columns, tokens, seed)
    weight = weights(rows, columns, seed + 1)
    factor = factorize(x.T @ x, tokens, options)
    return TYPES[kind], weight, factor


def dense(hessian, tokens, options):
    return dense_gptq.condition(hessian.numpy(), tokens, damp=options.damp, shrink=options.shrink)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("order", ["descending", "natural"])
@pytest.mark.parametrize("kind", TYPES)
def test_feedback_gives_the_codes_of_the_dense_twin(kind, order, seed):
    options = dataclasses.replace(FEEDBACK, order=order, compare=False)
    columns, tokens = 160 + 40 * seed, (300, 900, 2000, 5000)[seed]
    x = inputs(columns, tokens, seed)
    weight = weights(21, columns, seed + 1)
    h = x.T @ x
    found = solve(weight, TYPES[kind], factorize(h, tokens, options), options)
    grid = TYPES[kind].fit(weight, None)
    diagonal = h.diagonal().double().numpy()
    sequence = np.argsort(-diagonal, kind="stable") if order == "descending" else np.arange(columns)
    codes, margins = dense_gptq.feed_back(weight.numpy(), dense(h, tokens, options), sequence, value_table(grid))
    safe = margins > SAFE
    assert safe.mean() > 0.6
    np.testing.assert_array_equal(found.codes.numpy()[safe], codes[safe])
    assert torch.equal(found.grid.d, grid.d)


@pytest.mark.parametrize("kind", TYPES)
def test_descent_gives_the_codes_of_the_dense_twin(kind):
    options = dataclasses.replace(PLAIN, sweeps=2, compare=False)
    type_, weight, factor = problem(kind, 5, options=options)
    found = solve(weight, type_, factor, options)
    grid = type_.fit(weight, None)
    table, h = value_table(grid), factor.hessian.double().numpy()
    start = np.abs(table - weight.double().numpy()[:, :, None]).argmin(2)
    codes, margins = dense_gptq.descend(weight.double().numpy(), h, start, table, 2)
    safe = margins > SAFE
    assert safe.mean() > 0.3
    np.testing.assert_array_equal(found.codes.numpy()[safe], codes[safe])


@pytest.mark.parametrize("kind", TYPES)
def test_refit_solves_the_least_squares_of_the_dense_twin(kind):
    type_, weight, factor = problem(kind, 6)
    type_ = dataclasses.replace(type_, storage=torch.float32)
    tile = Tile.make(padded_rows(weight), type_.fit(weight, None))
    tile.feed_back(factor)
    assert gptq.refit(tile, factor)
    grid, codes = tile.grid, tile.row_codes().long()
    level = grid.levels.double()[codes]
    if grid.z is not None:
        level -= grid.z.double().repeat_interleave(grid.group, 1)
    parts = [grid.u.double().repeat_interleave(grid.group, 1) * level]
    if grid.v is not None:
        parts.append(-grid.v.double().repeat_interleave(grid.group, 1))
    member = torch.arange(weight.shape[1])[:, None] // grid.span == torch.arange(grid.d.shape[1])
    bases = torch.cat([part[:, :, None] * member for part in parts], 2).numpy()
    h = factor.hessian.double().numpy()
    best = dense_gptq.refit(weight.double().numpy(), h, bases)
    found = torch.cat([grid.d] if grid.m is None else [grid.d, grid.m], 1).double().numpy()
    values = [np.einsum("rnk,rk->rn", bases, x) for x in (best, found)]
    least, ours = (dense_gptq.losses(weight.double().numpy(), h, value) for value in values)
    np.testing.assert_allclose(ours, least, rtol=2e-4)


def stage_losses(kind, seed, **more):
    """Losses after one stage after the other."""
    stages = [
        {"feedback": True},
        {"sweeps": 1},
        {"sweeps": 3},
        {"refit": True, "alternations": 1},
        {"refit": True, "alternations": 3},
    ]
    options = dataclasses.replace(PLAIN, compare=False, **more)
    type_, weight, factor = problem(kind, seed, options=options)
    results = []
    for stage in stages:
        options = dataclasses.replace(options, **stage)
        results.append(solve(weight, type_, factor, options).loss)
    return results


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", TYPES)
def test_no_stage_after_feedback_loses_more(kind, seed):
    results = stage_losses(kind, seed)
    for before, after in itertools.pairwise(results):
        assert (after <= before * (1 + 1e-5)).all()
    assert results[-1].sum() < 0.98 * results[0].sum()


@pytest.mark.parametrize("kind", TYPES)
def test_feedback_loses_less_than_rounding(kind):
    type_, weight, factor = problem(kind, 1)
    rounded = solve(weight, type_, factor, PLAIN)
    fed = solve(weight, type_, factor, FEEDBACK)
    assert fed.loss.sum() < 0.75 * rounded.loss.sum()


def test_losses_are_those_of_the_decoded_values():
    type_, weight, factor = problem("offsets", 2)
    found = solve(weight, type_, factor, GptqOptions())
    values = found.grid.decode(found.codes).double().numpy()
    expected = dense_gptq.losses(weight.double().numpy(), factor.hessian.double().numpy(), values)
    np.testing.assert_allclose(found.loss.numpy(), expected, rtol=1e-4)


def test_rows_that_plain_codes_serve_better_keep_them():
    class Spoiled(SmallType):
        def fit(self, weight, importance, *, refine=True):
            grid = super().fit(weight, importance)
            d = grid.d.clone()
            d[::2] *= 20
            return dataclasses.replace(grid, d=d)

    type_ = Spoiled(levels=TYPES["offsets"].levels, offset=True, per_span=2)
    _, weight, factor = problem("offsets", 3)
    grid = SmallType.fit(type_, weight, None)
    plain = (grid, grid.nearest(weight))
    object.__setattr__(type_, "plain", lambda weight, importance: plain)
    found = solve(weight, type_, factor, FEEDBACK)
    assert found.plain_rows == len(weight[::2])
    assert torch.equal(found.codes[::2], plain[1][::2])
    assert torch.equal(found.grid.decode(found.codes)[::2], grid.decode(plain[1])[::2])
    assert (found.codes[1::2] != plain[1][1::2]).any(1).all()
    assert torch.equal(found.loss[::2], found.plain_loss[::2])
    assert (found.loss <= found.plain_loss).all()
    assert found.clipped < 0.2


@pytest.mark.parametrize("kind", TYPES)
def test_any_rows_alone_get_the_codes_of_the_whole(kind):
    torch.set_num_threads(1)
    type_, weight, factor = problem(kind, 4, rows=300)
    whole = solve(weight, type_, factor, GptqOptions())
    for start, stop in ((0, 256), (256, 300), (7, 8), (100, 300), (13, 77)):
        part = solve(weight[start:stop], type_, factor, GptqOptions())
        assert torch.equal(part.codes, whole.codes[start:stop])
        assert torch.equal(part.grid.d, whole.grid.d[start:stop])
        assert torch.equal(part.loss, whole.loss[start:stop])


def odd_hessians():
    n = 160
    x = inputs(n, 500, 9)
    dead = x.clone()
    dead[:, 10:30] = 0
    rank_one = torch.randn(1, n, generator=torch.Generator().manual_seed(2))
    massive = x * 1e-3
    massive[0] = rank_one[0] * 100
    return {
        "dead channels": (dead.T @ dead, 500),
        "fewer tokens than columns": (x[:40].T @ x[:40], 40),
        "one token": (x[:1].T @ x[:1], 1),
        "rank one": (rank_one.T @ rank_one, 1000),
        "massive activation": (massive.T @ massive, 500),
        "nothing seen": (torch.zeros(n, n), 0),
        "huge": (x.T @ x * 1e25, 500),
        "tiny": (x.T @ x * 1e-25, 500),
    }


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("name", odd_hessians())
def test_odd_hessians_give_finite_codes_never_worse_than_plain(name, shrink):
    h, tokens = odd_hessians()[name]
    options = GptqOptions(shrink=shrink)
    for type_ in (TYPES["offsets"], TYPES["symmetric"]):
        weight = weights(20, 160, 3)
        weight[3] = 0
        factor = factorize(h, tokens, options)
        found = solve(weight, type_, factor, options)
        assert torch.isfinite(found.grid.decode(found.codes)).all()
        assert (found.loss <= found.plain_loss).all()
        exact = factor.hessian.double().numpy()
        values = found.grid.decode(found.codes).double().numpy()
        plain_grid, plain_codes = type_.plain(weight, None)
        plain = dense_gptq.losses(weight.double().numpy(), exact, plain_grid.decode(plain_codes).double().numpy())
        ours = dense_gptq.losses(weight.double().numpy(), exact, values)
        assert (ours <= plain * 1.001 + 1e-30).all()


def test_dead_channels_keep_their_weights():
    n = 160
    x = inputs(n, 500, 9)
    x[:, 10:30] = 0
    weight = weights(8, n, 3)
    found = solve(weight, TYPES["symmetric"], factorize(x.T @ x, 500, FEEDBACK), FEEDBACK)
    grid = TYPES["symmetric"].fit(weight, None)
    assert torch.equal(found.codes[:, 10:30], grid.nearest(weight)[:, 10:30])


REAL = (
    "q1_0",
    "q2_0",
    "tq1_0",
    "tq2_0",
    "mxfp4",
    "nvfp4",
    "q2_k",
    "q3_k",
    "q4_k",
    "q6_k",
    "q4_0",
    "q5_1",
    "iq4_nl",
    "iq4_xs",
    "int4_g128",
    "int3_g64_asym",
    "int8",
)


@pytest.mark.parametrize("qtype", REAL)
def test_every_real_grid_gains_and_keeps_rows_apart(qtype):
    type_ = grid_type(qtype)
    x = inputs(512, 3000, 8)
    factor = factorize(x.T @ x, 3000, GptqOptions())
    assert type_.joint == 1
    weight = weights(18, 512, 9)
    found = solve(weight, type_, factor, GptqOptions())
    assert (found.loss <= found.plain_loss).all()
    assert found.loss.sum() < 0.7 * found.plain_loss.sum()
    part = solve(weight[5:12], type_, factor, GptqOptions())
    assert torch.equal(part.codes, found.codes[5:12])
    assert torch.equal(part.grid.scale(), found.grid.scale()[5:12])
    values = found.grid.decode(found.codes).double().numpy()
    exact = dense_gptq.losses(weight.double().numpy(), factor.hessian.double().numpy(), values)
    np.testing.assert_allclose(found.loss.numpy(), exact, rtol=1e-3)


def test_the_correction_moves_the_target():
    n, tokens = 160, 2000
    x = inputs(n, tokens, 3)
    full = x + 0.3 * x @ weights(n, n, 4) + 0.05 * inputs(n, tokens, 6)
    options = GptqOptions()
    weight = weights(16, n, 5)
    h, cross = x.T @ x, (full - x).T @ x
    wanted = full.double() @ weight.double().T
    errors = []
    for c in (None, cross):
        factor = factorize(h, tokens, options, cross=None if c is None else c.clone())
        found = solve(weight, SmallType(levels=tuple(map(float, range(-8, 8)))), factor, options)
        got = x.double() @ found.grid.decode(found.codes).double().T
        errors.append(float((wanted - got).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_zero_weights_and_one_row():
    type_, _, factor = problem("offsets", 0)
    found = solve(torch.zeros(1, 200), type_, factor, GptqOptions())
    assert not found.grid.decode(found.codes).any()
    assert found.loss.shape == (1,)


def test_sixteen_bit_weights_are_their_float32_values():
    type_, weight, factor = problem("symmetric", 0)
    half = weight.to(torch.bfloat16)
    assert torch.equal(
        solve(half, type_, factor, GptqOptions()).codes, solve(half.float(), type_, factor, GptqOptions()).codes
    )


def test_wrong_weights_are_refused():
    type_, weight, factor = problem("symmetric", 0)
    for bad in (weight[:, :180], weight[0], weight[:0]):
        with pytest.raises(UsageError):
            solve(bad, type_, factor, GptqOptions())
    with pytest.raises(UsageError):
        solve(weight, dataclasses.replace(type_, group=64), factor, GptqOptions())
    for value in (float("nan"), float("inf")):
        broken = weight.clone()
        broken[2, 7] = value
        with pytest.raises(NumericPolicyError):
            solve(broken, type_, factor, GptqOptions())


@pytest.mark.parametrize(
    "wrong",
    [
        {"damp": 0.0},
        {"damp": float("nan")},
        {"order": "random"},
        {"sweeps": -1},
        {"alternations": -1},
        {"correction": 2.0},
    ],
)
def test_options_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UsageError):
        GptqOptions(**wrong)
