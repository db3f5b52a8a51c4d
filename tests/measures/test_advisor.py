"""The one rule: what is taken for which machine, and that no estimate wins against a measurement."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quantize.measures.advisor import GOOD, INDISTINGUISHABLE, PRIORITIES, USABLE, Offer, advise, beaten_by

OFFER = st.builds(
    Offer,
    size=st.integers(900, 1100),
    kld=st.sampled_from([0.0, 0.001, 0.0019, 0.01, 0.04, 0.1, 0.3, math.inf, math.nan]),
    measured=st.booleans(),
    fits=st.booleans(),
    split=st.booleans(),
    cost=st.floats(1, 9),
    timed=st.booleans(),
)
LEVELS = (Offer(80, 0.0002), Offer(60, 0.0016), Offer(50, 0.006), Offer(40, 0.02), Offer(45, 0.04), Offer(30, 0.3))


def test_the_smallest_that_is_indistinguishable() -> None:
    advice = advise(LEVELS)
    assert (advice.take, advice.larger, advice.smaller, advice.reason) == (1, 0, 2, "clean")
    assert advice.front == (5, 3, 2, 1, 0)  # 4 is larger and worse than 3


def test_where_none_is_what_loses_least() -> None:
    advice = advise(LEVELS[2:])
    assert (advice.take, advice.reason, advice.larger) == (0, "least", None)
    small = [replace(offer, fits=offer.size < 45) for offer in LEVELS]
    advice = advise(small)
    assert (advice.take, advice.reason, advice.larger, advice.smaller) == (3, "least", 2, 5)
    assert advise([replace(offer, fits=False) for offer in LEVELS]).take is None
    assert advise([]).take is None


def test_an_estimate_never_wins_against_a_measurement() -> None:
    guesses = (Offer(40, 0.00001, measured=False, estimated=True), Offer(45, 0.0, measured=False))
    measured = (Offer(50, 0.01), Offer(30, 0.2))
    advice = advise((*measured, *guesses))
    assert (advice.take, advice.front, advice.untried) == (0, (1, 0), 2)
    assert beaten_by((*measured, *guesses))[:2] == [None, None]
    # Where no measured file fits, what is known otherwise decides.
    advice = advise((*(replace(one, fits=False) for one in measured), *guesses))
    assert advice.take == 2


def test_an_estimate_counts_twice_against_a_limit() -> None:
    one = Offer(40, 0.6 * INDISTINGUISHABLE, measured=False, estimated=True)
    assert advise([one]).reason == "least"
    assert advise([replace(one, estimated=False)]).reason == "clean"


def test_whole_on_the_gpu_before_split() -> None:
    offers = (Offer(80, 0.0002, split=True), Offer(50, 0.03), Offer(40, 0.04))
    assert (advise(offers).take, advise(offers).reason) == (1, "whole")
    poor = (offers[0], replace(offers[1], kld=0.06))
    assert (advise(poor).take, advise(poor).reason) == (0, "clean")


def test_priorities() -> None:
    offers = (Offer(80, 0.001, cost=9), Offer(50, 0.03, cost=3), Offer(30, 0.1, cost=1), Offer(20, 0.3, cost=0.5))
    assert [advise(offers, priority).take for priority in PRIORITIES] == [0, 1, 2]
    timed = (replace(offers[0], timed=True), *offers[1:])
    assert advise(timed, "speed").take == 0  # measured speeds win over computed ones
    assert [advise(offers[3:], priority).reason for priority in PRIORITIES] == ["least"] * 3
    assert GOOD < USABLE


@given(st.lists(OFFER, max_size=7), st.sampled_from(PRIORITIES))
def test_the_sentence_of_the_rule_holds(offers: list[Offer], priority: str) -> None:
    advice = advise(offers, priority)
    known = [offer for offer in offers if offer.fits and offer.kld < math.inf]
    assert (advice.take is None) == (not known)
    if advice.take is None:
        return
    taken = offers[advice.take]
    assert taken.fits
    pool = [offer for offer in known if offer.measured] or known
    assert taken.measured == pool[0].measured
    if priority == "quality" and not any(offer.split for offer in pool):
        clean = [offer for offer in pool if offer.judged < INDISTINGUISHABLE]
        # A thousandth of size more is no reason for a worse file.
        assert taken.size <= 1.001 * min((offer.size for offer in clean), default=math.inf)
        assert not clean or taken.judged < INDISTINGUISHABLE
        assert clean or taken.kld == min(offer.kld for offer in pool)


@given(st.lists(OFFER, max_size=8))
def test_what_is_beaten_is_beaten_by_something_on_the_front(offers: list[Offer]) -> None:
    front = advise([replace(offer, fits=True, measured=True) for offer in offers]).front
    known = [index for index, offer in enumerate(offers) if offer.kld < math.inf]
    for index in set(known) - set(front):
        one = offers[index]
        assert any(offers[j].size <= one.size * 1.001 and offers[j].kld <= one.kld for j in known if j != index)


@pytest.mark.parametrize("kld", [math.nan, math.inf])
def test_what_nobody_measured_is_not_taken(kld: float) -> None:
    assert advise([Offer(10, kld), Offer(20, 0.3)]).take == 1
    assert advise([Offer(10, kld)]).take is None
