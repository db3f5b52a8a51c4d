"""The loops over words: every SIMD level equals the torch twin bit for bit; odd numbers; arguments checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_quantize import kernels
from llm_quantize.grids.ggml_words import WORDS, book_of
from llm_quantize.kernels import _native, feedback, words
from llm_quantize.kernels.reference import words as reference_words


def problem(qtype, columns, rows, seed, *, diagonal=False):
    """(grid, book, H (n, n), metrics, coupling, weight (n, R))."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g)

    levels, group = WORDS[qtype].levels(), 16
    groups = -(-columns // group)
    scale = random(groups, rows).abs() / float(levels.abs().mean())
    scale[torch.rand(groups, rows, generator=g) < 0.05] = 0.0
    scale[0, 0], scale[-1, -1] = 1e-40, -0.3
    shift = scale * 0.125 if WORDS[qtype].shifted else None
    grid = feedback.TileGrid.make(scale, shift, (torch.arange(columns) // group).to(torch.int32), levels)
    root = random(columns, columns)
    hessian = torch.eye(columns) if diagonal else root @ root.T / columns + torch.eye(columns)
    hessian = (hessian + hessian.T) / 2
    metrics = torch.stack([hessian[a : a + 8, a : a + 8] for a in range(0, columns, 8)]).contiguous()
    coupling = random(columns + 3, columns + 5)[:columns, :columns] * 0.2  # a slice of a larger matrix
    return grid, book_of(qtype), hessian, metrics, coupling * (not diagonal), random(columns, rows)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("qtype", ["iq2_xxs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_m"])
@pytest.mark.parametrize(("columns", "rows"), [(128, 32), (8, 16)])
def test_native_feedback_equals_its_twin_bit_for_bit(level, qtype, columns, rows, diagonal):
    grid, book, _, metrics, coupling, weight = problem(qtype, columns, rows, columns, diagonal=diagonal)
    target = weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for module in (words, reference_words):
        t, d = target.clone(), torch.full_like(weight, 7.0)
        codes, counts = torch.full(weight.shape, 255, dtype=torch.uint8), torch.arange(rows, dtype=torch.int32)
        module.feedback(grid, book, coupling, metrics, weight, t, d, codes, counts)
        results.append((codes, d, counts))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert int(results[0][0].max()) < len(grid.levels)


def descent(qtype, columns, rows, seed, *, diagonal=False):
    """(grid, book, H, weight, H d, d, codes), the words being the nearest ones."""
    grid, book, hessian, metrics, coupling, weight = problem(qtype, columns, rows, seed, diagonal=diagonal)
    residual, codes = torch.empty_like(weight), torch.empty(weight.shape, dtype=torch.uint8)
    counts = torch.zeros(rows, dtype=torch.int32)
    for start in range(0, columns, 128):
        here = slice(start, start + 128)
        part = metrics[start // 8 : (start + 128) // 8]
        none = torch.zeros_like(coupling[here, here])
        loop = words.feedback
        loop(
            grid.columns(here),
            book,
            none,
            part,
            weight[here],
            weight[here].clone(),
            residual[here],
            codes[here],
            counts,
        )
    return grid, book, hessian, weight, hessian @ residual, residual, codes


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("qtype", ["iq2_xs", "iq2_s", "iq3_xxs", "iq1_s"])
@pytest.mark.parametrize(("columns", "rows"), [(144, 16), (8, 16)])
def test_native_descent_equals_its_twin_bit_for_bit(level, qtype, columns, rows, diagonal):
    grid, book, hessian, weight, *state = descent(qtype, columns, rows, columns + 1, diagonal=diagonal)
    results = []
    for module in (words, reference_words):
        own = [values.clone() for values in state]
        results.append([*own, module.descend(grid, book, hessian, weight, *own, 3)])
    ours, theirs = results
    assert ours.pop() == theirs.pop()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if columns > 30 and not diagonal:
        before = (state[0].double() * state[1]).sum(0)
        after = (ours[0].double() * ours[1]).sum(0)
        assert (after <= before * (1 + 1e-5)).all()
        assert after.sum() < 0.98 * before.sum()
        torch.testing.assert_close(ours[0], hessian @ ours[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("qtype", ["iq2_xs", "iq3_s", "iq1_s"])
def test_words_at_their_optimum_stay(level, qtype):
    grid, book, hessian, weight, *state = descent(qtype, 64, 16, 3)
    words.descend(grid, book, hessian, weight, *state, 100)
    before = [values.clone() for values in state]
    assert words.descend(grid, book, hessian, weight, *state, 1) == 0
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_infinite_and_missing_numbers_stay_inside_the_arrays(level):
    specials = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, 0.0, 1e-45])
    for qtype in ("iq2_xxs", "iq3_s", "iq1_s"):
        grid, book, hessian, metrics, coupling, weight = problem(qtype, 64, 16, 4)
        target = weight.clone()
        target[::3] = specials[torch.arange(16) % 6]
        residual, codes = torch.empty_like(weight), torch.full(weight.shape, 255, dtype=torch.uint8)
        metrics[1] = float("nan")
        words.feedback(
            grid, book, coupling, metrics, weight, target, residual, codes, torch.zeros(16, dtype=torch.int32)
        )
        assert int(codes.max()) < len(grid.levels)
        state = [torch.full((64, 16), float("nan")), weight.clone(), codes]
        words.descend(grid, book, hessian, weight, *state, 2)
        assert int(codes.max()) < len(grid.levels)


def arguments(loop):
    """What the native ``loop`` takes."""
    grid, book, hessian, metrics, coupling, _ = problem("iq2_xs", 64, 16, 1)
    down = loop == "descend_words"
    common = {
        "level": kernels.simd_level(),
        "scale": (grid.scale.T if down else grid.scale).contiguous().numpy(),
        "inverse": (grid.inverse.T if down else grid.inverse).contiguous().numpy(),
        "offset": None,
        "group": grid.group.numpy(),
        "levels": grid.levels.numpy(),
        "edges": grid.edges,
        "entries": book.entries.numpy(),
        "entry_codes": book.codes.numpy(),
        "signs": book.signs.numpy(),
    }
    shape = (16, 64) if down else (64, 16)
    state = {"weight": np.zeros(shape, np.float32), "residual": np.zeros(shape, np.float32)}
    more = {"codes": np.zeros(shape, np.uint8), "counts": np.zeros(16, np.int32)}
    if down:
        own = {"hessian": hessian.numpy(), "gradient": np.zeros(shape, np.float32), "sweeps": 1}
    else:
        own = {"coupling": coupling.numpy(), "metrics": metrics.numpy(), "target": np.zeros(shape, np.float32)}
    return common | state | more | own


BOTH = ("feed_words", "descend_words")


@pytest.mark.parametrize(
    ("loop", "name", "wrong"),
    [
        *((loop, "entries", np.zeros((8, 24), np.float32)) for loop in BOTH),
        *((loop, "entries", np.zeros((5, 512), np.float32)) for loop in BOTH),
        *((loop, "entry_codes", np.full((8, 512), 6, np.uint8)) for loop in BOTH),
        *((loop, "entry_codes", np.zeros((8, 256), np.uint8)) for loop in BOTH),
        *((loop, "signs", np.ones((4, 128), np.float32)) for loop in BOTH),
        *((loop, "signs", np.ones((8, 1), np.float32)) for loop in BOTH),
        *((loop, "group", (np.arange(64) // 4).astype(np.int32)) for loop in BOTH),
        *((loop, "group", np.full(64, 4, np.int32)) for loop in BOTH),
        *((loop, "counts", np.zeros(15, np.int32)) for loop in BOTH),
        *((loop, "residual", np.zeros((16, 16), np.float32)) for loop in BOTH),
        ("feed_words", "metrics", np.zeros((7, 8, 8), np.float32)),
        ("feed_words", "metrics", np.zeros((8, 8, 7), np.float32)),
        ("feed_words", "target", np.zeros((64, 15), np.float32)),
        ("feed_words", "coupling", np.zeros((63, 64), np.float32)),
        ("descend_words", "hessian", np.zeros((63, 64), np.float32)),
        ("descend_words", "gradient", np.zeros((16, 63), np.float32)),
        ("descend_words", "codes", np.full((16, 64), 6, np.uint8)),
    ],
)
def test_arguments_that_do_not_fit_are_refused(loop, name, wrong):
    found = arguments(loop)
    getattr(_native, loop)(**found)
    with pytest.raises(ValueError, match=r"."):
        getattr(_native, loop)(**found | {name: wrong})
