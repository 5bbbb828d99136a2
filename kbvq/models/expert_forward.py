"""The forward pass of a bank of experts, in plain torch, for whatever weights it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ExpertWeights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""gate_up_proj [2I, H], its bias [2I] or None, down_proj [H, I], its bias [H] or None."""

Gating = Callable[[Tensor], Tensor]
"""What lies between the projections: outputs of gate_up_proj [n, 2I] (or [n, I] of experts without a gate) -> inputs of
down_proj [n, I]."""

Observer = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
"""Called as (expert, inputs of gate_up_proj [n, H], inputs of down_proj [n, I], outputs [n, H], routing weights
[n])."""


def gated(activation: Callable[[Tensor], Tensor]) -> Gating:
    """The usual gating, activation(gate) * up, gate being the first half."""
    return partial(_apply_gate, activation)


def _apply_gate(activation: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


def run_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    num_experts: int,
    expert_weights: Callable[[int], ExpertWeights],
    gating: Gating,
    observe: Observer | None = None,
) -> Tensor:
    """Σ_k routing_weight_k · down_e(gating(gate_up_e(x))) over the experts of each token, biases included.

    hidden_states: [T, H], any float dtype; matrix products run in it.
    top_k_index: [T, k] integers; those >= num_experts mark experts of another rank and are skipped.
    top_k_weights: [T, k], any float dtype.
    expert_weights: asked once per expert that has tokens, in ascending order, so weights can be made on demand.
    observe: sees the inputs of both projections and the output of every expert that has tokens.

    Returns [T, H] in the dtype of `hidden_states`. Deterministic.
    """
    # float32: adding k outputs in bfloat16 would round k times. A token meets an expert at most once, so each
    # index_add_ writes a row at most once, and the order of the additions is that of the experts.
    output = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for expert, tokens, routing_weights in by_expert(top_k_index, top_k_weights, num_experts):
        gate_up_inputs = hidden_states[tokens]
        gate_up_weight, gate_up_bias, down_weight, down_bias = expert_weights(expert)
        down_inputs = gating(F.linear(gate_up_inputs, gate_up_weight, gate_up_bias))
        expert_output = F.linear(down_inputs, down_weight, down_bias)
        if observe is not None:
            observe(expert, gate_up_inputs, down_inputs, expert_output, routing_weights)
        output.index_add_(0, tokens, expert_output.float() * routing_weights[:, None])
    return output.to(hidden_states.dtype)


def by_expert(top_k_index: Tensor, top_k_weights: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens in ascending order [n], their routing weights [n] float32) of every expert that has tokens,
    in ascending order."""
    experts, order = top_k_index.flatten().sort(stable=True)
    tokens, routing_weights = order // top_k_index.shape[-1], top_k_weights.flatten()[order].float()
    counts = experts[experts < num_experts].bincount(minlength=num_experts).tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count:
            chosen = slice(start, start + count)
            start += count
            yield expert, tokens[chosen], routing_weights[chosen]


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
    gating: Gating,
    observe: Observer | None = None,
) -> Tensor:
    """`run_experts` as modules are called: [..., H], and maybe without routing (`fill_routing`)."""
    tokens = hidden_states.flatten(0, -2)
    top_k_index, top_k_weights = fill_routing(tokens, top_k_index, top_k_weights, num_experts)
    output = run_experts(
        tokens,
        top_k_index,
        top_k_weights,
        num_experts=num_experts,
        expert_weights=expert_weights,
        gating=gating,
        observe=observe,
    )
    return output.view(hidden_states.shape)


def fill_routing(
    tokens: Tensor, top_k_index: Tensor | None, top_k_weights: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor]:
    """The routing of a call: what it was given, or for a call with tokens [T, H] alone the index and weight, [T, 1].

    A shared expert takes every token with weight one. Several experts, as in Llama 4, take equal parts of the tokens in
    order, multiplied by their routing weights before; rows of zeros are tokens that were not routed there, and skipped.
    """
    if top_k_index is not None and top_k_weights is not None:
        return top_k_index, top_k_weights
    of_expert = torch.arange(num_experts, device=tokens.device).repeat_interleave(len(tokens) // num_experts)
    if num_experts > 1:
        of_expert = torch.where(tokens.any(-1), of_expert, num_experts)
    return of_expert[:, None], torch.ones(len(tokens), 1, device=tokens.device)
