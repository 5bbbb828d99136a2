"""Carve a routed mixture of experts out of a dense model: its neurons become one shared and several routed experts.

Layer by layer, after CMoE (Pei et al., 2025) and LLaMA-MoE (Zhu et al., 2024): the neurons that are active most often
form the shared expert; the others are clustered by when they are active, in clusters of equal size. Unlike CMoE's,
the router is fitted to the clusters' contributions, and the down projections are then fitted in closed form, such
that the layer adds what brings the carved model's residual stream back to the dense one's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from testbed.dense import common_config, copy_all_but_mlps_
from testbed.routed import fit_linear, fit_router
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

CLUSTERED_TOKENS = 8192
"""Tokens that decide which neurons are clustered together."""


@dataclass(frozen=True)
class Carving:
    """shared: neurons of the shared expert. experts: routed ones, of equal shares of the rest. active: of them per
    token. active_share: share of the routed neurons that count as active in a token, for the clustering. ridge: see
    fit_linear."""

    shared: int
    experts: int
    active: int
    active_share: float = 0.25
    ridge: float = 1e-3


def balanced_clusters(profiles: Tensor, num_clusters: int, *, iterations: int, seed: int) -> Tensor:
    """Cluster rows into equal sizes by k-means; returns row indices [num_clusters, rows / num_clusters], sorted.

    profiles: [rows, n]; rows are compared by direction. Within an iteration all pairs of row and cluster are taken from
    the closest on, wherever the row has no cluster yet and the cluster has room: no optimal assignment, but near it.
    """
    rows = len(profiles)
    if rows % num_clusters:
        raise ValueError(f"{rows} neurons cannot be dealt to {num_clusters} experts of equal size")
    size = rows // num_clusters
    profiles = F.normalize(profiles, dim=1)
    generator = torch.Generator().manual_seed(seed)
    centroids = profiles[torch.randperm(rows, generator=generator)[:num_clusters]]
    labels = torch.full((rows,), -1)
    for _ in range(iterations):
        order = (profiles @ centroids.T).flatten().argsort(descending=True, stable=True).tolist()
        new = [-1] * rows
        room = [size] * num_clusters
        for pair in order:
            row, cluster = divmod(pair, num_clusters)
            if new[row] < 0 and room[cluster]:
                new[row] = cluster
                room[cluster] -= 1
        if new == labels.tolist():
            break
        labels = torch.tensor(new)
        sums = torch.zeros(num_clusters, profiles.shape[1]).index_add_(0, labels, profiles)
        centroids = F.normalize(sums, dim=1)
    return labels.argsort(stable=True).view(num_clusters, size)


def neuron_groups(contributions: Tensor, carving: Carving, *, seed: int) -> tuple[Tensor, Tensor]:
    """Neurons of the shared expert [shared] and of the routed ones [experts, rest / experts].

    contributions: [tokens, neurons], how much a neuron adds to the output in a token, at least 0.
    """
    tokens, neurons = contributions.shape
    top = contributions.topk(carving.shared, dim=1).indices
    rates = torch.bincount(top.flatten(), minlength=neurons)
    order = rates.argsort(descending=True, stable=True)
    shared, rest = order[: carving.shared].sort().values, order[carving.shared :].sort().values
    routed = contributions[:, rest]
    active = routed.topk(int(carving.active_share * len(rest)), dim=1).indices
    profiles = torch.zeros(tokens, len(rest)).scatter_(1, active, 1.0).T
    return shared, rest[balanced_clusters(profiles, carving.experts, iterations=20, seed=seed)]


def carved_model(dense: PreTrainedModel, carving: Carving) -> Qwen2MoeForCausalLM:
    """A Qwen2-MoE with the dense model's attention and embeddings, float32; its experts are not filled yet."""
    rest = dense.config.intermediate_size - carving.shared
    config = Qwen2MoeConfig(
        **common_config(dense),
        intermediate_size=dense.config.intermediate_size,
        shared_expert_intermediate_size=carving.shared,
        moe_intermediate_size=rest // carving.experts,
        num_experts=carving.experts,
        num_experts_per_tok=carving.active,
        norm_topk_prob=True,
        qkv_bias=False,
    )
    model = Qwen2MoeForCausalLM._from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    copy_all_but_mlps_(model, dense)
    return model


@torch.no_grad()
def carve_block_(
    block: nn.Module, mlp: nn.Module, inputs: Tensor, target: Tensor, weights: Tensor, *, carving: Carving, seed: int
) -> float:
    """Fill a Qwen2-MoE block with the neurons of a dense MLP (routed.FillBlock)."""
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    hidden = F.silu(inputs @ gate.T) * (inputs @ up.T)
    contributions = hidden.abs() * down.norm(dim=0)
    shared, experts = neuron_groups(contributions[:: max(1, len(inputs) // CLUSTERED_TOKENS)], carving, seed=seed)

    energy = contributions[:, experts.flatten()].square().view(len(inputs), *experts.shape).sum(-1)
    router = fit_router(inputs, energy / energy.sum(-1, keepdim=True), seed=seed)
    block.gate.weight.copy_(router)
    block.shared_expert_gate.weight.zero_()  # its sigmoid is then a half
    block.shared_expert.gate_proj.weight.copy_(gate[shared])
    block.shared_expert.up_proj.weight.copy_(up[shared])
    block.experts.gate_up_proj.copy_(torch.cat([gate[experts], up[experts]], dim=1))

    _, routing, chosen = block.gate(inputs)
    mixing = torch.zeros(len(inputs), carving.experts).scatter_(1, chosen, routing)
    routed = hidden[:, experts.flatten()].view(len(inputs), *experts.shape) * mixing[..., None]
    features = torch.cat([0.5 * hidden[:, shared], routed.flatten(1)], dim=1)
    # If every active expert had the weight 1 / active, this would be the dense network of the active neurons.
    start = torch.cat([2 * down[:, shared], carving.active * down[:, experts.flatten()]], dim=1)
    fitted = fit_linear(features, target, weights, start, ridge=carving.ridge)
    block.shared_expert.down_proj.weight.copy_(fitted[:, : carving.shared])
    block.experts.down_proj.copy_(fitted[:, carving.shared :].unflatten(1, experts.shape).transpose(0, 1))
    error = (target - features @ fitted.T).square().sum(1) @ weights
    return (error / (target.square().sum(1) @ weights)).item()
