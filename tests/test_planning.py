"""Plans for the bundled model: budgets met, sensitivities respected."""

import dataclasses

import pytest
import torch

from kbvq.errors import ConfigError
from kbvq.models.layer_stream import LayerStream
from kbvq.quantization.pipeline import QuantizeOptions, Run
from kbvq.quantization.planning import PROTECTED_BITS, budget_plan, check_budget
from kbvq.quantization.sensitivity import Energies, Sensitivity, probed_rates
from kbvq.recipes import BUDGET_RANKS, CODES, make_recipe
from kbvq.storage.work_folder import WorkFolder
from kbvq.structures import PROJECTIONS


@pytest.fixture(scope="module")
def stream(trained_model):
    return LayerStream(trained_model, dtype=torch.float32, device="cpu")


def sensitivities(banks, recipe, divergences=None):
    """The same for all projections, with the Gaussian law, but for what is given."""
    base = recipe.bits if recipe.bits in CODES[recipe.codebook] else 2
    distortion = {bits: code.distortion for bits, code in CODES[recipe.codebook].items()}
    growth = {(bits, rank): distortion[bits] / distortion[base] for bits in distortion for rank in BUDGET_RANKS}
    sites = [(bank, projection) for bank in banks for projection in PROJECTIONS]
    rates = probed_rates(recipe)
    low, high = (distortion[rate] / distortion[base] for rate in rates)

    def sensitivity(value):
        noise = {rate: growth[rate, 0] for rate in rates}
        return Sensitivity({rates[0]: value * low, rates[1]: value * high}, Energies(noise, growth, 0.05))

    return {site: sensitivity((divergences or {}).get(site, 0.001)) for site in sites}


def peaks(banks):
    return {bank: torch.ones(bank.num_experts) for bank in banks}


def true_bits(banks, formats):
    weights = sum(e * o * i for b in banks for e, o, i in (b.projection_shape(p) for p in PROJECTIONS))
    return 8 * sum(getattr(format, p).num_bytes for format in formats for p in PROJECTIONS) / weights


@pytest.mark.parametrize("codebook", CODES)
@pytest.mark.parametrize("bits", [1.5, 2, 2.25, 2.718, 3.3, 4])
def test_true_bits_are_those_asked_for_within_one_percent(stream, bits, codebook):
    """Four layers are few to choose from; larger models come closer."""
    recipe = make_recipe("default", bits, codebook=codebook)
    check_budget(stream.banks, recipe)
    plan = budget_plan(stream.banks, recipe, sensitivities(stream.banks, recipe), peaks(stream.banks))
    assert 0.99 * bits <= true_bits(stream.banks, plan.formats) <= bits


def test_what_is_sensitive_gets_more_bits(stream):
    recipe = make_recipe("default", 2.25)
    site = stream.banks[1], "down_proj"
    measured = sensitivities(stream.banks, recipe, {site: 0.02})
    plan = budget_plan(stream.banks, recipe, measured, peaks(stream.banks))
    bits = {(row["bank"], row["projection"]): row["code_bits"] for row in plan.record["projections"]}
    assert bits[site[0].path, site[1]] == max(bits.values()) > min(bits.values())


def test_banks_with_super_experts_are_protected(stream):
    recipe = make_recipe("default", 2)
    found = peaks(stream.banks)
    found[stream.banks[2]][5] = 500.0
    plan = budget_plan(stream.banks, recipe, sensitivities(stream.banks, recipe), found)
    assert plan.record["super_experts"] == {stream.banks[2].path: [5]}
    for row in plan.record["projections"]:
        if row["bank"] == stream.banks[2].path:
            assert row["code_bits"] >= PROTECTED_BITS
    assert true_bits(stream.banks, plan.formats) <= 2


def test_measured_plan_beats_equal_rates_at_equal_bits(stream, tmp_path):
    """On the bundled model down is far more sensitive than gate and up, most of all in the first layer."""
    recipe = make_recipe("default", 2.14)
    options = QuantizeOptions(str(stream.folder), tmp_path / "out", "unused", recipe)
    ids = torch.randint(5, 1000, (8, 128), generator=torch.Generator().manual_seed(0))
    with WorkFolder(options.output) as work:
        work.resume({}, ())
        run, carry = Run(stream, ids, options, [], work), {}
        for stage in run.stages({}):
            for index in range(stage.steps if stage.name != "quantizing layer" else 0):
                carry = stage.step(index, carry).carry
    rows = carry["budget"]["projections"]
    predicted = sum(row["predicted_divergence"][str(row["code_bits"])] for row in rows)
    assert predicted < 0.95 * sum(row["predicted_divergence"]["2"] for row in rows)
    down = {row["bank"]: row["code_bits"] for row in rows if row["projection"] == "down_proj"}
    assert down[stream.banks[0].path] == max(down.values()) > min(down.values())
    assert 0.99 * 2.14 <= true_bits(stream.banks, carry["formats"]) <= 2.14
    # The skeleton is as it was: nothing is left in memory.
    assert all(parameter.is_meta for parameter in stream.model.parameters() if parameter.shape != torch.Size([0]))


def test_ranks_dear_at_that_width_are_left_out_and_unserved_activations_refused(stream):
    wide = [dataclasses.replace(bank, intermediate_size=4096) for bank in stream.banks[:1]]
    recipe = make_recipe("default", 2, idre=True)
    largest = check_budget(wide, recipe)
    assert largest[0].down_proj.rank == 16
    wider = [dataclasses.replace(bank, intermediate_size=14336) for bank in wide]
    assert check_budget(wider, recipe)[0].down_proj.rank == 0  # the basis would take longer than all the rest
    assert largest[0].gate_up_proj.rank == 2  # at width 256 a rank costs .03 bit, so four would cost more than .1
    with pytest.raises(ConfigError, match="model.layers.0.mlp.experts: the kernels cannot serve it: .*swish7"):
        check_budget([dataclasses.replace(bank, activation="swish7") for bank in wide], recipe)


def test_budgets_that_cannot_be_met_are_refused_before_anything_is_read(stream):
    narrow = [dataclasses.replace(bank, hidden_size=32, intermediate_size=16) for bank in stream.banks]
    with pytest.raises(ConfigError, match="--bits 1.5: the lowest rates take"):
        check_budget(narrow, make_recipe("default", 1.5))
    odd = [dataclasses.replace(bank, intermediate_size=30) for bank in stream.banks]
    with pytest.raises(ConfigError, match="model.layers.0.mlp.experts: in_features 30"):
        check_budget(odd, make_recipe("default", 2, codebook="rq"))
