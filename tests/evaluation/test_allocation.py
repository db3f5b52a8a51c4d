"""Choosing types: optimal where a step ends, never over budget, never worse than one type for all."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_quantize.errors import ResourceError, UsageError
from llm_quantize.evaluation import knapsack
from llm_quantize.evaluation.allocation import (
    Target,
    allocate,
    bytes_of,
    choose,
    hull,
    level_types,
    padded,
)
from llm_quantize.evaluation.profile import measure_profile, plan_profile
from llm_quantize.evaluation.sensitivity import Profile, Sensitivity
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import Options, plan

from ..tiny_models import make_tiny
from .test_sensitivity import windows_of

LADDER = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
figures = st.lists(st.tuples(st.integers(1, 300), st.floats(0, 1, allow_nan=False)), min_size=1, max_size=len(LADDER))


def profile_of(tensors: list[list[tuple[int, float]]]) -> Profile:
    rows = tuple(
        Sensitivity(f"t{index}", qtype, 4.0, 32 * nbytes, kld, 0.01)
        for index, options in enumerate(tensors)
        for qtype, (nbytes, kld) in zip(LADDER, options, strict=False)
    )
    return Profile("m", "a", {"sha256": "t"}, None, rows)


def every(profile: Profile) -> list[tuple[int, float]]:
    """(bytes, KLD) of every assignment there is."""
    options = profile.by_tensor().values()
    return [
        (sum(padded(row.nbytes) for row in rows), sum(row.kld for row in rows)) for rows in itertools.product(*options)
    ]


@settings(max_examples=150, deadline=None)
@given(st.lists(figures, min_size=1, max_size=4), st.floats(0, 1))
def test_against_every_assignment(tensors: list[list[tuple[int, float]]], share: float) -> None:
    profile = profile_of(tensors)
    known = every(profile)
    least, most = min(size for size, _ in known), max(size for size, _ in known)
    budget = int(least + share * (most - least))
    found = allocate(profile, budget)
    assert found.nbytes <= budget
    chosen = {(row.tensor, row.qtype): row for row in profile.rows}
    rows = [chosen[pair] for pair in found.types.items()]
    assert sum(padded(row.nbytes) for row in rows) == found.nbytes
    assert found.kld == pytest.approx(sum(row.kld for row in rows))
    best = min(kld for size, kld in known if size <= budget)
    assert found.kld == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_a_search_without_end_keeps_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = profile_of([[(7, 0.5), (9, 0.3), (12, 0.05)], [(5, 0.4), (8, 0.22), (11, 0.2)], [(6, 0.6), (13, 0.1)]])
    known = every(profile)
    best = [min(kld for size, kld in known if size <= 32 * budget) for budget in range(18, 37)]
    assert [allocate(profile, 32 * budget).kld for budget in range(18, 37)] == pytest.approx(best)
    monkeypatch.setattr(knapsack, "STATES", 0)
    found = [allocate(profile, 32 * budget).kld for budget in range(18, 37)]
    assert all(have >= least - 1e-12 for have, least in zip(found, best, strict=True))
    assert found != pytest.approx(best), "steps and filling alone miss some"


@settings(max_examples=100, deadline=None)
@given(st.lists(figures, min_size=1, max_size=4))
def test_optimal_at_the_corners_of_the_hull(tensors: list[list[tuple[int, float]]]) -> None:
    """Spending exactly what all steps down to a slope spend, nothing of that size is better. Steps of one slope are
    taken together: which of equals comes first is not told."""
    profile = profile_of(tensors)
    known = every(profile)
    together: dict[float, int] = {}
    for rows in profile.by_tensor().values():
        for low, high in itertools.pairwise(hull(rows)):
            more = padded(high.nbytes) - padded(low.nbytes)
            slope = round((low.kld - high.kld) / more, 12)
            together[slope] = together.get(slope, 0) + more
    budget = sum(padded(hull(rows)[0].nbytes) for rows in profile.by_tensor().values())
    for more in [0, *(together[slope] for slope in sorted(together, reverse=True))]:
        budget += more
        best = min(kld for size, kld in known if size <= budget)
        assert allocate(profile, budget).kld == pytest.approx(best, abs=1e-6)


@given(figures)
def test_the_hull_is_convex_and_falling(options: list[tuple[int, float]]) -> None:
    rows = profile_of([options]).rows
    found = hull(rows)
    slopes = [(low.kld - high.kld) / (high.nbytes - low.nbytes) for low, high in itertools.pairwise(found)]
    assert all(slope > 0 for slope in slopes)
    assert slopes == sorted(slopes, reverse=True)
    assert min(row.kld for row in rows) == found[-1].kld
    assert min(row.nbytes for row in rows) == found[0].nbytes


def test_types_and_sizes_that_cannot_be() -> None:
    profile = profile_of([[(10, 0.5), (20, 0.2), (30, 0.1)]])
    assert allocate(profile, 10_000, ["q3_k"]).types == {"t0": "q3_k"}
    with pytest.raises(UsageError, match="none of the types"):
        allocate(profile, 10_000, ["q8_0"])
    with pytest.raises(ResourceError, match="does not fit"):
        allocate(profile, 319)
    assert allocate(profile, 320).types == {"t0": "q2_k"}
    for wrong in ({}, {"like": "Q4_K_M", "size": 5}):
        with pytest.raises(UsageError, match="one size"):
            Target(**wrong)


def test_an_error_beyond_measure_is_no_overflow() -> None:
    profile = profile_of([[(1, 0.5)], [(1, 0.5)]])
    wide = replace(profile, rows=tuple(replace(row, kld_sem=1e300) for row in profile.rows))
    assert allocate(wide, 10_000).kld_sem == pytest.approx(1e300 * 2**0.5)


def test_sizes_of_a_model(tmp_path: Path) -> None:
    """A recipe like a level is no larger than it; one of a size fits it; the predicted size is the planned one."""
    model = make_tiny("llama", tmp_path / "model", hidden_size=256, intermediate_size=256)
    source = open_source(str(model))
    with source.checkpoint:
        profile = measure_profile(plan_profile(source, windows_of(), ["q8_0", "q6_k", "q4_k", "q3_k", "q2_k"], None))
        (level,) = plan(str(model), levels=["Q4_K_M"])
        types = level_types(source, "Q4_K_M")
        assert types == {t.name: t.qtype for t in level.tensors if t.name in types}
        assert bytes_of(source, types) == sum(padded(t.nbytes) for t in level.tensors if t.name in types)
        weights = level.weights
        for target, most in (
            (Target(like="Q4_K_M"), level.size + 64),
            (Target(size=level.size), level.size),
            (Target(bpw=5.0), int(5.0 * weights / 8)),
        ):
            choice = choose(source, profile, target)
            options = Options(overrides=Overrides(recipe=choice.recipe))
            (planned,) = plan(str(model), levels=[choice.recipe.level], options=options)
            assert planned.size <= most
            assert planned.size >= 0.9 * most
            assert abs(planned.size - choice.size) < 512
        choice = choose(source, profile, Target(like="q4_k_m"))
        assert choice.recipe.name == "Q4_K_M-profiled"
        size, kld = choice.levels["Q4_K_M"]
        assert abs(size - level.size) < 512
        assert choice.allocation.kld <= kld
