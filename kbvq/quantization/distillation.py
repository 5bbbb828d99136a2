"""End-to-end tuning: what is continuous in all quantized layers is trained together on the original model's
predictions.

Codes stay fixed. Codebooks, scales and biases of every bank are trained by Adam on KL(original ‖ quantized) of the
next-token probabilities over the calibration windows. Layer by layer each part is fitted to what it should have given;
here the parts learn to make up for each other where it counts. Training norms and routers along was measured and did
not pay (docs/experiments.md), so all that is not packed stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from kbvq.errors import NumericalError
from kbvq.models.layer_stream import LayerStream
from kbvq.models.moe_adapters import read_experts
from kbvq.quantization.block_tuning import TrainableBank, cosine_schedule, parameter_group, shuffled_windows
from kbvq.recipes import Recipe
from kbvq.structures import PackedBank


def distill(
    stream: LayerStream,
    banks: list[PackedBank],
    token_ids: Tensor,
    teacher: Tensor,
    recipe: Recipe,
    *,
    seed: int,
) -> list[PackedBank]:
    """The banks with their tuned values, on the CPU.

    The whole model is in memory: its dense part in the stream's dtype, the banks with an integer for each codeword; the
    decoded weights of a layer exist while it runs, in the forward and again in the backward pass.
    token_ids: [windows, tokens]. teacher: the last layer's outputs in the original model, [windows, tokens,
    hidden_size]. The recipe's distillation_rate is relative to the root mean square of each parameter. seed: of the
    windows' order.
    Raises NumericalError when the loss is not finite.
    """
    device, steps, learning_rate = stream.device, recipe.distillation_steps, recipe.distillation_rate
    modules = {
        bank.path: TrainableBank(bank.to(device), read_experts(stream.model.get_submodule(bank.path)).gating)
        for bank in banks
    }
    with stream.whole(modules) as model, _checkpointing(stream.layers):
        groups = [parameter_group(p, learning_rate) for module in modules.values() for p in module.parameters()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = cosine_schedule(optimizer, steps)
        drawn = shuffled_windows(token_ids.shape[1], len(token_ids), steps, seed)
        for chosen in tqdm(drawn, total=steps, desc="distilling", unit="step", disable=None):
            with torch.no_grad():
                wanted = stream.logits(teacher[chosen].to(device)).float().log_softmax(-1)
            with torch.enable_grad():
                found = model(input_ids=token_ids[chosen].to(device), use_cache=False).logits.float().log_softmax(-1)
                loss = F.kl_div(found, wanted, reduction="sum", log_target=True) / wanted[..., 0].numel()
                optimizer.zero_grad()
                loss.backward()
            if not torch.isfinite(loss):
                raise NumericalError("the divergence became infinite in end-to-end tuning; use the recipe default")
            optimizer.step()
            schedule.step()
        return [module.pack().to("cpu") for module in modules.values()]


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
