"""The modules that stand in a model where experts were: packed weights as buffers, decoded when used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import kbvq_kernels
from kbvq.codes.packing import dequantize_expert
from kbvq.errors import CheckpointError
from kbvq.models.expert_forward import ExpertWeights, Gating, fill_routing, run_bank
from kbvq.serving.packed_module import PackedModule, kernels_serve
from kbvq.structures import PROJECTIONS, BankFormat, PackedBank, ProjectionFormat
from kbvq_kernels import PreparedProjection


class PackedBankModule(PackedModule):
    """Buffers and forward core of a packed bank, whatever its call signature."""

    def __init__(self, format: BankFormat, gating: Gating, activation: str | None = None) -> None:
        super().__init__({projection: getattr(format, projection) for projection in PROJECTIONS})
        self.activation = activation
        self.format = format
        self.num_experts = format.gate_up_proj.num_experts
        self.gating = gating

    @torch.no_grad()
    def load_bank_(self, bank: PackedBank) -> None:
        """Copy the tensors of `bank` into the buffers; raises CheckpointError when its format is another."""
        if bank.format != self.format:
            raise CheckpointError(f"{bank.path}: the bank's format {bank.format} is not the module's {self.format}")
        for projection in PROJECTIONS:
            for name, buffer in self.projection_tensors(projection).items():
                buffer.copy_(getattr(bank, projection).tensors[name])

    def expert_weights(
        self,
        expert: int,
        dtype: torch.dtype,
        forms: Sequence[tuple[ProjectionFormat, Mapping[str, Tensor]]] | None = None,
    ) -> ExpertWeights:
        """Decoded weights and biases of one expert, in `dtype`. forms: `lookup_form` of both projections, None to make
        them for this call."""
        weights: list[Tensor | None] = []
        for format, tensors in forms or [self.lookup_form(projection) for projection in PROJECTIONS]:
            weights.append(dequantize_expert(format, tensors, expert, dtype))
            weights.append(tensors["bias"][expert].to(dtype) if format.has_bias else None)
        return tuple(weights)  # type: ignore[return-value]

    def _run(self, hidden_states: Tensor, top_k_index: Tensor | None, top_k_weights: Tensor | None) -> Tensor:
        """Compute the bank's output; the one place that chooses an implementation.

        The kernels serve CPU and CUDA. Other devices, inputs or routing weights that need a gradient, and experts with
        a gating that no kernel knows take the path in plain torch. A call without indices is that of `fill_routing`.
        """
        if self.activation is not None and kernels_serve(hidden_states, top_k_weights):
            prepared = self.kernel_projections(hidden_states.dtype)
            if self.num_experts > 1:
                top_k_index, top_k_weights = fill_routing(hidden_states, top_k_index, top_k_weights, self.num_experts)
            if self.format.gate_up_proj.has_column_scale:
                column_scale = self.projection_tensors("gate_up_proj")["column_scale"]
                hidden_states = hidden_states * column_scale.to(hidden_states.dtype)
            return kbvq_kernels.moe_forward(
                hidden_states, top_k_index, top_k_weights, *prepared, activation=self.activation
            )
        forms = [self.lookup_form(projection) for projection in PROJECTIONS]
        return run_bank(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.num_experts,
            lambda expert: self.expert_weights(expert, hidden_states.dtype, forms),
            self.gating,
        )

    def _prepare(self, dtype: torch.dtype) -> list[PreparedProjection]:
        """The kernels know no column scales: those of gate_up_proj multiply its inputs, those of down_proj the rows of
        up, which make its inputs."""
        made = super()._prepare(dtype)
        if self.format.down_proj.has_column_scale:
            made[0] = _scale_up_rows(made[0], self.projection_tensors("down_proj")["column_scale"])
        return made

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}=[{f.num_experts}, {f.out_features}, {f.in_features}] in {8 * f.num_bytes / f.num_weights:.3f} bits"
            for name, f in self.formats.items()
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
    """Routed experts of one layer; called like the fused experts modules of transformers.

    Where experts have different rates, this is the first tier of them; `tiers` has the others, each called with all
    tokens and, of the routing, its own experts.
    """

    def __init__(
        self, format: BankFormat, gating: Gating, activation: str | None = None, further: Sequence[BankFormat] = ()
    ) -> None:
        super().__init__(format, gating, activation)
        made = [PackedExperts(tier, gating, activation) for tier in further]
        self.tiers: nn.ModuleList | tuple[()] = nn.ModuleList(made) if made else ()
        self._held = [tier.experts for tier in (format, *further)]
        self.bank_experts = sum(map(len, self._held)) or self.num_experts
        self._places: dict[torch.device, Tensor] = {}

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """[..., H], [T, k] integers, [T, k] -> [..., H] in the dtype of `hidden_states`; see `run_bank`."""
        tokens = hidden_states.flatten(0, -2)
        if not self.tiers:
            return self._run(tokens, top_k_index, top_k_weights).view(hidden_states.shape)
        top_k_index, top_k_weights = fill_routing(tokens, top_k_index, top_k_weights, self.bank_experts)
        shifted = top_k_index.clamp(-1, self.bank_experts) + 1
        places = self._places_in_tiers(shifted.device).index_select(1, shifted.flatten())
        # On a CPU it costs little to see which tiers have tokens; a GPU would have to be waited for. Each runs once all
        # the same, as a compiled model needs what it prepares.
        looks = places.device.type == "cpu" and not torch.compiler.is_compiling()
        output = None
        for part, own in zip((self, *self.tiers), places.view(-1, *top_k_index.shape), strict=True):
            if looks and part._prepared is not None and bool((own == part.num_experts).all()):
                continue
            found = self._run(tokens, own, top_k_weights) if part is self else part(tokens, own, top_k_weights)
            output = found if output is None else output + found
        if output is None:
            output = torch.zeros_like(tokens)
        return output.view(hidden_states.shape)

    def _places_in_tiers(self, device: torch.device) -> Tensor:
        """Where expert e of the bank stands in each tier, at [tier, e + 1], int64; the tier's number of experts, which
        is skipped, for those of other tiers, and at both ends for what lies outside of the bank."""
        known = self._places.get(device)
        if known is None:
            known = torch.stack([torch.full((self.bank_experts + 2,), len(held), device=device) for held in self._held])
            for own, experts in zip(known, self._held, strict=True):
                own[[expert + 1 for expert in experts]] = torch.arange(len(experts), device=device)
            if not torch.compiler.is_compiling():
                self._places[device] = known
        return known


class PackedMLP(PackedBankModule):
    """A shared expert: a bank of one that every token meets with weight one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H] in the same dtype."""
        tokens = hidden_states.flatten(0, -2)
        return self._run(tokens, None, None).view(hidden_states.shape)


def packed_module(
    format: BankFormat, gating: Gating, activation: str | None = None, further: Sequence[BankFormat] = ()
) -> PackedBankModule:
    """The module that serves a bank of this kind, with zeroed buffers on the default device.

    activation: name of the activation in the usual gating, for the kernels; None keeps to plain torch. further: the
    tiers behind the first one, of routed experts.
    """
    if format.kind == "shared":
        return PackedMLP(format, gating, activation)
    return PackedExperts(format, gating, activation, further)
