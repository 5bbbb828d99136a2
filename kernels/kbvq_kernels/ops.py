"""The ops that models call, `kbvq::moe`, `kbvq::linear` and `kbvq::dequantize`, for CPU, CUDA and fake tensors.

A projection reaches an op as its tensors, in the order of `PreparedProjection.tensors`, and the
numbers that these do not determine. Triton is imported by the first call on CUDA, not before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbvq_kernels import cpu
from kbvq_kernels.prepared import PreparedProjection
from kbvq_kernels.reference import ACTIVATIONS


@torch.library.custom_op("kbvq::moe", mutates_args=(), device_types="cpu")
def _moe(
    hidden_states: Tensor,
    top_k_index: Tensor | None,
    top_k_weights: Tensor | None,
    gate_up: list[Tensor | None],
    gate_up_numbers: list[int],
    down: list[Tensor | None],
    down_numbers: list[int],
    activation: str,
) -> Tensor:
    return cpu.moe_forward(
        hidden_states,
        top_k_index,
        top_k_weights,
        PreparedProjection.from_tensors(gate_up, gate_up_numbers),
        PreparedProjection.from_tensors(down, down_numbers),
        activation,
    )


@_moe.register_kernel("cuda")
def _(hidden_states, top_k_index, top_k_weights, gate_up, gate_up_numbers, down, down_numbers, activation):
    from kbvq_kernels import launch

    with torch.cuda.device(hidden_states.device):
        return launch.moe_forward(
            hidden_states,
            top_k_index,
            top_k_weights,
            PreparedProjection.from_tensors(gate_up, gate_up_numbers),
            PreparedProjection.from_tensors(down, down_numbers),
            activation,
        )


@_moe.register_fake
def _(hidden_states, top_k_index, top_k_weights, gate_up, gate_up_numbers, down, down_numbers, activation):
    return hidden_states.new_empty(
        hidden_states.shape[0], PreparedProjection.from_tensors(down, down_numbers).out_features
    )


@torch.library.custom_op("kbvq::linear", mutates_args=(), device_types="cpu")
def _linear(inputs: Tensor, tensors: list[Tensor | None], numbers: list[int]) -> Tensor:
    return cpu.linear(inputs, PreparedProjection.from_tensors(tensors, numbers))


@_linear.register_kernel("cuda")
def _(inputs, tensors, numbers):
    from kbvq_kernels import launch

    with torch.cuda.device(inputs.device):
        return launch.linear(inputs, PreparedProjection.from_tensors(tensors, numbers))


@_linear.register_fake
def _(inputs, tensors, numbers):
    return inputs.new_empty(inputs.shape[0], PreparedProjection.from_tensors(tensors, numbers).out_features)


@torch.library.custom_op("kbvq::dequantize", mutates_args=(), device_types="cpu")
def _dequantize(tensors: list[Tensor | None], numbers: list[int], dtype: torch.dtype) -> Tensor:
    return cpu.dequantize(PreparedProjection.from_tensors(tensors, numbers), dtype)


@_dequantize.register_kernel("cuda")
def _(tensors, numbers, dtype):
    from kbvq_kernels import launch

    p = PreparedProjection.from_tensors(tensors, numbers)
    out = torch.empty(p.num_experts, p.out_features, p.in_features, dtype=dtype, device=p.codes.device)
    with torch.cuda.device(out.device):
        launch.dequantize(p, out)
    return out


@_dequantize.register_fake
def _(tensors, numbers, dtype):
    p = PreparedProjection.from_tensors(tensors, numbers)
    return p.codes.new_empty(p.num_experts, p.out_features, p.in_features, dtype=dtype)


def moe_forward(
    hidden_states: Tensor,
    top_k_index: Tensor | None,
    top_k_weights: Tensor | None,
    gate_up: PreparedProjection,
    down: PreparedProjection,
    activation: str = "silu",
) -> Tensor:
    """Mixture of experts on packed weights, [T, H] in the dtype of hidden_states; inference only.

        y_t = sum_j w_tj (W_down,e (act(g) * u) + b_down,e),  [g; u] = W_gate_up,e x_t + b_gate_up,e,  e = index_tj

    hidden_states: [T, H] float. top_k_index: [T, k] integers; those outside [0, num_experts) are skipped.
    top_k_weights: [T, k] float. Both None: every token goes to expert 0 with weight 1 (a shared expert).
    Products accumulate in float32. The result does not depend on the order in which programs run.
    Raises ValueError for an activation that is not served.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"no kernel serves activation {activation!r}; served: {', '.join(ACTIVATIONS)}")
    return _moe(
        hidden_states,
        top_k_index,
        top_k_weights,
        gate_up.tensors(),
        gate_up.numbers(),
        down.tensors(),
        down.numbers(),
        activation,
    )


def linear(inputs: Tensor, p: PreparedProjection) -> Tensor:
    """W x + b of the only expert of a projection, [T, out_features] in the dtype of inputs; inference only.

    inputs: [T, in_features] float. Products accumulate in float32.
    """
    return _linear(inputs, p.tensors(), p.numbers())


def dequantize(p: PreparedProjection, dtype: torch.dtype = torch.float32) -> Tensor:
    """Stored weights [num_experts, out_features, in_features], without the bias."""
    return _dequantize(p.tensors(), p.numbers(), dtype)
