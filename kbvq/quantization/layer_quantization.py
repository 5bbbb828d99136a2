"""What is done to one decoder layer: gather the teacher's moments, quantize its matrices and banks, carry the
activations on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

from kbvq.errors import NumericalError
from kbvq.method.projection import quantize_projection, report_projection
from kbvq.method.target_weights import Goal, TargetSums, goal_of
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
from kbvq.quantization.attention_matching import match_attention_
from kbvq.quantization.block_tuning import tune_banks
from kbvq.quantization.dense import pack_linears_
from kbvq.quantization.matching import match_inputs, match_outputs, token_weights
from kbvq.quantization.row_importance import row_importance, uses_importance
from kbvq.recipes import Recipe
from kbvq.structures import (
    PROJECTIONS,
    BankFormat,
    InputMoments,
    MatrixFormat,
    Moments,
    PackedBank,
    PackedMatrix,
    PackedProjection,
    TierMoments,
)

_Matched = dict[ExpertBank, tuple[InputMoments, TargetSums | None]]
"""By bank the moments of a projection's inputs, and the sums of what it is to give, if that is not what it gave."""


_OfTiers = dict[tuple[int, ...], PackedProjection]
"""A packed projection by the experts of each tier of its bank, () for all."""


@dataclass(frozen=True)
class LayerResult:
    """banks, matrices: packed, on the CPU. teacher, student: the layer's outputs, [windows, tokens, hidden_size].
    reports, matrix_reports: one JSON-ready record per tier and per matrix. dense: parameters outside the banks that
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
    banks: dict[ExpertBank, list[BankFormat]],
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
    to be stored in, one for each tier. run: the layer on activations of all windows. teacher, student: the layer's
    inputs in the original and in the quantized model, one tensor when they are still the same. matrices: formats of
    the Linears to be packed.
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
    # Several passes would count each token several times.
    linears_too = same_inputs and run.statistics.at_once == math.inf
    with linears if linears_too else nullcontext():
        teacher, teacher_moments, *kept = watch(run, teacher, observed, watched, by_routing=by_routing)
    weights = token_weights(teacher) if matching else None
    dense: dict[str, Tensor] = {}
    if weights is not None and not same_inputs:
        fitted = match_attention_(run, teacher_inputs, inputs, weights)
        dense = {f"{layer_path}.{name}": tensor for name, tensor in fitted.items()}
    packed_matrices: list[PackedMatrix] = []
    matrix_reports: list[dict[str, object]] = []
    if matrices:
        if not linears_too:
            with linears:
                run.watch(inputs)
        packed_matrices, matrix_reports = pack_linears_(linears, matrices, run.ranks, seed=seed)
        same_inputs = False
    if not banks:
        student = teacher if same_inputs else run(inputs)
        return LayerResult([], teacher, student, [], packed_matrices, matrix_reports, dense)
    if recipe.error_feedback:
        for bank, module in observed.items():
            order = module.sort_channels_(teacher_moments[bank]["down_proj"], banks[bank][0].down_proj.vector_dim)
            if weights is None:
                teacher_moments[bank]["down_proj"].reorder_(order)
            else:  # goals stand for them
                del teacher_moments[bank]["down_proj"]
    importance: dict[ExpertBank, Tensor] = {}
    if uses_importance(recipe):
        counting = token_weights(teacher) if weights is None else weights
        found_importance = row_importance(run, inputs, counting, observed, recipe)
        importance = {bank: of_bank.rows for bank, of_bank in found_importance.items()}
    packed: dict[ExpertBank, dict[str, _OfTiers]] = {bank: {} for bank in banks}
    original: dict[ExpertBank, dict[str, Tensor]] = {bank: dict(module.weights) for bank, module in observed.items()}
    coded: dict[ExpertBank, dict[str, _Coded]] = {bank: {} for bank in banks}
    reports = {tier: _new_report(tier) for tiers in banks.values() for tier in tiers}

    def code(bank: ExpertBank, place: int, projection: str, matched: _Matched) -> _Coded:
        order, module, own, goal = PROJECTIONS.index(projection), observed[bank], original[bank][projection], None
        moments, sums = matched.pop(bank)
        if sums is not None:
            targets = sums.mapped(own) if order == 0 else sums
            goal = goal_of(own, targets, moments, recipe.prior_tokens, team=run.ranks)
            del sums, targets
        of_teacher = teacher_moments[bank].pop(projection, moments)
        bias, of_rows = module.original_biases.get(projection), importance.get(bank) if order == 0 else None
        packed[bank][projection] = {}
        for tier in banks[bank]:
            some = tier.experts
            weights_of_tier = _of(own if goal is None else goal.weights, some)
            try:
                packed[bank][projection][some] = quantize_projection(
                    weights_of_tier,
                    _moments_of(of_teacher, some),
                    _moments_of(moments, some),
                    getattr(tier, projection),
                    recipe,
                    seed=_seed(seed, bank, place, order),
                    bias=None if bias is None else _of(bias, some),
                    goal=None if goal is None else Goal(weights_of_tier, _of(goal.mean, some)),
                    importance=None if of_rows is None else _of(of_rows, some),
                    team=run.ranks,
                    make=run.statistics.make,
                )
            except NumericalError as error:
                raise NumericalError(f"{tier.path}.{projection}: {error}") from error
        module.use_(projection, packed[bank][projection])
        return _Coded(own if goal is None else goal.weights, moments)

    def report(bank: ExpertBank, projection: str, found: _Coded) -> None:
        for tier in banks[bank]:
            moments = _moments_of(found.moments, tier.experts)
            reports[tier].setdefault("tokens", moments.tokens.tolist())
            reports[tier][projection] = dataclasses.asdict(
                report_projection(
                    _of(found.weights, tier.experts),
                    packed[bank][projection][tier.experts],
                    moments,
                    prior_tokens=recipe.prior_tokens,
                    team=run.ranks,
                )
            )

    matched: _Matched
    for order, projection in enumerate(PROJECTIONS):
        # The statistics of a projection are the largest thing in memory: gone as soon as it is coded.
        if order == 0 and same_inputs:
            matched = {bank: (teacher_moments[bank].pop(projection), None) for bank in banks}
        elif weights is None:
            found = watch_inputs(run, inputs, observed, (projection,), by_routing=by_routing)
            matched = {bank: (moments.pop(projection), None) for bank, moments in found.items()}
        elif order == 0:
            matched = dict(match_inputs(run, inputs, kept[0], weights, observed, by_routing=by_routing))
        else:
            matched = dict(
                match_outputs(run, inputs, kept[0], teacher, weights, observed, original, by_routing=by_routing)
            )
        for place, bank in enumerate(banks):
            coded[bank][projection] = code(bank, place, projection, matched)
            if not recipe.tuning_steps:
                report(bank, projection, coded[bank].pop(projection))
    if recipe.tuning_steps:
        packed = _tune(observed, packed, coded, run, inputs, teacher, recipe, seed=_seed(seed, next(iter(banks)), 0, 0))
        for bank, projections in coded.items():
            for projection, of_projection in projections.items():
                report(bank, projection, of_projection)
    student, _ = run_and_watch(run, inputs, observed, (), by_routing=by_routing)
    packed_banks = [
        PackedBank(
            tier.path,
            tier.kind,
            **{name: of_tiers[tier.experts].to("cpu") for name, of_tiers in packed[bank].items()},
            experts=tier.experts,
        )
        for bank, tiers in banks.items()
        for tier in tiers
    ]
    return LayerResult(packed_banks, teacher, student, list(reports.values()), packed_matrices, matrix_reports, dense)


def _new_report(tier: BankFormat) -> dict[str, object]:
    return {"path": tier.path} | ({"experts": list(tier.experts)} if tier.experts else {})


def _of(tensor: Tensor, experts: tuple[int, ...]) -> Tensor:
    """Of all experts [E, …], those of a tier; () for all."""
    return tensor[list(experts)] if experts else tensor


def _moments_of(moments: InputMoments, experts: tuple[int, ...]) -> Moments:
    return TierMoments(moments, experts) if experts else moments


@dataclass(frozen=True)
class _Coded:
    """Of a projection, for its report: the weights that were coded, and the moments of their inputs."""

    weights: Tensor
    moments: InputMoments


def _tune(
    observed: dict[ExpertBank, ObservedBank],
    packed: dict[ExpertBank, dict[str, _OfTiers]],
    coded: dict[ExpertBank, dict[str, _Coded]],
    run: LayerRunner,
    inputs: Tensor,
    targets: Tensor,
    recipe: Recipe,
    *,
    seed: int,
) -> dict[ExpertBank, dict[str, _OfTiers]]:
    """Of banks without tiers (Recipe)."""
    tuned = tune_banks(
        {module: {name: of[()] for name, of in packed[bank].items()} for bank, module in observed.items()},
        {module: {name: of.moments for name, of in coded[bank].items()} for bank, module in observed.items()},
        run,
        inputs,
        targets,
        steps=recipe.tuning_steps,
        learning_rate=recipe.tuning_rate,
        seed=seed,
    )
    return {bank: {name: {(): of} for name, of in tuned[module].items()} for bank, module in observed.items()}


def _seed(seed: int, bank: ExpertBank, place: int, order: int) -> int:
    """A seed of its own for every projection; its experts add their index."""
    return (((seed << 12) + bank.decoder_layer << 4) + 2 * place + order) << 12
