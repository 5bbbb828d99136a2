import itertools
import random

import pytest

from kbvq.errors import ConfigError
from kbvq.method.bit_budget import Choice, allocate


@pytest.mark.parametrize("seed", range(4))
def test_allocation_is_the_best_of_all_that_fit(seed):
    draw = random.Random(seed)
    projections = [
        [Choice(size := draw.randint(100, 900), 1000 / size * draw.random()) for _ in range(3)] for _ in range(5)
    ]
    budget = draw.randint(2000, 3000)
    fitting = [
        picks
        for picks in itertools.product(range(3), repeat=5)
        if sum(projections[i][pick].num_bytes for i, pick in enumerate(picks)) <= budget
    ]

    def error(picks):
        return sum(projections[i][pick].error for i, pick in enumerate(picks))

    chosen = allocate(projections, budget, slack=1.0)
    assert tuple(chosen) in fitting
    assert error(chosen) == pytest.approx(min(map(error, fitting)))

    def used(picks):
        return sum(projections[i][pick].num_bytes for i, pick in enumerate(picks))

    filling = [picks for picks in fitting if used(picks) > 0.97 * budget]
    chosen = allocate(projections, budget, slack=0.03)
    assert filling and error(chosen) == pytest.approx(min(map(error, filling)))


def test_a_budget_that_no_choices_fill_is_approached():
    projections = [[Choice(100, 2.0), Choice(300, 1.0), Choice(900, 0.0)], [Choice(100, 1.0)]]
    assert allocate(projections, 800) == [1, 0]


def test_large_sizes_stay_within_the_budget():
    projections = [[Choice(10**9 + i, 3.0), Choice(2 * 10**9, 1.0 + i)] for i in range(6)]
    chosen = allocate(projections, 9 * 10**9 + 100, slack=1.0)
    assert sum(projections[i][pick].num_bytes for i, pick in enumerate(chosen)) <= 9 * 10**9 + 100
    assert chosen == [1, 1, 0, 0, 0, 0]  # the third 10^9 would be needed for a gain of 0


def test_budget_below_the_smallest_choices_is_refused():
    with pytest.raises(ConfigError, match="below the 200 bytes"):
        allocate([[Choice(100, 1.0)], [Choice(100, 1.0)]], 150)
