"""Rates for all projections of a model under one budget of bytes: the least predicted error that fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kbvq.errors import ConfigError

_UNITS = 1 << 17  # the budget is divided into so many units; a choice costs at most one unit more than its bytes


@dataclass(frozen=True)
class Choice:
    """One way to store a projection: its bytes on disk and its predicted error, in units that all projections share."""

    num_bytes: int
    error: float


def allocate(projections: Sequence[Sequence[Choice]], budget: int, *, slack: float = 0.01) -> list[int]:
    """Index of the choice for each projection so that the sum of errors is least among those whose bytes fill the
    budget but for the share `slack`; if there are none, among those that come nearest to it from below.

    At most 256 choices a projection. A multiple-choice knapsack, solved exactly by dynamic programming over the bytes
    in steps of budget / 2^17. Raises ConfigError when even the smallest choices do not fit.
    """
    least = sum(min(choice.num_bytes for choice in choices) for choices in projections)
    unit = max(1.0, budget / _UNITS)
    sizes = [[math.ceil(choice.num_bytes / unit) for choice in choices] for choices in projections]
    capacity = int(budget // unit)
    # best[c]: least error of the projections so far with exactly c units.
    best = torch.full((capacity + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    taken = []
    for choices, units in zip(projections, sizes, strict=True):
        after = torch.full_like(best, torch.inf)
        choice_of = torch.zeros(capacity + 1, dtype=torch.uint8)
        for number, (choice, size) in enumerate(zip(choices, units, strict=True)):
            if size <= capacity:
                with_it = best[: capacity + 1 - size] + choice.error
                better = with_it < after[size:]
                after[size:][better] = with_it[better]
                choice_of[size:][better] = number
        best = after
        taken.append(choice_of)
    reached = torch.isfinite(best).nonzero().flatten()
    if not len(reached):
        raise ConfigError(f"the budget of {budget} bytes is below the {least} bytes of the lowest rates; raise --bits")
    # The most that can be filled may be below the budget less its slack; what lies within half a slack of it will do.
    floor = min(math.ceil(capacity * (1 - slack)), int(reached[-1] - capacity * slack / 2))
    left = max(floor, 0) + int(best[max(floor, 0) :].argmin())
    chosen = []
    for choice_of, units in zip(reversed(taken), reversed(sizes), strict=True):
        chosen.append(int(choice_of[left]))
        left -= units[chosen[-1]]
    return chosen[::-1]
