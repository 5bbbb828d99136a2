"""Importance matrices as llama-imatrix gathers them: mean squares of each input, per expert; nothing of kbvq here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Statistics = dict[tuple[int, int | None, bool], tuple[Tensor, int]]
"""(layer, expert or None for a shared one, whether of down) -> sum of the squares of the inputs [n], tokens."""


class InputSquares:
    """Gathers `Statistics` while a model runs."""

    def __init__(self, model: nn.Module) -> None:
        self.sums: Statistics = defaultdict(lambda: (torch.zeros(()), 0))
        for name, module in model.named_modules():
            layer = next((int(part) for part in name.split(".") if part.isdigit()), -1)
            if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
                module.forward = self._routed(layer, module)
            elif name.endswith(("shared_expert", "shared_experts")):
                for down, linear in ((False, module.gate_proj), (True, module.down_proj)):
                    linear.register_forward_pre_hook(self._shared(layer, down))

    def add(self, key: tuple[int, int | None, bool], inputs: Tensor) -> None:
        total, tokens = self.sums[key]
        self.sums[key] = (total + inputs.double().square().sum(0), tokens + len(inputs))

    def mean(self, layer: int, expert: int | None, down: bool) -> Tensor:
        total, tokens = self.sums[layer, expert, down]
        if not tokens:
            keys = [key for key in self.sums if key[0] == layer and key[1] is not None and key[2] == down]
            total = sum(self.sums[key][0] for key in keys)
            tokens = sum(self.sums[key][1] for key in keys)
        return (total / tokens).float()

    def _shared(self, layer: int, down: bool) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda module, inputs: self.add((layer, None, down), inputs[0].flatten(0, -2))

    def _routed(self, layer: int, experts: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            result = torch.zeros_like(hidden)
            for expert in chosen.unique().tolist():
                token, slot = (chosen == expert).nonzero(as_tuple=True)
                self.add((layer, expert, False), hidden[token])
                gate, up = F.linear(hidden[token], experts.gate_up_proj[expert]).chunk(2, dim=-1)
                inner = experts.act_fn(gate) * up
                self.add((layer, expert, True), inner)
                outputs = F.linear(inner, experts.down_proj[expert]) * weights[token, slot, None]
                result.index_add_(0, token, outputs.to(result.dtype))
            return result

        return forward
