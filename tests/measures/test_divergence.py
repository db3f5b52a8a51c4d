"""Perplexity and divergence: known answers, and the dense twin."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llm_quantize.errors import NumericPolicyError, UsageError
from llm_quantize.measures.amounts import decimals
from llm_quantize.measures.divergence import Comparison, compare, pair
from llm_quantize.measures.perplexity import cut_windows, log_softmax, perplexity, scored
from llm_quantize.measures.uncertainty import figure, mean_and_sem
from tests.oracles import divergence as oracle


def make_logits(seed: int, windows: int = 3, context: int = 8, vocabulary: int = 11) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (windows, context, vocabulary)).astype(np.float32)


def make_windows(seed: int, windows: int = 3, context: int = 8, vocabulary: int = 11) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, (windows, context)).astype(np.int32)


@pytest.mark.parametrize("context", [7, 8])
def test_equals_the_dense_twin(context: int) -> None:
    base = make_logits(1, context=context)
    other = base + 0.3 * make_logits(2, context=context)
    windows = make_windows(3, context=context)
    expected = oracle.divergence(base.tolist(), other.tolist(), windows.tolist())
    found = compare(iter(base), iter(other), windows).to_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-10, abs=1e-13), name


def test_known_answer_two_tokens() -> None:
    # p = (3/4, 1/4), q = (1/4, 3/4) at every position: KLD = ln 3 / 2; the tops differ; Δp of token 0 is -1/2.
    windows = np.zeros((2, 6), np.int32)
    base = np.tile(np.float32([math.log(3), 0]), (2, 6, 1))
    other = np.tile(np.float32([0, math.log(3)]), (2, 6, 1))
    found = compare(base, other, windows)
    assert found.tokens == 2 * 2
    assert found.kld == pytest.approx(math.log(3) / 2, rel=1e-6)
    assert found.kld_max == pytest.approx(math.log(3) / 2, rel=1e-6)
    assert found.reference_perplexity == pytest.approx(4 / 3, rel=1e-6)
    assert found.perplexity == pytest.approx(4, rel=1e-6)
    assert found.ln_ratio == pytest.approx(math.log(3), rel=1e-6)
    assert found.rms_delta_p == pytest.approx(0.5, rel=1e-6)
    assert found.same_top == 0.0
    assert found.kld_sem == pytest.approx(0, abs=1e-12)
    assert found.acceptance == pytest.approx(1 / 4 + 1 / 4, rel=1e-6)
    assert found.clusters == 2


def test_a_model_against_itself() -> None:
    logits, windows = make_logits(4), make_windows(5)
    found = compare(logits, logits + np.float32(7), windows)  # a constant added to all logits changes nothing
    assert found.kld == pytest.approx(0, abs=1e-7)
    assert found.ln_ratio == pytest.approx(0, abs=1e-6)
    assert found.same_top == 1.0
    assert found.acceptance == pytest.approx(1, abs=1e-6)
    assert found.acceptance <= 1
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-6)


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    found = perplexity(np.zeros((3, 8, 11), np.float32), make_windows(6))
    assert found.value == pytest.approx(11, rel=1e-12)
    assert found.tokens == 3 * 3
    assert found.sem == pytest.approx(0, abs=1e-6)


def test_a_token_that_the_source_rules_out_adds_nothing() -> None:
    windows = np.zeros((1, 6), np.int32)
    base = np.tile(np.float32([0, 0, -np.inf]), (1, 6, 1))
    other = np.zeros((1, 6, 3), np.float32)
    found = compare(base, other, windows)
    assert found.kld == pytest.approx(math.log(3 / 2), rel=1e-6)
    assert found.acceptance == pytest.approx(2 / 3, rel=1e-6)  # a third of the drafts is what the source rules out


def test_a_token_that_both_rule_out() -> None:
    logits = np.tile(np.float32([0, 0, -np.inf]), (1, 6, 1))
    assert compare(logits, logits, np.zeros((1, 6), np.int32)).kld == 0


def test_a_token_that_only_the_candidate_rules_out_is_refused() -> None:
    windows = np.zeros((1, 6), np.int32)
    base = np.zeros((1, 6, 3), np.float32)
    other = np.tile(np.float32([0, 0, -np.inf]), (1, 6, 1))
    with pytest.raises(NumericPolicyError, match="no finite divergence"):
        compare(base, other, windows)


def test_only_the_second_half_is_scored() -> None:
    windows, base, other = make_windows(7), make_logits(8), make_logits(9)
    expected = compare(base, other, windows)
    assert expected.clusters == 3
    changed = other.copy()
    changed[:, :4] += make_logits(10)[:, :4]  # the first half
    changed[:, 7] = 0  # the last position predicts a token that is not in the window
    assert compare(base, changed, windows) == expected
    changed[:, 4] = 0
    assert compare(base, changed, windows) != expected


def test_windows_follow_llama_perplexity() -> None:
    windows = cut_windows(list(range(23)), 5, bos=99)
    assert windows.tolist() == [
        [99, 1, 2, 3, 4],
        [99, 6, 7, 8, 9],
        [99, 11, 12, 13, 14],
        [99, 16, 17, 18, 19],
    ]
    assert cut_windows(list(range(23)), 5)[1, 0] == 5
    where, targets = scored(windows[0])
    assert (where.start, where.stop) == (2, 4)
    assert targets.tolist() == [3, 4]


def test_a_limit_keeps_windows_over_the_whole_text() -> None:
    assert cut_windows(list(range(100)), 10, limit=4)[:, 0].tolist() == [0, 20, 50, 70]
    assert len(cut_windows(list(range(100)), 10, limit=400)) == 10


@pytest.mark.parametrize(("count", "context", "limit"), [(4, 5, None), (9, 3, None), (9, 4, 0)])
def test_too_short_texts_are_refused(count: int, context: int, limit: int | None) -> None:
    with pytest.raises(UsageError):
        cut_windows(list(range(count)), context, limit=limit)


def test_vocabularies_of_different_size_are_refused() -> None:
    with pytest.raises(UsageError, match="vocabulary"):
        compare(make_logits(1), make_logits(2, vocabulary=12), make_windows(3))


def test_as_many_logits_as_windows() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare(make_logits(1), make_logits(2, windows=2), make_windows(3))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = make_logits(1)
    logits[1, 5, 3] = bad
    with pytest.raises(NumericPolicyError):
        compare(make_logits(2), logits, make_windows(3))


def test_log_softmax_of_huge_logits() -> None:
    assert np.exp(log_softmax(np.float32([[3e4, 3e4, 0]]))).tolist() == [[0.5, 0.5, 0.0]]


def scored_pair(first: np.ndarray, second: np.ndarray, base: np.ndarray, windows: np.ndarray) -> list[Comparison]:
    found = [Comparison(), Comparison()]
    for comparison, logits in zip(found, (first, second), strict=True):
        for window, reference, candidate in zip(windows, base, logits, strict=True):
            where, targets = scored(window)
            comparison.add(reference[where], candidate[where], targets)
    return found


def test_two_candidates_equal_the_dense_twin() -> None:
    base, windows = make_logits(1), make_windows(3)
    first, second = base + 0.3 * make_logits(2), base + 0.2 * make_logits(4)
    expected = oracle.paired(base.tolist(), first.tolist(), second.tolist(), windows.tolist())
    found = pair(scored_pair(first, second, base, windows), 0, 1).to_dict()
    assert found.keys() == {"first", "second", *expected}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_a_paired_error_is_smaller_than_the_errors_apart() -> None:
    """Two candidates with nearly the same error, which varies much from token to token."""
    base, windows = make_logits(1, windows=40), make_windows(3, windows=40)
    first = base + 0.5 * make_logits(2, windows=40)
    second = first + 0.02 * make_logits(4, windows=40)
    comparisons = scored_pair(first, second, base, windows)
    found = pair(comparisons, 0, 1)
    apart = math.hypot(*(comparison.result().kld_sem for comparison in comparisons))
    assert found.kld_difference_sem < apart / 3
    assert found.kld_difference == pytest.approx(
        comparisons[0].result().kld - comparisons[1].result().kld, rel=1e-9, abs=1e-12
    )


def test_pairs_need_the_same_tokens() -> None:
    base, windows = make_logits(1), make_windows(3)
    one, _ = scored_pair(base, base, base, windows)
    other, _ = scored_pair(base, base, make_logits(2), windows)
    with pytest.raises(UsageError, match="same tokens"):
        pair([one, other], 0, 1)
    with pytest.raises(UsageError, match="same tokens"):
        pair([one, scored_pair(base[:2], base[:2], base[:2], windows[:2])[0]], 0, 1)


def test_a_perplexity_beyond_float64_is_infinite() -> None:
    logits = np.zeros((1, 8, 4), np.float32)
    broken = logits + np.float32([0, 0, 0, 1e6])
    found = compare(logits, broken, np.zeros((1, 8), np.int32))
    assert math.isinf(found.perplexity)
    assert found.kld > 1e5
    assert math.isinf(perplexity(broken, np.zeros((1, 8), np.int32)).value)


def test_tokens_of_one_window_are_not_independent() -> None:
    """Each value said four times over: the error is that of the values, not half of it."""
    values = np.random.default_rng(11).normal(size=30)
    mean, error = mean_and_sem(values, np.arange(30))
    assert error == pytest.approx(values.std() / math.sqrt(29), rel=1e-12)
    assert mean_and_sem(np.repeat(values, 4), np.repeat(np.arange(30), 4)) == pytest.approx((mean, error), rel=1e-12)
    assert mean_and_sem(np.repeat(values, 4), np.arange(120))[1] < 0.51 * error


def test_the_error_covers_the_truth_where_windows_differ() -> None:
    """Of windows with a level of their own, 19 in 20 intervals of two errors hold the mean; half of those do that take
    tokens for independent."""
    random = np.random.default_rng(12)
    ids = np.repeat(np.arange(40), 50)
    held = {"clustered": 0, "tokens": 0}
    for _ in range(400):
        values = np.repeat(random.normal(size=40), 50) + random.normal(size=2000)
        for name, groups in (("clustered", ids), ("tokens", np.arange(2000))):
            mean, error = mean_and_sem(values, groups)
            held[name] += abs(mean) < 2 * error
    assert 0.92 < held["clustered"] / 400 < 0.98
    assert held["tokens"] / 400 < 0.6


def test_one_window_tells_no_error() -> None:
    base, windows = make_logits(1, windows=1), make_windows(3, windows=1)
    first, second = base + 0.3 * make_logits(2, windows=1), base + 0.2 * make_logits(4, windows=1)
    found = compare(base, first, windows)
    assert found.clusters == 1
    assert found.kld > 0
    errors = [value for name, value in found.to_dict().items() if name.endswith("_sem")]
    assert len(errors) == 7
    assert all(map(math.isnan, errors))
    both = pair(scored_pair(first, second, base, windows), 0, 1)
    assert both.clusters == 1
    assert all(math.isnan(value) for name, value in both.to_dict().items() if name.endswith("_sem"))
    assert figure(found.kld, found.kld_sem) == decimals(found.kld, 5)
    assert figure(0.25, None) == "0.25000"
    assert figure(-0.25, 0.125, 3, signed=True) == "-0.250 ± 0.125"
    assert figure(0.02621, 0.000758) == "0.02621 ± 0.00076"
    assert figure(92.02, 0.0884, 2) == "92.02 ± 0.09"
    assert figure(0.02621, 9.64e-06) == "0.02621 ± 0.00000964"
    assert figure(9.25e-06, 9.64e-08) == "0.00000925 ± 0.00000010"
    assert figure(4.56e-08, 1.2e-08) == "4.56e-08 ± 1.20e-08"


def test_parts_of_a_window_are_one_cluster() -> None:
    base, windows = make_logits(1, context=16), make_windows(3, context=16)
    other = base + 0.3 * make_logits(2, context=16)
    expected, parts, apart = compare(base, other, windows), Comparison(), Comparison()
    for index, window in enumerate(windows):
        where, targets = scored(window)
        for start in range(0, len(targets), 3):
            rows = slice(start, start + 3)
            parts.add(base[index][where][rows], other[index][where][rows], targets[rows], window=index)
            apart.add(base[index][where][rows], other[index][where][rows], targets[rows])
    assert parts.result() == expected
    assert apart.result().clusters == 9
    assert apart.result().kld_sem != expected.kld_sem


def test_pairs_need_the_same_windows() -> None:
    base, windows = make_logits(1), make_windows(3)
    one, _ = scored_pair(base, base, base, windows)
    other = Comparison()
    other.add_scores(one.scores())
    with pytest.raises(UsageError, match="same tokens"):
        pair([one, other], 0, 1)
