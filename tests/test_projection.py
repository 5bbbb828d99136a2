"""The method composed: a projection goes in with its statistics, a packed one comes out."""

import dataclasses

import pytest
import torch

from kbvq.codes.packing import dequantize_expert
from kbvq.errors import ConfigError, NumericalError
from kbvq.method import vector_quantization
from kbvq.method.error_feedback import encode_with_feedback
from kbvq.method.projection import quantize_projection, report_projection
from kbvq.method.rate_distortion import row_moment
from kbvq.method.target_weights import TargetSums, goal_of
from kbvq.recipes import CODES, RECIPE_NAMES, make_recipe
from kbvq.structures import InputMoments

EXPERTS, OUT, IN = 3, 64, 32
PAPER = make_recipe("paper", 2)


def planned(recipe):
    return recipe.projection_format(EXPERTS, OUT, IN)


def problem(seed=0, shift=0.5):
    """Weights with a shared direction, inputs with an uneven spectrum and a mean; tokens unevenly routed."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.02 * torch.randn(EXPERTS, OUT, IN, generator=generator)
    weights += 0.05 * torch.randn(EXPERTS, OUT, 1, generator=generator) * torch.randn(IN, generator=generator)
    moments, tokens = InputMoments.zeros(EXPERTS, IN), []
    for expert, count in enumerate((300, 500, 900)):
        inputs = torch.randn(count, IN, generator=generator) * torch.linspace(2, 0.1, IN) + shift
        moments.add_(expert, inputs, torch.ones(count))
        tokens.append(inputs)
    return weights, moments, tokens


def quantized(recipe, seed=0):
    weights, moments, tokens = problem(seed)
    packed = quantize_projection(weights, moments, moments, planned(recipe), recipe, seed=5)
    outputs = []
    for expert, inputs in enumerate(tokens):
        bias = packed.tensors["bias"][expert].float() if packed.format.has_bias else 0.0
        outputs.append(inputs @ dequantize_expert(packed.format, packed.tensors, expert).T + bias)
    return weights, tokens, packed, outputs


def output_error(recipe):
    weights, tokens, _, outputs = quantized(recipe)
    wanted = [inputs @ weight.T for inputs, weight in zip(tokens, weights, strict=True)]
    return sum((o - w).square().sum() for o, w in zip(outputs, wanted, strict=True)) / sum(
        w.square().sum() for w in wanted
    )


def test_what_no_weights_can_give_does_not_stretch_the_outputs():
    """Wanted outputs that are mostly noise: the packed weights are those of the best map, its mean is met."""
    weights, moments, tokens = problem()
    generator = torch.Generator().manual_seed(1)
    sums = TargetSums.zeros(EXPERTS, OUT, IN)
    targets = []
    for expert, inputs in enumerate(tokens):
        given = inputs @ weights[expert].T
        targets.append(given + 2 * given.std() * torch.randn(given.shape, generator=generator) + 0.3)
        sums.add_(expert, targets[-1], inputs, torch.ones(len(inputs)))
    recipe = make_recipe("default", 4, budget=False)
    goal = goal_of(weights, sums, moments, prior_tokens=0.0)
    packed = quantize_projection(weights, moments, moments, planned(recipe), recipe, seed=5, goal=goal)
    report = report_projection(goal.weights, packed, moments, prior_tokens=0.0)
    assert report.relative_error < 4 * CODES["trellis"][4].distortion
    for expert, (inputs, wanted) in enumerate(zip(tokens, targets, strict=True)):
        found = inputs @ dequantize_expert(packed.format, packed.tensors, expert).T + packed.tensors["bias"][expert]
        torch.testing.assert_close(found.mean(0), wanted.mean(0), rtol=1e-2, atol=1e-2 * wanted.std().item())


def test_a_shared_table_is_refitted_by_some_rows_nearly_as_well_as_by_all(monkeypatch):
    recipe = make_recipe("fast", 2, budget=False)
    generator = torch.Generator().manual_seed(0)
    n, rows = 128, 4096
    weights, moments = torch.randn(2, rows, n, generator=generator), InputMoments.zeros(2, n)
    for expert in range(2):
        moments.add_(expert, torch.randn(400, n, generator=generator) * torch.linspace(3, 0.1, n), torch.ones(400))
    coded_rows = []

    def watched(weights, *rest, **options):
        coded_rows.append(weights.shape[1])
        return encode_with_feedback(weights, *rest, **options)

    def error(recipe):
        format = recipe.projection_format(2, rows, n)
        packed = quantize_projection(weights, moments, moments, format, recipe, seed=5)
        return report_projection(weights, packed, moments, prior_tokens=0.0).relative_error

    monkeypatch.setattr(vector_quantization, "encode_with_feedback", watched)
    before, by_all = error(dataclasses.replace(recipe, refits=0)), error(recipe)
    monkeypatch.setattr(vector_quantization, "_REFIT_VECTORS", 256)
    by_some = error(recipe)
    assert coded_rows == [rows, rows, rows, rows // 2, rows]
    assert before > 1.01 * by_all and by_some - by_all < 0.3 * (before - by_all)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("codebook", CODES)
def test_every_codebook_gets_better_with_bits_and_than_its_plain_rounding(codebook, bits):
    """relative_error of white weights cannot be far above the code's distortion, which the plans are made of."""
    recipe = make_recipe("default", bits, budget=False, codebook=codebook, refits=1)
    weights, moments, _ = problem(shift=0.0)
    packed = quantize_projection(weights, moments, moments, planned(recipe), recipe, seed=5)
    report = report_projection(weights, packed, moments, prior_tokens=recipe.prior_tokens)
    assert report.code_bits == bits
    assert report.relative_error < 2 * recipe.distortion(packed.format)
    again = quantize_projection(weights, moments, moments, planned(recipe), recipe, seed=5)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in packed.tensors.items())


@pytest.mark.parametrize("name", RECIPE_NAMES)
@pytest.mark.parametrize("bits", [2, 4])
def test_format_planned_equals_format_made_and_error_falls_with_bits(name, bits):
    recipe = make_recipe(name, bits, budget=False)
    weights, _, packed, _ = quantized(recipe)
    planned = recipe.projection_format(EXPERTS, OUT, IN)
    assert dataclasses.replace(packed.format, tail=0) == planned  # but for the levels, which suit the weights
    relative = sum(
        (dequantize_expert(packed.format, packed.tensors, e) - w).square().sum() for e, w in enumerate(weights)
    )
    assert relative / weights.square().sum() < {2: 0.25, 4: 0.05}[bits]


def test_bits_are_those_of_the_stored_bytes():
    _, _, packed, _ = quantized(make_recipe("default", 2, budget=False))
    stored = sum(t.numel() * t.element_size() for t in packed.tensors.values())
    assert packed.format.num_bytes == stored
    assert packed.format.code_bytes * 8 == 2 * packed.format.num_weights


def test_bcos_restores_mean_and_deviation_of_every_output_channel():
    recipe = make_recipe("paper", 2, prior_tokens=0.0)
    weights, tokens, _, outputs = quantized(recipe)
    for weight, inputs, output in zip(weights, tokens, outputs, strict=True):
        wanted = inputs @ weight.T
        # float16 storage of scale and bias: 2^-11 relative.
        torch.testing.assert_close(output.mean(0), wanted.mean(0), rtol=2e-3, atol=2e-3 * wanted.abs().mean().item())
        torch.testing.assert_close(output.std(0), wanted.std(0), rtol=2e-3, atol=1e-4)


def test_each_part_of_the_paper_lowers_the_output_error():
    plain = output_error(make_recipe("paper", 2, idre=False, bcos=False))
    assert output_error(make_recipe("paper", 2, bcos=False)) < 0.5 * plain
    assert output_error(make_recipe("paper", 2, idre=False)) < plain
    assert output_error(make_recipe("paper", 2)) < output_error(make_recipe("paper", 2, bcos=False))


def test_plain_vq_equals_a_nearest_codeword_search_by_hand():
    recipe = make_recipe("paper", 2, idre=False, bcos=False)
    weights, _, packed, _ = quantized(recipe)
    assert set(packed.tensors) == {"codes", "codebook"}
    for expert in range(EXPERTS):
        vectors = weights[expert].reshape(-1, 4)
        codebook = packed.tensors["codebook"][expert, 0].float()
        best = torch.cdist(vectors.double(), codebook.double()).amin(1)
        decoded = dequantize_expert(packed.format, packed.tensors, expert).reshape(-1, 4)
        torch.testing.assert_close((decoded - vectors).norm(dim=1).double(), best, rtol=1e-4, atol=1e-6)


def test_int8_factors_are_close_to_float16_ones():
    shares = {}
    for dtype in ("float16", "int8"):
        recipe = make_recipe("default", 2, budget=False, idre=True, factor_dtype=dtype, rank_divisor=16)
        shares[dtype] = output_error(recipe)
    assert shares["int8"] < 1.1 * shares["float16"]


def test_same_seed_same_bytes():
    recipe = make_recipe("default", 2, budget=False)
    first, second = quantized(recipe)[2], quantized(recipe)[2]
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_report_matches_its_definition():
    recipe = make_recipe("paper", 2, prior_tokens=0.0)
    weights, moments, _ = problem()
    packed = quantize_projection(weights, moments, moments, planned(recipe), recipe, seed=5)
    report = report_projection(weights, packed, moments, prior_tokens=0.0)
    error = energy = 0.0
    for expert, weight in enumerate(weights.double()):
        moment = moments.outer_sum[expert].double() / moments.tokens[expert]
        difference = weight - dequantize_expert(packed.format, packed.tensors, expert).double()
        error += torch.trace(difference @ moment @ difference.T)
        energy += torch.trace(weight @ moment @ weight.T)
    assert report.relative_error == pytest.approx((error / energy).item(), rel=1e-4)
    assert report.code_bits == 2.0
    assert report.bits_above_limit > 0


def test_an_expert_without_tokens_is_corrected_with_the_pooled_moments():
    weights, moments, _ = problem()
    moments.outer_sum[1] = 0
    moments.input_sum[1] = 0
    moments.tokens[1] = 0
    moments.mass[1] = 0
    packed = quantize_projection(weights, moments, moments, planned(PAPER), PAPER, seed=5)
    assert all(torch.isfinite(t).all() for t in packed.tensors.values() if t.is_floating_point())


def test_all_zero_weights_stay_zero():
    _, moments, _ = problem()
    for name in RECIPE_NAMES:
        recipe = make_recipe(name, 2, budget=False)
        packed = quantize_projection(torch.zeros(EXPERTS, OUT, IN), moments, moments, planned(recipe), recipe, seed=0)
        assert not any(dequantize_expert(packed.format, packed.tensors, e).any() for e in range(EXPERTS))


def test_shapes_and_values_that_cannot_be_stored_are_refused():
    with pytest.raises(ConfigError, match="vectors for one codebook of 4096"):
        make_recipe("paper", 3).projection_format(EXPERTS, OUT, IN)
    with pytest.raises(ConfigError, match="not a multiple of vector_dim"):
        make_recipe("paper", 2).projection_format(EXPERTS, 512, 30)
    with pytest.raises(ConfigError, match="--bits 5"):
        make_recipe("paper", 5)
    with pytest.raises(ConfigError, match="unknown recipe"):
        make_recipe("papr", 2)
    with pytest.raises(ConfigError, match="from 1.5 to 4"):
        make_recipe("default", 1.2)
    with pytest.raises(ConfigError, match="codebook 'pq'"):
        make_recipe("default", 2, codebook="pq")
    with pytest.raises(ConfigError, match="trellis needs error feedback"):
        make_recipe("paper", 2, codebook="trellis")
    with pytest.raises(ConfigError, match="fill no whole number of bytes"):
        make_recipe("best", 2, budget=False).projection_format(EXPERTS, 30, IN)
    weights, moments, _ = problem()
    with pytest.raises(NumericalError, match="range of float16"):
        quantize_projection(weights * 1e7, moments, moments, planned(PAPER), PAPER, seed=0)


def test_recipes_are_data():
    recipe = make_recipe("paper", 2, klt=False)
    assert dataclasses.replace(recipe, klt=True) == make_recipe("paper", 2)
    assert recipe.to_dict()["klt"] is False


def test_report_has_the_error_of_each_expert_and_the_share_of_the_strongest_directions():
    recipe = make_recipe("default", 2, budget=False)
    weights, moments, tokens = problem()
    packed = quantize_projection(weights, moments, moments, planned(recipe), recipe, seed=5)
    report = report_projection(weights, packed, moments, prior_tokens=0.0)
    for expert, (weight, inputs) in enumerate(zip(weights, tokens, strict=True)):
        wrong = inputs @ (weight - dequantize_expert(packed.format, packed.tensors, expert)).T
        expected = wrong.square().sum() / (inputs @ weight.T).square().sum()
        assert report.relative_error_by_expert[expert] == pytest.approx(expected.item(), rel=1e-4)
    # The eigenvalues of H^½ Σ_w H^½ are those of H Σ_w.
    shares = []
    for weight, inputs in zip(weights.double(), tokens, strict=True):
        product = inputs.double().T @ inputs.double() @ row_moment(weight)
        largest = torch.linalg.eigvals(product).real.sort(descending=True).values
        shares.append(largest.cumsum(0) / largest.sum())
    assert report.spectrum[0] == 0 and report.spectrum[-1] == pytest.approx(1)
    assert report.spectrum[1:] == pytest.approx(torch.stack(shares).mean(0).tolist(), abs=1e-5)  # 32 directions


@pytest.mark.parametrize("bits", [2, 3])
def test_a_trellis_spends_its_bits_on_the_rows_that_count(bits):
    """Rows whose outputs count e^±1 times as much as the mean: the weighted error falls to about what a rate of its own
    for each row would give, their geometric by their arithmetic mean, and the bytes stay the same."""
    generator = torch.Generator().manual_seed(0)
    n, rows = 64, 1024
    weights, moments = torch.randn(1, rows, n, generator=generator), InputMoments.zeros(1, n)
    moments.add_(0, torch.randn(4000, n, generator=generator) * torch.linspace(2, 0.5, n), torch.ones(4000))
    importance = torch.randn(1, rows, generator=generator).exp()
    recipe = make_recipe("default", bits, budget=False, idre=False, bcos=False, prior_tokens=0.0)
    format = recipe.projection_format(1, rows, n)
    second_moment, _ = moments.expert_moments(0, 0.0)

    def errors(importance):
        packed = quantize_projection(weights, moments, moments, format, recipe, seed=0, importance=importance)
        wrong = weights[0] - dequantize_expert(packed.format, packed.tensors, 0)
        return (wrong @ second_moment * wrong).sum(1), packed.format.num_bytes

    (alike, size), (weighted, same_size) = errors(None), errors(importance)
    ideal = importance[0].log().mean().exp() / importance[0].mean()
    gain = (importance[0] @ weighted) / (importance[0] @ alike)
    assert 0.95 * ideal < gain < 1.2 * ideal
    assert size == same_size
    # Weighted, all rows have about the same error: those of the first quarter in importance as those of the last.
    by_rank = (importance[0] * weighted)[importance[0].argsort()].unflatten(0, (4, -1)).mean(1)
    assert by_rank.amax() < 1.6 * by_rank.amin()


@pytest.mark.parametrize("bcos", [True, False])
def test_rows_that_count_for_nothing_keep_a_finite_scale_under_one_and_the_same_input(bcos):
    """With a second moment of rank one, the outputs of a row that the search gave up can be next to nothing."""
    generator = torch.Generator().manual_seed(0)
    weights, moments = torch.randn(1, 256, 32, generator=generator), InputMoments.zeros(1, 32)
    moments.add_(0, torch.ones(64, 32), torch.ones(64))
    importance = torch.ones(1, 256)
    importance[0, ::2] = 1e-6
    recipe = make_recipe("default", 2, budget=False, idre=False, bcos=bcos)
    format = recipe.projection_format(1, 256, 32)
    packed = quantize_projection(weights, moments, moments, format, recipe, seed=0, importance=importance)
    assert packed.tensors["scale"].amax() < 6 * weights.square().mean(-1).sqrt().amax()
