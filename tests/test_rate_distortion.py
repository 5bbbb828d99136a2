import math

import pytest
import torch

from kbvq.method.rate_distortion import (
    bits_above_limit,
    row_moment,
    shannon_distortion,
    weighted_error,
    weighted_spectrum,
)


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
    assert spectrum.tolist() == pytest.approx([9.0, 12.0], rel=1e-5)


def test_spectrum_of_moments_that_do_not_commute_or_lack_rank():
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    second, rows = (factor @ factor.T for factor in factors)
    expected = torch.linalg.eigvals(second @ rows).real.sort().values
    assert weighted_spectrum(second, rows).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert not weighted_spectrum(second, torch.zeros(6, 6)).any()


def test_row_moment_is_shrunk_by_the_variance_of_its_entries():
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double()
    moment, off = rows.T @ rows / 7, ~torch.eye(5, dtype=torch.bool)
    variance = sum(((torch.outer(row, row) - moment)[off] ** 2).sum() for row in rows) / 7**2
    expected = moment * (1 - min(1.0, (variance / (moment[off] ** 2).sum()).item()))
    torch.testing.assert_close(row_moment(rows)[off], expected[off])
    torch.testing.assert_close(row_moment(rows).diagonal(), moment.diagonal())


def test_few_rows_have_the_limit_of_the_distribution_that_they_are_from():
    """96 rows of 256 columns, white but for the columns' lengths: the limit of the plain moment is bits too low."""
    generator = torch.Generator().manual_seed(0)
    lengths, second_moment = torch.rand(256, generator=generator) + 0.5, torch.eye(256)
    rows = torch.randn(96, 256, generator=generator) * lengths
    truth = shannon_distortion(lengths.square(), 2.0)
    shrunk = shannon_distortion(weighted_spectrum(second_moment, row_moment(rows)), 2.0)
    plain = shannon_distortion(weighted_spectrum(second_moment, rows.T @ rows / 96), 2.0)
    assert abs(bits_above_limit(truth, shrunk)) < 0.05
    assert bits_above_limit(truth, plain) > 1


def test_many_rows_keep_their_correlations():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator).double()
    rows = torch.randn(20000, 8, generator=generator).double() @ mixing
    torch.testing.assert_close(row_moment(rows), mixing.T @ mixing, rtol=0.1, atol=0.3)


def test_weighted_error_is_the_mean_squared_output_error():
    generator = torch.Generator().manual_seed(0)
    inputs, difference = torch.randn(400, 5, generator=generator), torch.randn(7, 5, generator=generator)
    explicit = (inputs.double() @ difference.double().T).square().sum() / 400 / 7
    assert weighted_error(difference, inputs.T @ inputs / 400) == pytest.approx(explicit.item(), rel=1e-5)


def test_bits_above_limit():
    assert bits_above_limit(4.0, 1.0) == pytest.approx(1.0)
    assert bits_above_limit(0.0, 1.0) == 0.0
    assert bits_above_limit(math.pi, math.pi) == 0.0
