import pytest
import torch
from packed_banks import random_bank
from torch.nn.functional import gelu, silu
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from kbvq.codes.packing import dequantize_expert
from kbvq.errors import CheckpointError
from kbvq.models.expert_forward import gated, run_experts
from kbvq.serving.packed_experts import PackedExperts, PackedMLP, packed_module
from kbvq.structures import PROJECTIONS, BankFormat, ProjectionFormat

EXPERTS, HIDDEN, INTERMEDIATE = 4, 32, 16
OPTIONS = {
    "plain": {},
    "rq, scale": {"codebook": "rq", "num_stages": 2, "has_scale": True},
    "12 bit, int8 factors": {"codebook_size": 4096, "rank": 4, "factor_dtype": "int8", "num_codebooks": EXPERTS},
}


def dense_weights(bank):
    return {
        name: torch.stack([dequantize_expert(p.format, p.tensors, e) for e in range(p.format.num_experts)])
        for name in PROJECTIONS
        for p in (getattr(bank, name),)
    }


def packed(bank, activation=silu):
    module = packed_module(bank.format, gated(activation))
    module.load_bank_(bank)
    return module


def transformers_experts(cls, config, bank):
    config._experts_implementation = "eager"
    module = cls(config).requires_grad_(False)
    for name, weight in dense_weights(bank).items():
        getattr(module, name).copy_(weight)
    return module


def routing(tokens, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN, generator=generator), index, torch.rand(tokens, k, generator=generator)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_routed_experts_equal_the_transformers_module_with_dequantized_weights(family, options):
    bank = random_bank("experts", "routed", EXPERTS, HIDDEN, INTERMEDIATE, seed=3, **options)
    cls, config = {
        "mixtral": (
            MixtralExperts,
            MixtralConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS),
        ),
        "qwen3_moe": (
            Qwen3MoeExperts,
            Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS),
        ),
    }[family]
    inputs = routing(11, 2)
    expected = transformers_experts(cls, config, bank)(*inputs)
    # Both compute in float32; only the order of sums over at most 32 terms differs.
    torch.testing.assert_close(packed(bank)(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_shared_expert_equals_the_transformers_mlp_with_dequantized_weights():
    bank = random_bank("shared_expert", "shared", 1, HIDDEN, INTERMEDIATE, seed=4, **OPTIONS["rq, scale"])
    mlp = Qwen2MoeMLP(Qwen2MoeConfig(hidden_size=HIDDEN), intermediate_size=INTERMEDIATE).requires_grad_(False)
    weights = dense_weights(bank)
    mlp.gate_proj.weight.copy_(weights["gate_up_proj"][0, :INTERMEDIATE])
    mlp.up_proj.weight.copy_(weights["gate_up_proj"][0, INTERMEDIATE:])
    mlp.down_proj.weight.copy_(weights["down_proj"][0])
    inputs = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0))
    module = packed(bank)
    assert isinstance(module, PackedMLP)
    torch.testing.assert_close(module(inputs), mlp(inputs), rtol=1e-5, atol=1e-5)


def test_biases_enter_before_the_activation_and_before_the_routing_weight():
    bank = random_bank("experts", "routed", EXPERTS, HIDDEN, INTERMEDIATE, seed=5, has_bias=True)
    weights = {name: w.double() for name, w in dense_weights(bank).items()}
    biases = {name: getattr(bank, name).tensors["bias"].double() for name in PROJECTIONS}
    hidden, index, routing_weights = routing(7, 3)
    expected = torch.zeros(7, HIDDEN, dtype=torch.float64)
    for token in range(7):
        for slot in range(3):
            e = index[token, slot]
            gate_up = weights["gate_up_proj"][e] @ hidden[token].double() + biases["gate_up_proj"][e]
            activated = gelu(gate_up[:INTERMEDIATE]) * gate_up[INTERMEDIATE:]
            output = weights["down_proj"][e] @ activated + biases["down_proj"][e]
            expected[token] += routing_weights[token, slot].double() * output
    actual = packed(bank, gelu)(hidden, index, routing_weights)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_indices_of_other_ranks_are_skipped():
    bank = random_bank("experts", "routed", EXPERTS, HIDDEN, INTERMEDIATE, seed=6)
    hidden, index, weights = routing(5, 2)
    index[1, 0] = EXPERTS
    index[3] = EXPERTS + 3
    silenced = weights.clone()
    silenced[1, 0] = 0
    silenced[3] = 0
    actual = packed(bank)(hidden, index, weights)
    expected = packed(bank)(hidden, index.clamp_max(EXPERTS - 1), silenced)
    assert torch.equal(actual[3], torch.zeros(HIDDEN))
    # A zeroed token changes the shapes of the products, so the sums may be taken in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_has_the_dtype_of_the_hidden_states_whatever_the_routing_weights(dtype):
    bank = random_bank("experts", "routed", EXPERTS, HIDDEN, INTERMEDIATE, seed=7, has_bias=True, has_scale=True)
    hidden, index, weights = routing(6, 2)
    reference = packed(bank)(hidden, index, weights)
    actual = packed(bank)(hidden.to(dtype), index, weights)
    assert actual.dtype == dtype
    # Five roundings (input, weight, gate_up, product, down) of relative size eps, on outputs of `reference`'s size.
    error = (actual.float() - reference).norm() / reference.norm()
    assert error < 5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_module_cast_to_another_dtype_still_runs(dtype):
    bank = random_bank("experts", "routed", EXPERTS, HIDDEN, INTERMEDIATE, seed=8, rank=4, has_scale=True)
    hidden, index, weights = routing(6, 2)
    module = packed(bank).to(dtype)
    assert module.gate_up_proj.dtype == torch.uint8
    assert module(hidden.to(dtype), index, weights).isfinite().all()


def test_no_tokens():
    bank = random_bank("experts", "routed", EXPERTS, HIDDEN, INTERMEDIATE, seed=9)
    empty = packed(bank)(torch.empty(0, HIDDEN), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert empty.shape == (0, HIDDEN)


def test_observer_sees_every_expert_with_tokens_once_in_ascending_order():
    hidden, index, routing_weights = routing(9, 2)
    index[index == 2] = 3  # expert 2 gets no tokens; expert 3 may meet a token twice
    gate_up, down = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN), torch.randn(EXPERTS, HIDDEN, INTERMEDIATE)
    seen = []
    run_experts(
        hidden,
        index,
        routing_weights,
        num_experts=EXPERTS,
        expert_weights=lambda e: (gate_up[e], None, down[e], None),
        gating=gated(silu),
        observe=lambda *observed: seen.append(observed),
    )
    assert [observed[0] for observed in seen] == [0, 1, 3]
    for expert, gate_up_inputs, down_inputs, outputs, weights in seen:
        tokens, slots = torch.where(index == expert)
        assert torch.equal(gate_up_inputs, hidden[tokens])
        assert torch.equal(weights, routing_weights[tokens, slots])
        gate, up = (hidden[tokens] @ gate_up[expert].T).chunk(2, dim=-1)
        torch.testing.assert_close(down_inputs, silu(gate) * up, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs, down_inputs @ down[expert].T, rtol=1e-5, atol=1e-5)


def test_buffers_are_the_formats_tensors_and_all_are_saved():
    bank = random_bank("experts", "routed", EXPERTS, HIDDEN, INTERMEDIATE, seed=10, rank=2, factor_dtype="int8")
    module = packed(bank)
    assert isinstance(module, PackedExperts)
    assert not list(module.parameters())
    saved = {f"experts.{name}": tensor for name, tensor in module.state_dict().items()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in saved.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in bank.format.tensors().items()
    }
    assert all(torch.equal(saved[name], tensor) for name, tensor in bank.state_dict().items())


def test_bank_of_another_format_is_refused():
    projection = ProjectionFormat(EXPERTS, 2 * INTERMEDIATE, HIDDEN, "vq", 4, 256)
    other = BankFormat("experts", "routed", projection, ProjectionFormat(EXPERTS, HIDDEN, INTERMEDIATE, "vq", 8, 256))
    bank = random_bank("experts", "routed", EXPERTS, HIDDEN, INTERMEDIATE, seed=11)
    with pytest.raises(CheckpointError, match="format"):
        packed_module(other, gated(silu)).load_bank_(bank)
