"""QINCo (Huijben et al. 2024, arXiv 2401.14732), decoded and encoded step by step as its recursion is written.

    x̂_0 = c_0[k_0]
    ĉ_m[j] = f_m(c_m[j], x̂_{m-1}),   x̂_m = x̂_{m-1} + ĉ_m[k_m]
    f_m(c, x̂):  v = c + A_m [c; x̂] + b_m,  then L times v ← v + B2 ReLU(B1 v)

The reference that RQ-MoE is held against: an independent implementation, without training. `from_rq_moe` takes the
weights of an `RQMoE(conditioning="reconstruction", num_refiners=1)`, which is the same model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kbvq.codes.rq_moe import RQMoE
from kbvq.errors import ConfigError


class Step(nn.Module):
    """f_m: the codeword of one stage as a function of the base codeword and the reconstruction so far."""

    def __init__(self, dim: int, depth: int, width: int) -> None:
        super().__init__()
        self.concat = nn.Linear(2 * dim, dim)
        self.down = nn.ModuleList(nn.Linear(dim, width, bias=False) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, dim, bias=False) for _ in range(depth))

    def forward(self, codeword: Tensor, reconstruction: Tensor) -> Tensor:
        """codeword, reconstruction [n, d] -> [n, d]."""
        value = codeword + self.concat(torch.cat([codeword, reconstruction], 1))
        for down, up in zip(self.down, self.up, strict=True):
            value = value + up(F.relu(down(value)))
        return value


class QINCo(nn.Module):
    """Quantizer of vectors [n, d] with `num_stages` codebooks of `codebook_size` base codewords."""

    def __init__(self, vector_dim: int, num_stages: int, codebook_size: int, depth: int, width: int) -> None:
        super().__init__()
        self.codebooks = nn.ParameterList(torch.zeros(codebook_size, vector_dim) for _ in range(num_stages))
        self.steps = nn.ModuleList(Step(vector_dim, depth, width) for _ in range(num_stages - 1))
        self.register_buffer("mean", torch.zeros(vector_dim))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def encode(self, vectors: Tensor) -> Tensor:
        """Greedy codes [n, M] int64 of vectors [n, d], over all codewords of every stage."""
        vectors = (vectors - self.mean) / self.scale
        codes = [torch.cdist(vectors, self.codebooks[0]).argmin(1)]
        reconstruction = self.codebooks[0][codes[0]]
        for codebook, step in zip(self.codebooks[1:], self.steps, strict=True):
            size = len(codebook)
            candidates = step(codebook.repeat(len(vectors), 1), reconstruction.repeat_interleave(size, 0))
            candidates = candidates.view(len(vectors), size, -1)
            codes.append((vectors[:, None] - reconstruction[:, None] - candidates).square().sum(2).argmin(1))
            reconstruction = reconstruction + candidates[torch.arange(len(vectors)), codes[-1]]
        return torch.stack(codes, 1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Vectors [n, d] of codes [n, m] int64, m <= M."""
        reconstruction = F.embedding(codes[:, 0], self.codebooks[0])
        for stage in range(1, codes.shape[1]):
            codeword = F.embedding(codes[:, stage], self.codebooks[stage])
            reconstruction = reconstruction + self.steps[stage - 1](codeword, reconstruction)
        return reconstruction * self.scale + self.mean

    @classmethod
    @torch.no_grad()
    def from_rq_moe(cls, model: RQMoE) -> QINCo:
        """The same quantizer as an RQMoE in its QINCo configuration; ConfigError for any other one."""
        if model.conditioning != "reconstruction" or model.num_refiners != 1:
            raise ConfigError('QINCo.from_rq_moe needs RQMoE(num_refiners=1, conditioning="reconstruction")')
        dim = model.vector_dim
        qinco = cls(dim, model.num_stages, model.codebook_size, model.refiner_depth, model.refiner_width)
        qinco.to(model.codebooks.device)
        qinco.mean.copy_(model.mean)
        qinco.scale.copy_(model.scale)
        for codebook, values in zip(qinco.codebooks, model.codebooks, strict=True):
            codebook.copy_(values)
        identity = torch.cat([torch.eye(dim), torch.zeros(dim, dim)], 1).to(model.codebooks.device)
        for stage, step in enumerate(qinco.steps):
            step.concat.weight.copy_(model.projection[stage] - identity)
            step.concat.bias.zero_()
            for block in range(model.refiner_depth):
                step.down[block].weight.copy_(model.refiner_in[stage, block, 0])
                step.up[block].weight.copy_(model.refiner_out[stage, block, 0])
        return qinco
