"""The moments that the calibration pass gathers, against sums over tokens recorded in a full model."""

import pytest
import torch
from tiny_models import tiny_model
from torch.nn.functional import silu

from kbvq.models.calibration import ObservedBank, spread_order
from kbvq.models.moe_adapters import find_expert_banks, read_experts


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_observed_banks_leave_the_outputs_and_gather_exact_moments(arch):
    model = tiny_model(arch)
    tokens = torch.randint(2, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
    calls = {}
    observed = {}
    for bank in find_expert_banks(model):
        experts = read_experts(model.get_submodule(bank.path))
        module = ObservedBank(experts.weights, experts.gating)
        module.watch_("gate_up_proj", "down_proj")
        module.register_forward_pre_hook(lambda _, inputs, path=bank.path: calls.update({path: inputs}))
        model.set_submodule(bank.path, module)
        observed[bank] = module
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)

    for bank, module in observed.items():
        hidden_states = calls[bank.path][0].flatten(0, -2).double()
        routed = calls[bank.path][1:] or (torch.zeros(60, 1, dtype=torch.int64), torch.ones(60, 1))
        weights = {name: weight.double() for name, weight in module.weights.items()}
        for expert in range(bank.num_experts):
            chosen = (routed[0] == expert).any(1)
            inputs = hidden_states[chosen]
            gate, up = (inputs @ weights["gate_up_proj"][expert].T).chunk(2, 1)
            for name, seen in (("gate_up_proj", inputs), ("down_proj", silu(gate) * up)):
                moments = module.moments[name]
                assert moments.tokens[expert] == chosen.sum()
                torch.testing.assert_close(moments.outer_sum[expert].double(), seen.T @ seen, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(moments.input_sum[expert].double(), seen.sum(0), rtol=1e-4, atol=1e-5)
                weight_sum = routed[1][routed[0] == expert].double().sum()
                torch.testing.assert_close(moments.weight_sum[expert].double(), weight_sum, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vector_dim", [1, 4])
def test_sorted_channels_compute_the_same_and_are_dealt_out_by_energy(vector_dim):
    model = tiny_model("qwen3_moe")
    bank = find_expert_banks(model)[0]
    experts = read_experts(model.get_submodule(bank.path))
    module = ObservedBank(experts.weights, experts.gating)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(200, bank.hidden_size, generator=generator)
    index = torch.randint(bank.num_experts, (200, 2), generator=generator)
    routing = torch.rand(200, 2, generator=generator)
    module.watch_("down_proj")
    before = module(states, index, routing)
    moments = module.moments["down_proj"]
    order = module.sort_channels_(moments, vector_dim)
    module.watch_("down_proj")
    torch.testing.assert_close(module(states, index, routing), before, rtol=1e-4, atol=1e-5)
    again = module.moments["down_proj"]
    moments.reorder_(order)
    torch.testing.assert_close(again.outer_sum, moments.outer_sum, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.input_sum, moments.input_sum, rtol=1e-4, atol=1e-4)
    energy = again.outer_sum.diagonal(dim1=1, dim2=2).unflatten(1, (-1, vector_dim))
    if vector_dim == 1:
        for of_expert in energy[..., 0]:
            ranks = of_expert.argsort().argsort()
            few = ranks.unfold(0, 5, 1)  # any neighbours have strong and weak ones among them
            assert (few.amax(1) >= 0.6 * len(ranks)).all() and (few.amin(1) < 0.4 * len(ranks)).all()
    else:  # each place in a vector holds one part of the descending order, from first vector to last
        assert (energy.mT.flatten(1).diff(dim=1) <= 1e-4).all()


@pytest.mark.parametrize("length", [1, 2, 3, 8, 20, 768, 1408, 14336])
def test_spread_order_is_a_permutation(length):
    assert spread_order(length).sort().values.tolist() == list(range(length))
