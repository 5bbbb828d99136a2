"""Tuning of what is continuous in a quantized layer, its codes fixed, on the layer's output.

Codebooks, scales and biases of the layer's banks are trained by Adam so that the quantized layer, on the inputs it will
see, gives the original layer's outputs: min Σ ‖layer_q(x_student) − layer(x_teacher)‖². Second-order coding treats each
projection alone; this is where gate, up and down, and the experts of one token, learn to make up for each other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from kbvq.codes.packing import (
    codeword_places,
    decode_codes,
    decode_factors,
    expand,
    store_tables,
    table_values,
    weight_signs,
)
from kbvq.errors import NumericalError
from kbvq.models.calibration import LayerRunner, ObservedBank
from kbvq.models.expert_forward import ExpertWeights, Gating, run_bank, stacked_experts
from kbvq.structures import PROJECTIONS, InputMoments, PackedBank, PackedProjection

TOKENS_PER_STEP = 2048
"""Calibration tokens in one step of Adam."""

_WARM_UP = 10  # steps over which the learning rate rises; then it falls as a cosine
_BIAS_SHARE = 0.3  # a bias starts near zero, so its steps are measured by the outputs it is added to


class TrainableProjection(nn.Module):
    """A packed projection with its codebook, scale and bias as float32 parameters; codes, factors and the network of
    rq-moe stay fixed."""

    def __init__(self, packed: PackedProjection) -> None:
        super().__init__()
        format, tensors = packed.format, packed.tensors
        self.packed = packed
        continuous = {name: tensors[name].float() for name in ("scale", "column_scale", "bias") if name in tensors}
        self.form = expand(format, tensors)
        self.has_tables = format.codebook not in ("trellis", "rq-moe")
        if self.has_tables:
            continuous["codebook"] = table_values(tensors)
            experts = range(format.num_experts)
            places = [codeword_places(format, tensors, expert).int() for expert in experts]
            self.places = torch.stack(places, 1)  # [num_stages, num_experts, out_features, num_vectors]
            self.negative = (
                torch.stack([weight_signs(format, tensors, e) < 0 for e in experts]) if format.signed else None
            )
        self.continuous = nn.ParameterDict({name: nn.Parameter(value) for name, value in continuous.items()})

    def weights(self) -> Tensor:
        """Decoded weights of all experts, [num_experts, out_features, in_features] float32, differentiable."""
        if not self.has_tables:
            scales = [self.continuous[name] if name in self.continuous else None for name in ("scale", "column_scale")]
            return _ScaledWeights.apply(self._fixed_of, self.packed.format.num_experts, *scales)
        flat = self.continuous["codebook"].flatten(0, 2)
        weights: Tensor = sum(F.embedding(places, flat) for places in self.places).flatten(-2)
        if self.negative is not None:
            weights = torch.where(self.negative, -weights, weights)
        if self.packed.format.rank:
            coefficients, basis = decode_factors(self.packed.tensors)  # stored ones: nothing of them is trained
            weights = weights + coefficients @ basis
        if "column_scale" in self.continuous:
            weights = weights * self.continuous["column_scale"]
        return weights * self.continuous["scale"][..., None] if "scale" in self.continuous else weights

    @torch.no_grad()
    def _fixed_of(self, expert: int) -> Tensor:
        """Of an expert, what no scale has multiplied, where nothing of that is trained: [out_features, in_features].
        Decoded anew each time: kept, it would take four bytes a weight."""
        fixed = decode_codes(*self.form, expert)
        return torch.addmm(fixed, *decode_factors(self.packed.tensors, expert)) if self.packed.format.rank else fixed

    def bias(self) -> Tensor | None:
        return self.continuous["bias"] if "bias" in self.continuous else None

    def pack(self) -> PackedProjection:
        """The projection with its tuned values, rounded as stored. Raises NumericalError if one left float16's
        range."""
        tuned = {name: parameter.detach() for name, parameter in self.continuous.items()}
        if "codebook" in tuned:
            if self.packed.format.signed:  # the table holds magnitudes
                tuned["codebook"] = tuned["codebook"].clamp_min(0)
            tuned |= store_tables(tuned.pop("codebook"), self.packed.format.codebook_dtype)
        tuned = {name: value if value.dtype == torch.int8 else value.half() for name, value in tuned.items()}
        for name, tensor in tuned.items():
            if not torch.isfinite(tensor).all():
                raise NumericalError(f"tuning drove {name} out of the range of float16; use fewer steps or none")
        return PackedProjection(self.packed.format, self.packed.tensors | tuned)


class _ScaledWeights(torch.autograd.Function):
    """scale · fixed · column_scale of all experts. Keeps nothing for the backward pass but the scales, and needs the
    memory of one expert besides the weights and their gradient: products left to autograd take twice as much."""

    @staticmethod
    def forward(
        context: Any,
        fixed_of: Callable[[int], Tensor],
        num_experts: int,
        scale: Tensor | None,
        column_scale: Tensor | None,
    ) -> Tensor:
        context.fixed_of, context.num_experts = fixed_of, num_experts
        context.save_for_backward(scale, column_scale)
        return torch.stack([_scaled(fixed_of(e), e, scale, column_scale) for e in range(num_experts)])

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        scale, column_scale = context.saved_tensors
        of_scale = None if scale is None else torch.empty_like(scale)
        of_column = None if column_scale is None else torch.zeros_like(column_scale)
        for expert in range(context.num_experts):
            product = gradient[expert] * context.fixed_of(expert)
            if of_scale is not None:
                of_scale[expert] = product.sum(1) if column_scale is None else product @ column_scale
            if of_column is not None:
                of_column += product.sum(0) if scale is None else scale[expert] @ product
        return None, None, of_scale, of_column


def _scaled(fixed: Tensor, expert: int, scale: Tensor | None, column_scale: Tensor | None) -> Tensor:
    weights = fixed if column_scale is None else fixed * column_scale
    return weights if scale is None else weights * scale[expert, :, None]


class TrainableBank(nn.Module):
    """Stands in for the module of a packed bank, decoding its trainable projections in every forward pass."""

    def __init__(self, tiers: Sequence[PackedBank], gating: Gating) -> None:
        """tiers: of the bank; one where it has none."""
        super().__init__()
        self.packed = list(tiers)
        self.gating = gating
        self.tiers = nn.ModuleList(
            nn.ModuleDict({name: TrainableProjection(getattr(tier, name)) for name in PROJECTIONS}) for tier in tiers
        )
        self.places = {
            expert: (number, place)
            for number, tier in enumerate(tiers)
            for place, expert in enumerate(tier.format.held)
        }
        """Of each expert of the bank, its tier and its place there."""

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        dtype = hidden_states.dtype
        of_tier = []
        for projections in self.tiers:
            weights = [projections[name].weights().to(dtype) for name in PROJECTIONS]
            biases = [None if bias is None else bias.to(dtype) for bias in (projections[n].bias() for n in PROJECTIONS)]
            of_tier.append(stacked_experts(weights, biases))

        def of_expert(expert: int) -> ExpertWeights:
            tier, place = self.places[expert]
            return of_tier[tier](place)

        return run_bank(hidden_states, top_k_index, top_k_weights, len(self.places), of_expert, self.gating)

    def pack(self) -> list[PackedBank]:
        """The tiers with their tuned values."""
        return [
            dataclasses.replace(tier, **{name: projections[name].pack() for name in PROJECTIONS})
            for tier, projections in zip(self.packed, self.tiers, strict=True)
        ]


def parameter_group(parameter: nn.Parameter, learning_rate: float, size: float | None = None) -> dict[str, object]:
    """A group for Adam whose learning rate is relative to `size`, by default the parameter's root mean square."""
    size = parameter.detach().square().mean().sqrt().item() if size is None else size
    return {"params": [parameter], "lr": learning_rate * max(size, 1e-8), "eps": 1e-11}


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises over a few steps, then falls to zero as a cosine."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def tune_banks(
    banks: Mapping[ObservedBank, Mapping[str, PackedProjection]],
    moments: Mapping[ObservedBank, Mapping[str, InputMoments]],
    run: LayerRunner,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> dict[ObservedBank, dict[str, PackedProjection]]:
    """Tuned projections of the banks of one layer, in use by the banks when it returns.

    moments: of the student's inputs of each projection.
    inputs: the layer's student inputs, targets: its teacher outputs, both [windows, tokens, hidden_size] on the CPU.
    learning_rate: relative to the root mean square of each parameter tensor. seed: of the order of the windows.
    """
    trainable = {
        bank: {name: TrainableProjection(projection) for name, projection in packed.items()}
        for bank, packed in banks.items()
    }
    groups = []
    for bank, projections in trainable.items():
        for name, projection in projections.items():
            for kind, parameter in projection.continuous.items():
                size = _BIAS_SHARE * _output_size(projection, moments[bank][name]) if kind == "bias" else None
                groups.append(parameter_group(parameter, learning_rate, size))
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = cosine_schedule(optimizer, steps)
    energy = float((targets - inputs).float().square().mean())
    drawn = shuffled_windows(inputs.shape[1], len(inputs), steps, seed)
    for chosen in tqdm(drawn, total=steps, desc="tuning", unit="step", leave=False, disable=None):
        with torch.enable_grad():
            for bank, projections in trainable.items():
                for name, projection in projections.items():
                    bank.set_(name, projection.weights(), projection.bias())
            outputs = run.batch(inputs[chosen])
            loss = (outputs.float() - targets[chosen].to(outputs.device).float()).square().mean() / energy
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
    tuned = {bank: {name: p.pack() for name, p in projections.items()} for bank, projections in trainable.items()}
    for bank, projections in tuned.items():
        for name, projection in projections.items():
            bank.use_(name, {(): projection})
    return tuned


def windows_per_step(tokens: int, windows: int) -> int:
    """Windows of `tokens` tokens in one step, at most all there are."""
    return max(1, min(windows, TOKENS_PER_STEP // tokens))


def shuffled_windows(tokens: int, windows: int, steps: int, seed: int) -> Iterator[Tensor]:
    """The windows of each step, [windows_per_step] int64: all of them in random order, then in another."""
    generator = torch.Generator().manual_seed(seed)
    rows = windows_per_step(tokens, windows)
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(waiting) < rows:
            waiting = torch.randperm(windows, generator=generator)
        chosen, waiting = waiting[:rows], waiting[rows:]
        yield chosen


def _output_size(projection: TrainableProjection, moments: InputMoments) -> float:
    """Root mean square of the projection's outputs, from the moments of its inputs."""
    moment = moments.pooled_second_moment()
    weights = projection.weights().detach().flatten(0, 1)
    return ((weights @ moment) * weights).sum(1).mean().clamp_min(0).sqrt().item()
