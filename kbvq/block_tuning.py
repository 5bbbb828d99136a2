"""Tuning of what is continuous in a quantized layer, its codes fixed, on the layer's output.

Codebooks, scales and biases of the layer's banks are trained by Adam so that the quantized layer, on the inputs it will
see, gives the original layer's outputs: min Σ ‖layer_q(x_student) − layer(x_teacher)‖². Second-order coding treats each
projection alone; this is where gate, up and down, and the experts of one token, learn to make up for each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from kbvq.calibration import LayerRunner, ObservedBank
from kbvq.errors import NumericalError
from kbvq.packing import decode_factors, unpack_stages
from kbvq.structures import InputMoments, PackedProjection

TOKENS_PER_STEP = 2048
"""Calibration tokens in one step of Adam."""

_WARM_UP = 10  # steps over which the learning rate rises; then it falls as a cosine
_BIAS_SHARE = 0.3  # a bias starts near zero, so its steps are measured by the outputs it is added to


class TrainableProjection(nn.Module):
    """A packed projection with its codebook, scale and bias as float32 parameters; codes and factors stay fixed."""

    def __init__(self, packed: PackedProjection) -> None:
        super().__init__()
        format, tensors = packed.format, packed.tensors
        self.packed = packed
        codes = unpack_stages(tensors["codes"], format.num_stages, format.num_vectors, format.codebook_size)
        if format.num_codebooks > 1:  # one table for all experts, each with a part of its own
            codes = codes + format.codebook_size * torch.arange(format.num_experts, device=codes.device).view(-1, 1, 1)
        self.codes = codes
        self.continuous = nn.ParameterDict(
            {name: nn.Parameter(tensors[name].float()) for name in ("codebook", "scale", "bias") if name in tensors}
        )
        self.low_rank: Tensor | None = None
        if format.rank:
            coefficients, basis = decode_factors(tensors)
            self.low_rank = coefficients @ basis

    def weights(self) -> Tensor:
        """Decoded weights of all experts, [num_experts, out_features, in_features] float32, differentiable."""
        codebook = self.continuous["codebook"]
        decoded = sum(F.embedding(codes, codebook[:, stage].flatten(0, 1)) for stage, codes in enumerate(self.codes))
        weights = decoded.flatten(-2)
        if self.low_rank is not None:
            weights = weights + self.low_rank
        return weights * self.continuous["scale"][..., None] if "scale" in self.continuous else weights

    def bias(self) -> Tensor | None:
        return self.continuous["bias"] if "bias" in self.continuous else None

    def pack(self) -> PackedProjection:
        """The projection with its tuned values, rounded to float16. Raises NumericalError if one left its range."""
        tuned = {name: parameter.detach().half() for name, parameter in self.continuous.items()}
        for name, tensor in tuned.items():
            if not torch.isfinite(tensor).all():
                raise NumericalError(f"tuning drove {name} out of the range of float16; use fewer steps or none")
        return PackedProjection(self.packed.format, self.packed.tensors | tuned)


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
                size = parameter.detach().square().mean().sqrt().item()
                if kind == "bias":
                    size = _BIAS_SHARE * _output_size(projection, moments[bank][name])
                groups.append({"params": [parameter], "lr": learning_rate * max(size, 1e-8), "eps": 1e-11})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    rows = windows_per_step(inputs.shape[1], len(inputs))
    waiting = torch.empty(0, dtype=torch.int64)
    energy = float((targets - inputs).float().square().mean())
    for _ in tqdm(range(steps), desc="tuning", unit="step", leave=False, disable=None):
        if len(waiting) < rows:
            waiting = torch.randperm(len(inputs), generator=generator)
        chosen, waiting = waiting[:rows], waiting[rows:]
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
            bank.use_(name, projection)
    return tuned


def windows_per_step(tokens: int, windows: int) -> int:
    """Windows of `tokens` tokens in one step, at most all there are."""
    return max(1, min(windows, TOKENS_PER_STEP // tokens))


def _output_size(projection: TrainableProjection, moments: InputMoments) -> float:
    """Root mean square of the projection's outputs, from the moments of its inputs."""
    moment = moments.pooled_second_moment()
    weights = projection.weights().detach().flatten(0, 1)
    return ((weights @ moment) * weights).sum(1).mean().clamp_min(0).sqrt().item()
