"""What carving and upcycling share: the walk through the layers, routers and linear maps fitted on the way."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch
from testbed.dense import Stream, batches
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

FillBlock = Callable[..., float]
"""(block, mlp, inputs, target, weights, *, seed) -> relative error left: fills an MoE block in the place of an MLP.
inputs: of the block, target: what it should add, both [tokens, hidden_size]; weights: of a token's squared error."""


def fill_layers_(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokens: Tensor,
    fill: FillBlock,
    *,
    seed: int,
    log: Callable[[str], None],
) -> None:
    """Fill the MoE blocks of `model` in turn, each such that the residual stream comes back to the dense model's.

    tokens: [windows, window] int64. The inputs of a block are those of the model as filled so far. `log` gets a line a
    layer, with the squared distance of the two streams relative to the dense one's, mean over tokens.
    """
    teacher, student = Stream(dense, tokens), Stream(model, tokens)
    for index, (old, new) in enumerate(zip(dense.model.layers, model.model.layers, strict=True)):
        teacher.attend(old)
        student.attend(new)
        teacher.add_mlp(old)
        wanted = teacher.flat()
        missing, weights = wanted - student.flat(), token_weights(wanted)
        error = fill(new.mlp, old.mlp, student.mlp_inputs(new), missing, weights, seed=seed + index)
        student.add_mlp(new)
        drift = ((student.flat() - wanted).square().sum(1) / wanted.square().sum(1)).mean().item()
        log(f"layer {index}: relative error of the block {error:.4f}, drift of the stream {drift:.5f}")


def token_weights(residual: Tensor) -> Tensor:
    """[tokens] weights of a fit of what is added to a residual stream [tokens, hidden_size]; their mean is 1.

    The next norm divides by a token's length, so its error counts relative to that. Without this, the few tokens that
    carry massive activations (lengths 10²-10⁴ times the others') would own every fit.
    """
    weights = residual.square().mean(-1).reciprocal()
    return weights / weights.mean()


@torch.enable_grad()
def fit_router(inputs: Tensor, targets: Tensor, *, seed: int, steps: int = 200, batch: int = 2048) -> Tensor:
    """Router weight [experts, hidden_size] by cross-entropy of softmax(inputs · weightᵀ) to targets [tokens, experts].

    targets: non-negative; rows sum to 1. Adam at 0.01 with cosine decay, from zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.zeros(targets.shape[1], inputs.shape[1]))
    optimizer = torch.optim.Adam([weight], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for rows in islice(batches(len(inputs), min(batch, len(inputs)), generator), steps):
        loss = F.cross_entropy(inputs[rows] @ weight.T, targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return weight.detach()


@torch.no_grad()
def fit_linear(features: Tensor, target: Tensor, weights: Tensor, start: Tensor, *, ridge: float) -> Tensor:
    """The map M [out, in] with the least weighted ‖target − features · Mᵀ‖² + penalty ‖M − start‖².

    features: [tokens, in]; target: [tokens, out]; weights: [tokens]. The penalty is `ridge` times the mean of the
    diagonal of the features' second moment, in every direction.
    """
    scaled = features * weights[:, None]
    moment = (scaled.T @ features).double()
    moment.diagonal().add_(ridge * moment.diagonal().mean())
    missing = target - features @ start.T
    change = torch.linalg.solve(moment, (scaled.T @ missing).double())
    return start + change.T.to(start.dtype)
