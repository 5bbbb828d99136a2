import pytest
import torch

from kbvq.errors import NumericalError
from kbvq.method.shared_basis import shared_low_rank, whitening_map


def random_problem(experts=3, out=10, inputs=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(experts, out, inputs, generator=generator)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.logspace(0, -1.5, inputs)
    return weights, mix @ mix.T


def weighted_norm(difference, moment):
    """Σ_e tr(Δ C Δᵀ), from the definition."""
    return sum(torch.trace(d.double() @ moment.double() @ d.double().T) for d in difference)


def test_whitening_map_is_a_root_of_the_damped_moment():
    _, moment = random_problem()
    root, inverse = whitening_map(moment)
    damped = moment.double() + 1e-4 * moment.double().diagonal().mean() * torch.eye(8)
    torch.testing.assert_close(root @ root.T, damped, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(root @ inverse, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-9)


def test_full_rank_reconstructs_the_weights():
    weights, moment = random_problem()
    basis, coefficients = shared_low_rank(weights, moment, 8)
    torch.testing.assert_close(coefficients @ basis, weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_share_is_the_truncated_svd_of_the_whitened_stack(rank):
    """Eckart-Young through an explicit SVD of the stack with a Cholesky whitening: another root, same optimum."""
    weights, moment = random_problem(seed=rank)
    damped = moment.double() + 1e-4 * moment.double().diagonal().mean() * torch.eye(8)
    root = torch.linalg.cholesky(damped)
    left, values, right = torch.linalg.svd(weights.double().flatten(0, 1) @ root, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank] @ torch.linalg.inv(root)
    basis, coefficients = shared_low_rank(weights, moment, rank)
    torch.testing.assert_close((coefficients @ basis).flatten(0, 1).double(), best, rtol=1e-3, atol=1e-4)


def test_klt_beats_plain_svd_under_the_input_metric_and_loses_without():
    weights, moment = random_problem(experts=4, out=12)
    with_klt = shared_low_rank(weights, moment, 2)
    plain = shared_low_rank(weights, None, 2)
    errors = {
        name: [weighted_norm(weights - c @ b, metric) for b, c in (with_klt, plain)]
        for name, metric in (("inputs", moment), ("identity", torch.eye(8)))
    }
    assert errors["inputs"][0] < 0.9 * errors["inputs"][1]
    assert errors["identity"][1] < errors["identity"][0]


def test_rank_deficient_moment_is_damped_not_fatal():
    weights, _ = random_problem()
    direction = torch.randn(8, generator=torch.Generator().manual_seed(1))
    basis, coefficients = shared_low_rank(weights, torch.outer(direction, direction), 1)
    share = coefficients @ basis
    assert torch.isfinite(share).all()
    # One direction carries all inputs: the rank-one share must reproduce the outputs along it.
    torch.testing.assert_close(share @ direction, weights @ direction, rtol=1e-3, atol=1e-3)


def test_basis_rows_are_scaled_for_storage():
    weights, moment = random_problem()
    basis, _ = shared_low_rank(weights, moment, 3)
    torch.testing.assert_close(basis.abs().amax(1), torch.ones(3))


def test_unusable_moments_are_refused():
    weights, moment = random_problem()
    with pytest.raises(NumericalError, match="no calibration token"):
        shared_low_rank(weights, torch.zeros(8, 8), 1)
    moment[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        shared_low_rank(weights, moment, 1)
