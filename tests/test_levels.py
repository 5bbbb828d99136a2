"""Which levels of a trellis code suit which weights: what is foreseen against coding itself."""

import pytest
import torch

from kbvq.codes.level_choice import TAILS, best_tail, value_histogram
from kbvq.codes.levels import levels
from kbvq.codes.trellis import TrellisCode


def drawn(freedom):
    """[256, 512] values of unit variance in each of 256 columns: Gaussian, or of Student's t distribution."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(512, 256, generator=generator)
    if freedom:
        values *= (freedom / torch.randn(freedom, 512, 256, generator=generator).square().sum(0)).sqrt()
    return values / values.square().mean(0).sqrt()


def coded_error(values, bits, tail):
    code = TrellisCode(bits, tail=tail)
    columns = values.T.contiguous()
    return (columns - code.decode(code.encode(columns))).square().mean().item()


@pytest.mark.parametrize("freedom", [0, 8, 4])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_is_foreseen_and_the_best_levels_are_found(bits, freedom):
    values = drawn(freedom)
    tail, foreseen = best_tail(bits, value_histogram(values, torch.ones(512), torch.ones(256)))
    errors = {other: coded_error(values, bits, other) for other in TAILS}
    assert abs(foreseen / errors[tail] - 1) < 0.2  # too much where the core is narrower than a Gaussian one
    assert errors[tail] < 1.03 * min(errors.values())
    assert (tail <= 6) if not freedom else (errors[tail] < 0.97 * errors[0])


def test_values_count_by_their_rows_and_columns_and_in_deviations_of_their_column():
    """Rows and columns of no mass count nothing, however far out they lie, and sizes do not change the shape."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(64, 6, generator=generator)
    rows, columns = 0.1 + torch.rand(64, generator=generator), torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 0.0])
    rows[3] = 0
    values[3] = 20.0
    values[:, 5] = torch.distributions.StudentT(2.0).sample((64,))
    found = value_histogram(values, rows, columns)
    expected = torch.zeros_like(found)
    for column in range(6):
        deviation = values[:, column].square().mean().sqrt()
        for row in range(64):
            of_value = (values[row, column] / deviation).square().log2()
            place = ((of_value.floor() + 2 ** (of_value - of_value.floor()) - 1 + 6) * 4).floor().int()
            expected[int(place.clamp(0, len(found) - 1))] += rows[row] * columns[column] * deviation**2
    assert torch.allclose(found, expected, rtol=1e-5)


def test_stretched_levels_keep_the_core_and_move_the_last_one():
    assert levels(0)[-1] < 3.2 and levels(25)[-1] > 10
    assert (levels(25) - levels(0))[96:160].abs().max() < 0.03
    assert (levels(25).diff() > 0).all()
