"""What the banks of a layer should give in the quantized model: sums for `method.target_weights`, in two passes.

Gate and up should give on the quantized model's inputs what they gave on the original's. The banks' outputs should also
take back what the residual stream lacks by then: behind the layer the activations should be the original's, so the
routed experts of a token together should give

    y = (original's output of the layer) − (the student's output without theirs).

A token's experts share what y differs from their own outputs on the original inputs in proportion to their routing
weights, which is the smallest change of their outputs that does it. Where it is more than those outputs, only as much
of it (method.target_weights.bounded).

Tokens count by the inverse of the norm of the activations behind the layer. A few tokens of real models are hundreds of
times larger than all others (massive activations, attention sinks) and would own the sums; what they need must still be
kept, so a weight by the inverse square, in which an error of all tokens would count alike behind a norm, is too little.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from kbvq.method.target_weights import TargetSums, bounded
from kbvq.method.team import sum_fields_
from kbvq.models.calibration import LayerRunner, ObservedBank, gathering, idle_suffices, recording
from kbvq.models.expert_forward import by_expert, run_bank, stacked_experts
from kbvq.models.moe_adapters import ExpertBank
from kbvq.structures import PROJECTIONS, InputMoments

logger = logging.getLogger("kbvq")

_LARGEST_WEIGHT = 10.0  # of a token, in those of the median: tokens of hardly any norm are no better known

Matched = dict[ExpertBank, tuple[InputMoments, TargetSums]]


def token_weights(outputs: Tensor) -> Tensor:
    """Weight of each token by the activations behind the layer, [windows, tokens] float32; the median's is 1.

    outputs: [windows, tokens, hidden_size].
    """
    norms = torch.stack([window.float().norm(dim=-1) for window in outputs])
    return (norms.median() / norms.clamp_min(1e-30)).clamp_max(_LARGEST_WEIGHT)


def match_inputs(
    run: LayerRunner,
    student: Tensor,
    teacher_inputs: Mapping[ExpertBank, Tensor],
    weights: Tensor,
    observed: Mapping[ExpertBank, ObservedBank],
    *,
    by_routing: bool,
) -> Matched:
    """For each bank the moments of its inputs in the student, and the sums whose targets are the original's inputs.

    student: the layer's inputs, [windows, tokens, hidden_size]. teacher_inputs: of each bank in the original, the same
    shape. weights: of the tokens (token_weights).
    """
    matched = {bank: _zeros(run, module, PROJECTIONS[0]) for bank, module in observed.items()}

    def add(part: slice, outputs: Tensor) -> None:
        of_token = weights[part].flatten().to(run.device)
        for bank, module in observed.items():
            original = teacher_inputs[bank][part].flatten(0, 1).to(run.device)
            record = module.recorded
            moments, sums = matched[bank]
            for expert, tokens, routing in by_expert(record.top_k_index, record.top_k_weights, module.num_experts):
                if expert not in module.gathered:
                    continue
                found = record.inputs[tokens]
                mass = moments.add_(expert, found, routing, by_routing=by_routing, token_weights=of_token[tokens])
                sums.add_(expert, original[tokens], found, mass)

    return _run(run, student, observed, matched, add, idle=idle_suffices(run, student, observed))


def match_outputs(
    run: LayerRunner,
    student: Tensor,
    teacher_inputs: Mapping[ExpertBank, Tensor],
    teacher_outputs: Tensor,
    weights: Tensor,
    observed: Mapping[ExpertBank, ObservedBank],
    original: Mapping[ExpertBank, Mapping[str, Tensor]],
    *,
    by_routing: bool,
) -> Matched:
    """For each bank the moments of down_proj's inputs in the student, and the sums whose targets are its due outputs.

    teacher_outputs: the layer's in the original. original: the banks' original weights, intermediate channels in the
    order of those in use. The rest as in `match_inputs`.
    """
    matched = {bank: _zeros(run, module, PROJECTIONS[1]) for bank, module in observed.items()}
    additive: dict[ExpertBank, bool] = {}

    def add(part: slice, outputs: Tensor) -> None:
        of_token = weights[part].flatten().to(run.device)
        recorded = {bank: module.recorded for bank, module in observed.items()}
        for bank, module in observed.items():
            if bank.kind == "routed" and bank not in additive:
                additive[bank] = _is_additive(run, module, student)
        for bank, module in observed.items():
            module.recorded = recorded[bank]
        for bank, module in observed.items():
            own: list[Tensor] = []
            biases = [module.original_biases.get(name) for name in PROJECTIONS]
            of_expert = stacked_experts([original[bank][name] for name in PROJECTIONS], biases)
            record = recorded[bank]
            reference = run_bank(
                teacher_inputs[bank][part].flatten(0, 1).to(run.device),
                record.top_k_index,
                record.top_k_weights,
                module.num_experts,
                of_expert,
                module.gating,
                lambda expert, gate_up, down, outputs, routing, own=own: own.append(outputs),
            )
            lacking = None
            if additive.get(bank):
                others = outputs.flatten(0, 1).float() - record.outputs.float()
                wanted = teacher_outputs[part].flatten(0, 1).to(run.device).float() - others
                shares = (record.top_k_weights.float().square() * (record.top_k_index < module.num_experts)).sum(-1)
                lacking = bounded(wanted - reference.float(), reference) / shares.clamp_min(1e-6)[:, None]
            moments, sums = matched[bank]
            for (expert, tokens, routing, inputs), target in zip(_by_expert(module), own, strict=True):
                if expert not in module.gathered:
                    continue
                target = target.float()
                if biases[1] is not None:  # stored as it is, beside that of the correction
                    target = target - biases[1][expert].float()
                if lacking is not None:
                    target = target + lacking[tokens] * routing[:, None]
                mass = moments.add_(expert, inputs, routing, by_routing=by_routing, token_weights=of_token[tokens])
                sums.add_(expert, target, inputs, mass)

    found = _run(run, student, observed, matched, add)
    for bank, holds in additive.items():
        if not holds:
            logger.info(
                "%s: the layer does not simply add what its experts give; they are matched to the original's own "
                "outputs, and errors before them are not taken back",
                bank.path,
            )
    return found


def _run(
    run: LayerRunner,
    student: Tensor,
    observed: Mapping[ExpertBank, ObservedBank],
    matched: Matched,
    add: Callable[[slice, Tensor], None],
    *,
    idle: bool = False,
) -> Matched:
    bytes_each = {
        module: 4 * sum(sums[0].numel() for sums in (matched[bank][0].upper_sum, matched[bank][1].cross_sum))
        for bank, module in observed.items()
    }
    with recording(observed.values(), idle=idle):
        for _ in gathering(run, bytes_each):
            run.watch(student, add)
    for moments, sums in matched.values():
        sum_fields_(run.ranks, moments, sums)
    return matched


def _zeros(run: LayerRunner, module: ObservedBank, projection: str) -> tuple[InputMoments, TargetSums]:
    """Both projections have targets of the hidden size: the bank's inputs, and its outputs."""
    weights = module.weights[projection]
    experts, width, make = module.num_experts, weights.shape[-1], run.statistics.make
    return (
        InputMoments.zeros(experts, width, weights.device, make=make),
        TargetSums.zeros(experts, module.hidden_size, width, weights.device, make=make),
    )


def _by_expert(module: ObservedBank) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(expert, its tokens, their routing weights, inputs of down_proj) of what the module recorded."""
    record = module.recorded
    routed = by_expert(record.top_k_index, record.top_k_weights, module.num_experts)
    for (expert, tokens, routing), (_, inputs) in zip(routed, record.down_inputs, strict=True):
        yield expert, tokens, routing, inputs


def _is_additive(run: LayerRunner, module: ObservedBank, hidden_states: Tensor) -> bool:
    """Whether the layer adds the bank's output to its own as it is: not so where a norm or a factor follows it.
    hidden_states: layer inputs, [windows, tokens, hidden_size], of which a window is run."""
    inputs = run.sample(hidden_states)
    outputs = run.batch(inputs)
    assert module.recorded is not None
    generator = torch.Generator().manual_seed(0)
    spread = module.recorded.outputs.float().std().item()
    offset = spread * torch.randn(module.recorded.outputs.shape, generator=generator).to(run.device)
    module.offset = offset
    try:
        moved = run.batch(inputs)
    finally:
        module.offset = None
    missed = (moved.float() - outputs.float()).flatten(0, 1) - offset
    return missed.norm().item() <= 0.05 * offset.norm().item()
