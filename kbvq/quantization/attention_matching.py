"""The last linear map of a layer's attention, fitted anew so that it takes back what the residual stream has lost.

Attention stays as it is stored, but the experts of the layers before are quantized, so a layer's attention starts from
a stream with errors in it. Its output projection is the one dense weight whose outputs are added to that stream as they
are. With x the layer's input and a the projection's input in the quantized model, and t the original's stream behind
attention, it should give t − x, though of a token no more beyond the original's output than that: again a least-squares
problem (method.target_weights), solved in closed form, with the tokens weighted as for the experts
(matching.token_weights). It costs no bits, and leaves the experts less to make up for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from kbvq.method.target_weights import TargetSums, bounded, goal_of
from kbvq.method.team import sum_fields_
from kbvq.models.calibration import LayerRunner
from kbvq.structures import InputMoments

_MOVED = 1e-2  # a map that is not added to the stream as it is changes the layer's outputs by much more than that


def output_projection(run: LayerRunner, hidden_states: Tensor) -> str | None:
    """Path in the layer of the linear map whose outputs are added to the layer's inputs before all else, or None.

    Names differ between families, so it is found by what it does: where its output is held fixed, moving the layer's
    input by −Δ and that output by Δ changes nothing. hidden_states: layer inputs, [windows, tokens, hidden_size].
    """
    inputs = run.sample(hidden_states).to(run.device)
    if inputs.dim() != 3:  # several residual streams
        return None
    candidates = {
        name: module
        for name, module in run.layer.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == inputs.shape[-1]
    }
    if not candidates:
        return None
    kept: dict[str, list[Tensor]] = {name: [] for name in candidates}
    with ExitStack() as hooks:
        for name, module in candidates.items():
            hooks.enter_context(_hooked(module, lambda _, __, output, name=name: kept[name].append(output)))
        expected = run.batch(inputs)
    generator = torch.Generator().manual_seed(0)
    for name, module in candidates.items():
        if len(kept[name]) != 1 or kept[name][0].shape != inputs.shape:
            continue
        own = kept[name][0]
        offset = inputs.float().std() * torch.randn(inputs.shape, generator=generator).to(run.device)
        fixed = (own.float() + offset).to(own.dtype)
        with _hooked(module, lambda _, __, ___, fixed=fixed: fixed):
            found = run.batch((inputs.float() - offset).to(inputs.dtype))
        missed = (found.float() - expected.float()).norm(dim=-1) / offset.norm(dim=-1)
        # The median of the tokens: one that a rounding error sends to another expert says nothing about the layer.
        if missed.flatten().median() < _MOVED:
            return name
    return None


@torch.no_grad()
def match_attention_(run: LayerRunner, teacher: Tensor, student: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Fit the layer's output projection, in place; returns the changed parameter by its path in the layer.

    teacher, student: the layer's inputs in the original and in the quantized model, [windows, tokens, hidden_size].
    weights: of the tokens, [windows, tokens]. Nothing is changed, and the answer is empty, where the layer has no such
    map.
    """
    path = output_projection(run, student)
    if path is None:
        return {}
    module = run.layer.get_submodule(path)
    moments = InputMoments.zeros(1, module.in_features, run.device)
    sums = TargetSums.zeros(1, module.out_features, module.in_features, run.device)
    bias = 0.0 if module.bias is None else module.bias.float()
    for part in run.parts(len(student)):
        _, given = _reach(run, module, teacher[part])
        lacking = (teacher[part].float() - student[part].float()).to(run.device)
        wanted = given.float() + bounded(lacking, given) - bias
        inputs, _ = _reach(run, module, student[part])
        inputs = inputs.flatten(0, -2)
        mass = moments.add_(
            0, inputs, torch.ones(len(inputs), device=run.device), token_weights=weights[part].flatten().to(run.device)
        )
        sums.add_(0, wanted.flatten(0, 1), inputs, mass)
    sum_fields_(run.ranks, moments, sums)
    fitted = goal_of(module.weight[None], sums, moments, prior_tokens=0.0).weights[0]
    module.weight.copy_(fitted)
    return {f"{path}.weight": module.weight.detach().cpu()}


def _reach(run: LayerRunner, module: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a module of the layer; what comes behind it does not run."""

    def stop(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        raise _Reached(inputs[0], output)

    with _hooked(module, stop):
        try:
            run.batch(hidden_states)
        except _Reached as reached:
            return reached.inputs, reached.output
    raise AssertionError("the output projection ran when it was looked for, and did not now")


class _Reached(Exception):
    """Ends a layer's forward pass."""

    def __init__(self, inputs: Tensor, output: Tensor) -> None:
        self.inputs, self.output = inputs, output


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., object]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
