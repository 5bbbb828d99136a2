"""What is done to one decoder layer: gather the teacher's moments, quantize its matrices and banks, carry the
activations on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

from kbvq.errors import NumericalError
from kbvq.method.projection import quantize_projection, report_projection
from kbvq.method.target_weights import Goal, goal_of
from kbvq.models.calibration import (
    LayerRunner,
    ObservedBank,
    WatchedLinears,
    observe_banks,
    run_and_keep,
    run_and_watch,
    watch_inputs,
)
from kbvq.models.moe_adapters import ExpertBank
from kbvq.models.ranks import Ranks
from kbvq.quantization.attention_matching import match_attention_
from kbvq.quantization.block_tuning import tune_banks
from kbvq.quantization.dense import pack_linears_
from kbvq.quantization.matching import match_inputs, match_outputs, token_weights
from kbvq.recipes import Recipe
from kbvq.structures import (
    PROJECTIONS,
    BankFormat,
    InputMoments,
    MatrixFormat,
    PackedBank,
    PackedMatrix,
    PackedProjection,
)


@dataclass(frozen=True)
class LayerResult:
    """banks, matrices: packed, on the CPU. teacher, student: the layer's outputs, [windows, tokens, hidden_size].
    reports, matrix_reports: one JSON-ready record per bank and per matrix. dense: parameters outside the banks that
    were changed, by their names in the model, on the CPU in the dtype that the layer computes in."""

    banks: list[PackedBank]
    teacher: Tensor
    student: Tensor
    reports: list[dict[str, object]]
    matrices: list[PackedMatrix] = field(default_factory=list)
    matrix_reports: list[dict[str, object]] = field(default_factory=list)
    dense: dict[str, Tensor] = field(default_factory=dict)


def quantize_layer(
    layer: nn.Module,
    layer_path: str,
    banks: dict[ExpertBank, BankFormat],
    recipe: Recipe,
    *,
    run: LayerRunner,
    teacher: Tensor,
    student: Tensor,
    seed: int,
    matrices: Sequence[MatrixFormat] = (),
) -> LayerResult:
    """Quantize the banks of a decoder layer, projection by projection, each for the inputs it will see; before them the
    other matrices, if any, all of them for the inputs that they get while nothing of this layer is quantized.

    layer: materialised, at `layer_path` of its model; its banks' modules are replaced. banks: with the formats they are
    to be stored in. run: the layer on activations of all windows. teacher, student: the layer's inputs in the original
    and in the quantized model, one tensor when they are still the same. matrices: formats of the Linears to be packed.
    down is quantized after gate and up, for the inputs that their quantized versions make.
    """
    observed = observe_banks(layer, layer_path, banks)
    same_inputs, inputs, by_routing = student is teacher, student, recipe.routing_weighted
    # What stands between a layer's activations and experts of another width, or called with other tokens, has no place
    # in the sums.
    of_layer = all(m.hidden_size == inputs.shape[-1] and not bank.routed_before for bank, m in observed.items())
    matching = recipe.matching and of_layer
    watch = run_and_keep if matching else run_and_watch
    teacher_inputs = teacher
    linears = WatchedLinears({m.path: layer.get_submodule(m.path.removeprefix(f"{layer_path}.")) for m in matrices})
    # With goals of its own, a projection does not need the teacher's moments; those of down tell its strong channels.
    watched = PROJECTIONS if same_inputs or not matching else PROJECTIONS[1:]
    with linears if same_inputs else nullcontext():
        teacher, teacher_moments, *kept = watch(run, teacher, observed, watched, by_routing=by_routing)
    weights = token_weights(teacher) if matching else None
    dense: dict[str, Tensor] = {}
    if weights is not None and not same_inputs:
        fitted = match_attention_(run, teacher_inputs, inputs, weights)
        dense = {f"{layer_path}.{name}": tensor for name, tensor in fitted.items()}
    packed_matrices: list[PackedMatrix] = []
    matrix_reports: list[dict[str, object]] = []
    if matrices:
        if not same_inputs:
            with linears:
                run.watch(inputs)
        packed_matrices, matrix_reports = pack_linears_(linears, matrices, run.ranks, seed=seed)
        same_inputs = False
    if not banks:
        student = teacher if same_inputs else run(inputs)
        return LayerResult([], teacher, student, [], packed_matrices, matrix_reports, dense)
    if recipe.error_feedback:
        for bank, module in observed.items():
            order = module.sort_channels_(teacher_moments[bank]["down_proj"], banks[bank].down_proj.vector_dim)
            teacher_moments[bank]["down_proj"] = teacher_moments[bank]["down_proj"].reorder(order)
    packed: dict[ExpertBank, dict[str, PackedProjection]] = {bank: {} for bank in banks}
    seen: dict[ExpertBank, dict[str, InputMoments]] = {bank: {} for bank in banks}
    original: dict[ExpertBank, dict[str, Tensor]] = {bank: dict(module.weights) for bank, module in observed.items()}
    goals: dict[ExpertBank, dict[str, Goal]] = {bank: {} for bank in banks}
    for order, projection in enumerate(PROJECTIONS):
        if order == 0 and same_inputs:
            for bank in banks:
                seen[bank][projection] = teacher_moments[bank][projection]
        elif weights is None:
            for bank, moments in watch_inputs(run, inputs, observed, (projection,), by_routing=by_routing).items():
                seen[bank] |= moments
        else:
            if order == 0:
                matched = match_inputs(run, inputs, kept[0], weights, observed, by_routing=by_routing)
            else:
                matched = match_outputs(
                    run, inputs, kept[0], teacher, weights, observed, original, by_routing=by_routing
                )
            for bank, (moments, sums) in matched.items():
                seen[bank][projection] = moments
                own = original[bank][projection]
                targets = sums.mapped(own) if order == 0 else sums
                goals[bank][projection] = goal_of(own, targets, moments, recipe.prior_tokens, team=run.ranks)
        for place, (bank, module) in enumerate(observed.items()):
            try:
                packed[bank][projection] = quantize_projection(
                    original[bank][projection],
                    teacher_moments[bank].get(projection, seen[bank][projection]),
                    seen[bank][projection],
                    getattr(banks[bank], projection),
                    recipe,
                    seed=_seed(seed, bank, place, order),
                    bias=module.original_biases.get(projection),
                    goal=goals[bank].get(projection),
                    team=run.ranks,
                )
            except NumericalError as error:
                raise NumericalError(f"{bank.path}.{projection}: {error}") from error
            module.use_(projection, packed[bank][projection])
    if recipe.tuning_steps:
        packed = _tune(observed, packed, seen, run, inputs, teacher, recipe, seed=_seed(seed, next(iter(banks)), 0, 0))
    student, _ = run_and_watch(run, inputs, observed, (), by_routing=by_routing)
    coded = {bank: original[bank] | {name: goal.weights for name, goal in goals[bank].items()} for bank in banks}
    reports = [_report(bank, coded[bank], packed[bank], seen[bank], recipe, run.ranks) for bank in banks]
    on_cpu = {bank: {name: p.to("cpu") for name, p in projections.items()} for bank, projections in packed.items()}
    packed_banks = [PackedBank(b.path, b.kind, **on_cpu[b]) for b in banks]
    return LayerResult(packed_banks, teacher, student, reports, packed_matrices, matrix_reports, dense)


def _tune(
    observed: dict[ExpertBank, ObservedBank],
    packed: dict[ExpertBank, dict[str, PackedProjection]],
    moments: dict[ExpertBank, dict[str, InputMoments]],
    run: LayerRunner,
    inputs: Tensor,
    targets: Tensor,
    recipe: Recipe,
    *,
    seed: int,
) -> dict[ExpertBank, dict[str, PackedProjection]]:
    tuned = tune_banks(
        {module: packed[bank] for bank, module in observed.items()},
        {module: moments[bank] for bank, module in observed.items()},
        run,
        inputs,
        targets,
        steps=recipe.tuning_steps,
        learning_rate=recipe.tuning_rate,
        seed=seed,
    )
    return {bank: tuned[module] for bank, module in observed.items()}


def _report(
    bank: ExpertBank,
    weights: dict[str, Tensor],
    packed: dict[str, PackedProjection],
    moments: dict[str, InputMoments],
    recipe: Recipe,
    ranks: Ranks,
) -> dict[str, object]:
    reports = {
        projection: dataclasses.asdict(
            report_projection(
                weights[projection],
                packed[projection],
                moments[projection],
                prior_tokens=recipe.prior_tokens,
                team=ranks,
            )
        )
        for projection in PROJECTIONS
    }
    return {"path": bank.path, "tokens": moments["gate_up_proj"].tokens.tolist(), **reports}


def _seed(seed: int, bank: ExpertBank, place: int, order: int) -> int:
    """A seed of its own for every projection; its experts add their index."""
    return (((seed << 12) + bank.decoder_layer << 4) + 2 * place + order) << 12
