"""Upcycle a dense model: experts start as its MLP with half of their neurons drawn afresh, then diverge in training.

Initialisation after Drop-Upcycling (Nakamura et al., 2025). Instead of pretraining go on, which takes GPUs, each layer
is trained by itself to add what the dense layer adds, every expert on the tokens that the router sends it: its router
separates clusters of tokens; the down projections are fitted in closed form, then all expert weights by Adam.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from testbed.carve import balanced_clusters
from testbed.dense import batches, common_config, copy_all_but_mlps_
from testbed.routed import fit_linear, fit_router
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Upcycling:
    """experts of full width, `active` of them per token. fresh: share of their neurons that is drawn afresh.
    sharpness: of the soft targets of the router. steps, batch (tokens), rate: of Adam, with cosine decay."""

    experts: int
    active: int = 2
    fresh: float = 0.5
    sharpness: float = 10.0
    ridge: float = 1e-3
    steps: int = 8
    batch: int = 2048
    rate: float = 1e-3


def upcycled_model(dense: PreTrainedModel, upcycling: Upcycling) -> MixtralForCausalLM:
    """A Mixtral with the dense model's attention and embeddings, float32; its experts are not filled yet."""
    config = MixtralConfig(
        **common_config(dense),
        intermediate_size=dense.config.intermediate_size,
        num_local_experts=upcycling.experts,
        num_experts_per_tok=upcycling.active,
        sliding_window=None,
    )
    model = MixtralForCausalLM._from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    copy_all_but_mlps_(model, dense)
    return model


@torch.no_grad()
def start_experts_(block: nn.Module, mlp: nn.Module, upcycling: Upcycling, *, seed: int) -> None:
    """Copies of the dense MLP, in each of which other neurons are replaced by normal ones of the same mean and
    deviation (per matrix)."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    neurons = len(gate)

    def drawn(weight: Tensor) -> Tensor:
        return weight.mean() + weight.std() * torch.randn(weight.shape, generator=generator)

    for expert in range(upcycling.experts):
        fresh = torch.randperm(neurons, generator=generator)[: round(upcycling.fresh * neurons)]
        new_gate, new_up, new_down = gate.clone(), up.clone(), down.clone()
        new_gate[fresh], new_up[fresh] = drawn(gate[fresh]), drawn(up[fresh])
        new_down[:, fresh] = drawn(down[:, fresh])
        block.experts.gate_up_proj[expert] = torch.cat([new_gate, new_up])
        block.experts.down_proj[expert] = new_down


def cluster_router(inputs: Tensor, upcycling: Upcycling, *, seed: int) -> Tensor:
    """Router weight [experts, hidden_size] that tells clusters of tokens of equal size apart."""
    centred = F.normalize(inputs - inputs.mean(0), dim=1)
    sample = centred[:: max(1, len(centred) // 4096)]
    sample = sample[: len(sample) // upcycling.experts * upcycling.experts]
    clusters = balanced_clusters(sample, upcycling.experts, iterations=20, seed=seed)
    centroids = F.normalize(sample[clusters].mean(1), dim=1)
    targets = (upcycling.sharpness * centred @ centroids.T).softmax(-1)
    return fit_router(inputs, targets, seed=seed)


def upcycle_block_(
    block: nn.Module,
    mlp: nn.Module,
    inputs: Tensor,
    target: Tensor,
    weights: Tensor,
    *,
    upcycling: Upcycling,
    seed: int,
) -> float:
    """Fill a Mixtral block with diverged copies of a dense MLP (routed.FillBlock)."""
    start_experts_(block, mlp, upcycling, seed=seed)
    experts = block.experts
    with torch.no_grad():
        block.gate.weight.copy_(cluster_router(inputs, upcycling, seed=seed))
        _, _, chosen = block.gate(inputs)
        for expert in range(upcycling.experts):
            rows = (chosen == expert).any(1).nonzero().squeeze(1)
            gate, up = F.linear(inputs[rows], experts.gate_up_proj[expert]).chunk(2, dim=-1)
            down = experts.down_proj[expert]
            down.copy_(fit_linear(F.silu(gate) * up, target[rows], weights[rows], down, ridge=upcycling.ridge))

    energy = (target.square().sum(1) @ weights) / len(inputs)
    optimizer = torch.optim.Adam(experts.parameters(), lr=upcycling.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, upcycling.steps))
    parts = batches(len(inputs), min(upcycling.batch, len(inputs)), torch.Generator().manual_seed(seed))
    for rows in islice(parts, upcycling.steps):
        error = (block(inputs[None, rows])[0] - target[rows]).square().sum(1) @ weights[rows]
        optimizer.zero_grad()
        (error / (len(rows) * energy)).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    with torch.no_grad():
        parts = zip(*(rows.split(2048) for rows in (inputs, target, weights)), strict=True)
        error = sum((block(part[None])[0] - wanted).square().sum(1) @ weight for part, wanted, weight in parts)
    return (error / (energy * len(inputs))).item()
