"""The modules that stand in a model where experts were: packed weights as buffers, decoded when used."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

import kbvq_kernels
from kbvq.codes.packing import dequantize_expert
from kbvq.errors import CheckpointError
from kbvq.models.expert_forward import ExpertWeights, Gating, fill_routing, run_bank
from kbvq.structures import PROJECTIONS, BankFormat, PackedBank, ProjectionFormat, buffer_name
from kbvq_kernels import PreparedProjection


class PackedBankModule(nn.Module):
    """Buffers and forward core of a packed bank, whatever its call signature.

    Every tensor of the format is a persistent buffer, not a parameter: integers cannot be parameters of a
    trainable model, and a non-persistent buffer would hold garbage after a load through the meta device.
    """

    def __init__(self, format: BankFormat, gating: Gating, activation: str | None = None) -> None:
        super().__init__()
        self.activation = activation
        self._prepared: tuple[tuple, list[PreparedProjection]] | None = None
        self.format = format
        self.num_experts = format.gate_up_proj.num_experts
        self.gating = gating
        for projection in PROJECTIONS:
            for name, spec in self.projection_format(projection).tensors().items():
                self.register_buffer(buffer_name(projection, name), torch.zeros(spec.shape, dtype=spec.dtype))

    def projection_format(self, projection: str) -> ProjectionFormat:
        return getattr(self.format, projection)

    def projection_tensors(self, projection: str) -> dict[str, Tensor]:
        """The stored tensors of one projection by their names in the format."""
        names = self.projection_format(projection).tensors()
        return {name: getattr(self, buffer_name(projection, name)) for name in names}

    @torch.no_grad()
    def load_bank_(self, bank: PackedBank) -> None:
        """Copy the tensors of `bank` into the buffers; raises CheckpointError when its format is another."""
        if bank.format != self.format:
            raise CheckpointError(f"{bank.path}: the bank's format {bank.format} is not the module's {self.format}")
        for projection in PROJECTIONS:
            for name, buffer in self.projection_tensors(projection).items():
                buffer.copy_(getattr(bank, projection).tensors[name])

    def expert_weights(self, expert: int, dtype: torch.dtype) -> ExpertWeights:
        """Decoded weights and biases of one expert, in `dtype`."""
        weights: list[Tensor | None] = []
        for projection in PROJECTIONS:
            format, tensors = self.projection_format(projection), self.projection_tensors(projection)
            weights.append(dequantize_expert(format, tensors, expert, dtype))
            weights.append(tensors["bias"][expert].to(dtype) if format.has_bias else None)
        return tuple(weights)  # type: ignore[return-value]

    def _run(self, hidden_states: Tensor, top_k_index: Tensor | None, top_k_weights: Tensor | None) -> Tensor:
        """Compute the bank's output; the one place that chooses an implementation.

        The kernels serve CPU and CUDA. Other devices, inputs that need a gradient, and experts with a gating that no
        kernel knows take the path in plain torch. A call without indices is that of `fill_routing`.
        """
        needs_gradient = torch.is_grad_enabled() and hidden_states.requires_grad
        if self.activation is not None and hidden_states.device.type in ("cpu", "cuda") and not needs_gradient:
            prepared = self._kernel_projections(hidden_states.dtype)
            if self.num_experts > 1:
                top_k_index, top_k_weights = fill_routing(hidden_states, top_k_index, top_k_weights, self.num_experts)
            if self.format.gate_up_proj.has_column_scale:
                column_scale = self.projection_tensors("gate_up_proj")["column_scale"]
                hidden_states = hidden_states * column_scale.to(hidden_states.dtype)
            return kbvq_kernels.moe_forward(
                hidden_states, top_k_index, top_k_weights, *prepared, activation=self.activation
            )
        return run_bank(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.num_experts,
            lambda expert: self.expert_weights(expert, hidden_states.dtype),
            self.gating,
        )

    def _kernel_projections(self, dtype: torch.dtype) -> list[PreparedProjection]:
        """Both projections as the kernels read them; made at the first call, and again when a buffer has changed.

        The kernels know no column scales: those of gate_up_proj multiply its inputs, those of down_proj the rows of up,
        which make its inputs.
        """
        if torch.compiler.is_compiling() and self._prepared is not None:
            return self._prepared[1]
        tensors = [self.projection_tensors(projection) for projection in PROJECTIONS]
        buffers = [tensor for of_projection in tensors for tensor in of_projection.values()]
        state = (dtype, *((t.device, t.dtype, t.data_ptr(), 0 if t.is_inference() else t._version) for t in buffers))
        if self._prepared is None or self._prepared[0] != state:
            made = [
                kbvq_kernels.prepare(named, **self.projection_format(projection).to_dict(), dtype=dtype)
                for projection, named in zip(PROJECTIONS, tensors, strict=True)
            ]
            if self.format.down_proj.has_column_scale:
                made[0] = _scale_up_rows(made[0], tensors[1]["column_scale"])
            if hasattr(self, "_hf_hook"):  # accelerate may take the buffers away again: keep no reference to them
                return made
            self._prepared = (state, made)
        return self._prepared[1]

    def extra_repr(self) -> str:
        formats = {projection: self.projection_format(projection) for projection in PROJECTIONS}
        return ", ".join(
            f"{name}=[{f.num_experts}, {f.out_features}, {f.in_features}] in {8 * f.num_bytes / f.num_weights:.3f} bits"
            for name, f in formats.items()
        )


def _scale_up_rows(gate_up: PreparedProjection, column_scale: Tensor) -> PreparedProjection:
    """gate_up_proj with the rows of up, the second half, multiplied by column_scale [intermediate_size]; in float32, so
    that the product of two stored scales is not rounded again."""
    rows = torch.cat([torch.ones_like(column_scale), column_scale]).float()
    scaled = {
        name: t if t is None else t.float() * rows for name, t in (("scale", gate_up.scale), ("bias", gate_up.bias))
    }
    return dataclasses.replace(gate_up, **scaled)


class PackedExperts(PackedBankModule):
    """Routed experts of one layer; called like the fused experts modules of transformers."""

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """[..., H], [T, k] integers, [T, k] -> [..., H] in the dtype of `hidden_states`; see `run_bank`."""
        tokens = hidden_states.flatten(0, -2)
        return self._run(tokens, top_k_index, top_k_weights).view(hidden_states.shape)


class PackedMLP(PackedBankModule):
    """A shared expert: a bank of one that every token meets with weight one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H] in the same dtype."""
        tokens = hidden_states.flatten(0, -2)
        return self._run(tokens, None, None).view(hidden_states.shape)


def packed_module(format: BankFormat, gating: Gating, activation: str | None = None) -> PackedBankModule:
    """The module that serves a bank of this kind, with zeroed buffers on the default device.

    activation: name of the activation in the usual gating, for the kernels; None keeps to plain torch.
    """
    return {"routed": PackedExperts, "shared": PackedMLP}[format.kind](format, gating, activation)
