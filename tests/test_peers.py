"""Reading the peers' packed checkpoints: codes packed here bit by bit, bits counted by hand, and refusals."""

from __future__ import annotations

import pytest
import torch
from peers.packed_formats import StoredSize, assert_experts_shrank, dense_checkpoint, minimal_bits, round_to_nearest
from torch import Tensor

GROUP_SIZE = 64
EXPERT = "model.layers.0.mlp.experts.0.up_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"


def to_int32(words: list[list[int]]) -> Tensor:
    return torch.tensor([[word - (1 << 32 if word >> 31 else 0) for word in row] for row in words], dtype=torch.int32)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """[rows, n] codes -> [rows, n · bits / 32] int32: each row one large number, cut into words."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        rows.append([(number >> (32 * i)) & 0xFFFFFFFF for i in range(len(row) * bits // 32)])
    return to_int32(rows)


def quantized_weight(bits: int, *, activation_order: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes [out, in], zero points and scales [out, groups], the group of each input, and the weight they stand for."""
    generator = torch.Generator().manual_seed(bits)
    out_features, in_features = 96, 128
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator)
    zeros = torch.randint(0, 2**bits, (out_features, in_features // GROUP_SIZE), generator=generator)
    scales = (torch.rand(zeros.shape, generator=generator) + 0.5).half()
    order = torch.randperm(in_features, generator=generator) if activation_order else torch.arange(in_features)
    group = order // GROUP_SIZE
    weight = torch.empty(out_features, in_features)
    for column in range(in_features):
        weight[:, column] = (codes[:, column] - zeros[:, group[column]]) * scales[:, group[column]].float()
    return codes, zeros, scales, group, weight


def gptq_checkpoint(bits: int, *, activation_order: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros, scales, group, weight = quantized_weight(bits, activation_order=activation_order)
    prefix = EXPERT.removesuffix("weight")
    packed = {
        ROUTER: torch.ones(4, 128, dtype=torch.bfloat16),
        f"{prefix}qweight": pack_stream(codes, bits).t().contiguous(),
        f"{prefix}qzeros": pack_stream(zeros.t(), bits),
        f"{prefix}scales": scales.t().contiguous(),
    }
    if activation_order:
        packed[f"{prefix}g_idx"] = group.int()
    return packed, weight


def original_checkpoint(weight: Tensor) -> dict[str, Tensor]:
    return {EXPERT: weight.bfloat16(), ROUTER: torch.ones(4, 128, dtype=torch.bfloat16)}


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("activation_order", [False, True])
def test_gptq_layout_is_read_and_counted(bits: int, activation_order: bool) -> None:
    packed, weight = gptq_checkpoint(bits, activation_order=activation_order)
    dense, size = dense_checkpoint(packed, original_checkpoint(weight), bits=bits)
    assert torch.equal(dense[EXPERT], weight)
    # 96 x 128 weights: the codes, 2 x 96 zero points and scales, and 32 bits an input for the group indices.
    stored = 96 * 128 * bits + 2 * 96 * (bits + 16) + (128 * 32 if activation_order else 0)
    assert size.num_weights == 96 * 128
    assert size.bits_per_weight == stored / (96 * 128)
    if not activation_order:
        assert size.bits_per_weight == minimal_bits(bits, GROUP_SIZE)


@pytest.mark.parametrize("bits", [2, 3])
def test_compressed_tensors_layout_is_read_and_counted(bits: int) -> None:
    codes, zeros, scales, _, weight = quantized_weight(bits)
    prefix = EXPERT.removesuffix("weight")
    packed = {
        ROUTER: torch.ones(4, 128, dtype=torch.bfloat16),
        f"{prefix}weight_packed": pack_stream(codes, bits),
        f"{prefix}weight_zero_point": pack_stream(zeros.t(), bits).t().contiguous(),
        f"{prefix}weight_scale": scales,
        f"{prefix}weight_shape": torch.tensor([96, 128]),
    }
    dense, size = dense_checkpoint(packed, original_checkpoint(weight), bits=bits)
    assert torch.equal(dense[EXPERT], weight)
    # The codes, 2 x 96 zero points and scales, and the shape as two 64-bit numbers.
    stored = 96 * 128 * bits + 2 * 96 * (bits + 16) + 2 * 64
    assert size.bits_per_weight == stored / (96 * 128)


def test_an_expert_left_at_sixteen_bits_is_refused() -> None:
    _, weight = gptq_checkpoint(2)
    original = original_checkpoint(weight)
    with pytest.raises(ValueError, match="up_proj.weight was not quantized"):
        dense_checkpoint(original, original, bits=2)


def test_a_changed_router_is_refused() -> None:
    packed, weight = gptq_checkpoint(2)
    original = original_checkpoint(weight)
    original[ROUTER] = original[ROUTER] * 2
    with pytest.raises(ValueError, match=r"mlp\.gate\.weight is no expert weight"):
        dense_checkpoint(packed, original, bits=2)


@pytest.mark.parametrize("damage", ["none", "order", "zero points"])
def test_codes_read_wrongly_are_refused(damage: str) -> None:
    """Gaussian weights of 0.63 steps, as trained ones are at 2 bits; GPTQ's first format stores zero points less 1."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.63 * torch.randn(96, 128, generator=generator)
    codes, zeros = (weight.round() + 1).clamp(0, 3).long(), torch.ones(96, 2).long()
    if damage == "order":
        codes = codes.flip(1)
    elif damage == "zero points":
        zeros -= 1
    prefix = EXPERT.removesuffix("weight")
    packed = {
        ROUTER: torch.ones(4, 128, dtype=torch.bfloat16),
        f"{prefix}qweight": pack_stream(codes, 2).t().contiguous(),
        f"{prefix}qzeros": pack_stream(zeros.t(), 2),
        f"{prefix}scales": torch.ones(2, 96, dtype=torch.float16),
    }
    if damage == "none":
        dense_checkpoint(packed, original_checkpoint(weight), bits=2)
    else:
        with pytest.raises(ValueError, match="relative error"):
            dense_checkpoint(packed, original_checkpoint(weight), bits=2)


@pytest.mark.parametrize("stored", [0, 700, 2000])
def test_experts_must_shrink(stored: int) -> None:
    with pytest.raises(ValueError, match="did not quantize"):
        assert_experts_shrank(StoredSize(1000, {"qweight": stored}), 2000)


def test_experts_that_shrank_pass() -> None:
    assert_experts_shrank(StoredSize(1000, {"qweight": 250, "scales": 32}), 2000)


def test_round_to_nearest_picks_the_nearest_of_the_levels_of_each_group() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    dense = round_to_nearest(weight, 2, GROUP_SIZE)
    for row in range(8):
        for start in (0, 64):
            part, rounded = weight[row, start : start + 64], dense[row, start : start + 64]
            low, high = min(part.min().item(), 0.0), max(part.max().item(), 0.0)
            scale = torch.tensor((high - low) / 3).half().item()
            zero = round(-low / scale)
            levels = torch.tensor([(code - zero) * scale for code in range(4)])
            nearest = levels[(part.unsqueeze(1) - levels).abs().argmin(1)]
            torch.testing.assert_close(rounded, nearest, rtol=0, atol=1e-6)
