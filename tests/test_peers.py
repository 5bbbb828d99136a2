"""Reading the peers' packed checkpoints: codes packed here bit by bit, bits counted by hand, and refusals."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from peers.ggml import quantize
from peers.importance import InputSquares
from peers.packed_formats import (
    GGML_TYPES,
    ExpertName,
    StoredSize,
    assert_experts_shrank,
    dense_checkpoint,
    dequantize_ggml,
    expert_name,
    ggml_bits,
    minimal_bits,
    names_in_tools,
    round_to_nearest,
)
from tiny_models import VOCAB_SIZE, tiny_model
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


def test_names_of_expert_weights() -> None:
    layer = "model.layers.3"
    assert expert_name(f"{layer}.mlp.experts.12.down_proj.weight") == ExpertName(3, 12, "down_proj")
    assert expert_name(f"{layer}.block_sparse_moe.experts.0.w3.weight") == ExpertName(3, 0, "up_proj")
    assert expert_name(f"{layer}.mlp.shared_expert.gate_proj.weight") == ExpertName(3, None, "gate_proj")
    for other in ("mlp.gate.weight", "mlp.shared_expert_gate.weight", "self_attn.q_proj.weight", "mlp.up_proj.weight"):
        assert expert_name(f"{layer}.{other}") is None
    assert names_in_tools(f"{layer}.block_sparse_moe.experts.0.w2.qweight") == (
        f"{layer}.block_sparse_moe.experts.0.w2.qweight",
        f"{layer}.block_sparse_moe.experts.0.down_proj.qweight",  # AutoRound
        f"{layer}.mlp.experts.0.down_proj.qweight",  # GPTQModel, llm-compressor
    )
    assert f"{layer}.mlp.gate.weight" in names_in_tools(f"{layer}.block_sparse_moe.gate.weight")
    assert names_in_tools(f"{layer}.self_attn.q_proj.weight") == (f"{layer}.self_attn.q_proj.weight",)


def test_codes_of_mixed_widths_are_read_by_their_size() -> None:
    packed, weight = gptq_checkpoint(3)
    dense, _ = dense_checkpoint(packed, original_checkpoint(weight), bits=2)
    assert torch.equal(dense[EXPERT], weight)


class FakeLibrary:
    """ggml_quantize_chunk at the level of pointers: reads what it is given and writes blocks that gguf made."""

    def __init__(self, blocks: np.ndarray) -> None:
        self.blocks = blocks

    def ggml_quantize_chunk(
        self, type_: int, source: int, target: int, start: int, rows: int, columns: int, importance: int
    ) -> int:
        floats = ctypes.POINTER(ctypes.c_float)
        self.values = np.ctypeslib.as_array(ctypes.cast(source, floats), (rows, columns)).copy()
        self.importance = np.ctypeslib.as_array(ctypes.cast(importance, floats), (columns,)).copy()
        self.type, self.start = type_, start
        ctypes.memmove(target, self.blocks.ctypes.data, self.blocks.nbytes)
        return self.blocks.nbytes


def q2_k_blocks(rows: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Random Q2_K blocks, uint8 [rows, 84 · blocks], and their weights by llama.cpp's definition: of 16 groups of 16,
    each code q of 2 bits stands for d · scale · q − dmin · minimum; scale and minimum have 4 bits."""
    rng = np.random.default_rng(0)
    scales = rng.integers(0, 256, (rows, blocks, 16), dtype=np.uint8)
    codes = rng.integers(0, 4, (rows, blocks, 2, 4, 32), dtype=np.uint8)  # halves of 128, then shifts, then bytes
    d, dmin = (rng.uniform(0.01, 0.02, (rows, blocks, 1)).astype(np.float16) for _ in range(2))
    packed = sum(codes[..., shift, :] << np.uint8(2 * shift) for shift in range(4)).reshape(rows, blocks, 64)
    data = np.concatenate([scales, packed, d.view(np.uint8), dmin.view(np.uint8)], axis=-1).reshape(rows, -1)
    groups = codes.reshape(rows, blocks, 16, 16).astype(np.float32)
    scale = d.astype(np.float32)[..., None] * (scales & 15)[..., None]
    minimum = dmin.astype(np.float32)[..., None] * (scales >> 4)[..., None]
    return data, (scale * groups - minimum).reshape(rows, -1)


def test_llamacpp_rows_are_padded_and_read_back() -> None:
    blocks, values = q2_k_blocks(96, 1)
    weight, importance = torch.from_numpy(values)[:, :192], torch.rand(192)
    library = FakeLibrary(blocks)
    stored = quantize(library, weight, importance, "Q2_K")
    assert library.type == GGMLQuantizationType.Q2_K == 10 and library.start == 0
    assert library.values.shape == (96, 256) and not library.values[:, 192:].any()
    assert np.array_equal(library.values[:, :192], weight.numpy())
    assert np.array_equal(library.importance, np.pad(importance.numpy(), (0, 64)))

    packed = {ROUTER: torch.ones(4, 128, dtype=torch.bfloat16), EXPERT.replace("weight", "ggml_Q2_K"): stored}
    dense, size = dense_checkpoint(packed, original_checkpoint(weight), bits=2)
    torch.testing.assert_close(dense[EXPERT], weight, rtol=1e-6, atol=1e-6)
    assert ggml_bits("Q2_K") == 84 * 8 / 256
    assert size.bits_per_weight == ggml_bits("Q2_K") * 256 / 192  # what is stored, padding included

    with pytest.raises(RuntimeError, match="8064 bytes of IQ3_S, 10560 are"):
        quantize(library, weight, importance, "IQ3_S")


def test_gguf_knows_every_type() -> None:
    """The blocks of each are read by gguf in the size that is counted."""
    for name, bits in GGML_TYPES.items():
        assert bits <= ggml_bits(name) < bits + 0.7
        blocks = torch.zeros(2, int(256 * ggml_bits(name) / 8), dtype=torch.uint8)
        assert dequantize_ggml(blocks, name, 200).shape == (2, 200)
    assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType.IQ2_XXS] == (256, 66)


@torch.no_grad()
def test_importance_is_the_mean_square_of_each_experts_inputs() -> None:
    model, reference = tiny_model("qwen2_moe"), tiny_model("qwen2_moe")
    tokens = torch.randint(2, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(0))
    seen: list[tuple[Tensor, Tensor]] = []
    block = reference.model.layers[1].mlp
    block.experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[:2]))
    expected = reference(tokens).logits
    squares = InputSquares(model)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    hidden, chosen = seen[0]
    for expert in chosen.unique().tolist():
        inputs = hidden[(chosen == expert).any(1)]
        torch.testing.assert_close(squares.mean(1, expert, False), inputs.square().mean(0))
        gate, up = (inputs @ block.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(squares.mean(1, expert, True), inner.square().mean(0))
    torch.testing.assert_close(squares.mean(1, None, False), hidden.square().mean(0))
    counts = [(chosen == expert).sum() for expert in range(8)]
    pooled = sum(count * squares.mean(1, expert, False) for expert, count in enumerate(counts) if count) / sum(counts)
    squares.sums[1, 99, False] = (torch.zeros(()), 0)
    torch.testing.assert_close(squares.mean(1, 99, False), pooled)
