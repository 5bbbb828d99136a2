"""Goals of a projection against least squares by another route."""

import torch

from kbvq.method.target_weights import RIDGE, TOKENS_PER_CHANNEL, TargetSums, goal_of
from kbvq.structures import InputMoments

EXPERTS, OUT, IN, TOKENS = 2, 5, 8, 400


def sums(inputs, targets, weights, moments=None, found=None):
    moments = moments or InputMoments.zeros(EXPERTS, IN)
    found = found or TargetSums.zeros(EXPERTS, targets.shape[-1], IN)
    for expert in range(EXPERTS):
        mass = moments.add_(expert, inputs[expert], torch.ones(len(inputs[expert])), token_weights=weights[expert])
        found.add_(expert, targets[expert], inputs[expert], mass)
    return moments, found


def data(tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(EXPERTS, OUT, IN, generator=generator)
    inputs = torch.randn(EXPERTS, tokens, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    due = torch.randn(EXPERTS, OUT, IN, generator=generator)
    targets = inputs @ due.mT + 0.1 * torch.randn(EXPERTS, tokens, OUT, generator=generator)
    weights = torch.rand(EXPERTS, tokens, generator=generator) + 0.1
    return original, inputs, targets, weights


def test_goal_is_ridge_regression_toward_the_original_weights():
    original, inputs, targets, weights = data()
    check_ridge(original, inputs, targets, weights, RIDGE * max(1, TOKENS_PER_CHANNEL * IN / TOKENS))


def test_plenty_of_tokens_are_pulled_no_less():
    original, inputs, targets, weights = data(tokens=2 * int(TOKENS_PER_CHANNEL) * IN)
    check_ridge(original, inputs, targets, weights, RIDGE)


def check_ridge(original, inputs, targets, weights, strength):
    moments, found = sums(inputs, targets, weights)
    goal = goal_of(original, found, moments, prior_tokens=0.0)
    for e in range(EXPERTS):
        w = weights[e].double()
        ridge = strength * (w[:, None] * inputs[e].double().square()).sum(0).mean()
        # Rows of data that ask for the original weights stand for the ridge.
        rows = torch.cat([w.sqrt()[:, None] * inputs[e].double(), ridge.sqrt() * torch.eye(IN).double()])
        wanted = torch.cat([w.sqrt()[:, None] * targets[e].double(), ridge.sqrt() * original[e].double().T])
        expected = torch.linalg.lstsq(rows, wanted).solution.T
        torch.testing.assert_close(goal.weights[e].double(), expected, rtol=1e-3, atol=1e-3)
        mean = (w[:, None] * targets[e].double()).sum(0) / w.sum()
        torch.testing.assert_close(goal.mean[e].double(), mean, rtol=1e-3, atol=1e-3)


def test_targets_that_the_original_weights_give_change_nothing():
    original, inputs, _, weights = data()
    moments, found = sums(inputs, inputs @ original.mT, weights)
    goal = goal_of(original, found, moments, prior_tokens=16.0)
    torch.testing.assert_close(goal.weights, original, rtol=1e-4, atol=1e-4)


def test_mapped_sums_are_those_of_the_mapped_targets():
    original, inputs, targets, weights = data()
    map_ = torch.randn(EXPERTS, 3, OUT, generator=torch.Generator().manual_seed(1))
    _, found = sums(inputs, targets, weights)
    _, expected = sums(inputs, targets @ map_.mT, weights)
    mapped = found.mapped(map_)
    torch.testing.assert_close(mapped.cross_sum, expected.cross_sum, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(mapped.output_sum, expected.output_sum, rtol=1e-4, atol=1e-2)


def test_few_tokens_pull_harder_toward_the_original_and_none_leave_it():
    original, inputs, targets, weights = data(tokens=4)
    check_ridge(original, inputs, targets, weights, RIDGE * TOKENS_PER_CHANNEL * IN / 4)
    moments, found = sums(inputs[:, :0], targets[:, :0], weights[:, :0])
    goal = goal_of(original, found, moments, prior_tokens=1.0)
    torch.testing.assert_close(goal.weights, original)
    assert goal.mean.isfinite().all()
