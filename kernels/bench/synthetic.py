"""Synthetic packed projections and the expert shapes of the models that the benchmarks measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kbvq_kernels import PreparedProjection, prepare


@dataclass(frozen=True)
class ExpertShape:
    """Routed experts of one layer of a model."""

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int

    @property
    def weights_per_expert(self) -> int:
        return 3 * self.hidden * self.intermediate


SHAPES = (
    ExpertShape("Qwen3-30B-A3B", 48, 128, 8, 2048, 768),
    ExpertShape("Qwen1.5-MoE-A2.7B", 24, 60, 4, 2048, 1408),
    ExpertShape("Mixtral-8x7B", 32, 8, 2, 4096, 14336),
)


@dataclass(frozen=True)
class CodeFormat:
    """A code format; bits are those of the codes alone."""

    name: str
    vector_dim: int
    codebook_size: int
    num_stages: int

    @property
    def bits(self) -> float:
        return self.num_stages * (8 if self.codebook_size == 256 else 12) / self.vector_dim


FORMATS = (
    CodeFormat("2b vq d4 256", 4, 256, 1),
    CodeFormat("3b vq d4 4096", 4, 4096, 1),
    CodeFormat("2b rq2 d8 256", 8, 256, 2),
    CodeFormat("3b rq3 d8 256", 8, 256, 3),
    CodeFormat("1.5b vq d8 4096", 8, 4096, 1),
    CodeFormat("3b rq2 d8 4096", 8, 4096, 2),
)


def random_tensors(
    code: CodeFormat, num_experts: int, out_features: int, in_features: int, rank: int = 0, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """(tensors, format fields) with random codes, scales and biases, and outputs of order one."""
    vectors = in_features // code.vector_dim
    row_bytes = code.num_stages * (vectors if code.codebook_size == 256 else vectors + (vectors + 1) // 2)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).half()

    width = (in_features * code.num_stages) ** -0.5
    tensors = {
        "codes": torch.randint(0, 256, (num_experts, out_features, row_bytes), dtype=torch.uint8, device=device),
        "codebook": normal(1, code.num_stages, code.codebook_size, code.vector_dim, scale=width),
        "scale": normal(num_experts, out_features, scale=0.1) + 1,
        "bias": normal(num_experts, out_features, scale=0.1),
    }
    if rank:
        tensors["basis"] = normal(rank, in_features, scale=in_features**-0.5)
        tensors["coefficients"] = normal(num_experts, out_features, rank, scale=rank**-0.5)
    fields = {
        "in_features": in_features,
        "codebook": "vq" if code.num_stages == 1 else "rq",
        "vector_dim": code.vector_dim,
        "codebook_size": code.codebook_size,
        "num_stages": code.num_stages,
        "rank": rank,
    }
    return tensors, fields


def random_bank(
    shape: ExpertShape, code: CodeFormat, rank: int = 0, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> tuple[PreparedProjection, PreparedProjection]:
    """Prepared gate_up and down projections of one layer."""
    sizes = ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
    made = (random_tensors(code, shape.num_experts, *size, rank=rank, device=device) for size in sizes)
    gate_up, down = (prepare(tensors, **fields, dtype=dtype) for tensors, fields in made)
    return gate_up, down


def random_routing(shape: ExpertShape, num_tokens: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Uniform routing: k different experts a token, weights that sum to one."""
    order = torch.rand(num_tokens, shape.num_experts, device=device).argsort(-1)
    weights = torch.rand(num_tokens, shape.top_k, device=device).softmax(-1)
    return order[:, : shape.top_k].contiguous(), weights


def grouped_mm_forward(
    x: Tensor, index: Tensor, weights: Tensor, gate_up_weight: Tensor, down_weight: Tensor
) -> Tensor:
    """The bf16 baseline: transformers' default expert path (sort by expert, F.grouped_mm, combine)."""
    num_tokens, top_k = index.shape
    num_experts = gate_up_weight.shape[0]
    flat = index.reshape(-1)
    order = torch.argsort(flat)
    countable = flat.to(torch.float32 if x.device.type == "cpu" else torch.int32)
    counts = torch.histc(countable, num_experts, 0, num_experts - 1)
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = torch.nn.functional.grouped_mm(x[order // top_k], gate_up_weight.transpose(1, 2), offs=ends).chunk(2, -1)
    h = torch.nn.functional.silu(gate) * up
    rows = torch.nn.functional.grouped_mm(h, down_weight.transpose(1, 2), offs=ends)
    rows = rows * weights.reshape(-1, 1)[order].to(rows.dtype)
    restored = torch.empty_like(rows)
    restored[order] = rows
    return restored.view(num_tokens, top_k, -1).sum(1)
