"""Models of transformers that hold what packed experts decode to: what packed models are compared with."""

from typing import Any

import torch
from torch import nn

from kbvq.codes.packing import dequantize_expert
from kbvq.serving.packed_experts import PackedBankModule
from kbvq.structures import PROJECTIONS


@torch.no_grad()
def write_decoded_(original: Any, packed: PackedBankModule) -> None:
    """Put the decoded weights of a bank into the module that it was made from, in that module's own layout."""
    decoded, biases = {}, {}
    parts = [packed, *getattr(packed, "tiers", ())]
    for name in PROJECTIONS:
        weights, bias = {}, {}
        for part in parts:
            format, tensors = part.projection_format(name), part.projection_tensors(name)
            for place, expert in enumerate(part.format.experts or range(part.num_experts)):
                weights[expert] = dequantize_expert(format, tensors, place)
                bias[expert] = tensors["bias"][place] if format.has_bias else None
        decoded[name] = torch.stack([weights[expert] for expert in sorted(weights)])
        biases[name] = None if bias[0] is None else torch.stack([bias[expert] for expert in sorted(bias)])
    gate_up, down = decoded["gate_up_proj"], decoded["down_proj"]
    if isinstance(getattr(original, "gate_proj", None), nn.Linear):
        gate, up = gate_up[0].chunk(2)
        for linear, weight in ((original.gate_proj, gate), (original.up_proj, up), (original.down_proj, down[0])):
            linear.weight.copy_(weight)
        return
    if type(original).__name__ == "DbrxExperts":
        gate, up = gate_up.chunk(2, dim=1)
        for parameter, weight in ((original.mlp.w1, gate), (original.mlp.v1, up), (original.mlp.w2, down.mT)):
            parameter.copy_(weight.reshape(parameter.shape))
        return
    interleaved = type(original).__name__ == "GptOssExperts"
    if interleaved:
        gate_up = torch.stack(gate_up.chunk(2, dim=1), 2).flatten(1, 2)
    if getattr(original, "is_transposed", type(original).__name__ == "Llama4TextExperts"):
        gate_up, down = gate_up.mT, down.mT
    first = "gate_up_proj" if hasattr(original, "gate_up_proj") else "up_proj"
    getattr(original, first).copy_(gate_up)
    original.down_proj.copy_(down)
    if biases["down_proj"] is not None:
        bias = biases["gate_up_proj"]
        if interleaved:
            bias = torch.stack(bias.chunk(2, dim=1), 2).flatten(1, 2)
        getattr(original, f"{first}_bias").copy_(bias)
        original.down_proj_bias.copy_(biases["down_proj"])
