"""What an error in each output of gate and up costs: a trellis code spends its bits where it costs most.

The outputs z of gate and up reach the layer through the gating h = φ(z) and down, so a small error δ of output r of
neuron i adds δ · ∂h_i/∂z_r · (column i of W_down) to the layer's output. Errors of the outputs are next to independent,
and the expected square is

    E[δ_r²] · E[(∂h_i/∂z_r)²] · ‖W_down,i‖²,

of which the last two factors are the importance of row r (a power below one of it pays more: errors are neither small
nor independent). In the later layers of real models rows differ by a factor of ten and more. A trellis codes the rows
of a column as one sequence, and finds by itself which of them are worth the bits: the sum of weighted errors comes
within a few per cent of what a rate of its own for each row would give, without any of it being stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kbvq.models.calibration import LayerRunner, ObservedBank, idle_suffices, recording
from kbvq.models.expert_forward import Gating, by_expert
from kbvq.models.moe_adapters import ExpertBank
from kbvq.recipes import Recipe
from kbvq.structures import PROJECTIONS

_TOKENS = 2048
"""Of each expert, in the mean, that are looked at: the slopes are means over tokens, and known well from fewer of them
than second moments."""

_AT_ONCE = 1 << 22  # outputs of gate and up; several copies of them are made

_PRIOR = 64.0
"""Virtual tokens of an expert for which its neurons have the mean slopes of all neurons."""


def uses_importance(recipe: Recipe) -> bool:
    return recipe.row_importance > 0 and recipe.codebook == "trellis" and recipe.error_feedback


@dataclass(frozen=True)
class Importance:
    """Of one bank.

    rows: of gate and up, [num_experts, rows] float32, 1 in the mean of an expert's rows.
    errors: by projection, what a squared error of an output costs in each expert, [num_experts] float32: the mean over
        gate and up's rows, and for down's outputs, which are the layer's, 1; times the mass of the expert's tokens.
    """

    rows: Tensor
    errors: dict[str, Tensor]


@torch.no_grad()
def row_importance(
    run: LayerRunner,
    hidden_states: Tensor,
    weights: Tensor,
    observed: Mapping[ExpertBank, ObservedBank],
    recipe: Recipe,
) -> dict[ExpertBank, Importance]:
    """What errors in the outputs of each bank's projections cost.

    hidden_states: the layer's inputs, [windows, tokens, hidden_size]; the first windows are run. weights: of the tokens
    (matching.token_weights). observed: with the original weights. recipe: says whether tokens count by their squared
    routing weights, too, and to what power the importance of rows is returned.
    """
    if not observed:
        return {}
    idle = idle_suffices(run, hidden_states, observed)
    with recording(observed.values(), idle=idle):
        run.batch(run.sample(hidden_states))
        windows = max(_windows(module) for module in observed.values())
        windows = -(-windows // run.batch_size) * run.batch_size  # whole batches
        shapes = {bank: module.weights[PROJECTIONS[0]].shape[:2] for bank, module in observed.items()}
        sums = {bank: torch.zeros(shape, device=run.device) for bank, shape in shapes.items()}
        mass, counts = (
            {bank: torch.zeros(shape[0], device=run.device) for bank, shape in shapes.items()} for _ in range(2)
        )

        def add(part: slice, outputs: Tensor) -> None:
            of_token = weights[part].flatten().to(run.device)
            for bank, module in observed.items():
                record, gate_up, bias = module.recorded, module.weights[PROJECTIONS[0]], module.biases[PROJECTIONS[0]]
                assert record is not None
                # Some banks are called with other tokens than the layer: those count alike.
                of_call = of_token if len(of_token) == len(record.inputs) else of_token.new_ones(len(record.inputs))
                for expert, tokens, routing in by_expert(record.top_k_index, record.top_k_weights, module.num_experts):
                    counting = of_call[tokens] * (routing.square() if recipe.routing_weighted else 1)
                    own_bias = None if bias is None else bias[expert]
                    step = max(1, _AT_ONCE // gate_up.shape[1])
                    for places, of_places in zip(tokens.split(step), counting.split(step), strict=True):
                        given = F.linear(record.inputs[places], gate_up[expert], own_bias)
                        sums[bank][expert] += of_places @ squared_slopes(module.gating, given)
                    mass[bank][expert] += counting.sum()
                    counts[bank][expert] += len(tokens)

        run.watch(hidden_states[:windows], add)
    for bank in observed:
        run.ranks.sum_(sums[bank], mass[bank], counts[bank])
    power = recipe.row_importance
    return {bank: _importance(sums[bank], mass[bank], counts[bank], module, power) for bank, module in observed.items()}


def squared_slopes(gating: Gating, gate_up: Tensor) -> Tensor:
    """(∂h/∂z)² of every output z of gate and up, h being the neuron's input of down; as gate_up, [n, rows] float32."""
    with torch.enable_grad():
        given = gate_up.detach().float().requires_grad_()
        (slopes,) = torch.autograd.grad(gating(given).sum(), given)  # a neuron's h depends on its own outputs alone
    return slopes.square_()


def _windows(module: ObservedBank) -> int:
    """How many windows have so many tokens for each expert, by the one that ran."""
    assert module.recorded is not None
    routed = (module.recorded.top_k_index < module.num_experts).sum().item()  # in one window
    return -(-_TOKENS * module.num_experts // max(1, int(routed)))


def _importance(sums: Tensor, mass: Tensor, counts: Tensor, module: ObservedBank, power: float) -> Importance:
    means = sums / mass.clamp_min(1e-30)[:, None]
    of_all = sums.sum() / (mass.sum() * sums.shape[1]).clamp_min(1e-30)
    share = (counts / (counts + _PRIOR).clamp_min(1))[:, None]
    means = share * means + (1 - share) * of_all
    columns = torch.stack([down.float().square().sum(0) for down in module.weights[PROJECTIONS[1]]])
    costs = means * columns.repeat(1, means.shape[1] // columns.shape[1])
    importance = costs.pow(power)
    average = importance.mean(1, keepdim=True)
    rows = torch.where(average > 0, importance / average.clamp_min(1e-30), 1.0)
    mass = mass + _PRIOR * mass.sum() / counts.sum().clamp_min(1)  # an expert that saw none may be met on other text
    return Importance(rows, dict(zip(PROJECTIONS, (mass * costs.mean(1), mass), strict=True)))
