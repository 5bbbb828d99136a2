"""What kbvq knows about mixture-of-experts architectures: where their experts are, and how they compute.

One rule finds routed experts: modules named `experts`, or of a class whose name ends so. `read_experts` brings each
into the one layout that kbvq computes with: `gate_up_proj` [E, 2I, H] (gate rows first) and `down_proj` [E, H, I], with
biases or without, and a gating between them. What the experts interface of transformers declares is enough for nearly
all (interleaved, transposed, with biases, without a gate, with a gate function of their own); two older layouts have a
reader of their own. Everything else is refused by name, with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from kbvq.errors import UnsupportedModelError
from kbvq.models.expert_forward import Gating, gated
from kbvq_kernels.reference import ACTIVATIONS

if TYPE_CHECKING:  # importing it loads torch._dynamo and Triton
    from transformers import PreTrainedModel

SHARED_EXPERT_NAMES = ("shared_expert", "shared_experts", "shared_mlp")


@dataclass(frozen=True)
class ExpertBank:
    """One group of experts of a model that are packed together.

    path: module path, e.g. "model.layers.3.mlp.experts".
    kind: "routed", or "shared" (then num_experts is 1).
    hidden_size: width of the experts' inputs and outputs; not always that of the model.
    intermediate_size: width of the inputs of down_proj.
    decoder_layer: index of the decoder layer that holds it.
    gated: gate_up_proj has rows of gate and of up, intermediate_size each; else of up alone.
    has_bias: both projections have one.
    activation: name of the activation in the usual gating, for the kernels; None for a gating that they do not know.
    routed_before: called with the tokens of all experts at once (Llama 4), which are not those of the layer.
    """

    path: str
    kind: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    decoder_layer: int
    gated: bool = True
    has_bias: bool = False
    activation: str | None = "silu"
    routed_before: bool = False

    def projection_shape(self, projection: str) -> tuple[int, int, int]:
        """(num_experts, out_features, in_features) of one of its projections."""
        if projection == "gate_up_proj":
            return self.num_experts, (1 + self.gated) * self.intermediate_size, self.hidden_size
        return self.num_experts, self.hidden_size, self.intermediate_size


@dataclass(frozen=True)
class Experts:
    """The experts of a module in the layout that kbvq computes with.

    weights: gate_up_proj [E, 2I, H], gate rows first, or [E, I, H] of experts without a gate, and down_proj [E, H, I];
        in the dtype of the module, detached, sharing its memory where the layout allows.
    biases: [E, rows] by projection; empty, or of both.
    gating: what lies between the projections. activation: its name for the kernels, or None, and
    routed_before: see ExpertBank.
    """

    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    gating: Gating
    activation: str | None
    routed_before: bool = False


def decoder_layers(model: PreTrainedModel) -> tuple[nn.ModuleList, str]:
    """The decoder layers of a mixture of experts and their module path, e.g. "model.layers": the outermost list that
    holds experts. Raises UnsupportedModelError when there is none."""
    for path, module in model.named_modules():
        if _holds_experts(path, module):
            names = path.split(".")
            for end in range(1, len(names)):
                layers = model.get_submodule(".".join(names[:end]))
                if isinstance(layers, nn.ModuleList):
                    return layers, ".".join(names[:end])
    raise UnsupportedModelError(f"{type(model).__name__} keeps no experts in decoder layers; {_SUPPORTED}")


def find_expert_banks(model: PreTrainedModel) -> list[ExpertBank]:
    """Every bank of a model, on any device (meta too), in layer order, the routed experts of a layer before its shared.

    Shared experts of another build than three Linears are left alone, and so are experts of their own for images
    (ernie4_5_vl_moe): calibration text never reaches them. Raises UnsupportedModelError for a dense model
    and, with the reason, for routed experts that kbvq cannot quantize.
    """
    model_type = model.config.model_type
    found = [(path, module) for path, module in model.named_modules() if _holds_experts(path, module)]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} ({model_type}) has no experts that kbvq finds: it quantizes only the experts of a "
            f"mixture of experts, and this seems to be a dense model; {_SUPPORTED}"
        )
    _, layers_path = decoder_layers(model)
    banks = []
    for path, module in found:
        if not path.startswith(f"{layers_path}."):
            raise UnsupportedModelError(
                f"{model_type}: {path} is outside the decoder layers {layers_path}; {_SUPPORTED}"
            )
        if any(part.startswith("vision") for part in path.removeprefix(f"{layers_path}.").split(".")):
            continue
        try:
            banks.append(_describe(path, "routed", read_experts(module), layers_path))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{model_type}: {path} ({type(module).__name__}) cannot be quantized: {error}; {_SUPPORTED}"
            ) from error
        block_path = path.rpartition(".")[0]
        block = model.get_submodule(block_path)
        linear = getattr(getattr(block, "router", None), "layer", None)
        if isinstance(linear, nn.Linear) and linear.in_features != banks[-1].hidden_size:  # DBRX up to 5.4
            raise UnsupportedModelError(
                f"{model_type}: transformers {transformers.__version__} gives {block_path}.router {linear.in_features} "
                f"inputs, its experts {banks[-1].hidden_size}, and so cannot run it itself; upgrade transformers"
            )
        for name, shared in block.named_children():
            if name in SHARED_EXPERT_NAMES and _is_plain_mlp(shared):
                banks.append(_describe(f"{block_path}.{name}", "shared", read_experts(shared), layers_path))
    return sorted(banks, key=lambda bank: bank.decoder_layer)


def read_experts(module: nn.Module) -> Experts:
    """The experts of a module at a bank's path. Raises UnsupportedModelError with the reason alone."""
    if _is_plain_mlp(module):
        return _read_mlp(module)
    name = type(module).__name__
    experts = _READERS[name](module) if name in _READERS else _read_interface(module)
    gate_up, down = experts.weights["gate_up_proj"], experts.weights["down_proj"]
    if down.dim() != 3 or gate_up.shape not in [
        (down.shape[0], rows, down.shape[1]) for rows in (down.shape[2], 2 * down.shape[2])
    ]:
        raise UnsupportedModelError(
            f"gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)} are not [E, 2I, H] and [E, H, I]"
        )
    return experts


_SUPPORTED = "docs/results/families.md lists the architectures that kbvq was tested with"


def _describe(path: str, kind: str, experts: Experts, layers_path: str) -> ExpertBank:
    num_experts, hidden_size, intermediate_size = experts.weights["down_proj"].shape
    return ExpertBank(
        path,
        kind,
        num_experts,
        hidden_size,
        intermediate_size,
        decoder_layer=int(path.removeprefix(f"{layers_path}.").partition(".")[0]),
        gated=experts.weights["gate_up_proj"].shape[1] == 2 * intermediate_size,
        has_bias=bool(experts.biases),
        activation=experts.activation,
        routed_before=experts.routed_before,
    )


def _holds_experts(path: str, module: nn.Module) -> bool:
    """Whether a module holds routed experts, by its name or its class, which not every architecture gives them."""
    name = path.rpartition(".")[2]
    return name == "experts" or (type(module).__name__.endswith("Experts") and name not in SHARED_EXPERT_NAMES)


def _is_plain_mlp(module: nn.Module) -> bool:
    """Whether it is an MLP of three Linears without bias, as most shared experts are."""
    linears = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return hasattr(module, "act_fn") and all(isinstance(x, nn.Linear) and x.bias is None for x in linears)


def _read_mlp(module: Any) -> Experts:
    gate_up = torch.cat([module.gate_proj.weight.detach(), module.up_proj.weight.detach()])
    return Experts(
        {"gate_up_proj": gate_up[None], "down_proj": module.down_proj.weight.detach()[None]},
        {},
        gated(module.act_fn),
        _activation_name(module.act_fn),
    )


def _read_interface(module: Any) -> Experts:
    """What the experts interface of transformers declares; versions without an attribute have the usual value."""
    apply_gate = getattr(type(module), "_apply_gate", None)
    if apply_gate is None:
        raise UnsupportedModelError("it does not use the fused experts interface of transformers")
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedModelError("its experts end in a norm")
    has_gate = getattr(module, "has_gate", True)
    first = "gate_up_proj" if has_gate else "up_proj"
    gate_up, down = (getattr(module, name, None) for name in (first, "down_proj"))
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
        raise UnsupportedModelError(f"it lacks the fused parameters {first} and down_proj")
    gate_up, down = gate_up.detach(), down.detach()
    if getattr(module, "is_transposed", False):
        gate_up, down = gate_up.mT, down.mT
    biases = {}
    if getattr(module, "has_bias", False):
        first_bias, down_bias = (getattr(module, f"{name}_bias", None) for name in (first, "down_proj"))
        if not isinstance(first_bias, Tensor) or not isinstance(down_bias, Tensor):
            raise UnsupportedModelError(f"it lacks the parameters {first}_bias and down_proj_bias")
        biases = {"gate_up_proj": first_bias.detach(), "down_proj": down_bias.detach()}
    interleaved = has_gate and not getattr(module, "is_concatenated", type(module).__name__ not in _INTERLEAVED)
    if interleaved:
        gate_up = torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], 1)
        if biases:
            bias = biases["gate_up_proj"]
            biases["gate_up_proj"] = torch.cat([bias[:, ::2], bias[:, 1::2]], 1)
    gating, activation = _gating(module, apply_gate, has_gate=has_gate, interleaved=interleaved)
    return Experts({"gate_up_proj": gate_up, "down_proj": down}, biases, gating, activation)


def _gating(module: Any, apply_gate: Callable, *, has_gate: bool, interleaved: bool) -> tuple[Gating, str | None]:
    """A module's gating on gate rows first, without its weights, and its name for the kernels."""
    activation = getattr(module, "act_fn", None)
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        raise UnsupportedModelError("its activation has parameters of its own")
    if not has_gate or apply_gate is _default_apply_gate:
        if activation is None:
            raise UnsupportedModelError("it has no act_fn")
        # Interleaving is undone in the weights, so the usual gate function finds its halves again.
        return (gated(activation), _activation_name(activation)) if has_gate else (activation, None)
    bare = copy.copy(module)
    bare.__dict__["_parameters"] = {}
    return partial(_own_gate, bare, interleaved), None


def _own_gate(module: Any, interleaved: bool, gate_up: Tensor) -> Tensor:
    if interleaved:
        gate_up = torch.stack(gate_up.chunk(2, dim=-1), -1).flatten(-2)
    return module._apply_gate(gate_up)


def _read_llama4(module: Any) -> Experts:
    """Transposed; called with the tokens of all experts, already multiplied by their routing weights (fill_routing)."""
    weights = {"gate_up_proj": module.gate_up_proj.detach().mT, "down_proj": module.down_proj.detach().mT}
    return Experts(weights, {}, gated(module.act_fn), _activation_name(module.act_fn), routed_before=True)


def _read_dbrx(module: Any) -> Experts:
    """Three matrices with the rows of all experts; that of down is stored transposed."""
    shape = (module.num_experts, module.ffn_hidden_size, module.hidden_size)
    gate, up, down = (getattr(module.mlp, name).detach().view(shape) for name in ("w1", "v1", "w2"))
    activation = module.mlp.activation_fn
    weights = {"gate_up_proj": torch.cat([gate, up], 1), "down_proj": down.mT}
    return Experts(weights, {}, gated(activation), _activation_name(activation))


_INTERLEAVED = ("GptOssExperts",)
"""Classes whose rows of gate and up alternate, for versions of transformers that do not declare it: what one version
packs has to be in the order in which another serves it."""

_READERS: dict[str, Callable[[Any], Experts]] = {"Llama4TextExperts": _read_llama4, "DbrxExperts": _read_dbrx}
"""Classes without the experts interface of transformers -> how they are read."""


def _activation_name(activation: object) -> str | None:
    """Its name in a transformers config if the kernels know it."""
    for name in ACTIVATIONS:
        known = ACT2FN[name]
        if activation is getattr(F, name, None) or (
            type(activation) is type(known) and repr(activation) == repr(known)
        ):
            return name
    return None
