"""A dense model in the clothes of a mixture of experts: the same function, exactly."""

from __future__ import annotations

import torch
from testbed.dense import common_config, copy_all_but_mlps_
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel


@torch.no_grad()
def deal_neurons(dense: PreTrainedModel, num_experts: int) -> MixtralForCausalLM:
    """A Mixtral, float32, whose experts hold the neurons of the dense MLPs in turn and are all active.

    The router is zero, so each expert has the weight 1 / num_experts, and the down projections are num_experts times
    the dense ones; for a power of two that is exact in every floating-point format.
    Raises ValueError when the neurons cannot be dealt to so many experts.
    """
    neurons = dense.config.intermediate_size
    if num_experts < 1 or num_experts & (num_experts - 1) or neurons % num_experts:
        raise ValueError(f"{neurons} neurons cannot be dealt to {num_experts} experts; use a power of two that divides")
    size = neurons // num_experts
    config = MixtralConfig(
        **common_config(dense),
        intermediate_size=size,
        num_local_experts=num_experts,
        num_experts_per_tok=num_experts,
        sliding_window=None,
    )
    model = MixtralForCausalLM._from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    copy_all_but_mlps_(model, dense)
    for old, new in zip(dense.model.layers, model.model.layers, strict=True):
        gate, up = old.mlp.gate_proj.weight.unflatten(0, (-1, size)), old.mlp.up_proj.weight.unflatten(0, (-1, size))
        new.mlp.gate.weight.zero_()
        new.mlp.experts.gate_up_proj.copy_(torch.cat([gate, up], dim=1))
        new.mlp.experts.down_proj.copy_(num_experts * old.mlp.down_proj.weight.unflatten(1, (-1, size)).transpose(0, 1))
    return model
