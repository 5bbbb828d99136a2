"""How every bank of a model will be stored, decided before the first layer is quantized."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

import kbvq_kernels
from kbvq.errors import ConfigError
from kbvq.method.bit_budget import Choice, allocate
from kbvq.models.moe_adapters import ExpertBank
from kbvq.quantization.sensitivity import Sensitivity, Site, super_experts
from kbvq.recipes import Recipe
from kbvq.structures import PROJECTIONS, BankFormat, ProjectionFormat

logger = logging.getLogger("kbvq")

TOLERANCE = 0.01
"""A budget counts as met when at most so much of it is left over."""

PROTECTED_BITS = 3
"""Least code bits of a bank that has a super expert."""


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
        smallest += sum(min(format.num_bytes for _, format in options) for options in candidates.values())
        by_bytes = {p: max(options, key=lambda o: o[1].num_bytes)[1] for p, options in candidates.items()}
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

    Predicted is the KL divergence, as the sum of what each projection alone would cause (sensitivity). Banks with super
    experts get at least PROTECTED_BITS.
    """
    found = super_experts({bank.path: peak for bank, peak in peaks.items()})
    options = []
    for bank in banks:
        for projection in PROJECTIONS:
            candidates = _candidates(bank, projection, recipe)
            protected = [option for option in candidates if option[0][0] >= PROTECTED_BITS]
            options.append(protected if bank.path in found and protected else candidates)
    sites = [(bank, projection) for bank in banks for projection in PROJECTIONS]
    measured = [sensitivities[site] for site in sites]
    choices = [
        [Choice(format.num_bytes, sensitivity.predict(*option, bias=format.has_bias)) for option, format in candidates]
        for candidates, sensitivity in zip(options, measured, strict=True)
    ]
    budget = _budget_bytes(banks, recipe)
    picked = allocate(choices, budget, slack=TOLERANCE)
    chosen = [candidates[pick] for candidates, pick in zip(options, picked, strict=True)]
    formats = [
        BankFormat(bank.path, bank.kind, gate_up_proj=gate_up[1], down_proj=down[1])
        for bank, gate_up, down in zip(banks, chosen[::2], chosen[1::2], strict=True)
    ]
    used = sum(format.num_bytes for _, format in chosen)
    if used < (1 - TOLERANCE) * budget:
        logger.warning(
            "--bits %g: the nearest that the rates of this model's few projections add up to is %.3f bits per weight",
            recipe.bits,
            recipe.bits * used / budget,
        )
    if found:
        logger.info("super experts, kept at %d bits or more: %s", PROTECTED_BITS, found)
    rows = [
        {
            "bank": bank.path,
            "projection": projection,
            "code_bits": bits,
            "rank": rank,
            "bias": format.has_bias,
            "bias_share": sensitivity.energies.bias_share,
            "predicted_divergence": {
                str(rate): sensitivity.predict(rate, 0, bias=format.has_bias)
                for rate, rank in sensitivity.energies.errors
                if not rank
            },
        }
        for (bank, projection), ((bits, rank), format), sensitivity in zip(sites, chosen, measured, strict=True)
    ]
    return BudgetPlan(formats, {"super_experts": found, "projections": rows})


def _candidates(bank: ExpertBank, projection: str, recipe: Recipe) -> list[tuple[tuple[int, int], ProjectionFormat]]:
    """((code bits, rank), format) of everything the budget may choose: every rate and rank, with and without a bias."""
    shape = bank.projection_shape(projection)
    try:
        formats = recipe.candidates(*shape)
    except ConfigError as error:
        raise ConfigError(f"{bank.path}: {error}") from error
    served = {option: format for option, format in formats.items() if _why_not_served(bank, format) is None}
    if not served:
        _check_served(bank, next(iter(formats.values())))
    biases = (True,) if bank.has_bias else (True, False) if recipe.bcos else (False,)
    return [(option, dataclasses.replace(f, has_bias=bias)) for option, f in served.items() for bias in biases]


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
