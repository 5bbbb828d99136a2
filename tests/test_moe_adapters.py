import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, DbrxConfig, GptOssConfig, Llama4TextConfig, LlamaConfig, NemotronHConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kbvq.errors import UnsupportedModelError
from kbvq.models.moe_adapters import (
    TESTED_FAMILIES,
    ExpertBank,
    bank_activation,
    bank_weights,
    decoder_layers,
    find_expert_banks,
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


def test_every_family_is_in_the_tests():
    assert {config_class.model_type for config_class, _ in ARCHITECTURES.values()} == set(TESTED_FAMILIES)


def test_order_follows_the_layer_number_not_its_spelling():
    banks = find_expert_banks(meta_model(tiny_config("qwen3_moe", num_hidden_layers=12, mlp_only_layers=[3])))
    assert [bank.decoder_layer for bank in banks] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_and_activation_reproduce_the_bank(arch):
    """down(activation(gate) * up) from what the adapter returns is what the model's own module computes."""
    model = tiny_model(arch)
    tokens = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for bank in find_expert_banks(model):
        module = model.get_submodule(bank.path)
        weights, activation = bank_weights(module, bank), bank_activation(module)
        assert weights["gate_up_proj"].shape == (bank.num_experts, 2 * bank.intermediate_size, bank.hidden_size)
        assert weights["down_proj"].shape == (bank.num_experts, bank.hidden_size, bank.intermediate_size)
        for expert in range(bank.num_experts):
            gate, up = F.linear(tokens, weights["gate_up_proj"][expert]).split(bank.intermediate_size, dim=-1)
            expected = F.linear(activation(gate) * up, weights["down_proj"][expert])
            with torch.no_grad():
                if bank.kind == "shared":
                    output = module(tokens)
                else:
                    output = module(tokens, torch.full((5, 1), expert), torch.ones(5, 1))
            torch.testing.assert_close(output, expected)


def test_decoder_layers():
    model = meta_model(tiny_config("mixtral"))
    layers, path = decoder_layers(model)
    assert layers is model.model.layers and path == "model.layers"


def test_dense_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="llama.*no experts.*dense.*mixtral"):
        find_expert_banks(meta_model(LlamaConfig(**SMALL, intermediate_size=64)))


@pytest.mark.parametrize(
    "config, reason",
    [
        (
            GptOssConfig(**SMALL, intermediate_size=32, num_local_experts=4, head_dim=8),
            "gpt_oss.*GptOssExperts.*biases",
        ),
        (
            DbrxConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64, attn_config={"rope_theta": 1e4}),
            "dbrx.*DbrxExperts.*interface",
        ),
        (
            Llama4TextConfig(**SMALL, intermediate_size=32, intermediate_size_mlp=32, num_local_experts=4, head_dim=8),
            "llama4_text.*Llama4TextExperts.*interface",
        ),
        (
            NemotronHConfig(
                **SMALL,
                layers_block_type=["moe", "moe"],
                intermediate_size=32,
                n_routed_experts=4,
                moe_intermediate_size=16,
                moe_shared_expert_intermediate_size=16,
            ),
            "nemotron_h.*NemotronHExperts.*no gate",
        ),
    ],
    ids=["gpt_oss", "dbrx", "llama4", "nemotron_h"],
)
def test_other_experts_are_refused_by_name_with_the_reason(config, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        find_expert_banks(meta_model(config))


def test_a_standard_but_untested_family_is_refused():
    config = CONFIG_MAPPING["glm4_moe"](**SMALL, intermediate_size=32, moe_intermediate_size=16, n_routed_experts=4)
    with pytest.raises(UnsupportedModelError, match="glm4_moe.*not been tested.*mixtral.*deepseek_v3"):
        find_expert_banks(meta_model(config))


@pytest.mark.parametrize(
    "attribute, value, reason",
    [
        ("is_transposed", True, "transposed"),
        ("is_concatenated", False, "interleaved"),
        ("has_post_expert_norm", True, "end in a norm"),
        ("gate_up_proj", nn.Parameter(torch.empty(8, 65, 64, device="meta")), "not \\[E, 2I, H\\]"),
    ],
)
def test_each_condition_of_the_rule(attribute, value, reason):
    model = meta_model(tiny_config("qwen3_moe"))
    setattr(model.model.layers[1].mlp.experts, attribute, value)
    with pytest.raises(UnsupportedModelError, match=f"layers.1.mlp.experts.*{reason}"):
        find_expert_banks(model)


def test_own_gate_function_is_refused(monkeypatch):
    model = meta_model(tiny_config("qwen3_moe"))
    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "_apply_gate", lambda self, x: x)
    with pytest.raises(UnsupportedModelError, match="gate function of its own"):
        find_expert_banks(model)


def test_interface_attributes_absent_from_older_transformers_count_as_standard():
    model = meta_model(tiny_config("qwen3_moe"))
    for layer in model.model.layers:
        for attribute in ("is_concatenated", "has_post_expert_norm"):
            vars(layer.mlp.experts).pop(attribute, None)
    assert find_expert_banks(model) == EXPECTED["qwen3_moe"]


def test_separate_expert_modules_are_refused():
    model = meta_model(LlamaConfig(**SMALL, intermediate_size=64))
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(UnsupportedModelError, match="layers.0.mlp.experts.*ModuleList"):
        find_expert_banks(model)


def test_shared_expert_with_bias_is_refused():
    with pytest.raises(UnsupportedModelError, match="shared_experts.*gate_proj.*without bias"):
        find_expert_banks(meta_model(tiny_config("deepseek_v2", mlp_bias=True)))


def test_banks_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        routed(0).path = "elsewhere"
