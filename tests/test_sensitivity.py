"""What is measured before quantization, against quantization itself."""

import pytest
import torch
from stand_in_experts import StandInExperts
from torch import nn
from torch.nn.functional import silu

from kbvq.codes import level_choice
from kbvq.codes.packing import dequantize_expert
from kbvq.method.projection import quantize_projection
from kbvq.method.rate_distortion import weighted_error
from kbvq.models.calibration import LayerRunner, ObservedBank
from kbvq.models.moe_adapters import ExpertBank
from kbvq.quantization.sensitivity import (
    EXPONENTS,
    Energies,
    Sensitivity,
    divergences,
    noise_law,
    probe_layer,
    probed_rates,
    super_experts,
)
from kbvq.recipes import make_recipe
from kbvq.structures import InputMoments

EXPERTS, OUT, IN = 2, 128, 64


def problem(shift=0.0, shared=0.0):
    generator = torch.Generator().manual_seed(0)
    weights = 0.05 * torch.randn(EXPERTS, OUT, IN, generator=generator)
    direction = torch.randn(EXPERTS, OUT, 1, generator=generator) * torch.randn(IN, generator=generator)
    weights += shared * direction
    mixing = torch.randn(IN, IN, generator=generator) * torch.logspace(0, -1, IN)
    moments = InputMoments.zeros(EXPERTS, IN)
    for expert in range(EXPERTS):
        inputs = torch.randn(2000, IN, generator=generator) @ mixing.T + shift
        moments.add_(expert, inputs, torch.ones(2000))
    return weights, moments


def quantization_error(weights, moments, recipe, bits, **changes):
    format = recipe.projection_format(*weights.shape, bits=bits, **changes)
    packed = quantize_projection(weights, moments, moments, format, recipe, seed=0)
    return sum(
        weighted_error(w - dequantize_expert(packed.format, packed.tensors, e), moments.expert_moments(e, 0.0)[0])
        for e, w in enumerate(weights)
    )


def test_noise_has_the_size_of_the_error_that_quantization_makes_at_every_rate():
    """Within a fifth for the trellis code, whose errors are Gaussian-like; vector codes differ more from their law."""
    recipe = make_recipe("best", 2, bcos=False, prior_tokens=0.0)
    weights, moments = problem()
    law = noise_law(weights, moments, recipe, (2, 3))
    white = law.white(torch.Generator().manual_seed(1))

    def drawn(rate):
        noise = law.noise(white, rate)
        return sum(weighted_error(noise[e], moments.expert_moments(e, 0.0)[0]) for e in range(EXPERTS))

    for bits in (2, 3):
        made = quantization_error(weights, moments, recipe, bits)
        assert 0.8 < drawn(bits) / made < 1.25
        assert 0.8 < drawn(2) * law.energies.errors[bits, 0] / made < 1.25


def test_noise_of_rows_that_differ_in_importance_is_that_of_their_errors():
    """Within a third for each quarter of the rows by importance."""
    recipe = make_recipe("default", 2, bcos=False, prior_tokens=0.0)
    weights, moments = problem()
    importance = torch.randn(EXPERTS, OUT, generator=torch.Generator().manual_seed(2)).exp()
    law = noise_law(weights, moments, recipe, (2, 3), importance=importance)
    format = recipe.projection_format(*weights.shape, bits=2)
    packed = quantize_projection(weights, moments, moments, format, recipe, seed=0, importance=importance)
    noise = law.noise(law.white(torch.Generator().manual_seed(1)), 2)
    drawn, made = [], []
    for e, w in enumerate(weights):
        second_moment, ranks = moments.expert_moments(e, 0.0)[0], importance[e].argsort().view(4, -1)
        for found, wrong in ((drawn, noise[e]), (made, w - dequantize_expert(packed.format, packed.tensors, e))):
            found.append((wrong @ second_moment * wrong).sum(1)[ranks].sum(1))
    ratios = torch.stack(drawn).sum(0) / torch.stack(made).sum(0)
    assert ((0.75 < ratios) & (ratios < 1.35)).all(), ratios
    assert torch.stack(made).sum(0)[0] > 3 * torch.stack(made).sum(0)[-1]


def test_growth_says_what_a_shared_basis_saves():
    recipe = make_recipe("best", 2, bcos=False, prior_tokens=0.0, idre=True)
    for shared in (0.0, 0.05):
        weights, moments = problem(shared=shared)
        growth = noise_law(weights, moments, recipe, (2, 3)).energies.errors
        saved = growth[2, 2] / growth[2, 0]
        assert saved < 0.5 if shared else saved > 0.9
        made = [quantization_error(weights, moments, recipe, 2, rank=rank) for rank in (0, 2)]
        assert 0.7 < saved / (made[1] / made[0]) < 1.4


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_far_out_on_a_heavy_channel_are_foreseen_and_levels_reach_them(bits, monkeypatch):
    """As in layers with massive activations: one channel has most of the energy, and there a row has a weight of 8
    deviations. One value may be lucky with its levels: foreseen within a factor of two."""
    recipe = make_recipe("default", 2, bcos=False, prior_tokens=0.0, sampling_damping=0.0)
    weights, moments = problem()
    weights[:, 7, 5] = torch.tensor([0.6, 0.45])
    for columns in (moments.upper_sum[:, 5], moments.upper_sum[:, :, 5]):
        columns.mul_(30)
    found = {}
    for stretched in (True, False):
        if not stretched:
            monkeypatch.setattr(level_choice, "TAILS", (0,))
            level_choice._errors.cache_clear()
        law = noise_law(weights, moments, recipe, (2, 3))
        noise = law.noise(law.white(torch.Generator().manual_seed(1)), 2)
        lowest = sum(weighted_error(noise[e], moments.expert_moments(e, 0.0)[0]) for e in range(EXPERTS))
        for rank in (0, 2):
            found[stretched, rank] = quantization_error(weights, moments, recipe, bits, rank=rank)
            assert 0.5 < lowest * law.energies.errors[bits, rank] / found[stretched, rank] < 2
    level_choice._errors.cache_clear()
    assert found[True, 0] < 0.7 * found[False, 0]
    assert found[False, 2] < 0.7 * found[False, 0]
    # What is foreseen is not what is probed, and predictions start from the probes.
    sensitivity = Sensitivity({2: 0.01, 3: 0.003}, law.energies)
    assert law.energies.errors[3, 0] > 1.5 * law.energies.noise[3]
    assert sensitivity.predict(3, 0, bias=False) > 0.0045 > 0.003 > sensitivity.predict(3, 2, bias=False)
    fitted = noise_law(weights, moments, make_recipe("fast", 2), (2, 3)).energies  # tables are fitted to such weights
    assert all(abs(fitted.errors[rate, 0] - noise) < 1e-9 for rate, noise in fitted.noise.items())


def test_bias_share_is_the_constant_part_of_the_error():
    recipe = make_recipe("best", 2, prior_tokens=0.0)
    weights, moments = problem(shift=3.0)
    law = noise_law(weights, moments, recipe, (2, 3))
    noise = law.noise(law.white(torch.Generator().manual_seed(1)), 2)
    constant = total = 0.0
    for expert in range(EXPERTS):
        second_moment, mean = moments.expert_moments(expert, 0.0)
        constant += (noise[expert] @ mean).square().mean().item()  # per row, as weighted_error
        total += weighted_error(noise[expert], second_moment)
    assert abs(law.energies.bias_share - constant / total) < 0.05
    sensitivity = Sensitivity({2: 0.01, 3: 0.003}, law.energies)
    assert sensitivity.predict(2, 0, bias=True) < sensitivity.predict(2, 0, bias=False)
    assert abs(sensitivity.predict(2, 0, bias=False) - 0.01) < 0.0002  # Gaussian weights err as they were probed


def test_predictions_follow_the_power_law_through_the_probes():
    growth = {(1, 0): 8.0, (2, 0): 1.0, (3, 0): 0.25, (4, 0): 0.0625, (2, 4): 0.5}
    energies = Energies({2: 1.0, 3: 0.25}, growth, 0.0, (0.75, 0.25))
    proportional = Sensitivity({2: 0.04, 3: 0.01}, energies)
    saturated = Sensitivity({2: 0.04, 3: 0.02}, energies)  # grows as the root of the energy
    for sensitivity, exponent in ((proportional, 1.0), (saturated, 0.5)):
        assert abs(sensitivity.exponent - exponent) < 1e-9
        assert abs(sensitivity.predict(1, 0, bias=False) - 0.04 * 8.0) < 1e-9  # more noise than probed: no saturation
        for bits, of_probe, energy in ((2, 2, 1.0), (3, 3, 1.0), (4, 3, 0.25)):
            expected = sensitivity.divergences[of_probe] * energy**exponent
            assert abs(sensitivity.predict(bits, 0, bias=False) - expected) < 1e-9
        assert abs(sensitivity.predict(2, 4, bias=False) - 0.04 * 0.5**exponent) < 1e-9
    # Experts of different rates add up what each would give by its share.
    mixed = proportional.predict({2: 0.75, 3: 0.25}, 0, bias=False)
    assert abs(mixed - (0.75 * 0.04 + 0.25 * 0.01)) < 1e-9
    # Two probes are a sample: what they say is kept within bounds, and nothing measured means nothing predicted.
    assert Sensitivity({2: 0.04, 3: 0.05}, energies).exponent == EXPONENTS[0]
    assert Sensitivity({2: 0.9, 3: 0.001}, energies).exponent == EXPONENTS[1]
    assert Sensitivity({2: 0.0, 3: 0.0}, energies).predict(1, 0, bias=False) == 0.0


def test_probed_rates_lie_around_the_budget():
    for codebook, expected in (
        ("trellis", [(1, 2), (2, 3), (2, 3), (3, 4), (3, 4)]),
        ("rq-moe", [(1, 2), (2, 4), (2, 4), (2, 4), (2, 4)]),  # it has no 3 bits
    ):
        bits = (1.5, 2, 2.25, 3.3, 4)
        assert [probed_rates(make_recipe("default", value, codebook=codebook)) for value in bits] == expected


def test_probe_disturbs_one_projection_at_a_time_and_carries_the_rest_on():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Module()
            self.mlp.experts = StandInExperts()
            generator = torch.Generator().manual_seed(0)
            self.mlp.experts.gate_up_proj = nn.Parameter(torch.randn(2, 16, 8, generator=generator))
            self.mlp.experts.down_proj = nn.Parameter(torch.randn(2, 8, 8, generator=generator))
            self.mlp.experts.act_fn = silu

        def forward(self, states):
            tokens = states.flatten(0, 1)
            index = (tokens[:, :1] > 0).long()
            return states + self.mlp.experts(tokens, index, torch.ones_like(index).float()).view(states.shape)

    layer = Layer()
    bank = ExpertBank("layers.0.mlp.experts", "routed", 2, 8, 8, 0)
    run = LayerRunner(layer, lambda rows: {}, batch_size=4, device=torch.device("cpu"))
    inputs = torch.randn(6, 50, 8, generator=torch.Generator().manual_seed(1))
    earlier = (ExpertBank("before", "routed", 2, 8, 8, -1), "down_proj")
    disturbed = {(earlier, 2): inputs[:3] + 1}
    with torch.no_grad():
        probe = probe_layer(
            layer,
            "layers.0",
            [bank],
            make_recipe("default", 2, prior_tokens=1.0),
            run=run,
            inputs=inputs,
            disturbed=disturbed,
            num_probed=3,
            rates=(2, 3),
            seed=0,
        )
        assert isinstance(layer.mlp.experts, ObservedBank)  # with the original weights again, in another order
        torch.testing.assert_close(layer(inputs), probe.outputs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(disturbed[earlier, 2], layer(inputs[:3] + 1), rtol=1e-4, atol=1e-5)
    own = {probe: states for probe, states in disturbed.items() if probe[0] != earlier}
    assert list(own) == [((bank, name), rate) for name in ("gate_up_proj", "down_proj") for rate in (2, 3)]
    relative = [
        (states - probe.outputs[:3]).square().mean() / probe.outputs[:3].square().mean() for states in own.values()
    ]
    assert all(1e-4 < value < 1 for value in relative)
    assert relative[1] < 0.5 * relative[0] and relative[3] < 0.5 * relative[2]
    largest = (probe.outputs - inputs).abs().max()
    assert probe.peaks[bank].max() == largest


def test_divergence_is_the_mean_kl_of_the_predictions():
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(5, 9, generator=generator)
    reference, *others = torch.randn(3, 3, 4, 5, generator=generator)

    def expected(other):
        p, q = ((states.double() @ head.double()).softmax(-1) for states in (reference, other))
        return (p * (p / q).log()).sum(-1).mean().item()

    found = divergences(lambda states: states @ head, reference, dict(enumerate(others)))
    assert all(abs(found[i] - expected(other)) < 1e-5 for i, other in enumerate(others))


def test_a_small_divergence_over_a_large_vocabulary_is_not_lost_in_rounding():
    generator = torch.Generator().manual_seed(1)
    head = 4 * torch.randn(16, 49152, generator=generator)
    reference = torch.randn(2, 8, 16, generator=generator)
    other = reference + 1e-3 * torch.randn(reference.shape, generator=generator)
    log_p, log_q = ((states.double() @ head.double()).log_softmax(-1) for states in (reference, other))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert expected < 5e-5
    found = divergences(lambda states: states @ head, reference, {0: other, 1: reference})
    assert found[1] == 0
    assert abs(found[0] - expected) < 0.05 * expected


def test_super_experts_stand_far_above_all_others():
    generator = torch.Generator().manual_seed(0)
    peaks = {f"layer {i}": 1 + torch.rand(64, generator=generator) for i in range(8)}
    assert super_experts(peaks) == {}
    peaks["layer 1"][7] = 900.0
    peaks["layer 3"][2] = 60.0  # large, but not beside the largest
    assert super_experts(peaks) == {"layer 1": [7]}
