"""What an error in an output of gate and up costs, against the layer's own response to it."""

from dataclasses import replace

import pytest
import torch
from test_matching import EXPERTS, HIDDEN, WIDTH, setting
from torch.nn.functional import silu

from kbvq.models.expert_forward import gated
from kbvq.quantization.matching import token_weights
from kbvq.quantization.row_importance import row_importance, squared_slopes, uses_importance
from kbvq.recipes import make_recipe

FULL = make_recipe("default", 2, row_importance=1.0)


def measured(**changes):
    layer, bank, run, teacher, _, observed, outputs, _, original = setting()
    observed[bank].set_("gate_up_proj", original[bank]["gate_up_proj"], None)
    importance = row_importance(run, teacher, token_weights(outputs), observed, replace(FULL, **changes))[bank]
    return importance.rows, layer, bank, run, teacher, observed, token_weights(outputs)


def test_slopes_are_those_of_the_gating():
    gate_up = torch.randn(7, 2 * WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small = 1e-5 * torch.eye(2 * WIDTH, dtype=torch.float64)
    gating = gated(silu)
    differences = torch.stack([(gating(gate_up + step) - gating(gate_up - step)).sum(1) / 2e-5 for step in small], 1)
    torch.testing.assert_close(squared_slopes(gating, gate_up).double(), differences.square(), rtol=1e-3, atol=1e-5)


def test_importance_is_what_a_small_error_of_a_row_does_to_the_layer():
    """The layer is run with each output moved by a little in its bias; tokens count by their weights alone, as routing
    weights are in the layer's output already."""
    importance, layer, bank, run, teacher, observed, weights = measured()
    module = observed[bank]
    assert importance.shape == (EXPERTS, 2 * WIDTH)
    torch.testing.assert_close(importance.mean(1), torch.ones(EXPERTS))

    def outputs(bias):
        module.biases["gate_up_proj"] = bias
        with torch.no_grad():
            return torch.cat([run.batch(part) for part in teacher.double().split(2)])

    layer.double()
    layer.router = layer.router.double()
    module.weights = {name: weight.double() for name, weight in module.weights.items()}
    zeros = torch.zeros(EXPERTS, 2 * WIDTH, dtype=torch.float64)
    before, cost = outputs(zeros), torch.empty_like(zeros)
    for expert in range(EXPERTS):
        for row in range(2 * WIDTH):
            moved = zeros.clone()
            moved[expert, row] = 1e-4
            cost[expert, row] = ((outputs(moved) - before).square().sum(-1) * weights).sum()
    # A few of the tokens of an expert are prior ones, for which all neurons have the same slopes.
    relative = cost / cost.mean(1, keepdim=True)
    for found, wanted in zip(importance, relative, strict=True):
        assert torch.corrcoef(torch.stack([found.double(), wanted]))[0, 1] > 0.7
    without = measured_without_prior()
    torch.testing.assert_close(without.double(), relative, rtol=1e-2, atol=1e-3)


def measured_without_prior():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kbvq.quantization.row_importance._PRIOR", 0.0)
        return measured()[0]


def test_importance_of_an_expert_without_tokens_is_that_of_its_columns():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_matching.Layer.route", _without_last)
        importance, _, bank, _, _, observed, _ = measured()
    columns = observed[bank].weights["down_proj"][-1].square().sum(0).repeat(2)
    torch.testing.assert_close(importance[-1], columns / columns.mean())


def _without_last(layer, tokens):
    weights, index = (tokens @ layer.router)[:, : EXPERTS - 1].softmax(-1).topk(2)
    return index, weights


def test_power_tempers_it():
    full, root = measured()[0], measured(row_importance=0.5)[0]
    ratio = root / full.sqrt()
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


def test_few_windows_are_run_where_they_have_enough_tokens(monkeypatch):
    monkeypatch.setattr("kbvq.quantization.row_importance._TOKENS", 8)
    seen = []
    _, layer, bank, run, teacher, observed, weights = measured()
    original = run.watch
    monkeypatch.setattr(run, "watch", lambda states, after: (seen.append(len(states)), original(states, after)))
    run.layer_kwargs = {1: {}, 2: {}}.__getitem__  # a run has arguments for whole batches, and for one window
    row_importance(run, teacher, weights, observed, FULL)
    assert seen == [2]  # a window has 12 tokens with two experts each, a batch two windows
    assert teacher.shape == (5, 12, HIDDEN)


def test_codes_of_single_rows_have_no_use_for_it():
    assert uses_importance(make_recipe("default", 2)) and uses_importance(make_recipe("best", 2))
    assert not uses_importance(make_recipe("fast", 2)) and not uses_importance(make_recipe("paper", 2))


def test_tokens_of_a_bank_that_gets_others_than_the_layer_count_alike():
    """As in Llama 4, whose experts are called with the routed tokens one expert after the other."""
    _, _, bank, run, teacher, observed, weights = measured()
    plain = row_importance(run, teacher, torch.ones_like(weights), observed, FULL)[bank].rows
    assert not torch.allclose(measured()[0], plain)
    twice = torch.cat([weights, weights], 1)  # as many weights as the layer has tokens, which are not the bank's
    found = row_importance(run, teacher, twice, observed, FULL)[bank].rows
    torch.testing.assert_close(found, plain)
