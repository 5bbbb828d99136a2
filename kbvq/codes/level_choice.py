"""Which levels of a trellis code suit a projection's weights: the error of values by their size, foreseen."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kbvq.codes.levels import levels
from kbvq.codes.trellis import TrellisCode

TAILS = tuple(range(0, 51, 2))
"""Hundredths of h that are tried; the last level lies at 3.1 for 0, at 34 for 50. Steps of two put it within 5 % of any
weight, so that one on a massive activation loses almost nothing."""

_LOWEST, _RARE, _FAR, _HIGHEST = -6, 3, 5, 12
_STEPS, _FAR_STEPS = 4, 64
_RARE_BIN, _FAR_BIN = (_RARE - _LOWEST) * _STEPS, (_FAR - _LOWEST) * _STEPS
NUM_BINS = _FAR_BIN + (_HIGHEST - _FAR) * _FAR_STEPS
"""Values are counted by their squares, from 2^_LOWEST to 2^_HIGHEST, in _STEPS bins an octave and from 2^_FAR on in
_FAR_STEPS."""

_AT_ONCE = 1 << 22  # values counted
_SIMULATED = 8, 2048  # Gaussian sequences and their length
_PLANTED, _SPACING = 48, 16  # values of each bin from _RARE_BIN to _FAR_BIN, one in so many Gaussian ones


def value_histogram(values: Tensor, row_mass: Tensor, column_mass: Tensor) -> Tensor:
    """How the error's weight is spread over the sizes of values, each in deviations of its column: float64 [bins].

    values: [rows, columns] float32. row_mass: [rows], column_mass: [columns]; a value of row r and column c counts
    row_mass_r column_mass_c deviation_c², which is what an error of so many deviations costs.
    """
    found = torch.zeros(NUM_BINS, dtype=torch.float64, device=values.device)
    variances = values.square().mean(0).clamp_min(torch.finfo(torch.float32).tiny)
    cost, step = column_mass * variances, max(1, _AT_ONCE // values.shape[1])
    for rows, mass in zip(values.split(step), row_mass.split(step), strict=True):
        costs = (mass[:, None] * cost).flatten().double()
        found += torch.bincount(_bins(rows.square() / variances).flatten(), costs, minlength=NUM_BINS)
    return found


def best_tail(bits: int, histogram: Tensor) -> tuple[int, float]:
    """(tail, mean squared error in deviations) of the levels that code values of that `value_histogram` best at so many
    bits per value with 2^12 states."""
    share = histogram.double().cpu() / histogram.sum().clamp_min(1e-300).item()
    errors = _errors(bits) @ share
    best = int(errors.argmin())
    return TAILS[best], errors[best].item()


def _bins(squares: Tensor) -> Tensor:
    """Number of the bin of each squared value: the exponent of a float32 and the first bits of its fraction."""
    bits = squares.float().contiguous().view(torch.int32)
    near, far = (
        (bits >> 24 - steps.bit_length()) - (127 + first) * steps
        for first, steps in ((_LOWEST, _STEPS), (_FAR, _FAR_STEPS))
    )
    return torch.where(near < _FAR_BIN, near.clamp_(min=0), far.clamp_(0, NUM_BINS - 1 - _FAR_BIN) + _FAR_BIN).long()


@cache
def _errors(bits: int) -> Tensor:
    """Mean squared error of values by tail and bin, float64 [tails, bins].

    Of values up to _RARE from Gaussian sequences; of those up to _FAR planted into such, as there are hardly any. What
    lies farther out is so rare that its neighbours give way: it gets the nearest level.
    """
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(_SIMULATED, generator=generator)
    planted = torch.randn(_PLANTED, _FAR_BIN - _RARE_BIN, _SPACING, generator=generator)
    places = torch.arange(_FAR_BIN - _RARE_BIN) + torch.rand(planted.shape[:2], generator=generator)
    signs = torch.randint(2, places.shape, generator=generator) * 2 - 1
    planted[..., 0] = (2.0 ** (_RARE + places / _STEPS)).sqrt() * signs
    octaves = 2.0 ** torch.arange(_FAR, _HIGHEST)[:, None]
    far = (octaves * (1 + (torch.arange(_FAR_STEPS) + 0.5) / _FAR_STEPS)).flatten().sqrt().double()
    found = []
    for tail in TAILS:
        code = TrellisCode(bits, tail=tail)
        near, rare = (_mean_errors(code, values) for values in (plain, planted.flatten(1)))
        nearest = (far[:, None] - levels(tail).double()).abs().amin(1).square()
        found.append(torch.cat([near[:_RARE_BIN], rare[_RARE_BIN:_FAR_BIN], nearest]))
    return torch.stack(found)


def _mean_errors(code: TrellisCode, values: Tensor) -> Tensor:
    """Of values [num_sequences, length] by bin, float64."""
    bins = _bins(values.square()).flatten()
    wrong = (values - code.decode(code.encode(values))).square().flatten().double()
    return torch.bincount(bins, wrong, minlength=NUM_BINS) / torch.bincount(bins, minlength=NUM_BINS).clamp_min(1)
