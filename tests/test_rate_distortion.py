import math

import pytest
import torch

from kbvq.method.rate_distortion import bits_above_limit, shannon_distortion, weighted_error, weighted_spectrum


def test_white_gaussian_has_distortion_four_to_the_minus_rate():
    assert shannon_distortion(torch.full((32,), 2.0), 2.0) == pytest.approx(32 * 2.0 / 16, rel=1e-9)


def test_two_levels_are_filled_as_by_hand():
    # κ = (16, 1), water level 4: only the first component is coded, at ½ log₂ 4 = 1 bit, shared by two components.
    assert shannon_distortion(torch.tensor([16.0, 1.0]), 0.5) == pytest.approx(4.0 + 1.0, rel=1e-9)


def test_null_directions_cost_nothing():
    spectrum = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert shannon_distortion(spectrum, 0.5) == pytest.approx(4.0**-2, rel=1e-9)
    assert shannon_distortion(torch.zeros(4), 2.0) == 0.0


def test_spectrum_of_commuting_moments_is_the_product():
    spectrum = weighted_spectrum(torch.diag(torch.tensor([4.0, 9.0])), torch.diag(torch.tensor([3.0, 1.0])))
    assert spectrum.tolist() == pytest.approx([9.0, 12.0])


def test_weighted_error_is_the_mean_squared_output_error():
    generator = torch.Generator().manual_seed(0)
    inputs, difference = torch.randn(400, 5, generator=generator), torch.randn(7, 5, generator=generator)
    explicit = (inputs.double() @ difference.double().T).square().sum() / 400 / 7
    assert weighted_error(difference, inputs.T @ inputs / 400) == pytest.approx(explicit.item(), rel=1e-5)


def test_bits_above_limit():
    assert bits_above_limit(4.0, 1.0) == pytest.approx(1.0)
    assert bits_above_limit(0.0, 1.0) == 0.0
    assert bits_above_limit(math.pi, math.pi) == 0.0
