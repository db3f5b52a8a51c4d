"""Grids whose codes are chosen eight at a time: the words of the dense twin, and every stage as on any other grid."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from llm_quantize.errors import UsageError
from llm_quantize.grids import grid_type, pack_ggml, unpack_ggml
from llm_quantize.grids.ggml_words import WORDS
from llm_quantize.methods.gptq import GptqOptions, factorize, losses, solve
from llm_quantize.methods.tile import word_metrics
from tests.grids.small_grids import inputs, weights

from ..oracles import dense_gptq, dense_words

PLAIN = GptqOptions(feedback=False, sweeps=0, refit=False, correction=0.0, compare=False)
FEEDBACK = dataclasses.replace(PLAIN, feedback=True)
SAFE = 2e-6


def problem(rows, seed, *, columns=256, tokens=1500, options=FEEDBACK):
    x = inputs(columns, tokens, seed)
    return weights(rows, columns, seed + 1), factorize(x.T @ x, tokens, options, joint=8), x.T @ x


def table_of(grid):
    """Of a grid: scales and shifts (rows, n), entries (E, size) and signs (P, 8) as the dense twin has them."""
    scale = grid.scale().double().repeat_interleave(grid.group, 1).numpy()
    shift = grid.offset().double().repeat_interleave(grid.group, 1).numpy()
    signs = None if grid.book.signs is None else grid.book.signs.T.double().numpy()
    return scale, shift, grid.book.entries.T.double().numpy(), signs


@pytest.mark.parametrize("order", ["descending", "natural"])
@pytest.mark.parametrize("qtype", WORDS)
def test_feedback_gives_the_words_of_the_dense_twin(qtype, order):
    options = dataclasses.replace(FEEDBACK, order=order)
    weight, factor, h = problem(5, 3, options=options)
    found = solve(weight, grid_type(qtype), factor, options)
    table = table_of(grid_type(qtype).fit(weight, factor.importance))
    exact = dense_gptq.condition(h.numpy(), 1500, damp=options.damp, shrink=options.shrink)
    mass = h.diagonal().double().reshape(-1, 8).sum(1)
    first = torch.argsort(mass, descending=True, stable=True) * 8 if order == "descending" else torch.arange(0, 256, 8)
    sequence = (first[:, None] + torch.arange(8)).flatten().numpy()
    values, margins = dense_words.feed_back(weight.double().numpy(), exact, sequence, *table)
    same = np.isclose(found.grid.decode(found.codes).numpy(), values, rtol=1e-5, atol=1e-7).all(axis=1)
    assert same[margins > SAFE].all()
    assert same.sum() >= 3


@pytest.mark.parametrize("qtype", WORDS)
def test_descent_gives_the_words_of_the_dense_twin(qtype):
    options = dataclasses.replace(PLAIN, sweeps=2)
    weight, factor, _ = problem(5, 7, options=options)
    found = solve(weight, grid_type(qtype), factor, options)
    kind = grid_type(qtype)
    grid = kind.fit(weight, factor.importance)
    start = grid.decode(grid.nearest(weight, factor.hessian.diagonal())).double().numpy()
    exact = factor.hessian.double().numpy()
    values, margins = dense_words.descend(weight.double().numpy(), exact, start, *table_of(grid), 2)
    same = np.isclose(found.grid.decode(found.codes).numpy(), values, rtol=1e-5, atol=1e-7).all(axis=1)
    assert same[margins > SAFE].all()
    assert same.sum() >= 3


@pytest.mark.parametrize("qtype", ["iq2_xs", "iq2_s", "iq1_s"])
def test_turns_find_nearly_what_trying_every_word_finds(qtype):
    book = grid_type(qtype).plain(weights(1, 256, 1), None)[0].book
    entries = book.entries.T.double().numpy()
    signs = None if book.signs is None else book.signs.T.double().numpy()
    rng, spread = np.random.default_rng(5), np.abs(entries).mean()
    paid = free = 0.0
    for _ in range(12):
        root = rng.normal(size=(8, 12))
        metric, target = np.eye(8) + 0.3 * root @ root.T, rng.normal(size=8) * spread
        word, _ = dense_words.word_of(metric, target, entries, signs, target)
        paid += dense_words.costs(metric, target, word[None])[0]
        free += dense_words.cheapest(metric, target, entries, signs)
    assert free <= paid <= 1.12 * free


def test_what_later_columns_make_up_for_is_the_inverse_of_the_inverse():
    _, factor, _ = problem(1, 2, columns=64)
    h = factor.hessian.double()[factor.order][:, factor.order]
    for word, metric in enumerate(word_metrics(factor)):
        rest = slice(8 * word, None)
        wanted = torch.linalg.inv(torch.linalg.inv(h[rest, rest])[:8, :8])
        torch.testing.assert_close(metric.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.diagonal().max()))


@pytest.mark.parametrize("qtype", WORDS)
def test_no_stage_after_feedback_loses_more(qtype):
    stages = [{"feedback": True}, {"sweeps": 1}, {"sweeps": 3}, {"refit": True, "alternations": 1}]
    options, results = PLAIN, []
    for stage in stages:
        options = dataclasses.replace(options, **stage)
        weight, factor, _ = problem(17, 4, options=options)
        results.append(solve(weight, grid_type(qtype), factor, options).loss)
    for before, after in itertools.pairwise(results):
        assert (after <= before * (1 + 1e-5)).all()
    assert results[-1].sum() < 0.98 * results[0].sum()


@pytest.mark.parametrize("qtype", WORDS)
def test_words_lose_half_of_what_rounding_loses_and_their_bytes_hold_them(qtype):
    weight, factor, _ = problem(18, 8, columns=512, tokens=3000)
    kind = grid_type(qtype)
    found = solve(weight, kind, factor, GptqOptions())
    assert (found.loss <= found.plain_loss).all()
    assert found.loss.sum() < 0.5 * found.plain_loss.sum()
    np.testing.assert_allclose(losses(weight, found.grid, found.codes, factor).numpy(), found.loss.numpy(), rtol=1e-4)
    grid, codes = unpack_ggml(qtype, pack_ggml(qtype, found.grid, found.codes), 512)
    assert torch.equal(codes, found.codes)
    assert torch.equal(grid.decode(codes), found.grid.decode(found.codes))
    part = solve(weight[5:12], kind, factor, GptqOptions())
    assert torch.equal(part.codes, found.codes[5:12])
    assert torch.equal(part.grid.scale(), found.grid.scale()[5:12])


def odd_hessians():
    x = inputs(256, 500, 9)
    dead = x.clone()
    dead[:, 10:30] = 0
    massive = x * 1e-3
    massive[0] = 100
    return {
        "dead channels": (dead.T @ dead, 500),
        "one token": (x[:1].T @ x[:1], 1),
        "massive activation": (massive.T @ massive, 500),
        "nothing seen": (torch.zeros(256, 256), 0),
        "huge": (x.T @ x * 1e25, 500),
        "tiny": (x.T @ x * 1e-25, 500),
    }


@pytest.mark.parametrize("name", odd_hessians())
@pytest.mark.parametrize("qtype", ["iq2_xxs", "iq3_s", "iq1_m"])
def test_odd_hessians_give_finite_codes_never_worse_than_plain(name, qtype):
    h, tokens = odd_hessians()[name]
    weight = weights(20, 256, 3)
    weight[3] = 0
    found = solve(weight, grid_type(qtype), factorize(h, tokens, GptqOptions(), joint=8), GptqOptions())
    assert torch.isfinite(found.grid.decode(found.codes)).all()
    assert (found.loss <= found.plain_loss).all()
    assert not found.grid.decode(found.codes)[3].any()
    assert pack_ggml(qtype, found.grid, found.codes).shape[0] == 20


def test_an_order_that_parts_words_is_refused():
    x = inputs(256, 600, 2)
    weight = weights(3, 256, 1)
    with pytest.raises(UsageError, match="whole words"):
        solve(weight, grid_type("iq2_xs"), factorize(x.T @ x, 600, GptqOptions()), GptqOptions())
    natural = GptqOptions(order="natural")
    assert solve(weight, grid_type("iq2_xs"), factorize(x.T @ x, 600, natural), natural).codes.shape == (3, 256)


def test_an_order_by_words_serves_scalar_grids_too():
    weight, factor, _ = problem(9, 5, options=GptqOptions())
    found = solve(weight, grid_type("q2_k"), factor, GptqOptions())
    assert found.loss.sum() < 0.7 * found.plain_loss.sum()
