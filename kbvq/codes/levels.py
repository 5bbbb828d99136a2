"""The levels of a trellis code: what its states stand for.

Weights of language models have heavier tails than a Gaussian source, most of all in the channels with the largest
inputs: weights of 5 to 30 deviations are rare, but on a code whose levels end at 3.1 they cost more than all others
together. So the levels are unit-Gaussian quantiles z stretched to z exp(h z²/2), Tukey's h distribution, with
h = tail / 100 chosen for each projection (level_choice): its core hardly changes, and it costs no bits.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor


@cache
def _stretched(tail: int) -> tuple[float, ...]:
    quantiles = (NormalDist().inv_cdf((4 * j + 1) / 1022) for j in range(256))
    return tuple(z * math.exp(tail / 200 * z * z) for z in quantiles)


def levels(tail: int = 0) -> Tensor:
    """The 256 reproduction levels, ascending and antisymmetric: float32, every one exact in float16.

    Unit-Gaussian quantiles at (4j + 1) / 1022, a little farther into the tails than the midpoints (2j + 1) / 512, which
    pays at 3 and 4 bits, stretched by `tail`.
    """
    return torch.tensor(_stretched(tail)).half().float()
