import pytest
import torch

from kbvq.method.quadratic_form import quadratic_forms


@pytest.mark.parametrize("n", [1, 255, 256, 300, 700])
def test_each_row_has_its_own_form(n):
    generator = torch.Generator().manual_seed(n)
    inputs = torch.randn(3 * n, n, generator=generator) + 5
    rows = torch.randn(40, n, generator=generator)
    moment, mean = (inputs.double().T @ inputs.double() / len(inputs)).float(), inputs.mean(0)
    outputs = rows.double() @ inputs.double().T
    torch.testing.assert_close(quadratic_forms(rows, moment), outputs.square().mean(1).float(), rtol=1e-4, atol=0)
    centred = quadratic_forms(rows, moment, mean)
    torch.testing.assert_close(centred, outputs.var(1, unbiased=False).float(), rtol=1e-3, atol=0)


def test_no_column_is_no_energy():
    assert quadratic_forms(torch.ones(3, 0), torch.ones(0, 0)).tolist() == [0, 0, 0]
