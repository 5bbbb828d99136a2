"""Fitting a layer's output projection, against a solver that sees every token."""

import pytest
import torch
from torch import nn

from kbvq.method.target_weights import RIDGE, TOKENS_PER_CHANNEL
from kbvq.models.calibration import LayerRunner
from kbvq.quantization.attention_matching import match_attention_, output_projection

HIDDEN, INNER = 6, 10


class Layer(nn.Module):
    """Residual layer: a mixing of tokens whose output projection is `attention.last`, then a map in the place of
    experts. `scale` multiplies what attention gives; `parallel` experts read the layer's inputs."""

    def __init__(self, scale=1.0, parallel=False, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.Module()
        self.attention.first = nn.Linear(HIDDEN, INNER, bias=False)
        self.attention.last = nn.Linear(INNER, HIDDEN, bias=bias)
        self.inner, self.outer = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.scale, self.parallel = scale, parallel

    def mixed(self, states):
        return self.attention.first(states.tanh()).cumsum(1).sin()

    def forward(self, states):
        behind = states + self.scale * self.attention.last(self.mixed(states))
        return behind + self.outer(self.inner(states if self.parallel else behind).sin())


def setting(**changes):
    layer = Layer(**changes).requires_grad_(False)
    run = LayerRunner(layer, lambda rows: {}, batch_size=2, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(5, 40, HIDDEN, generator=generator)
    return layer, run, teacher, teacher + 0.3 * torch.randn(teacher.shape, generator=generator)


@pytest.mark.parametrize("bias", [False, True])
def test_fit_is_the_weighted_ridge_solution(bias):
    layer, run, teacher, student = setting(bias=bias)
    weights = torch.rand(5, 40, generator=torch.Generator().manual_seed(2)) + 0.1
    old = layer.attention.last.weight.clone()
    offset = layer.attention.last.bias if bias else 0.0
    teacher[1, :3] += 100  # tokens that lack far more than attention gives
    given = layer.mixed(teacher) @ old.T + offset
    share = (given.norm(dim=-1) / (teacher - student).norm(dim=-1))[..., None]
    assert 0.02 < (share < 1).float().mean() < 0.5 and share[1, :3].max() < 0.2
    wanted = (share.clamp_max(1) * (teacher - student) + given - offset).flatten(0, 1).double()
    inputs = layer.mixed(student).flatten(0, 1).double()
    changed = match_attention_(run, teacher, student, weights)
    assert list(changed) == ["attention.last.weight"]
    torch.testing.assert_close(layer.attention.last.weight, changed["attention.last.weight"])
    if bias:
        assert torch.equal(layer.attention.last.bias, offset)
    # min Σ w ‖y − M a‖² + penalty ‖M − old‖², as one least-squares problem over stacked rows.
    root = weights.flatten().double().sqrt()[:, None]
    strength = RIDGE * max(1, TOKENS_PER_CHANNEL * INNER / weights.numel())
    penalty = strength * (root * inputs).square().sum(0).mean()
    rows = torch.cat([root * inputs, penalty.sqrt() * torch.eye(INNER, dtype=torch.float64)])
    goals = torch.cat([root * wanted, penalty.sqrt() * old.T.double()])
    expected = torch.linalg.lstsq(rows, goals).solution.T
    torch.testing.assert_close(layer.attention.last.weight.double(), expected, rtol=1e-3, atol=1e-4)


def test_fit_brings_the_stream_back():
    layer, run, teacher, student = setting()

    def distance():
        behind = teacher + layer.mixed(teacher) @ old.T
        found = student + layer.attention.last(layer.mixed(student))
        return (found - behind).square().mean().item()

    old = layer.attention.last.weight.clone()
    before = distance()
    match_attention_(run, teacher, student, torch.ones(5, 40))
    assert distance() < 0.95 * before


@pytest.mark.parametrize("changes", [{"scale": 0.5}, {"parallel": True}])
def test_layers_of_another_structure_are_left_alone(changes):
    layer, run, teacher, student = setting(**changes)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert output_projection(run, student) is None
    assert match_attention_(run, teacher, student, torch.ones(5, 40)) == {}
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
