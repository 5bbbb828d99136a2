"""Heal a mixture of experts by distillation: Adam on KL(dense ‖ mixture) of the next-token distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from testbed.dense import batches
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Distillation:
    """steps of `batch` windows each. rate: of Adam, warmed up over 5 % of the steps, then cut by a cosine to nothing.
    save_every: steps between checkpoints."""

    steps: int
    batch: int = 4
    rate: float = 2e-4
    save_every: int = 10


def distil_(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    windows: Tensor,
    distillation: Distillation,
    *,
    checkpoint: Path,
    seed: int,
    log: Callable[[str], None],
) -> None:
    """Train the MLP blocks of `model` (experts and routers) on windows [n, window] int64.

    checkpoint: a safetensors file with weights, both moments of Adam and the steps so far; training goes on from it
    where it exists, with the same result as without the interruption.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if ".mlp." in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = torch.optim.Adam(trained.values(), lr=distillation.rate, betas=(0.9, 0.95))
    done = _load(checkpoint, trained, optimizer) if checkpoint.exists() else 0
    parts = batches(len(windows), distillation.batch, torch.Generator().manual_seed(seed))
    for step, rows in enumerate(islice(parts, done, distillation.steps), done):
        progress = step / distillation.steps
        rate = distillation.rate * min(1.0, (progress + 1 / distillation.steps) / 0.05)
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))
        tokens = windows[rows]
        with torch.no_grad():
            wanted = dense(tokens, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
        found = model(tokens, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
        loss = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        log(f"step {step + 1} of {distillation.steps}: KL {loss.item():.4f}")
        if (step + 1) % distillation.save_every == 0:
            _save(checkpoint, trained, optimizer, step + 1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _save(path: Path, trained: dict[str, torch.nn.Parameter], optimizer: torch.optim.Adam, steps: int) -> None:
    tensors = {"steps": torch.tensor(steps)}
    for name, parameter in trained.items():
        tensors[f"weight.{name}"] = parameter.detach()
        tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in _MOMENTS}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


@torch.no_grad()
def _load(path: Path, trained: dict[str, torch.nn.Parameter], optimizer: torch.optim.Adam) -> int:
    tensors = load_file(path)
    for name, parameter in trained.items():
        parameter.copy_(tensors[f"weight.{name}"])
        moments = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
        optimizer.state[parameter] = {"step": tensors["steps"].float()} | moments
    return int(tensors["steps"])
