"""End-to-end tuning: what is continuous in the quantized model is trained together on the original's predictions.

Codes stay fixed. Scales, biases and codebooks of every bank, and the decoder layers' linear maps and norms that stay
dense, are trained by Adam on KL(original ‖ quantized) of the next-token probabilities, on windows of the calibration
text that no layer was fitted to (on those that they were, the divergence is half as large and tells little).
Layer by layer each part is fitted to what it should have given; here the parts learn to make up for each other where it
counts (fine-tuning as of AQLM and QuIP#: Egiazarian et al. 2024, Tseng et al. 2024). On a real model the dense parts
gain most of it (docs/experiments.md). Routers stay as they are: whom a token is sent to is no continuous choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedModel

from kbvq.errors import NumericalError
from kbvq.models.layer_stream import LayerStream, return_freed_memory
from kbvq.models.moe_adapters import read_experts
from kbvq.quantization.block_tuning import (
    TrainableBank,
    cosine_schedule,
    parameter_group,
    shuffled_windows,
    windows_per_step,
)
from kbvq.recipes import Recipe
from kbvq.structures import PackedBank

TOKENS_OF_LOGITS = 256
"""Positions of a step whose logits exist at the same time."""

_BETAS = (0.9, 0.95)


def distill(
    stream: LayerStream,
    banks: list[PackedBank],
    dense: Mapping[str, Tensor],
    token_ids: Tensor,
    teacher: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    new_tensor: Callable[..., Tensor] = torch.zeros,
    then: Callable[[PreTrainedModel, AbstractContextManager], None] | None = None,
) -> tuple[list[PackedBank], dict[str, Tensor]]:
    """The banks with their tuned values, and the dense parameters that differ from the stored ones, on the CPU.

    In memory are the banks packed (of a trellis on the CPU in the pages of their files), or with an integer for each
    codeword; the dense part in the stream's dtype, what is trained of it in float32; and Adam's two moments of that. A
    gradient exists until its parameter has taken its step, in the backward pass; the decoded weights of a layer while
    it runs, in the forward and again in the backward pass; the logits of TOKENS_OF_LOGITS positions.

    dense: parameters outside the banks as changed so far, by their names in the model. token_ids: [windows, tokens].
    teacher: the last layer's outputs in the original model, [windows, tokens, hidden_size]. The recipe's
    distillation_rate and dense_rate are relative to the root mean square of each parameter. seed: of the windows'
    order. new_tensor: makes a float32 tensor of zeros from its sizes and `device`, for Adam's moments of matrices.
    then: called with the tuned model and the precision that its forward passes run in.
    Raises NumericalError when the loss is not finite.
    """
    device, steps = stream.device, recipe.distillation_steps
    tiers: dict[str, list[PackedBank]] = {}
    for bank in banks:
        tiers.setdefault(bank.format.bank, []).append(bank.to(device))
    modules = {
        path: TrainableBank(of_bank, read_experts(stream.model.get_submodule(path)).gating)
        for path, of_bank in tiers.items()
    }
    with stream.whole(modules, dense) as model, _checkpointing(stream.layers):
        trained = trainable_dense(model, stream.layers_path, list(modules)) if recipe.dense_rate else {}
        for parameter in trained.values():
            parameter.data = parameter.data.float()  # steps are far below the precision of bfloat16
            parameter.requires_grad_(True)
        of_banks = [parameter for module in modules.values() for parameter in module.parameters()]
        groups = [parameter_group(parameter, recipe.distillation_rate) for parameter in of_banks]
        optimizers = [torch.optim.Adam(groups, betas=_BETAS)]
        for parameter in trained.values():
            group = parameter_group(parameter, recipe.dense_rate)
            optimizers.append(_stepping_in_the_backward_pass(parameter, group, new_tensor))
        schedules = [cosine_schedule(optimizer, steps) for optimizer in optimizers]
        mixed = torch.autocast(device.type, dtype=stream.dtype, enabled=stream.dtype != torch.float32)
        drawn = shuffled_windows(token_ids.shape[1], len(token_ids), steps, seed)
        for chosen in tqdm(drawn, total=steps, desc="distilling", unit="step", disable=None):
            optimizers[0].zero_grad()
            with torch.enable_grad(), mixed:
                outputs = stream.last_outputs(token_ids[chosen])
            loss, gradient = _divergence(stream, outputs.detach(), teacher[chosen].to(device), mixed)
            if not torch.isfinite(loss):
                raise NumericalError("the divergence became infinite in end-to-end tuning; use the recipe default")
            outputs.backward(gradient)
            optimizers[0].step()
            for schedule in schedules:
                schedule.step()
        tuned = {name: parameter.detach().cpu() for name, parameter in trained.items()}
        if then is not None:
            with torch.no_grad():
                then(model, mixed)
        packed = [tier.to("cpu") for module in modules.values() for tier in module.pack()]
        return packed, {**dense, **tuned}


def _divergence(
    stream: LayerStream, outputs: Tensor, teacher: Tensor, mixed: AbstractContextManager
) -> tuple[Tensor, Tensor]:
    """Mean KL(original ‖ quantized) of the next-token probabilities over [windows, tokens], and its gradient for the
    last layer's outputs; both [windows, tokens, hidden_size] on the stream's device. A part of the tokens at a time:
    of all, the logits would take more memory than the layers where the vocabulary is large."""
    loss = torch.zeros((), device=outputs.device)
    gradient = torch.empty_like(outputs)
    length = max(1, TOKENS_OF_LOGITS // len(outputs))
    for begin in range(0, outputs.shape[1], length):
        part = slice(begin, begin + length)
        wanted = stream.logits(teacher[:, part]).float().log_softmax(-1)
        with torch.enable_grad():
            own = outputs[:, part].clone().requires_grad_(True)
            with mixed:
                found = stream.logits(own)
            found = found.float().log_softmax(-1)
            of_part = F.kl_div(found, wanted, reduction="sum", log_target=True) / outputs[..., 0].numel()
            of_part.backward()
        loss += of_part.detach()
        gradient[:, part] = own.grad
    return loss, gradient


def _stepping_in_the_backward_pass(
    parameter: nn.Parameter, group: dict[str, object], new_tensor: Callable[..., Tensor]
) -> torch.optim.Adam:
    """An Adam for one parameter that takes its step as soon as the gradient is there, and drops it."""
    optimizer = torch.optim.Adam([group], betas=_BETAS)
    if parameter.dim() > 1:
        moments = {name: new_tensor(*parameter.shape, device=parameter.device) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}

    def step(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    parameter.register_post_accumulate_grad_hook(step)
    return optimizer


def tuning_windows(recipe: Recipe, samples: int, sequence_length: int) -> int:
    """How many windows end-to-end tuning takes, so that it sees none twice."""
    return recipe.distillation_steps * windows_per_step(sequence_length, samples)


def trainable_dense(model: PreTrainedModel, layers_path: str, banks: list[str]) -> dict[str, nn.Parameter]:
    """Parameters of the decoder layers' linear maps and norms outside the banks, by their names in the model.

    What stands beside a bank in its block, routers and gates of shared experts, is left out.
    """
    blocks = {path.rpartition(".")[0] for path in banks}
    found = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        inside = path.startswith(f"{layers_path}.") and not path.startswith(tuple(f"{bank}." for bank in banks))
        if not own or not inside:
            continue
        router = path.rpartition(".")[0] in blocks
        norm = all(parameter.dim() == 1 for parameter in own.values()) and "norm" in type(module).__name__.lower()
        if norm or (isinstance(module, nn.Linear) and not router):
            found |= {f"{path}.{name}": parameter for name, parameter in own.items()}
    return found


@contextmanager
def _checkpointing(layers: nn.ModuleList) -> Iterator[None]:
    """Layers that keep no activations for the backward pass but run again. Behind each layer of both passes freed pages
    are given back: what is kept of a layer lies between its blocks, and the next layer's would come on top."""

    def run(layer: Callable[..., Tensor], hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if hidden_states.requires_grad:
            hidden_states.register_hook(lambda gradient: return_freed_memory())
        outputs = checkpoint(layer, hidden_states, *arguments, use_reentrant=False, **options)
        return_freed_memory()
        return outputs

    for layer in layers:
        layer.forward = partial(run, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
