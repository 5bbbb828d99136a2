import dataclasses

import moe_families
import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from kbvq.errors import UnsupportedModelError
from kbvq.models.calibration import ObservedBank
from kbvq.models.moe_adapters import (
    ExpertBank,
    decoder_layers,
    find_expert_banks,
    read_experts,
)

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def meta_model(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def routed(layer, num_experts=8):
    return ExpertBank(f"model.layers.{layer}.mlp.experts", "routed", num_experts, 64, 32, layer)


def shared(layer, name, width):
    return ExpertBank(f"model.layers.{layer}.mlp.{name}", "shared", 1, 64, width, layer)


EXPECTED = {
    "mixtral": [routed(0, 4), routed(1, 4)],
    "qwen2_moe": [
        *(routed(0), shared(0, "shared_expert", 48)),
        *(routed(1), shared(1, "shared_expert", 48)),
    ],
    "qwen3_moe": [routed(0), routed(1)],
    "qwen3_moe_tied": [routed(0), routed(1)],
    "olmoe": [routed(0), routed(1)],
    "deepseek_v2": [routed(1), shared(1, "shared_experts", 64)],
    "deepseek_v3": [routed(1), shared(1, "shared_experts", 64)],
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_banks_of_the_supported_families(arch):
    assert find_expert_banks(meta_model(tiny_config(arch))) == EXPECTED[arch]


def test_order_follows_the_layer_number_not_its_spelling():
    banks = find_expert_banks(meta_model(tiny_config("qwen3_moe", num_hidden_layers=12, mlp_only_layers=[3])))
    assert [bank.decoder_layer for bank in banks] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_and_gating_reproduce_the_bank(arch):
    """down(gating(gate_up)) from what the adapter returns is what the model's own module computes."""
    check_experts(tiny_model(arch), 64)


KNOWN = moe_families.moe_model_types()
"""Older versions of transformers lack some."""

OTHER_LAYOUTS = ["gpt_oss", "aria_text", "nemotron_h", "dbrx", "deepseek_v4", "beam"]


@pytest.mark.parametrize("model_type", [t for t in OTHER_LAYOUTS if t in KNOWN])
def test_other_layouts_reproduce_the_bank(model_type):
    model = moe_families.tiny_model(moe_families.tiny_config(model_type))
    if reason := moe_families.REFUSED_WITH_OLD_TRANSFORMERS.get(model_type):
        with pytest.raises(UnsupportedModelError, match=f"{model_type}: .*{reason}"):
            find_expert_banks(model)
        return
    check_experts(model, 64)


def check_experts(model, hidden_size):
    tokens = torch.randn(5, hidden_size, generator=torch.Generator().manual_seed(0))
    for bank in find_expert_banks(model):
        module = model.get_submodule(bank.path)
        experts = read_experts(module)
        assert (experts.activation, bool(experts.biases)) == (bank.activation, bank.has_bias)
        for name, weight in experts.weights.items():
            assert tuple(weight.shape) == bank.projection_shape(name)
        for expert in range(bank.num_experts):
            biases = {name: bias[expert] for name, bias in experts.biases.items()}
            gate_up = F.linear(tokens, experts.weights["gate_up_proj"][expert], biases.get("gate_up_proj"))
            hidden = experts.gating(gate_up)
            expected = F.linear(hidden, experts.weights["down_proj"][expert], biases.get("down_proj"))
            with torch.no_grad():
                if bank.kind == "shared":
                    output = module(tokens)
                else:
                    output = module(tokens[None] if "Dbrx" in type(module).__name__ else tokens, *to_one(expert))
            torch.testing.assert_close(output.view(expected.shape), expected)


def to_one(expert):
    """Routing of five tokens to an expert."""
    return torch.full((5, 1), expert), torch.ones(5, 1)


def test_llama4_experts_take_the_tokens_of_all_at_once():
    """Each expert has its part of the rows, multiplied by the routing weights; rows of zeros were not routed to it."""
    model = moe_families.tiny_model(moe_families.tiny_config("llama4_text"))
    bank = find_expert_banks(model)[0]
    module = model.get_submodule(bank.path)
    tokens = torch.randn(bank.num_experts * 5, bank.hidden_size, generator=torch.Generator().manual_seed(0))
    tokens[::3] = 0
    observed = ObservedBank(read_experts(module).weights, read_experts(module).gating)
    observed.watch_("gate_up_proj")
    with torch.no_grad():
        torch.testing.assert_close(observed(tokens), module(tokens), rtol=1e-4, atol=1e-6)
    routed = tokens.any(-1).view(bank.num_experts, 5).sum(1)
    assert torch.equal(observed.moments["gate_up_proj"].tokens, routed)


def test_decoder_layers():
    model = meta_model(tiny_config("mixtral"))
    layers, path = decoder_layers(model)
    assert layers is model.model.layers and path == "model.layers"


def test_dense_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="llama.*no experts.*dense.*families.md"):
        find_expert_banks(meta_model(LlamaConfig(**SMALL, intermediate_size=64)))


@pytest.mark.parametrize(
    "model_type, reason",
    [("jetmoe", "jetmoe.*JetMoeParallelExperts.*interface"), ("longcat_flash", "longcat_flash.*LongcatFlashExperts")],
)
def test_other_experts_are_refused_by_name_with_the_reason(model_type, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        find_expert_banks(meta_model(moe_families.tiny_config(model_type)))


@pytest.mark.parametrize(
    "attribute, value, reason",
    [
        ("has_bias", True, "lacks the parameters gate_up_proj_bias"),
        ("has_gate", False, "lacks the fused parameters up_proj"),
        ("has_post_expert_norm", True, "end in a norm"),
        ("act_fn", nn.PReLU(), "activation has parameters"),
        ("gate_up_proj", nn.Parameter(torch.empty(8, 65, 64, device="meta")), "not \\[E, 2I, H\\]"),
    ],
)
def test_each_condition_of_the_rule(attribute, value, reason):
    model = meta_model(tiny_config("qwen3_moe"))
    setattr(model.model.layers[1].mlp.experts, attribute, value)
    with pytest.raises(UnsupportedModelError, match=f"layers.1.mlp.experts.*{reason}"):
        find_expert_banks(model)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu", "gelu_new"])
def test_activations_are_named_for_the_kernels(activation):
    banks = find_expert_banks(meta_model(tiny_config("qwen3_moe", hidden_act=activation)))
    assert {bank.activation for bank in banks} == {activation if activation != "gelu_new" else None}


def test_interface_attributes_absent_from_older_transformers_count_as_standard():
    model = meta_model(tiny_config("qwen3_moe"))
    for layer in model.model.layers:
        for attribute in ("is_concatenated", "has_post_expert_norm"):
            vars(layer.mlp.experts).pop(attribute, None)
    assert find_expert_banks(model) == EXPECTED["qwen3_moe"]


def test_interleaved_rows_are_put_in_order_whether_transformers_declares_them_or_not(monkeypatch):
    model = moe_families.tiny_model(moe_families.tiny_config("gpt_oss"))
    bank = find_expert_banks(model)[0]
    module = model.get_submodule(bank.path)
    gate_up = module.gate_up_proj.detach().mT
    for declared in (True, False):
        if declared:
            module.is_concatenated = False
        else:
            del module.is_concatenated
            monkeypatch.delattr(type(module), "is_concatenated", raising=False)
        experts = read_experts(module)
        rows = torch.cat([gate_up[:, 0::2], gate_up[:, 1::2]], 1)
        assert torch.equal(experts.weights["gate_up_proj"], rows)
        bias = experts.biases["gate_up_proj"]
        assert torch.equal(bias, torch.cat([module.gate_up_proj_bias[:, 0::2], module.gate_up_proj_bias[:, 1::2]], 1))


def test_router_of_another_width_than_its_experts_is_refused():
    """As in DBRX of transformers 5.4, which so cannot run it itself."""
    model = meta_model(moe_families.tiny_config("dbrx"))
    model.transformer.blocks[1].ffn.router.layer = nn.Linear(48, 4)
    with pytest.raises(UnsupportedModelError, match="dbrx: transformers .* gives .*ffn.router (48|32) inputs"):
        find_expert_banks(model)


def test_separate_expert_modules_are_refused():
    model = meta_model(LlamaConfig(**SMALL, intermediate_size=64))
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(UnsupportedModelError, match="layers.0.mlp.experts.*ModuleList"):
        find_expert_banks(model)


def test_shared_expert_with_bias_is_left_alone():
    banks = find_expert_banks(meta_model(tiny_config("deepseek_v2", mlp_bias=True)))
    assert [bank.kind for bank in banks] == ["routed"]


def test_banks_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        routed(0).path = "elsewhere"
