"""Accumulators: equal to the obvious sums, the same bytes for any number of threads, and never silent about NaN."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from llm_quantize.calibration.statistics import BlockSums, memory_of, partial
from llm_quantize.errors import NumericPolicyError, UsageError
from llm_quantize.io.statistics_file import KINDS, StoredTap

DENSE = StoredTap("block.attention", 0, 48, 1, {"q.weight": None, "k.weight": None})
EXPERTS = StoredTap("block.experts", 0, 32, 4, {"gate.weight": None})
WINDOWS = 17


@pytest.fixture(scope="module")
def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    scales = torch.logspace(-3, 3, 48)
    return [torch.randn(70 + i, 48, generator=generator) * scales for i in range(WINDOWS)]


def collect(inputs: Sequence[torch.Tensor], threads: int, *, kinds: Sequence[str] = KINDS, early: int = 0) -> BlockSums:
    """Expert 3 is never reached, expert 0 not by every window."""
    sums = BlockSums([DENSE, EXPERTS], kinds, early_bytes=early)

    def window(index: int) -> None:
        with sums.window(index) as sink:
            rows = inputs[index]
            for expert in (2, 0, 1) if index % 3 else (1, 2):
                sink(EXPERTS, expert, rows[expert : 30 + expert * index, :32])
            sink(EXPERTS, 3, rows[:0, :32])
            sink(DENSE, 0, rows)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(window, range(len(inputs))))
    return sums


def test_sums_are_the_obvious_ones(inputs: list[torch.Tensor]) -> None:
    found = collect(inputs, 1).arrays()
    every = torch.cat(inputs).double().numpy()
    assert found["block.attention.counts"].tolist() == [len(every)]
    np.testing.assert_allclose(found["block.attention.sum_squares"][0], (every**2).sum(0), rtol=1e-13)
    np.testing.assert_allclose(found["block.attention.sums"][0], every.sum(0), rtol=1e-11)
    np.testing.assert_array_equal(found["block.attention.absmax"][0], np.abs(every).max(0))
    hessian = found["block.attention.hessian"][0]
    bound = np.sqrt(np.outer((every**2).sum(0), (every**2).sum(0)))
    assert (np.abs(hessian - every.T @ every) / bound).max() < 1e-6
    np.testing.assert_array_equal(hessian, hessian.T)
    one = np.concatenate([rows[1 : 31 + i - 1, :32].double().numpy() for i, rows in enumerate(inputs)])
    np.testing.assert_allclose(found["block.experts.sum_squares"][1], (one**2).sum(0), rtol=1e-13)


def test_an_expert_that_no_token_reached_is_all_zero(inputs: list[torch.Tensor]) -> None:
    found = collect(inputs, 2).arrays()
    assert found["block.experts.counts"][3] == 0
    assert all(not found[f"block.experts.{suffix}"][3].any() for suffix in ("sum_squares", "sums", "absmax", "hessian"))
    assert (found["block.experts.counts"][:3] > 0).all()


@pytest.mark.parametrize(("threads", "early"), [(2, 0), (4, 0), (3, 30_000), (8, 1 << 30)])
def test_any_number_of_threads_gives_the_same_bytes(inputs: list[torch.Tensor], threads: int, early: int) -> None:
    alone, together = collect(inputs, 1).arrays(), collect(inputs, threads, early=early).arrays()
    assert alone.keys() == together.keys()
    for name in alone:
        assert alone[name].tobytes() == together[name].tobytes(), name


def test_windows_are_added_in_their_order(inputs: list[torch.Tensor]) -> None:
    """Window 0 ends last; its float64 sums still come first, and early windows beyond the bound wait."""
    kinds = ("imatrix",)
    sums = BlockSums([DENSE], kinds, early_bytes=8 * 48)
    begun, release = threading.Event(), threading.Event()

    def first() -> None:
        with sums.window(0) as sink:
            sink(DENSE, 0, inputs[0])
            begun.set()
            assert release.wait(20)

    def later(index: int) -> None:
        with sums.window(index) as sink:
            sink(DENSE, 0, inputs[index])

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(first)]
        assert begun.wait(20)
        jobs += [pool.submit(later, index) for index in (1, 2, 3)]
        done = {job for job in jobs[1:] if not _times_out(job)}
        assert len(done) == 1  # one early window fits, the others hold their threads
        assert sums.windows == 0
        with pytest.raises(ValueError, match="window 0 is missing"):
            sums.arrays()
        release.set()
        for job in jobs:
            job.result(20)
    expected = np.zeros(48)
    for rows in inputs[:4]:
        expected += partial(kinds, rows).sum_squares
    assert sums.arrays()["block.attention.sum_squares"][0].tobytes() == expected.tobytes()


def _times_out(job: object) -> bool:
    try:
        job.result(0.3)
    except TimeoutError:
        return True
    return False


def test_a_failure_wakes_those_that_wait(inputs: list[torch.Tensor]) -> None:
    sums = BlockSums([DENSE], ("imatrix",), early_bytes=0)
    begun = threading.Event()

    def first() -> None:
        with sums.window(0) as sink:
            begun.set()
            while not waiting():
                pass
            sink(DENSE, 0, torch.full((3, 48), float("nan")))

    def waiting() -> int:
        return len(sums._condition._waiters)

    def second() -> None:
        with sums.window(1) as sink:
            sink(DENSE, 0, inputs[1])

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(first)]
        assert begun.wait(20)
        jobs.append(pool.submit(second))
        for job in jobs:
            with pytest.raises(NumericPolicyError, match="sample 0"):
                job.result(20)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_named(inputs: list[torch.Tensor], value: float, kind: str) -> None:
    rows = inputs[0].clone()
    rows[65, 7] = value
    with pytest.raises(NumericPolicyError, match="sample 12, token 65, channel 7") as caught:
        partial([kind], rows, tap="model.layers.3.self_attn", window=12)
    assert caught.value.tensor == "model.layers.3.self_attn"
    assert caught.value.exit_code == 9


def test_large_activations_are_finite() -> None:
    """Squares beyond float32 are no error, but a float32 Hessian cannot hold them."""
    rows = torch.full((4, 8), 1e20)
    found = partial(("imatrix", "absmax"), rows)
    np.testing.assert_allclose(found.sum_squares, 4 * np.float64(np.float32(1e20)) ** 2, rtol=1e-15)
    with pytest.raises(NumericPolicyError, match="overflow"):
        partial(("hessian",), rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_as_they_are(inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    rows = inputs[0].to(dtype)
    wide = rows.double().numpy()
    found = partial(KINDS, rows)
    np.testing.assert_allclose(found.sum_squares, (wide**2).sum(0), rtol=1e-13)
    np.testing.assert_array_equal(found.absmax, np.abs(wide).max(0))
    assert found.hessian is not None
    assert found.hessian.dtype == np.float32


def test_dead_channels_are_zero(inputs: list[torch.Tensor]) -> None:
    rows = inputs[0].clone()
    rows[:, 5] = 0
    found = partial(KINDS, rows)
    assert found.sum_squares[5] == found.sums[5] == found.absmax[5] == 0
    assert not found.hessian[5].any()
    assert not found.hessian[:, 5].any()


def test_only_what_was_asked_for_is_kept(inputs: list[torch.Tensor]) -> None:
    assert set(collect(inputs, 1, kinds=("imatrix",)).arrays()) == {
        f"{tap}.{suffix}" for tap in ("block.attention", "block.experts") for suffix in ("counts", "sum_squares")
    }
    with pytest.raises(UsageError, match="no such statistic"):
        BlockSums([DENSE], ("imatrix", "median"))


@pytest.mark.parametrize("kinds", [("imatrix",), ("absmax",), ("hessian",), KINDS])
def test_memory_is_foreseen(inputs: list[torch.Tensor], kinds: tuple[str, ...]) -> None:
    foreseen = memory_of([DENSE, EXPERTS], kinds)
    assert foreseen.totals == sum(a.nbytes for a in collect(inputs, 1, kinds=kinds).arrays().values())
    window = sum(
        values.nbytes
        for tap in (DENSE, EXPERTS)
        for _ in range(tap.matrices)
        for values in partial(kinds, inputs[0][:, : tap.columns]).arrays()
    )
    assert foreseen.window == window


def test_a_window_counts_once(inputs: list[torch.Tensor]) -> None:
    sums = collect(inputs[:2], 1)
    with pytest.raises(ValueError, match="added before"), sums.window(1) as sink:
        sink(DENSE, 0, inputs[0])
