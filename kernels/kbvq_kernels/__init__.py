"""Fused kernels that serve packed experts: see README.md. Importing this touches neither CUDA nor Triton.

prepared = prepare(tensors, **format_fields, dtype=torch.bfloat16)
y = moe_forward(hidden_states, top_k_index, top_k_weights, gate_up, down, "silu")
y = linear(inputs, prepared)
"""

from kbvq_kernels import reference
from kbvq_kernels.ops import dequantize, linear, moe_forward
from kbvq_kernels.prepared import PreparedProjection, prepare, slower_than_bf16, supports

__all__ = [
    "PreparedProjection",
    "dequantize",
    "linear",
    "moe_forward",
    "prepare",
    "reference",
    "slower_than_bf16",
    "supports",
]
