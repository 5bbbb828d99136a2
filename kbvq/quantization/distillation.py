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

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedModel

from kbvq.errors import NumericalError
from kbvq.models.layer_stream import LayerStream
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


def distill(
    stream: LayerStream,
    banks: list[PackedBank],
    dense: Mapping[str, Tensor],
    token_ids: Tensor,
    teacher: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    then: Callable[[PreTrainedModel, AbstractContextManager], None] | None = None,
) -> tuple[list[PackedBank], dict[str, Tensor]]:
    """The banks with their tuned values, and the dense parameters that differ from the stored ones, on the CPU.

    The whole model is in memory: its banks packed, or with an integer for each codeword; its dense part in the stream's
    dtype, and of the dense parameters that are trained, in float32, four copies (value, gradient, Adam's two moments).
    The decoded weights of a layer exist while it runs, in the forward and again in the backward pass.

    dense: parameters outside the banks as changed so far, by their names in the model. token_ids: [windows, tokens].
    teacher: the last layer's outputs in the original model, [windows, tokens, hidden_size]. The recipe's
    distillation_rate and dense_rate are relative to the root mean square of each parameter. seed: of the windows'
    order. then: called with the tuned model and the precision that its forward passes run in.
    Raises NumericalError when the loss is not finite.
    """
    device, steps = stream.device, recipe.distillation_steps
    modules = {
        bank.path: TrainableBank(bank.to(device), read_experts(stream.model.get_submodule(bank.path)).gating)
        for bank in banks
    }
    with stream.whole(modules, dense) as model, _checkpointing(stream.layers):
        trained = trainable_dense(model, stream.layers_path, list(modules)) if recipe.dense_rate else {}
        for parameter in trained.values():
            parameter.data = parameter.data.float()  # steps are far below the precision of bfloat16
            parameter.requires_grad_(True)
        of_banks = [parameter for module in modules.values() for parameter in module.parameters()]
        groups = [parameter_group(parameter, recipe.distillation_rate) for parameter in of_banks]
        groups += [parameter_group(parameter, recipe.dense_rate) for parameter in trained.values()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = cosine_schedule(optimizer, steps)
        mixed = torch.autocast(device.type, dtype=stream.dtype, enabled=stream.dtype != torch.float32)
        drawn = shuffled_windows(token_ids.shape[1], len(token_ids), steps, seed)
        for chosen in tqdm(drawn, total=steps, desc="distilling", unit="step", disable=None):
            with torch.no_grad():
                wanted = stream.logits(teacher[chosen].to(device)).float().log_softmax(-1)
            with torch.enable_grad():
                with mixed:
                    found = model(input_ids=token_ids[chosen].to(device), use_cache=False).logits
                found = found.float().log_softmax(-1)
                loss = F.kl_div(found, wanted, reduction="sum", log_target=True) / wanted[..., 0].numel()
                optimizer.zero_grad()
                loss.backward()
            if not torch.isfinite(loss):
                raise NumericalError("the divergence became infinite in end-to-end tuning; use the recipe default")
            optimizer.step()
            schedule.step()
        tuned = {name: parameter.detach().cpu() for name, parameter in trained.items()}
        if then is not None:
            with torch.no_grad():
                then(model, mixed)
        return [module.pack().to("cpu") for module in modules.values()], {**dense, **tuned}


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
    """Layers that keep no activations for the backward pass but run again."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
