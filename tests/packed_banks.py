"""Random packed banks and what they decode to, written out independently of `kbvq.packing`."""

import torch

from kbvq.packing import pack_stages
from kbvq.structures import BankFormat, PackedBank, PackedProjection, ProjectionFormat


def random_projection(format: ProjectionFormat, seed: int) -> tuple[PackedProjection, torch.Tensor]:
    """A projection with random contents, and its codes [num_stages, experts, rows, num_vectors]."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(
        format.codebook_size,
        (format.num_stages, format.num_experts, format.out_features, format.num_vectors),
        generator=generator,
    )
    tensors = {}
    for name, spec in format.tensors().items():
        if name == "codes":
            tensors[name] = pack_stages(codes, format.codebook_size)
        elif spec.dtype == torch.int8:
            tensors[name] = torch.randint(-127, 128, spec.shape, generator=generator).to(torch.int8)
        else:
            spread = {"codebook": 0.3, "basis_scale": 0.004, "coefficients_scale": 0.004}.get(name, 0.5)
            tensors[name] = (spread * torch.randn(spec.shape, generator=generator)).to(spec.dtype)
    return PackedProjection(format, tensors), codes


def reference_weight(packed: PackedProjection, codes: torch.Tensor, expert: int) -> torch.Tensor:
    """Stored weight of one expert, [out_features, in_features] float64, vector by vector from the unpacked codes."""
    format, t = packed.format, packed.tensors
    codebook = t["codebook"].double()[expert if format.num_codebooks > 1 else 0]
    weight = torch.zeros(format.out_features, format.in_features, dtype=torch.float64)
    for row in range(format.out_features):
        for vector in range(format.num_vectors):
            columns = slice(vector * format.vector_dim, (vector + 1) * format.vector_dim)
            for stage in range(format.num_stages):
                weight[row, columns] += codebook[stage, codes[stage, expert, row, vector]]
    if format.rank:
        coefficients, basis = t["coefficients"][expert].double(), t["basis"].double()
        if format.factor_dtype == "int8":
            coefficients = coefficients @ torch.diag(t["coefficients_scale"][expert].double())
            basis = torch.diag(t["basis_scale"].double()) @ basis
        weight = weight + coefficients @ basis
    if format.has_scale:
        weight = torch.diag(t["scale"][expert].double()) @ weight
    return weight


def random_bank(path: str, kind: str, experts: int, hidden: int, intermediate: int, seed: int, **options) -> PackedBank:
    """A bank with random contents; `options` are those of both ProjectionFormats."""
    options = {"codebook": "vq", "vector_dim": 4, "codebook_size": 256} | options
    format = BankFormat(
        path,
        kind,
        ProjectionFormat(experts, 2 * intermediate, hidden, **options),
        ProjectionFormat(experts, hidden, intermediate, **options),
    )
    gate_up, _ = random_projection(format.gate_up_proj, seed)
    down, _ = random_projection(format.down_proj, seed + 1000)
    return PackedBank(path, kind, gate_up, down)
