"""Experts of a bank with rates of their own: tiers, from the plan to the served model."""

import copy
import dataclasses
import json

import pytest
import torch
from decoded_models import write_decoded_
from packed_banks import random_bank
from quantizing import quantize
from tiny_models import save_tiny_model
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from kbvq.codes.packing import dequantize_expert
from kbvq.errors import CheckpointError, ConfigError
from kbvq.models.calibration import ObservedBank
from kbvq.models.expert_forward import gated
from kbvq.quantization import planning
from kbvq.recipes import make_recipe
from kbvq.reporting.report import write_report
from kbvq.reporting.run_report import read_run
from kbvq.serving.packed_experts import packed_module
from kbvq.storage.checkpoint import inspect_checkpoint, verify_checkpoint
from kbvq.structures import PROJECTIONS, BankFormat, InputMoments, TierMoments, check_tiers, tier_path

EXPERTS, HIDDEN, INTERMEDIATE = 5, 32, 16
HELD = (1, 3, 4), (2,), (0,)
TOKENS = torch.randint(2, 128, (3, 24), generator=torch.Generator().manual_seed(5))


def tiers(bank="experts"):
    """Random tiers of rates 2, 3 and 4."""
    trellis = {"codebook": "trellis", "vector_dim": 1, "has_scale": True, "has_column_scale": True}
    found = []
    for place, experts in enumerate(HELD):
        path, size = tier_path(bank, place), 2 ** (place + 2)
        made = random_bank(path, "routed", len(experts), HIDDEN, INTERMEDIATE, place, codebook_size=size, **trellis)
        found.append(dataclasses.replace(made, experts=experts))
    return found


def served(activation):
    banks = tiers()
    formats = [bank.format for bank in banks]
    module = packed_module(formats[0], gated(silu), activation, formats[1:])
    for part, bank in zip((module, *module.tiers), banks, strict=True):
        part.load_bank_(bank)
    return module, banks


def by_hand(banks, hidden, index, weights):
    """In float64, token by token."""
    where = {expert: (bank, place) for bank in banks for place, expert in enumerate(bank.experts)}
    expected = torch.zeros(len(hidden), HIDDEN, dtype=torch.float64)
    for token, (experts, own) in enumerate(zip(index.tolist(), weights.tolist(), strict=True)):
        for expert, weight in zip(experts, own, strict=True):
            if expert not in where:
                continue
            bank, place = where[expert]
            gate_up, down = (
                dequantize_expert(p.format, p.tensors, place).double() for p in (bank.gate_up_proj, bank.down_proj)
            )
            gate, up = (gate_up @ hidden[token].double()).chunk(2)
            expected[token] += weight * (down @ (silu(gate) * up))
    return expected


def routing(tokens):
    generator = torch.Generator().manual_seed(tokens)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN, generator=generator), index, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize("activation", ["silu", None], ids=["kernels", "torch"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_tiers_give_what_their_experts_give(activation, tokens):
    module, banks = served(activation)
    hidden, index, weights = routing(tokens)
    with torch.no_grad():
        found = module(hidden, index, weights)
    expected = by_hand(banks, hidden, index, weights)
    assert (found.double() - expected).norm() < 0.02 * expected.norm()  # products in integers round to 8 bits
    if activation is None:
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["silu", None], ids=["kernels", "torch"])
def test_indices_outside_are_skipped_and_not_taken_for_another_tiers(activation):
    module, banks = served(activation)
    hidden, index, weights = routing(6)
    index[0] = torch.tensor([EXPERTS, EXPERTS + 7])
    index[2, 1], index[4, 0] = -1, EXPERTS
    with torch.no_grad():
        found = module(hidden, index, weights)
    assert torch.equal(found[0], torch.zeros(HIDDEN))
    expected = by_hand(banks, hidden, index, weights)
    assert (found.double() - expected).norm() < 0.02 * expected.norm()


def test_gradients_reach_the_inputs():
    module, banks = served("silu")
    hidden, index, weights = routing(4)
    hidden.requires_grad_(True)
    module(hidden, index, weights).square().sum().backward()
    outputs = by_hand(banks, hidden.detach(), index, weights)
    step = 1e-4 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    moved = by_hand(banks, hidden.detach() + step, index, weights)
    change = (moved.square().sum() - outputs.square().sum()).item()
    assert abs((hidden.grad * step).sum().item() - change) < 0.02 * abs(change)


def test_an_observed_bank_computes_with_the_weights_of_all_tiers():
    banks = tiers()
    shapes = {"gate_up_proj": (EXPERTS, 2 * INTERMEDIATE, HIDDEN), "down_proj": (EXPERTS, HIDDEN, INTERMEDIATE)}
    original = {name: torch.zeros(shape) for name, shape in shapes.items()}
    observed = ObservedBank(original, gated(silu))
    for name in PROJECTIONS:
        observed.use_(name, {bank.experts: getattr(bank, name) for bank in banks})
    assert not any(weight.any() for weight in original.values())  # they are still needed
    hidden, index, weights = routing(8)
    expected = by_hand(banks, hidden, index, weights)
    torch.testing.assert_close(observed(hidden, index, weights).double(), expected, rtol=1e-4, atol=1e-4)


def test_moments_of_a_tier_are_those_of_its_experts():
    generator = torch.Generator().manual_seed(0)
    whole = InputMoments.zeros(EXPERTS, 6)
    for expert in range(EXPERTS):
        whole.add_(expert, torch.randn(3 + expert, 6, generator=generator), torch.ones(3 + expert))
    part = TierMoments(whole, (1, 4))
    assert part.tokens.tolist() == [4, 7] and part.mass.tolist() == [4.0, 7.0]
    for place, expert in enumerate((1, 4)):
        for found, wanted in zip(part.expert_moments(place, 8.0), whole.expert_moments(expert, 8.0), strict=True):
            assert torch.equal(found, wanted)
    assert torch.equal(part.pooled_second_moment(), whole.pooled_second_moment())


@pytest.fixture(scope="module")
def folders(tmp_path_factory, module_text):
    """A tiny model of the bundled kind and its packed form, in which every routed bank has two tiers."""
    root = tmp_path_factory.mktemp("tiers")
    save_tiny_model(root / "model", "qwen2_moe", hidden_size=64, moe_intermediate_size=64)
    with pytest.MonkeyPatch.context() as patch:
        in_two(patch)
        quantize(root / "model", root / "packed", module_text, make_recipe("default", 3.6))
        quantize(root / "model", root / "tuned", module_text, make_recipe("best", 3.6, distillation_steps=3))
    return root


@pytest.fixture(scope="module")
def module_text(tmp_path_factory):
    from quantizing import write_text

    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def in_two(patch):
    """All that a budget may choose for a routed bank: odd experts a step above the even ones."""

    def partitions(shares):
        experts = range(len(shares[0]))
        return [{0: tuple(e for e in experts if e % 2 == 0), 1: tuple(e for e in experts if e % 2)}]

    patch.setattr(planning, "expert_partitions", partitions)
    patch.setattr(planning, "TIER_PENALTY", 0.01)


def routed(folder):
    banks = json.loads((folder / "config.json").read_text())["quantization_config"]["banks"]
    return [BankFormat.from_dict(bank) for bank in banks if bank["kind"] == "routed"]


def decoded_model(root, packed):
    """The original with what the packed model's banks decode to."""
    original = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    for path, module in packed.named_modules():
        if path.endswith(("mlp.experts", "shared_expert")):
            write_decoded_(original.get_submodule(path), module)
    return original


def test_a_run_stores_tiers_that_the_report_and_inspect_know(folders):
    formats = routed(folders / "packed")
    banks = {format.bank for format in formats}
    assert len(formats) == 2 * len(banks) > 0
    for bank in banks:
        own = [format for format in formats if format.bank == bank]
        check_tiers(bank, 8, own)
        low, high = sorted(own, key=lambda format: format.experts)
        assert (low.experts, high.experts) == ((0, 2, 4, 6), (1, 3, 5, 7))
        rates = [(f.gate_up_proj.trellis_bits, f.down_proj.trellis_bits) for f in (low, high)]
        assert rates[0] != rates[1] and all(one <= other for one, other in zip(*rates, strict=True))
    verify_checkpoint(folders / "packed")
    summary = inspect_checkpoint(folders / "packed")
    assert 3.5 < summary["bits_per_weight"] <= 3.6
    assert {bank["path"] for bank in summary["banks"]} >= {format.path for format in formats}
    record = json.loads((folders / "packed" / "kbvq_run.json").read_text())
    reports = {bank["path"]: bank for layer in record["layers"] for bank in layer["banks"]}
    for format in formats:
        assert tuple(reports[format.path]["experts"]) == format.experts
        assert len(reports[format.path]["tokens"]) == len(format.experts)
        assert len(reports[format.path]["down_proj"]["relative_error_by_expert"]) == len(format.experts)
    planned = {row["bank"] for row in record["budget"]["projections"]}
    assert planned == {bank["path"] for bank in summary["banks"]}


def test_a_loaded_model_computes_with_the_decoded_weights_of_all_tiers(folders):
    packed = AutoModelForCausalLM.from_pretrained(folders / "packed", dtype=torch.float32)
    with torch.no_grad():
        expected, found = decoded_model(folders, packed)(TOKENS).logits, packed(TOKENS).logits
        assert (found - expected).norm() < 0.02 * expected.norm()
        copied = copy.deepcopy(packed)
        assert torch.equal(copied(TOKENS).logits, found)
    generated = packed.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, TOKENS.shape[1] + 4)


def test_a_model_with_tiers_is_saved_offloaded_and_compiled(folders, tmp_path):
    packed = AutoModelForCausalLM.from_pretrained(folders / "packed", dtype=torch.float32)
    packed.save_pretrained(tmp_path / "saved")
    assert inspect_checkpoint(tmp_path / "saved") == inspect_checkpoint(folders / "packed")
    layers = {f"model.layers.{index}": "disk" for index in range(packed.config.num_hidden_layers)}
    others = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(
        folders / "packed",
        dtype=torch.float32,
        device_map=layers | others,
        offload_folder=str(tmp_path / "offload"),
        offload_buffers=True,
    )
    with torch.no_grad():
        expected = packed(TOKENS, use_cache=False).logits
        for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32), offloaded):
            assert torch.equal(model(TOKENS, use_cache=False).logits, expected)
        compiled = torch.compile(packed, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


def test_end_to_end_tuning_trains_all_tiers(folders):
    """Scales of both change, codes of none."""
    plain, tuned = (
        AutoModelForCausalLM.from_pretrained(folders / name, dtype=torch.float32).state_dict()
        for name in ("packed", "tuned")
    )
    assert plain.keys() == tuned.keys()
    scales = [name for name in plain if ".experts." in name and name.endswith("_proj_scale")]
    assert any(".tiers.0." in name for name in scales)
    assert all(not torch.equal(plain[name], tuned[name]) for name in scales)
    codes = [name for name in plain if name.endswith((".gate_up_proj", ".down_proj")) and ".experts." in name]
    assert all(torch.equal(plain[name], tuned[name]) for name in codes)


def rewrite(folders, tmp_path, change):
    """The packed checkpoint with another config.json."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in (folders / "packed").iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"]["banks"])
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([0, 1, 2, 4], "do not hold each of the 8 experts once"),
        ([0, 2, 4, 8], "do not hold each of the 8 experts once"),
        ([2, 0, 4, 6], "ascending order"),
        ([0], "do not have the 1 experts"),
        ([0, 2, 4, 6.0], "list of their numbers"),
        ("0246", "list of their numbers"),
        ([], "config.json makes"),
    ],
)
def test_tiers_that_do_not_make_up_their_bank_are_refused(folders, tmp_path, experts, message):
    def change(banks):
        next(bank for bank in banks if 0 in bank.get("experts", ()))["experts"] = experts

    with pytest.raises((CheckpointError, ConfigError), match=message):
        AutoModelForCausalLM.from_pretrained(rewrite(folders, tmp_path, change))


def test_tiers_at_other_paths_are_refused(folders, tmp_path):
    def change(banks):
        tier = next(bank for bank in banks if ".tiers." in bank["path"])
        tier["path"] = tier["path"].replace(".tiers.0", ".tiers.1")

    with pytest.raises(CheckpointError, match="missing|not one below the other"):
        AutoModelForCausalLM.from_pretrained(rewrite(folders, tmp_path, change))


def test_tuning_of_a_layer_refuses_rates_per_expert():
    with pytest.raises(ConfigError, match="tuning_steps do not know rates per expert"):
        make_recipe("default", 2, tuning_steps=5)
    make_recipe("default", 2, tuning_steps=5, expert_rates=False)
    make_recipe("default", 2, tuning_steps=5, budget=False)  # then all experts are alike


def test_the_report_puts_the_experts_of_tiers_together_again(folders):
    run = read_run(folders / "packed")
    record = json.loads((folders / "packed" / "kbvq_run.json").read_text())
    reports = {bank["path"]: bank for layer in record["layers"] for bank in layer["banks"]}
    rows = {row.path: row for row in run.banks}
    for format in routed(folders / "packed"):
        assert len(rows[format.bank].tokens) == 8
        for place, expert in enumerate(format.experts):
            assert rows[format.bank].tokens[expert] == reports[format.path]["tokens"][place]
    few = record["experts_with_few_tokens"]
    for path, row in rows.items():
        assert few.get(path, []) == [expert for expert, tokens in enumerate(row.tokens) if tokens < 256] == row.starved
    write_report(folders / "packed")
    page = (folders / "packed" / "report.html").read_text(encoding="utf-8")
    assert "1 tier 2 gate/up" in page and "model.layers.1.mlp.experts.gate_up_proj" in page
