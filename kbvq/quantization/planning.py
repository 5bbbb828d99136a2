"""How every bank of a model will be stored, decided before the first layer is quantized."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

import kbvq_kernels
from kbvq.errors import ConfigError
from kbvq.method.bit_budget import Choice, allocate
from kbvq.models.moe_adapters import ExpertBank
from kbvq.quantization.sensitivity import Sensitivity, Site, super_experts
from kbvq.recipes import Recipe
from kbvq.structures import PROJECTIONS, BankFormat, ProjectionFormat, tier_path

logger = logging.getLogger("kbvq")

TOLERANCE = 0.01
"""A budget counts as met when at most so much of it is left over."""

PROTECTED_BITS = 3
"""Least code bits of a super expert."""

SHIFTS = (-0.5, -0.25, 0.0, 0.25, 0.5)
"""Bits by which the borders between the rates of a bank's experts may move."""

TIER_PENALTY = 1.01
"""A bank with one more tier has to be so much better: each takes calls of the kernels of its own."""

MAX_OPTIONS = 250
"""Ways to store a bank that a budget chooses from."""


@dataclass(frozen=True)
class BudgetPlan:
    """formats: of all banks, in their order. record: what was measured and chosen, ready for JSON."""

    formats: list[BankFormat]
    record: dict[str, object]


def uniform_plan(banks: list[ExpertBank], recipe: Recipe) -> list[BankFormat]:
    """Every projection alike.

    Raises ConfigError, naming the bank, when it cannot be stored, or when no kernel would serve it.
    """
    plan = []
    for bank in banks:
        formats = {}
        for projection in PROJECTIONS:
            try:
                formats[projection] = _format(bank, recipe.projection_format(*bank.projection_shape(projection)))
            except ConfigError as error:
                raise ConfigError(f"{bank.path}: {error}") from error
            _check_served(bank, formats[projection])
        plan.append(BankFormat(bank.path, bank.kind, **formats))
    return plan


def check_budget(banks: list[ExpertBank], recipe: Recipe) -> list[BankFormat]:
    """The formats of the highest rates, which bound the size of what a budget can choose. Raises as `uniform_plan`."""
    smallest, largest = 0, []
    for bank in banks:
        candidates = {p: _candidates(bank, p, recipe) for p in PROJECTIONS}
        biased = bank.has_bias
        for options in candidates.values():
            smallest += min(dataclasses.replace(f, has_bias=biased).num_bytes for f in options.values())
        by_bytes = {p: max(options.values(), key=lambda f: f.num_bytes) for p, options in candidates.items()}
        largest.append(BankFormat(bank.path, bank.kind, **by_bytes))
    if smallest > _budget_bytes(banks, recipe):
        raise ConfigError(
            f"--bits {recipe.bits}: the lowest rates take {8 * smallest / _num_weights(banks):.3f} bits per weight, "
            "everything stored; raise --bits"
        )
    return largest


def budget_plan(
    banks: list[ExpertBank],
    recipe: Recipe,
    sensitivities: Mapping[Site, Sensitivity],
    peaks: Mapping[ExpertBank, Tensor],
) -> BudgetPlan:
    """Code bits, rank and bias of each projection for the least predicted error within the recipe's bits per weight.

    Predicted is the KL divergence, as the sum of what each projection alone would cause (sensitivity). Super experts
    get at least PROTECTED_BITS; so do the others of their bank, unless the recipe has rates per expert.
    """
    found = super_experts({bank.path: peak for bank, peak in peaks.items()})
    menus = [
        bank_options(bank, [sensitivities[bank, p] for p in PROJECTIONS], found.get(bank.path, []), recipe)
        for bank in banks
    ]
    choices = [[Choice(option.num_bytes, option.error) for option in menu] for menu in menus]
    budget = _budget_bytes(banks, recipe)
    chosen = [menu[pick] for menu, pick in zip(menus, allocate(choices, budget, slack=TOLERANCE), strict=True)]
    formats = [tier for bank, option in zip(banks, chosen, strict=True) for tier in option.tiers(bank, recipe)]
    used = sum(getattr(tier, projection).num_bytes for tier in formats for projection in PROJECTIONS)
    if used < (1 - TOLERANCE) * budget:
        logger.warning(
            "--bits %g: the nearest that the rates of this model's few projections add up to is %.3f bits per weight",
            recipe.bits,
            recipe.bits * used / budget,
        )
    if found:
        logger.info("super experts, kept at %d bits or more: %s", PROTECTED_BITS, found)
    known = {bank.path: bank for bank in banks}
    rows = [_row(tier, p, sensitivities[known[tier.bank], p]) for tier in formats for p in PROJECTIONS]
    return BudgetPlan(formats, {"super_experts": found, "projections": rows})


def _row(tier: BankFormat, projection: str, sensitivity: Sensitivity) -> dict[str, object]:
    """What the record says of a projection: with its predicted divergence at each rate without a basis, of a tier the
    share of its experts."""
    format, energies = getattr(tier, projection), sensitivity.energies
    share = sum(energies.shares[expert] for expert in tier.experts) if tier.experts else 1.0
    return {
        "bank": tier.path,
        "projection": projection,
        "code_bits": _code_bits(format),
        "rank": format.rank,
        "bias": format.has_bias,
        "bias_share": energies.bias_share,
        "predicted_divergence": {
            str(rate): share * sensitivity.predict(rate, 0, bias=format.has_bias)
            for rate, rank in energies.errors
            if not rank
        },
    }


@dataclass(frozen=True)
class ProjectionChoice:
    """bits: of each class of experts (expert_classes). num_bytes: of all of them."""

    bits: tuple[int, ...]
    rank: int
    bias: bool
    num_bytes: int
    error: float


@dataclass(frozen=True)
class BankOption:
    """One way to store a bank. classes: its experts, those of a class with the same rates. projections: as stored, in
    the order of PROJECTIONS. num_bytes, error: of both, as in Choice."""

    classes: tuple[tuple[int, ...], ...]
    projections: tuple[ProjectionChoice, ...]
    num_bytes: int
    error: float

    def tiers(self, bank: ExpertBank, recipe: Recipe) -> list[BankFormat]:
        """Formats of its tiers, the one with most experts first; one for all experts if their rates are the same."""
        held: dict[tuple[int, ...], list[int]] = {}
        for place, experts in enumerate(self.classes):
            held.setdefault(tuple(choice.bits[place] for choice in self.projections), []).extend(experts)
        tiers = []
        ordered = sorted(held.items(), key=lambda item: (-len(item[1]), item[0]))
        for place, (bits, experts) in enumerate(ordered):
            formats = {
                projection: dataclasses.replace(
                    _candidates(bank, projection, recipe, len(experts))[rate, choice.rank], has_bias=choice.bias
                )
                for projection, rate, choice in zip(PROJECTIONS, bits, self.projections, strict=True)
            }
            some = tuple(sorted(experts)) if len(held) > 1 else ()
            tiers.append(BankFormat(tier_path(bank.path, place), bank.kind, **formats, experts=some))
        return tiers


def bank_options(
    bank: ExpertBank, sensitivities: Sequence[Sensitivity], protected: Sequence[int], recipe: Recipe
) -> list[BankOption]:
    """What the budget may choose for a bank, by ascending size: every rate, rank and bias of its projections, and with
    rates per expert every one of `expert_partitions`.

    sensitivities: in the order of PROJECTIONS. protected: super experts.
    """
    shares = [sensitivity.energies.shares for sensitivity in sensitivities]
    several = recipe.expert_rates and bank.num_experts > 1
    partitions = [{0: tuple(range(bank.num_experts))}]
    if several:
        partitions += expert_partitions(shares)
    found: list[BankOption] = []
    for offsets in partitions:
        classes: dict[tuple[int, bool], tuple[int, ...]] = {}
        for offset, experts in offsets.items():
            for kept in (False, True):
                own = tuple(e for e in experts if (e in protected if several else bool(protected)) == kept)
                if own:
                    classes[offset, kept] = own
        of_projection = [
            _projection_choices(bank, projection, classes, sensitivity, recipe)
            for projection, sensitivity in zip(PROJECTIONS, sensitivities, strict=True)
        ]
        penalty = TIER_PENALTY ** (len(classes) - 1)
        found += [
            BankOption(
                tuple(classes.values()),
                pair,
                sum(choice.num_bytes for choice in pair),
                penalty * sum(choice.error for choice in pair),
            )
            for pair in itertools.product(*of_projection)
        ]
    return _best_by_size(found)


def _projection_choices(
    bank: ExpertBank,
    projection: str,
    classes: Mapping[tuple[int, bool], tuple[int, ...]],
    sensitivity: Sensitivity,
    recipe: Recipe,
) -> list[ProjectionChoice]:
    """Every rate of the bank, rank and bias for a projection whose experts' rates are (offset from the bank's, whether
    of PROTECTED_BITS at the least). Steps end at the lowest and highest rate that there are."""
    formats = [_candidates(bank, projection, recipe, len(experts)) for experts in classes.values()]
    options = sorted(set.intersection(*(set(of_class) for of_class in formats)))
    rates = sorted({bits for bits, _ in options})
    biases = (True,) if bank.has_bias else (True, False) if recipe.bcos else (False,)
    least = min((rate for rate in rates if rate >= PROTECTED_BITS), default=rates[-1])
    found: dict[tuple[tuple[int, ...], int, bool], ProjectionChoice] = {}
    for base, rank, bias in itertools.product(range(len(rates)), sorted({rank for _, rank in options}), biases):
        bits = tuple(
            max(rates[min(max(base + offset, 0), len(rates) - 1)], least if kept else rates[0])
            for offset, kept in classes
        )
        if (bits, rank, bias) in found or not all((rate, rank) in options for rate in bits):
            continue
        stored = [
            dataclasses.replace(own[rate, rank], has_bias=bias).num_bytes
            for own, rate in zip(formats, bits, strict=True)
        ]
        shares: dict[int, float] = {}
        for rate, experts in zip(bits, classes.values(), strict=True):
            own_share = sum(sensitivity.energies.shares[expert] for expert in experts) if len(classes) > 1 else 1.0
            shares[rate] = shares.get(rate, 0.0) + own_share
        error = sensitivity.predict(shares, rank, bias=bias)
        found[bits, rank, bias] = ProjectionChoice(bits, rank, bias, sum(stored), error)
    return list(found.values())


def expert_partitions(shares: Sequence[Sequence[float]]) -> list[dict[int, tuple[int, ...]]]:
    """Ways to give the experts of a bank rates that differ: by the steps from the bank's rate, −1, 0 or 1, the experts
    that are so far from it.

    An expert with four times the share of another in the bank's error is to have a bit more; both projections of an
    expert have the same offset, by the geometric mean of its shares in them. Rates are whole, so where the bank's own
    lies between two of them the borders move: a way for each of SHIFTS.
    """
    count = len(shares[0])
    logs = [
        sum(0.5 * math.log2(max(of[expert] * count, 1e-6)) for of in shares) / len(shares) for expert in range(count)
    ]
    found = {}
    for shift in SHIFTS:
        offsets = tuple(min(max(math.floor(value + shift + 0.5), -1), 1) for value in logs)
        if len(set(offsets)) > 1:
            found[offsets] = {
                offset: tuple(e for e, own in enumerate(offsets) if own == offset) for offset in sorted(set(offsets))
            }
    return list(found.values())


def _best_by_size(options: list[BankOption]) -> list[BankOption]:
    """The best of each of MAX_OPTIONS steps of size; larger ones that are worse, too, as a budget may have to be
    filled."""
    least, most = (choose(option.num_bytes for option in options) for choose in (min, max))
    best: dict[int, BankOption] = {}
    for option in options:
        step = (option.num_bytes - least) * (MAX_OPTIONS - 1) // max(1, most - least)
        if step not in best or (option.error, option.num_bytes) < (best[step].error, best[step].num_bytes):
            best[step] = option
    return [best[step] for step in sorted(best)]


def _code_bits(format: ProjectionFormat) -> int:
    return round(8 * format.code_bytes / format.num_weights)


def _candidates(
    bank: ExpertBank, projection: str, recipe: Recipe, num_experts: int | None = None
) -> dict[tuple[int, int], ProjectionFormat]:
    """By (code bits, rank) the formats that the budget may choose for so many experts of a bank, by default all; with a
    bias where the recipe or the original has one."""
    _, *shape = bank.projection_shape(projection)
    try:
        formats = recipe.candidates(num_experts or bank.num_experts, *shape)
    except ConfigError as error:
        raise ConfigError(f"{bank.path}: {error}") from error
    served = {option: format for option, format in formats.items() if _why_not_served(bank, format) is None}
    if not served:
        _check_served(bank, next(iter(formats.values())))
    return {option: _format(bank, format) for option, format in served.items()}


def _format(bank: ExpertBank, format: ProjectionFormat) -> ProjectionFormat:
    """The format with a bias if the original experts have one: it is stored whatever the recipe says."""
    return dataclasses.replace(format, has_bias=format.has_bias or bank.has_bias)


def _check_served(bank: ExpertBank, format: ProjectionFormat) -> None:
    if reason := _why_not_served(bank, format):
        raise ConfigError(f"{bank.path}: the kernels cannot serve it: {reason}")


def _why_not_served(bank: ExpertBank, format: ProjectionFormat) -> str | None:
    """Why no kernel serves the format. Experts with a gating that no kernel knows are served in plain torch."""
    return kbvq_kernels.supports(**format.expanded.to_dict(), activation=bank.activation or "silu")


def _num_weights(banks: list[ExpertBank]) -> int:
    return sum(e * o * i for bank in banks for e, o, i in (bank.projection_shape(p) for p in PROJECTIONS))


def _budget_bytes(banks: list[ExpertBank], recipe: Recipe) -> int:
    return int(recipe.bits * _num_weights(banks) / 8)
