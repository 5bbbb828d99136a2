"""What is done to one decoder layer: gather the teacher's moments, quantize its banks, carry the activations on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from kbvq.calibration import ObservedBank
from kbvq.errors import NumericalError
from kbvq.moe_adapters import ExpertBank, bank_activation, bank_weights
from kbvq.projection import quantize_projection, report_projection
from kbvq.recipes import Recipe
from kbvq.structures import PROJECTIONS, InputMoments, PackedBank, PackedProjection


@dataclass(frozen=True)
class LayerResult:
    """banks: packed, on the CPU. teacher, student: the layer's outputs, [windows, tokens, hidden_size].
    reports: one JSON-ready record per bank."""

    banks: list[PackedBank]
    teacher: Tensor
    student: Tensor
    reports: list[dict[str, object]]


def quantize_layer(
    layer: nn.Module,
    layer_path: str,
    banks: list[ExpertBank],
    recipe: Recipe,
    *,
    run: Callable[[Tensor], Tensor],
    teacher: Tensor,
    student: Tensor,
    seed: int,
) -> LayerResult:
    """Quantize the banks of a decoder layer, projection by projection, each for the inputs it will see.

    layer: materialised, at `layer_path` of its model; its banks' modules are replaced. run: the layer on activations of
    all windows. teacher, student: the layer's inputs in the original and in the quantized model, one tensor when they
    are still the same. down is quantized after gate and up, for the inputs that their quantized versions make.
    """
    observed = {bank: _observe(layer, bank.path.removeprefix(f"{layer_path}."), bank) for bank in banks}
    same_inputs = student is teacher
    teacher, teacher_moments = _run_and_watch(run, teacher, observed, PROJECTIONS)
    packed: dict[ExpertBank, dict[str, PackedProjection]] = {bank: {} for bank in banks}
    reports: dict[ExpertBank, dict[str, object]] = {bank: {"path": bank.path} for bank in banks}
    inputs = student
    for order, projection in enumerate(PROJECTIONS if banks else ()):
        moments = teacher_moments
        if order > 0 or not same_inputs:
            _, moments = _run_and_watch(run, inputs, observed, (projection,))
        for place, (bank, module) in enumerate(observed.items()):
            weights, seen = module.weights[projection], moments[bank][projection]
            wanted = teacher_moments[bank][projection]
            try:
                made = quantize_projection(weights, wanted, seen, recipe, seed=_seed(seed, bank, place, order))
            except NumericalError as error:
                raise NumericalError(f"{bank.path}.{projection}: {error}") from error
            report = report_projection(weights, made, seen, prior_tokens=recipe.prior_tokens)
            reports[bank] |= {"tokens": seen.tokens.tolist(), projection: dataclasses.asdict(report)}
            module.use_(projection, made)
            packed[bank][projection] = made.to("cpu")
    student = teacher if same_inputs and not banks else _run_and_watch(run, inputs, observed, ())[0]
    made_banks = [PackedBank(bank.path, bank.kind, **packed[bank]) for bank in banks]
    return LayerResult(made_banks, teacher, student, list(reports.values()))


def _observe(layer: nn.Module, path: str, bank: ExpertBank) -> ObservedBank:
    """Put an observed bank where the original one is."""
    original = layer.get_submodule(path)
    module = ObservedBank(bank_weights(original, bank), bank_activation(original))
    layer.set_submodule(path, module)
    return module


def _run_and_watch(
    run: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    observed: dict[ExpertBank, ObservedBank],
    projections: tuple[str, ...],
) -> tuple[Tensor, dict[ExpertBank, dict[str, InputMoments]]]:
    """The layer's outputs, and the moments of the inputs of these projections by bank."""
    for module in observed.values():
        module.watch_(*projections)
    outputs = run(hidden_states)
    return outputs, {bank: module.moments for bank, module in observed.items()}


def _seed(seed: int, bank: ExpertBank, place: int, order: int) -> int:
    """A seed of its own for every projection; its experts add their index."""
    return (((seed << 12) + bank.decoder_layer << 4) + 2 * place + order) << 12
