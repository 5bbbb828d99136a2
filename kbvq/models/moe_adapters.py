"""What kbvq knows about mixture-of-experts architectures: where their experts are, and which it can quantize.

One rule selects routed experts, the fused experts interface of transformers: parameters `gate_up_proj` [E, 2I, H] (gate
rows first) and `down_proj` [E, H, I], no bias, `down(activation(gate) * up)`. Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import _default_apply_gate

from kbvq.errors import UnsupportedModelError

TESTED_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")
"""The `model_type`s that kbvq accepts: those whose quantization, saving and loading are tested."""

SHARED_EXPERT_NAMES = ("shared_expert", "shared_experts")

# Attribute of the experts interface -> (value of the rule and of transformers versions without the attribute, reason).
_INTERFACE = {
    "has_gate": (True, "its experts have no gate"),
    "has_bias": (False, "its experts have biases"),
    "is_transposed": (False, "its expert weights are stored transposed"),
    "is_concatenated": (True, "its gate and up rows are interleaved"),
    "has_post_expert_norm": (False, "its experts end in a norm"),
}


@dataclass(frozen=True)
class ExpertBank:
    """One group of experts of a model that are packed together.

    path: module path, e.g. "model.layers.3.mlp.experts".
    kind: "routed", or "shared" (then num_experts is 1).
    intermediate_size: rows of gate, which are as many as the rows of up.
    decoder_layer: index of the decoder layer that holds it.
    """

    path: str
    kind: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    decoder_layer: int


def decoder_layers(model: PreTrainedModel) -> tuple[nn.ModuleList, str]:
    """The decoder layers of a causal language model and their module path, e.g. "model.layers"."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps no decoder layers at {model.base_model_prefix}.layers; {_SUPPORTED}"
        )
    return layers, f"{model.base_model_prefix}.layers"


def find_expert_banks(model: PreTrainedModel) -> list[ExpertBank]:
    """Every bank of a model, on any device (meta too), in layer order, the routed experts of a layer before its shared.

    Raises UnsupportedModelError for a dense model and, with the reason, for experts that kbvq cannot quantize.
    """
    model_type = model.config.model_type
    found = [(path, module) for path, module in model.named_modules() if _holds_experts(path, module)]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} ({model_type}) has no experts: it is a dense model, and kbvq quantizes only the "
            f"experts of a mixture of experts; {_SUPPORTED}"
        )
    for path, module in found:
        if reason := _why_not_standard(module):
            raise UnsupportedModelError(
                f"{model_type}: {path} ({type(module).__name__}) cannot be quantized: {reason}; {_SUPPORTED}"
            )
    if model_type not in TESTED_FAMILIES:
        raise UnsupportedModelError(
            f"{model_type} has experts of the standard layout, but kbvq has not been tested with it; {_SUPPORTED}"
        )

    _, layers_path = decoder_layers(model)
    banks = []
    for path, module in found:
        layer = int(path.removeprefix(f"{layers_path}.").partition(".")[0])
        num_experts, hidden_size, intermediate_size = module.down_proj.shape
        banks.append(ExpertBank(path, "routed", num_experts, hidden_size, intermediate_size, layer))

        block_path = path.rpartition(".")[0]
        for name, shared in model.get_submodule(block_path).named_children():
            if name in SHARED_EXPERT_NAMES:
                _check_shared(f"{block_path}.{name}", shared, model_type)
                hidden_size, intermediate_size = shared.down_proj.weight.shape
                banks.append(ExpertBank(f"{block_path}.{name}", "shared", 1, hidden_size, intermediate_size, layer))
    return sorted(banks, key=lambda bank: bank.decoder_layer)


def bank_weights(module: nn.Module, bank: ExpertBank) -> dict[str, Tensor]:
    """{"gate_up_proj": [E, 2I, H], "down_proj": [E, H, I]} of the module at `bank.path`, in its dtype, detached.

    Routed experts share memory with the module; a shared expert's gate and up are stacked into a copy.
    """
    if bank.kind == "routed":
        return {"gate_up_proj": module.gate_up_proj.detach(), "down_proj": module.down_proj.detach()}
    gate_up = torch.cat([module.gate_proj.weight.detach(), module.up_proj.weight.detach()])
    return {"gate_up_proj": gate_up[None], "down_proj": module.down_proj.weight.detach()[None]}


def bank_activation(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The activation between gate and up of the module at a bank's path."""
    return module.act_fn


_SUPPORTED = f"supported model types: {', '.join(TESTED_FAMILIES)}"


def _holds_experts(path: str, module: nn.Module) -> bool:
    """Whether a module holds routed experts, by its name or its class, which not every architecture gives them."""
    return path.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts")


def _why_not_standard(module: nn.Module) -> str | None:
    """The first condition of the fused experts interface that a module fails, or None."""
    apply_gate = getattr(type(module), "_apply_gate", None)
    if apply_gate is None:
        return "it does not use the fused experts interface of transformers"
    for attribute, (expected, reason) in _INTERFACE.items():
        if getattr(module, attribute, expected) != expected:
            return reason
    gate_up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
        return "it lacks the fused parameters gate_up_proj and down_proj"
    if apply_gate is not _default_apply_gate:
        return "it has a gate function of its own"
    if not hasattr(module, "act_fn"):
        return "it has no act_fn"
    if down.dim() != 3 or gate_up.shape != (down.shape[0], 2 * down.shape[2], down.shape[1]):
        return f"gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)} are not [E, 2I, H] and [E, H, I]"
    return None


def _check_shared(path: str, module: nn.Module, model_type: str) -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(module, name, None)
        if not isinstance(linear, nn.Linear) or linear.bias is not None:
            raise UnsupportedModelError(
                f"{model_type}: shared expert {path} cannot be quantized: {name} is not a Linear without "
                f"bias; {_SUPPORTED}"
            )
    if not hasattr(module, "act_fn"):
        raise UnsupportedModelError(f"{model_type}: shared expert {path} cannot be quantized: no act_fn; {_SUPPORTED}")
