"""The passes that gather what banks should give, against the same sums token by token."""

import pytest
import torch
from stand_in_experts import StandInExperts
from torch import nn
from torch.nn.functional import silu

from kbvq.models.calibration import LayerRunner, idle_suffices, observe_banks, run_and_keep, run_and_watch
from kbvq.models.moe_adapters import ExpertBank
from kbvq.quantization.matching import match_inputs, match_outputs, token_weights
from kbvq.structures import PROJECTIONS

HIDDEN, WIDTH, EXPERTS, TOP = 8, 6, 3, 2


class Layer(nn.Module):
    """A residual layer with routed experts; `factor` multiplies what they give."""

    def __init__(self, factor=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mlp, self.factor = nn.Module(), factor
        self.mlp.experts = StandInExperts()
        self.mlp.experts.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator))
        self.mlp.experts.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator))
        self.mlp.experts.act_fn = silu
        self.router = torch.randn(HIDDEN, EXPERTS, generator=generator)

    def route(self, tokens):
        weights, index = (tokens @ self.router).softmax(-1).topk(TOP)
        return index, weights

    def forward(self, states):
        tokens = states.flatten(0, 1)
        return states + self.factor * self.mlp.experts(tokens.tanh(), *self.route(tokens)).view(states.shape)


def setting(factor=1.0):
    layer = Layer(factor)
    bank = ExpertBank("layers.0.mlp.experts", "routed", EXPERTS, HIDDEN, WIDTH, 0)
    run = LayerRunner(layer, lambda rows: {}, batch_size=2, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(5, 12, HIDDEN, generator=generator)
    student = teacher + 0.2 * torch.randn(5, 12, HIDDEN, generator=generator)
    observed = observe_banks(layer, "layers.0", [bank])
    with torch.no_grad():
        outputs, _, kept = run_and_keep(run, teacher, observed, PROJECTIONS, by_routing=True)
    module = observed[bank]
    original = {bank: dict(module.weights)}
    module.set_("gate_up_proj", module.weights["gate_up_proj"] * 1.1, None)
    return layer, bank, run, teacher, student, observed, outputs, kept, original


def expert_output(weights, expert, token):
    gate, up = (weights["gate_up_proj"][expert] @ token).chunk(2)
    inner = silu(gate) * up
    return weights["down_proj"][expert] @ inner, inner


def test_inputs_are_paired_token_by_token():
    layer, bank, run, teacher, student, observed, outputs, kept, _ = setting()
    torch.testing.assert_close(kept[bank], teacher.tanh())
    weights = token_weights(outputs)
    moments, sums = match_inputs(run, student, kept, weights, observed, by_routing=True)[bank]
    cross = torch.zeros(EXPERTS, HIDDEN, HIDDEN)
    outer, tokens = torch.zeros_like(cross), torch.zeros(EXPERTS, dtype=torch.int64)
    for x, y, weight in zip(student.flatten(0, 1), teacher.flatten(0, 1), weights.flatten(), strict=True):
        for expert, routing in zip(*layer.route(x), strict=True):
            cross[expert] += weight * routing**2 * torch.outer(y.tanh(), x.tanh())
            outer[expert] += weight * routing**2 * torch.outer(x.tanh(), x.tanh())
            tokens[expert] += 1
    torch.testing.assert_close(sums.cross_sum, cross, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.outer_sum, outer, rtol=1e-4, atol=1e-4)
    assert moments.tokens.equal(tokens)
    assert not observed[bank].recording and observed[bank].recorded is None


def test_experts_do_not_run_for_their_inputs(monkeypatch):
    _, bank, run, _, student, observed, outputs, kept, _ = setting()
    weights = token_weights(outputs)
    expected = match_inputs(run, student, kept, weights, observed, by_routing=True)[bank]
    monkeypatch.setattr(observed[bank], "gating", None)
    found = match_inputs(run, student, kept, weights, observed, by_routing=True)[bank]
    assert torch.equal(found[1].cross_sum, expected[1].cross_sum) and not observed[bank].idle


class TwoBanks(nn.Module):
    """A second bank that is called with the same tokens as the first one, or with what that gives."""

    def __init__(self, chained):
        super().__init__()
        self.first, self.second, self.chained = Layer(), Layer(), chained

    def forward(self, states):
        inner = self.first(states)
        return inner + self.second(inner if self.chained else states)


@pytest.mark.parametrize("chained", [False, True])
def test_experts_run_where_another_bank_sees_what_they_give(chained):
    layer = TwoBanks(chained)
    names = ("first", "second")
    banks = [ExpertBank(f"layers.0.{name}.mlp.experts", "routed", EXPERTS, HIDDEN, WIDTH, 0) for name in names]
    originals = [layer.get_submodule(f"{name}.mlp.experts") for name in names]
    run = LayerRunner(layer, lambda rows: {}, batch_size=2, device=torch.device("cpu"))
    states = torch.randn(3, 12, HIDDEN, generator=torch.Generator().manual_seed(1))
    observed = observe_banks(layer, "layers.0", banks)
    assert all(p.is_meta for module in originals for p in module.parameters())  # the weights are held once
    assert idle_suffices(run, states, observed) != chained
    with torch.no_grad():
        _, _, kept = run_and_keep(run, states, observed, PROJECTIONS, by_routing=False)
        called = (layer.first(states) if chained else states).flatten(0, 1)
    matched = match_inputs(run, states, kept, torch.ones(states.shape[:2]), observed, by_routing=False)
    _, sums = matched[banks[1]]
    index, _ = layer.second.route(called)
    for expert in range(EXPERTS):
        own = called.tanh()[(index == expert).any(1)]
        torch.testing.assert_close(sums.cross_sum[expert], own.T @ own, rtol=1e-4, atol=1e-4)


def test_outputs_that_are_met_restore_the_original_behind_the_layer():
    """A token whose experts give their targets leaves the layer as it did in the original, unless that would take more
    than what they give anyway; then it comes as much nearer."""
    layer, bank, run, teacher, student, observed, outputs, kept, original = setting()
    weights = token_weights(outputs)
    moments, sums = match_outputs(run, student, kept, outputs, weights, observed, original, by_routing=True)[bank]
    cross, mean = torch.zeros(EXPERTS, HIDDEN, WIDTH), torch.zeros(EXPERTS, HIDDEN)
    bound = []
    pairs = zip(*(t.flatten(0, 1) for t in (student, teacher, outputs)), weights.flatten(), strict=True)
    for x, y, wanted, weight in pairs:
        index, routing = layer.route(x)
        reference = [expert_output(original[bank], e, y.tanh())[0] for e in index]
        given = sum(r * f for r, f in zip(routing, reference, strict=True))
        lacking = wanted - x - given
        share = min(1, given.norm() / lacking.norm())
        targets = [f + r * share * lacking / routing.square().sum() for r, f in zip(routing, reference, strict=True)]
        met = x + sum(r * t for r, t in zip(routing, targets, strict=True))
        torch.testing.assert_close(met, x + given + share * lacking)
        bound.append(share < 1)
        for expert, r, target in zip(index, routing, targets, strict=True):
            inner = expert_output(observed[bank].weights, expert, x.tanh())[1]
            cross[expert] += weight * r**2 * torch.outer(target, inner)
            mean[expert] += weight * r**2 * target
    torch.testing.assert_close(sums.cross_sum, cross, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.output_sum, mean, rtol=1e-4, atol=1e-4)
    assert moments.mass.sum() > 0 and 0 < sum(bound) < len(bound)


def test_a_layer_that_scales_its_experts_is_matched_without_the_residual(caplog):
    caplog.set_level("INFO", logger="kbvq")
    layer, bank, run, teacher, student, observed, outputs, kept, original = setting(factor=0.5)
    weights = token_weights(outputs)
    _, sums = match_outputs(run, student, kept, outputs, weights, observed, original, by_routing=True)[bank]
    mean = torch.zeros(EXPERTS, HIDDEN)
    for x, y, weight in zip(student.flatten(0, 1), teacher.flatten(0, 1), weights.flatten(), strict=True):
        for expert, routing in zip(*layer.route(x), strict=True):
            mean[expert] += weight * routing**2 * expert_output(original[bank], expert, y.tanh())[0]
    torch.testing.assert_close(sums.output_sum, mean, rtol=1e-4, atol=1e-4)
    assert "does not simply add" in caplog.text


def test_large_tokens_weigh_less_and_small_ones_not_without_bound():
    outputs = torch.ones(1, 5, 4) * torch.tensor([1.0, 1.0, 1.0, 100.0, 1e-3])[None, :, None]
    torch.testing.assert_close(token_weights(outputs)[0], torch.tensor([1.0, 1.0, 1.0, 0.01, 10.0]))


def test_moments_that_were_gathered_stay_as_they_are_when_the_layer_runs_again():
    _, bank, run, teacher, student, observed, _, _, _ = setting()
    with torch.no_grad():
        _, moments = run_and_watch(run, teacher, observed, PROJECTIONS, by_routing=True)
        before = {name: moments[bank][name].outer_sum.clone() for name in PROJECTIONS}
        peaks = observed[bank].peaks.clone()
        run.batch(10 * student[:2])
    assert all(torch.equal(moments[bank][name].outer_sum, before[name]) for name in PROJECTIONS)
    assert torch.equal(observed[bank].peaks, peaks)
