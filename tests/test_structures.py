import pytest
import torch

from kbvq.errors import ConfigError
from kbvq.structures import BankFormat, InputMoments, PackedProjection, ProjectionFormat


def moments_of(batches, experts=2, width=5):
    moments = InputMoments.zeros(experts, width)
    for expert, inputs, routing in batches:
        moments.add_(expert, inputs, routing)
    return moments


def test_streamed_and_merged_moments_equal_one_batch():
    generator = torch.Generator().manual_seed(0)
    inputs, routing = torch.randn(60, 5, generator=generator), torch.rand(60, generator=generator)
    whole = moments_of([(1, inputs, routing)])
    streamed = moments_of([(1, inputs[s : s + 7], routing[s : s + 7]) for s in range(0, 60, 7)])
    merged = moments_of([(1, inputs[:13], routing[:13])]) + moments_of([(1, inputs[13:], routing[13:])])
    reference = inputs.double().T @ inputs.double()
    for moments in (whole, streamed, merged):
        torch.testing.assert_close(moments.outer_sum[1].double(), reference, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.input_sum[1], inputs.sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.weight_sum[1], routing.sum())
        assert moments.tokens.tolist() == [0, 60]


def test_sums_of_many_channels_are_complete_whenever_they_are_read():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 600, generator=generator)
    moments = InputMoments.zeros(2, 600)
    for start in range(0, 50, 10):
        moments.add_(1, inputs[start : start + 10], torch.ones(10))
        seen = inputs[: start + 10].double()
        torch.testing.assert_close(moments.outer_sum[1].double(), seen.T @ seen, rtol=1e-5, atol=1e-5)
        pooled = (seen.T @ seen / len(seen)).float()
        torch.testing.assert_close(moments.pooled_second_moment(), pooled, rtol=1e-5, atol=1e-5)
    order = torch.randperm(600, generator=generator)
    moments.reorder_(torch.stack([order, order]))
    sorted_inputs = inputs[:, order].double()
    torch.testing.assert_close(moments.outer_sum[1].double(), sorted_inputs.T @ sorted_inputs, rtol=1e-5, atol=1e-5)


def test_few_tokens_are_shrunk_toward_the_pool():
    generator = torch.Generator().manual_seed(0)
    rare, common = torch.randn(2, 5, generator=generator), torch.randn(98, 5, generator=generator)
    moments = moments_of([(0, rare, torch.ones(2)), (1, common, torch.ones(98))])
    pooled = torch.cat([rare, common])
    second_moment, mean = moments.expert_moments(0, prior_tokens=6.0)
    torch.testing.assert_close(second_moment, (rare.T @ rare + 6 * pooled.T @ pooled / 100) / 8)
    torch.testing.assert_close(mean, (rare.sum(0) + 6 * pooled.mean(0)) / 8)


def test_tokens_can_count_by_their_squared_routing_weight():
    generator = torch.Generator().manual_seed(0)
    inputs, routing = torch.randn(50, 5, generator=generator), torch.rand(50, generator=generator)
    moments = InputMoments.zeros(2, 5)
    moments.add_(0, inputs, routing, by_routing=True)
    second_moment, mean = moments.expert_moments(0, prior_tokens=0.0)
    weights = routing.double().square()
    expected = torch.einsum("t,ti,tj->ij", weights, inputs.double(), inputs.double()) / weights.sum()
    torch.testing.assert_close(second_moment.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean.double(), (weights @ inputs.double()) / weights.sum(), rtol=1e-5, atol=1e-6)
    assert moments.tokens.tolist() == [50, 0]


def test_an_expert_without_tokens_has_the_pooled_moments():
    moments = moments_of([(0, torch.ones(4, 5), torch.ones(4))])
    torch.testing.assert_close(moments.expert_moments(1, 1.0)[0], moments.pooled_second_moment())


def projection_format(**changes):
    return ProjectionFormat(**{"num_experts": 2, "out_features": 8, "in_features": 12, "codebook": "vq",
                               "vector_dim": 4, "codebook_size": 4096} | changes)  # fmt: skip


def test_twelve_bit_rows_hold_a_byte_plane_and_a_nibble_plane():
    assert projection_format().row_bytes == 3 + 2
    assert projection_format(codebook_size=256, num_stages=2, codebook="rq").row_bytes == 6


def test_bank_format_survives_json():
    bank = BankFormat("model.layers.0.mlp.experts", "routed", projection_format(), projection_format(rank=2))
    assert BankFormat.from_dict(bank.to_dict()) == bank
    assert "model.layers.0.mlp.experts.down_proj_basis" in bank.tensors()
    assert bank.tensors()["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.uint8


def test_unreadable_formats_are_refused():
    with pytest.raises(ConfigError, match="this version cannot read"):
        BankFormat.from_dict({"path": "a", "kind": "routed", "gate_up_proj": {"novel": 1}, "down_proj": {}})
    with pytest.raises(ConfigError, match="are named rq-grouped since"):
        projection_format(codebook="rq-moe", num_stages=2, num_groups=8)
    with pytest.raises(ConfigError, match="codebook_size 300"):
        projection_format(codebook_size=300)
    with pytest.raises(ConfigError, match="do not match"):
        PackedProjection(projection_format(), {})
    tensors = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in projection_format().tensors().items()}
    with pytest.raises(ConfigError, match="codes is"):
        PackedProjection(projection_format(), tensors | {"codes": torch.zeros(1, dtype=torch.uint8)})
