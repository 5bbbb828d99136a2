"""The forward pass of a bank of experts, in plain torch, for whatever weights it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ExpertWeights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""gate_up_proj [2I, H], its bias [2I] or None, down_proj [H, I], its bias [H] or None."""

Observer = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
"""Called as (expert, inputs of gate_up_proj [n, H], inputs of down_proj [n, I], outputs [n, H], routing weights
[n])."""


def run_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    num_experts: int,
    expert_weights: Callable[[int], ExpertWeights],
    activation: Callable[[Tensor], Tensor],
    observe: Observer | None = None,
) -> Tensor:
    """Σ_k routing_weight_k · (down_e(activation(gate) · up) + bias_e) over the experts of each token.

    hidden_states: [T, H], any float dtype; matrix products run in it.
    top_k_index: [T, k] integers; those >= num_experts mark experts of another rank and are skipped.
    top_k_weights: [T, k], any float dtype.
    expert_weights: asked once per expert that has tokens, in ascending order, so weights can be made on demand.
    observe: sees the inputs of both projections and the output of every expert that has tokens.

    Returns [T, H] in the dtype of `hidden_states`. Deterministic.
    """
    experts, order = top_k_index.flatten().sort(stable=True)
    tokens = order // top_k_index.shape[-1]
    routing_weights = top_k_weights.flatten()[order].float()
    counts = experts[experts < num_experts].bincount(minlength=num_experts).tolist()

    # float32: adding k outputs in bfloat16 would round k times. A token meets an expert at most once, so each
    # index_add_ writes a row at most once, and the order of the additions is that of the experts.
    output = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        chosen = slice(start, start + count)
        start += count
        gate_up_inputs = hidden_states[tokens[chosen]]
        gate_up_weight, gate_up_bias, down_weight, down_bias = expert_weights(expert)
        gate, up = F.linear(gate_up_inputs, gate_up_weight, gate_up_bias).chunk(2, dim=-1)
        down_inputs = activation(gate) * up
        expert_output = F.linear(down_inputs, down_weight, down_bias)
        if observe is not None:
            observe(expert, gate_up_inputs, down_inputs, expert_output, routing_weights[chosen])
        output.index_add_(0, tokens[chosen], expert_output.float() * routing_weights[chosen, None])
    return output.to(hidden_states.dtype)


def stacked_experts(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Callable[[int], ExpertWeights]:
    """The weights of one expert from those of all: gate_up_proj and down_proj [E, …], and their biases [E, …]."""

    def of_expert(expert: int) -> ExpertWeights:
        (gate_up, gate_up_bias), (down, down_bias) = (
            (weight[expert], None if bias is None else bias[expert])
            for weight, bias in zip(weights, biases, strict=True)
        )
        return gate_up, gate_up_bias, down, down_bias

    return of_expert


def run_bank(
    hidden_states: Tensor,
    top_k_index: Tensor | None,
    top_k_weights: Tensor | None,
    num_experts: int,
    expert_weights: Callable[[int], ExpertWeights],
    activation: Callable[[Tensor], Tensor],
    observe: Observer | None = None,
) -> Tensor:
    """`run_experts` as modules are called: [..., H], and without routing for a shared expert, which every token meets
    with weight one."""
    tokens = hidden_states.flatten(0, -2)
    if top_k_index is None or top_k_weights is None:
        top_k_index = torch.zeros(len(tokens), 1, dtype=torch.int64, device=tokens.device)
        top_k_weights = torch.ones(len(tokens), 1, device=tokens.device)
    output = run_experts(
        tokens,
        top_k_index,
        top_k_weights,
        num_experts=num_experts,
        expert_weights=expert_weights,
        activation=activation,
        observe=observe,
    )
    return output.view(hidden_states.shape)
