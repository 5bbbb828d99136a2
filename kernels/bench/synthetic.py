"""Synthetic packed projections and the expert shapes of the models that the benchmarks measure."""

from __future__ import annotations

import dataclasses
import math
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
    codebook: str
    vector_dim: int
    codebook_size: int
    num_stages: int = 1
    signed: bool = False
    codebook_dtype: str = "float16"
    num_groups: int = 1

    @property
    def bits(self) -> float:
        return self.num_stages * math.log2(self.codebook_size) / self.vector_dim + self.signed

    @property
    def lookups(self) -> float:
        """Table lookups per weight."""
        return self.num_stages / self.vector_dim

    @property
    def fields(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "name"}


FORMATS = (
    CodeFormat("2b signed d8 int8", "vq", 8, 256, signed=True, codebook_dtype="int8"),
    CodeFormat("3b signed d4 int8", "vq", 4, 256, signed=True, codebook_dtype="int8"),
    CodeFormat("2b vq d4 int8", "vq", 4, 256, codebook_dtype="int8"),
    CodeFormat("4b vq d2 int8", "vq", 2, 256, codebook_dtype="int8"),
    CodeFormat("2b rq2 d8 int8", "rq", 8, 256, 2, codebook_dtype="int8"),
    CodeFormat("2b trellis", "trellis", 1, 4),
    CodeFormat("1b vq d8 int8", "vq", 8, 256, codebook_dtype="int8"),
    CodeFormat("3b vq d4 4096", "vq", 4, 4096),
    CodeFormat("1.5b vq d8 4096", "vq", 8, 4096),
    CodeFormat("4b rq2 d4", "rq", 4, 256, 2),
    CodeFormat("3b rq3 d8", "rq", 8, 256, 3),
    CodeFormat("3b rq2 d8 4096", "rq", 8, 4096, 2),
    CodeFormat("2b rq-grouped2 d8", "rq-grouped", 8, 256, 2, num_groups=8),
    CodeFormat("3b rq-grouped3 d8", "rq-grouped", 8, 256, 3, num_groups=8),
)
"""The first six are measured, the rest only counted. float16 and int8 codebooks are the same to kernels on CUDA."""

MEASURED = 6

EXPANDED = CodeFormat("2b rq-moe d8, expanded", "rq-grouped", 8, 256, 2, num_groups=256)
"""What rq-moe is to the kernels. Its tables of 1 MiB lie in no cache that the ceilings know."""


def random_tensors(
    code: CodeFormat, num_experts: int, out_features: int, in_features: int, rank: int = 0, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """(tensors, format fields) with random codes, scales and biases, and outputs of order one."""

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).half()

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8 if low >= 0 else torch.int8, device=device)

    width = (in_features * code.num_stages) ** -0.5
    tensors = {"bias": normal(num_experts, out_features, scale=0.1)}
    if code.codebook == "trellis":
        tensors["codes"] = integers(0, 256, num_experts, in_features, int(out_features * code.bits) // 8)
        tensors["scale"] = normal(num_experts, out_features, scale=0.1 * width) + width
    else:
        vectors, tables = in_features // code.vector_dim, 1 + (code.num_stages - 1) * code.num_groups
        nibbles = (vectors + 1) // 2 if code.codebook_size > 256 else 0
        row_bytes = code.num_stages * (vectors + nibbles) + (in_features // 8 if code.signed else 0)
        tensors["codes"] = integers(0, 256, num_experts, out_features, row_bytes)
        tensors["scale"] = normal(num_experts, out_features, scale=0.1) + 1
        shape = (1, tables, code.codebook_size, code.vector_dim)
        if code.codebook_dtype == "int8":
            tensors["codebook"] = integers(0 if code.signed else -127, 127, *shape).to(torch.int8)
            tensors["codebook_scale"] = torch.full((1, tables), width / 64, device=device).half()
        else:
            tensors["codebook"] = normal(*shape, scale=width)
            if code.signed:
                tensors["codebook"] = tensors["codebook"].abs()
        if code.num_groups > 1:
            tensors["groups"] = integers(0, code.num_groups, 1, code.codebook_size)
    if rank:
        tensors["basis"] = normal(rank, in_features, scale=in_features**-0.5)
        tensors["coefficients"] = normal(num_experts, out_features, rank, scale=rank**-0.5)
    return tensors, {"in_features": in_features, "rank": rank} | code.fields


def random_bank(
    shape: ExpertShape, code: CodeFormat, rank: int = 0, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> tuple[PreparedProjection, PreparedProjection]:
    """Prepared gate_up and down projections of one layer."""
    sizes = ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
    made = (random_tensors(code, shape.num_experts, *size, rank=rank, device=device) for size in sizes)
    gate_up, down = (prepare(tensors, **fields, dtype=dtype) for tensors, fields in made)
    return gate_up, down


def meta_bank(shape: ExpertShape, code: CodeFormat, rank: int = 0) -> tuple[PreparedProjection, PreparedProjection]:
    """Prepared gate_up and down projections of which only shapes and dtypes exist, as on CUDA."""
    bank = []
    for rows, columns in ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)):
        tensors, fields = random_tensors(code, 1, 16, columns, rank)
        meta = {}
        for name, t in tensors.items():
            size = list(t.shape)
            if name in ("codes", "scale", "bias", "coefficients"):
                axis = 2 if name == "codes" and code.codebook == "trellis" else 1
                size[0], size[axis] = shape.num_experts, size[axis] * rows // 16
            meta[name] = torch.empty(size, dtype=t.dtype, device="meta")
        bank.append(prepare(meta, **fields, dtype=torch.bfloat16))
    return bank[0], bank[1]


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
