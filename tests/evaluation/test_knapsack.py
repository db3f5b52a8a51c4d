"""The exact search against every choice there is, with a known choice that is hardly worse than the best."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llm_quantize.evaluation.knapsack import knapsack


@pytest.mark.parametrize("seed", range(40))
def test_the_best_of_all_choices_is_found_whatever_the_price(seed: int) -> None:
    random = np.random.Generator(np.random.PCG64(seed))
    items = [[(int(random.integers(1, 40)), float(random.random())) for _ in range(4)] for _ in range(5)]
    choices = [
        (sum(items[item][one][0] for item, one in enumerate(choice)), choice)
        for choice in itertools.product(range(4), repeat=5)
    ]

    def cost(choice: tuple[int, ...] | list[int]) -> float:
        return sum(items[item][one][1] for item, one in enumerate(choice))

    budget = int(random.integers(min(size for size, _ in choices), 120))
    best = min(cost(choice) for size, choice in choices if size <= budget)
    for price in (0.0, 0.005, 0.02, 0.1):
        for known in (best * 1.0001, best * 1.3 + 0.1):
            found = knapsack(items, budget, price, known)
            assert found is not None
            assert cost(found) == pytest.approx(best, rel=1e-12)
            assert sum(items[item][one][0] for item, one in enumerate(found)) <= budget
        assert knapsack(items, budget, price, best) is None
