"""A model's banks with the second moments of their inputs on windows of calibration text."""

from __future__ import annotations

from pathlib import Path

import torch
from drawn_windows import drawn_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from kbvq.models.calibration import ObservedBank
from kbvq.models.moe_adapters import find_expert_banks, read_experts
from kbvq.structures import PROJECTIONS


@torch.no_grad()
def observed_model(folder: Path, windows: int, *, length: int) -> dict[str, ObservedBank]:
    """By path the banks of the model in `folder`, in float32, that so many windows of `length` tokens ran through."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    observed = {}
    for bank in find_expert_banks(model):
        experts = read_experts(model.get_submodule(bank.path))
        observed[bank.path] = module = ObservedBank(experts.weights, experts.gating, experts.biases)
        module.watch_(*PROJECTIONS, by_routing=True)
        model.set_submodule(bank.path, module)
    for window in drawn_windows(tokenizer, windows, length=length):
        model(window[None])
    return observed
