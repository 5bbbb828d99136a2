"""Several processes that share the experts of a projection, here as threads that meet where tensors are summed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kbvq.method import vector_quantization
from kbvq.method.projection import quantize_projection, report_projection
from kbvq.method.target_weights import TargetSums, goal_of
from kbvq.recipes import make_recipe
from kbvq.structures import InputMoments

EXPERTS, OUT, IN = 3, 64, 48


class Members:
    """The others' tensors are added in the order of the members, as a sum over processes is the same in all of them."""

    def __init__(self, count):
        self.count, self.barrier, self.brought = count, threading.Barrier(count), {}

    def share(self, index, total):
        return range(index * total // self.count, (index + 1) * total // self.count)

    def sum_(self, index, *tensors):
        self.brought[index] = tensors
        self.barrier.wait()
        sums = [
            sum(parts[1:], start=parts[0]) for parts in zip(*(self.brought[i] for i in range(self.count)), strict=True)
        ]
        self.barrier.wait()
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total)


class Member:
    def __init__(self, members, index):
        self.share = lambda total: members.share(index, total)
        self.sum_ = lambda *tensors: members.sum_(index, *tensors)


def problem():
    generator = torch.Generator().manual_seed(0)
    weights = 0.02 * torch.randn(EXPERTS, OUT, IN, generator=generator)
    moments, sums = InputMoments.zeros(EXPERTS, IN), TargetSums.zeros(EXPERTS, OUT, IN)
    for expert, count in enumerate((300, 500, 200)):
        inputs = torch.randn(count, IN, generator=generator) * torch.linspace(2, 0.1, IN) + 0.3
        mass = moments.add_(expert, inputs, torch.rand(count, generator=generator), by_routing=True)
        sums.add_(
            expert, inputs @ weights[expert].T + 0.01 * torch.randn(count, OUT, generator=generator), inputs, mass
        )
    return weights, moments, sums


def work(recipe):
    """What a member does."""
    weights, moments, sums = problem()

    importance = torch.rand(EXPERTS, OUT, generator=torch.Generator().manual_seed(3))

    def quantize(team):
        goal = goal_of(weights, sums, moments, 8.0, team=team)
        format = recipe.projection_format(EXPERTS, OUT, IN, bits=2, rank=2)
        packed = quantize_projection(
            weights, moments, moments, format, recipe, seed=5, goal=goal, importance=importance, team=team
        )
        return goal, packed, report_projection(weights, packed, moments, prior_tokens=8.0, team=team)

    return quantize


@pytest.fixture
def coded(monkeypatch):
    """Experts of every call of the coder."""
    counts, original = [], vector_quantization.encode_with_feedback
    monkeypatch.setattr(
        vector_quantization,
        "encode_with_feedback",
        lambda weights, *rest, **options: (counts.append(len(weights)), original(weights, *rest, **options))[1],
    )
    return counts


@pytest.mark.parametrize("count", [2, 4])  # of four, one has nothing to do
def test_a_trellis_coded_by_a_team_has_the_bytes_of_one_process(coded, count):
    quantize = work(make_recipe("default", 2))
    expected = quantize(Member(Members(1), 0))
    assert coded == [EXPERTS]
    members = Members(count)
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(quantize, [Member(members, i) for i in range(count)]))
    assert sorted(coded[1:]) == sorted(len(members.share(i, EXPERTS)) for i in range(count))
    for goal, packed, report in found:
        assert all(torch.equal(ours, getattr(expected[0], name)) for name, ours in vars(goal).items())
        assert packed.tensors.keys() == expected[1].tensors.keys()
        for name, tensor in packed.tensors.items():
            assert torch.equal(tensor, expected[1].tensors[name]), name
        assert report == expected[2]


@pytest.mark.parametrize("codebook", ["sign-vq", "rq-moe"])
def test_refitted_tables_differ_by_the_order_of_sums_alone(coded, codebook):
    quantize = work(make_recipe("fast", 2, codebook=codebook))
    expected = quantize(Member(Members(1), 0))
    members = Members(2)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(quantize, [Member(members, i) for i in range(2)])
    assert sorted(coded) == [1, 1, 2, 2, 3, 3]
    for name, tensor in first[1].tensors.items():
        assert torch.equal(tensor, second[1].tensors[name]), name
    same = (first[1].tensors["codes"] == expected[1].tensors["codes"]).double().mean()
    assert same > 0.99
    assert first[2].relative_error == pytest.approx(expected[2].relative_error, rel=1e-3)


@pytest.mark.parametrize("recipe", [make_recipe("default", 2), make_recipe("fast", 2, codebook="rq-moe")])
def test_experts_of_a_large_projection_are_coded_in_groups(coded, monkeypatch, recipe):
    quantize = work(recipe)
    expected = quantize(Member(Members(1), 0))
    monkeypatch.setattr(vector_quantization, "CODED_AT_ONCE", 2 * OUT * IN)
    found = quantize(Member(Members(1), 0))
    runs = 1 + (recipe.codebook != "trellis") * recipe.refits
    assert coded == [EXPERTS] * runs + [2, 1] * runs
    for name, tensor in found[1].tensors.items():
        assert torch.equal(tensor, expected[1].tensors[name]), name
