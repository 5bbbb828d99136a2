"""The calibration pass over one decoder layer: run it on stored activations and gather the moments of its banks.

While a layer is worked on, each of its banks is an `ObservedBank`: the original weights (the teacher) or, projection
by projection, the quantized ones (the student), with the moments of the inputs gathered on request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from kbvq.expert_forward import run_experts
from kbvq.packing import dequantize_expert
from kbvq.structures import PROJECTIONS, InputMoments, PackedProjection


class ObservedBank(nn.Module):
    """Stands in for a bank's module; called like it, with or without routing.

    weights: {"gate_up_proj": [E, 2I, H], "down_proj": [E, H, I]} in the dtype that the layer computes in.
    """

    def __init__(self, weights: Mapping[str, Tensor], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.biases: dict[str, Tensor | None] = dict.fromkeys(PROJECTIONS)
        self.activation = activation
        self.num_experts = len(self.weights["down_proj"])
        self.moments: dict[str, InputMoments] = {}

    def watch_(self, *projections: str) -> None:
        """Start new moments for the inputs of these projections; those of the others are not gathered."""
        self.moments = {
            name: InputMoments.zeros(self.num_experts, self.weights[name].shape[-1], self.weights[name].device)
            for name in projections
        }

    def use_(self, projection: str, packed: PackedProjection) -> None:
        """Compute with the quantized projection from now on."""
        like = self.weights[projection]
        experts = [dequantize_expert(packed.format, packed.tensors, e, like.dtype) for e in range(self.num_experts)]
        self.weights[projection] = torch.stack(experts)
        self.biases[projection] = packed.tensors["bias"].to(like.dtype) if packed.format.has_bias else None

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        tokens = hidden_states.flatten(0, -2)
        if top_k_index is None or top_k_weights is None:  # a shared expert: every token, weight one
            top_k_index = torch.zeros(len(tokens), 1, dtype=torch.int64, device=tokens.device)
            top_k_weights = torch.ones(len(tokens), 1, device=tokens.device)
        output = run_experts(
            tokens,
            top_k_index,
            top_k_weights,
            num_experts=self.num_experts,
            expert_weights=self._expert_weights,
            activation=self.activation,
            observe=self._observe if self.moments else None,
        )
        return output.view(hidden_states.shape)

    def _expert_weights(self, expert: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        (gate_up, gate_up_bias), (down, down_bias) = (
            (self.weights[name][expert], None if bias is None else bias[expert]) for name, bias in self.biases.items()
        )
        return gate_up, gate_up_bias, down, down_bias

    def _observe(self, expert: int, gate_up_inputs: Tensor, down_inputs: Tensor, routing_weights: Tensor) -> None:
        for name, inputs in zip(PROJECTIONS, (gate_up_inputs, down_inputs), strict=True):
            if name in self.moments:
                self.moments[name].add_(expert, inputs, routing_weights)


@torch.no_grad()
def run_layer(
    layer: nn.Module,
    hidden_states: Tensor,
    layer_kwargs: Callable[[int], dict],
    *,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """Output of a decoder layer for all windows, a batch at a time.

    hidden_states: [windows, tokens, hidden_size] on the CPU.
    layer_kwargs: batch rows -> keyword arguments of the layer.
    Returns the same shape and dtype, on the CPU.
    """
    outputs = torch.empty_like(hidden_states)
    for start in range(0, len(hidden_states), batch_size):
        batch = hidden_states[start : start + batch_size].to(device)
        outputs[start : start + batch_size] = layer(batch, **layer_kwargs(len(batch))).cpu()
    return outputs
