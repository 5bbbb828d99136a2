"""The calibration pass over one decoder layer: run it on stored activations and gather the moments of its banks.

While a layer is worked on, each of its banks is an `ObservedBank`: the original weights (the teacher) or, projection
by projection, the quantized ones (the student), with the moments of the inputs gathered on request.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kbvq.codes.packing import dequantize_expert, expand
from kbvq.errors import UnsupportedModelError
from kbvq.method.team import sum_fields_
from kbvq.models.expert_forward import ExpertWeights, Gating, Observer, fill_routing, run_bank, stacked_experts
from kbvq.models.moe_adapters import ExpertBank, read_experts
from kbvq.models.ranks import ONE, Ranks
from kbvq.structures import PROJECTIONS, InputMoments, MakeZeros, PackedProjection


@dataclass(frozen=True)
class Recorded:
    """One forward pass of a bank. inputs, outputs: [T, H]. top_k_index, top_k_weights: [T, k], filled in where the call
    had none (`fill_routing`). down_inputs: (expert, inputs of down_proj [n, I]) of every expert that had tokens; of an
    idle bank none."""

    inputs: Tensor
    outputs: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    down_inputs: list[tuple[int, Tensor]]


class ObservedBank(nn.Module):
    """Stands in for a bank's module; called like it, with or without routing.

    weights: {"gate_up_proj": [E, 2I, H], "down_proj": [E, H, I]} in the dtype that the layer computes in; experts
        without a gate have I rows in the first.
    biases: of the original experts, [E, rows] by projection, where they have any.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], gating: Gating, biases: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.original_biases = dict(biases or {})
        self.biases: dict[str, Tensor | None] = {name: self.original_biases.get(name) for name in PROJECTIONS}
        self.gating = gating
        self.num_experts = len(self.weights["down_proj"])
        self.dtype = self.weights["down_proj"].dtype
        self.moments: dict[str, InputMoments] = {}
        self.gathered = range(self.num_experts)
        """The experts whose statistics are gathered in this pass."""
        self.peaks = torch.zeros(self.num_experts, device=self.weights["down_proj"].device)
        """Largest absolute output of each expert while moments were gathered, [num_experts] float32."""
        self.by_routing = False
        self.recording = False
        """Whether a forward pass is left in `recorded`."""
        self.recorded: Recorded | None = None
        self.idle = False
        """While recording: whether the experts are left out, and the outputs zeros."""
        self.offset: Tensor | None = None
        """Added to the outputs, [T, H]."""

    @property
    def hidden_size(self) -> int:
        return self.weights["down_proj"].shape[1]

    def watch_(self, *projections: str, by_routing: bool = False, make: MakeZeros = torch.zeros) -> None:
        """Start new moments for the inputs of these projections; those of the others are not gathered.

        by_routing: weight each token by its squared routing weight (`InputMoments.mass`). make: see InputMoments.zeros.
        """
        self.by_routing = by_routing
        self.moments = {
            name: InputMoments.zeros(
                self.num_experts, self.weights[name].shape[-1], self.weights[name].device, make=make
            )
            for name in projections
        }

    def sort_channels_(self, moments: InputMoments, vector_dim: int) -> Tensor:
        """Reorder the intermediate channels of each expert, which changes nothing that the bank computes: the rows of
        gate and up and the columns of down move together.

        Every expert has strong and weak channels of its own. Sorted by energy, experts can share one coding order. The
        vectors of a vector code get one channel from each of `vector_dim` equal parts of that order: with the metric of
        the inputs, the search for the nearest codeword then spends the bits of a vector on its strong channels. Single
        channels (vector_dim 1) are spread such that strong ones have weak ones beside them (`spread_order`): a trellis
        spends the bits of a few neighbouring rows of gate and up on those of them that matter.

        moments: of the inputs of down_proj. Returns the order, [num_experts, intermediate_size] int64.
        """
        order = moments.upper_sum.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        if vector_dim == 1:
            order = order[:, spread_order(order.shape[1]).to(order.device)]
        order = order.unflatten(1, (vector_dim, -1)).mT.flatten(1)
        gate_up, down = self.weights["gate_up_proj"], self.weights["down_proj"]
        gated = gate_up.shape[1] == 2 * order.shape[1]
        rows = torch.cat([order, order + order.shape[1]], 1) if gated else order
        self.weights["gate_up_proj"] = gate_up.gather(1, rows[..., None].expand(-1, -1, gate_up.shape[2]))
        if "gate_up_proj" in self.original_biases:
            bias = self.original_biases["gate_up_proj"].gather(1, rows)
            self.original_biases["gate_up_proj"] = self.biases["gate_up_proj"] = bias
        self.weights["down_proj"] = down.gather(2, order[:, None].expand(-1, down.shape[1], -1))
        return order

    def use_(self, projection: str, packed: Mapping[tuple[int, ...], PackedProjection]) -> None:
        """Compute with decoded weights and the bias of a packed projection from now on.

        packed: by the experts that each tier holds, () for all.
        """
        weights = torch.empty_like(self.weights[projection], memory_format=torch.contiguous_format)
        biased = any(tier.format.has_bias for tier in packed.values())
        bias = torch.zeros(weights.shape[:2], device=weights.device) if biased else None
        for experts, tier in packed.items():
            form, held = expand(tier.format, tier.tensors), list(experts or range(self.num_experts))
            for place, expert in enumerate(held):  # in place: a list of float32 and its stack would be two copies more
                weights[expert].copy_(dequantize_expert(*form, place))
            if bias is not None and tier.format.has_bias:
                bias[held] = tier.tensors["bias"].float()
        self.set_(projection, weights, bias)

    def set_(self, projection: str, weights: Tensor, bias: Tensor | None) -> None:
        """Compute with these weights and biases of all experts from now on, in the dtype of the original ones.

        bias: None for that of the original experts, if they have one.
        """
        self.weights[projection] = weights.to(self.dtype)
        self.biases[projection] = self.original_biases.get(projection) if bias is None else bias.to(self.dtype)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        observe = self._observe if self.moments else None
        of_expert = stacked_experts(*([named[name] for name in PROJECTIONS] for named in (self.weights, self.biases)))
        if self.recording:
            return self._record(hidden_states, top_k_index, top_k_weights, of_expert, observe)
        output = run_bank(hidden_states, top_k_index, top_k_weights, self.num_experts, of_expert, self.gating, observe)
        return output if self.offset is None else output + self.offset.view_as(output).to(output.dtype)

    def _record(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None,
        top_k_weights: Tensor | None,
        of_expert: Callable[[int], ExpertWeights],
        observe: Observer | None,
    ) -> Tensor:
        tokens = hidden_states.flatten(0, -2)
        top_k_index, top_k_weights = fill_routing(tokens, top_k_index, top_k_weights, self.num_experts)
        down_inputs: list[tuple[int, Tensor]] = []

        def note(expert: int, gate_up: Tensor, down: Tensor, outputs: Tensor, routing: Tensor) -> None:
            down_inputs.append((expert, down))
            if observe is not None:
                observe(expert, gate_up, down, outputs, routing)

        if self.idle:
            output = torch.zeros_like(tokens)
        else:
            output = run_bank(tokens, top_k_index, top_k_weights, self.num_experts, of_expert, self.gating, note)
        if self.offset is not None:
            output = output + self.offset.to(output.dtype)
        self.recorded = Recorded(tokens, output, top_k_index, top_k_weights, down_inputs)
        return output.view(hidden_states.shape)

    def _observe(
        self, expert: int, gate_up_inputs: Tensor, down_inputs: Tensor, outputs: Tensor, routing_weights: Tensor
    ) -> None:
        if expert not in self.gathered:
            return
        self.peaks[expert] = torch.maximum(self.peaks[expert], outputs.abs().max())
        for name, inputs in zip(PROJECTIONS, (gate_up_inputs, down_inputs), strict=True):
            if name in self.moments:
                self.moments[name].add_(expert, inputs, routing_weights, by_routing=self.by_routing)


def spread_order(length: int) -> Tensor:
    """A permutation of `length` ranks [length] int64 in which neighbours are far apart and every few of them stand for
    all: multiples of the golden section of the length, modulo the length."""
    step = round(length * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, length) > 1:
        step += 1
    return torch.arange(length) * step % length


class ActivationStore(Protocol):
    """Where the activations of all windows live, which may be more than the memory holds."""

    def empty_like(self, tensor: Tensor) -> Tensor:
        """A new tensor of that shape and dtype, on the CPU."""

    def release(self) -> None:
        """What was read or written may leave the memory until it is needed again."""


class InMemory:
    """Activations in memory."""

    def empty_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor)

    def release(self) -> None:
        pass


@dataclass(frozen=True)
class StatisticsStore:
    """Where the second moments of all experts live, and what is made from them.

    make: see MakeZeros. at_once: bytes of them that may be gathered in one pass over the windows; where all experts
    have more, there are several passes, each for a group of experts.
    """

    make: MakeZeros = torch.zeros
    at_once: float = math.inf

    def groups(self, num_experts: int, bytes_each: int) -> list[range]:
        """The experts that each pass gathers; bytes_each: of the statistics of one."""
        step = int(max(1, min(num_experts, self.at_once / max(1, bytes_each))))
        return [range(first, min(first + step, num_experts)) for first in range(0, num_experts, step)]


AfterBatch = Callable[[slice, Tensor], None]


class LayerRunner:
    """A decoder layer as a function of the activations of all windows, of which each rank runs its share.

    layer_kwargs: rows of a batch -> keyword arguments of the layer for a batch of so many windows.
    store: of the activations. statistics: where they go.
    """

    def __init__(
        self,
        layer: nn.Module,
        layer_kwargs: Callable[[int], dict],
        *,
        batch_size: int,
        device: torch.device,
        store: ActivationStore | None = None,
        statistics: StatisticsStore | None = None,
        ranks: Ranks = ONE,
    ) -> None:
        self.layer = layer
        self.layer_kwargs = layer_kwargs
        self.batch_size = batch_size
        self.device = device
        self.store = store or InMemory()
        self.statistics = statistics or StatisticsStore()
        self.ranks = ranks

    def __call__(self, hidden_states: Tensor, after: AfterBatch | None = None) -> Tensor:
        """[windows, tokens, hidden_size] on the CPU -> the layer's output, the same shape and dtype, on the CPU.

        after: called behind each batch with its windows and its outputs, [windows, tokens, hidden_size] on `device`.
        """
        outputs = self.store.empty_like(hidden_states)
        self._run(hidden_states, outputs, after)
        self.ranks.wait()
        return outputs

    def watch(self, hidden_states: Tensor, after: AfterBatch | None = None) -> None:
        """The same for what the layer's observed banks see of it alone."""
        self._run(hidden_states, None, after)

    @torch.no_grad()
    def _run(self, hidden_states: Tensor, outputs: Tensor | None, after: AfterBatch | None) -> None:
        for part in self.parts(len(hidden_states)):
            found = self.batch(hidden_states[part])
            if outputs is not None:
                outputs[part] = found.cpu()
            if after is not None:
                after(part, found)

    def parts(self, windows: int) -> Iterator[slice]:
        """The batches of this rank's share of so many windows."""
        return self.ranks.batches(windows, self.batch_size)

    @staticmethod
    def sample(hidden_states: Tensor) -> Tensor:
        """One window of them, for questions about how the layer is built."""
        return hidden_states[:1]

    def batch(self, hidden_states: Tensor) -> Tensor:
        """Output for a batch of at most `batch_size` windows, on `device`; differentiable."""
        self.store.release()
        outputs = self.layer(hidden_states.to(self.device), **self.layer_kwargs(len(hidden_states)))
        if not isinstance(outputs, Tensor):
            raise UnsupportedModelError(
                f"{type(self.layer).__name__} returns a {type(outputs).__name__}; kbvq runs layers that return their "
                "hidden states alone"
            )
        return outputs


def observe_banks(layer: nn.Module, layer_path: str, banks: Iterable[ExpertBank]) -> dict[ExpertBank, ObservedBank]:
    """Put observed banks where the modules of these banks are in a decoder layer, which is at `layer_path`. The modules
    themselves are left without weights, so that those are gone once the observed banks have others."""
    observed = {}
    for bank in banks:
        path = bank.path.removeprefix(f"{layer_path}.")
        module = layer.get_submodule(path)
        experts = read_experts(module)
        observed[bank] = ObservedBank(experts.weights, experts.gating, experts.biases)
        layer.set_submodule(path, observed[bank])
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    return observed


def run_and_watch(
    run: LayerRunner,
    hidden_states: Tensor,
    observed: Mapping[ExpertBank, ObservedBank],
    projections: tuple[str, ...],
    *,
    by_routing: bool,
    after: AfterBatch | None = None,
) -> tuple[Tensor, dict[ExpertBank, dict[str, InputMoments]]]:
    """The layer's outputs, and the moments of the inputs of these projections by bank, of the windows of all ranks.
    after: as of LayerRunner."""
    passes = _watching(run, observed, projections, by_routing)
    next(passes)
    outputs = run(hidden_states, after)
    for _ in passes:
        run.watch(hidden_states)
    return outputs, _moments(run.ranks, observed)


def run_and_keep(
    run: LayerRunner,
    hidden_states: Tensor,
    observed: Mapping[ExpertBank, ObservedBank],
    projections: tuple[str, ...],
    *,
    by_routing: bool,
) -> tuple[Tensor, dict[ExpertBank, dict[str, InputMoments]], dict[ExpertBank, Tensor]]:
    """As `run_and_watch`, and the inputs of each bank for all windows, of the shape of `hidden_states`."""
    kept = {bank: run.store.empty_like(hidden_states) for bank in observed}

    def keep(part: slice, outputs: Tensor) -> None:
        for bank, module in observed.items():
            kept[bank][part] = module.recorded.inputs.view_as(outputs).cpu()

    with recording(observed.values()):
        outputs, moments = run_and_watch(run, hidden_states, observed, projections, by_routing=by_routing, after=keep)
    return outputs, moments, kept


@contextmanager
def recording(modules: Iterable[ObservedBank], *, idle: bool = False) -> Iterator[None]:
    """Inside the block each forward pass of these banks is left in `recorded`. idle: for what they are called with
    alone, without running their experts."""
    modules = list(modules)
    for module in modules:
        module.recording, module.idle = True, idle
    try:
        yield
    finally:
        for module in modules:
            module.recording, module.idle, module.recorded = False, False, None


def idle_suffices(run: LayerRunner, hidden_states: Tensor, observed: Mapping[ExpertBank, ObservedBank]) -> bool:
    """Whether the banks of the layer are called with the same while they are idle: so where none of them sees what
    another one gives. hidden_states: layer inputs, [windows, tokens, hidden_size], of which a window is run."""
    if len(observed) < 2:
        return True
    calls = []
    for idle in (False, True):
        with recording(observed.values(), idle=idle), torch.no_grad():
            run.batch(run.sample(hidden_states))
            found = [module.recorded for module in observed.values()]
        calls.append([(each.inputs, each.top_k_index, each.top_k_weights) for each in found if each is not None])
    return all(torch.equal(one, two) for both in zip(*calls, strict=True) for one, two in zip(*both, strict=True))


def watch_inputs(
    run: LayerRunner,
    hidden_states: Tensor,
    observed: Mapping[ExpertBank, ObservedBank],
    projections: tuple[str, ...],
    *,
    by_routing: bool,
) -> dict[ExpertBank, dict[str, InputMoments]]:
    """The moments alone."""
    for _ in _watching(run, observed, projections, by_routing):
        run.watch(hidden_states)
    return _moments(run.ranks, observed)


def _watching(
    run: LayerRunner, observed: Mapping[ExpertBank, ObservedBank], projections: tuple[str, ...], by_routing: bool
) -> Iterator[int]:
    """`gathering` of new moments of the inputs of these projections."""
    for module in observed.values():
        module.watch_(*projections, by_routing=by_routing, make=run.statistics.make)
    widths = {module: [module.weights[name].shape[-1] for name in projections] for module in observed.values()}
    return gathering(run, {module: 4 * sum(n * n for n in of_module) for module, of_module in widths.items()})


def gathering(run: LayerRunner, bytes_each: Mapping[ObservedBank, int]) -> Iterator[int]:
    """The passes over the windows that it takes to gather the statistics of all experts, by their numbers; in each the
    `gathered` experts of the banks are those whose turn it is. bytes_each: of the statistics of one expert."""
    groups = {module: run.statistics.groups(module.num_experts, own) for module, own in bytes_each.items()}
    try:
        for number in range(max(map(len, groups.values()), default=1)):
            for module, of_module in groups.items():
                module.gathered = of_module[number] if number < len(of_module) else range(0)
            yield number
    finally:
        for module in groups:
            module.gathered = range(module.num_experts)


class WatchedLinears:
    """Inside the block, sums of x xᵀ over what these Linears are called with, by their paths. Those that are called
    with one and the same tensor, one right after the other, have one sum, which is taken once."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self.linears = linears
        self._first: dict[str, str] = {}  # path -> the first one that has the same inputs
        self._sums: dict[str, Tensor] = {}
        self._tokens: Counter[str] = Counter()
        self._last: tuple[str, Tensor] | None = None
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> WatchedLinears:
        self._hooks = [m.register_forward_pre_hook(partial(self._see, path)) for path, m in self.linears.items()]
        return self

    def __exit__(self, *exception: object) -> None:
        self._last = None
        for hook in self._hooks:
            hook.remove()

    def _see(self, path: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs = arguments[0]
        if path not in self._first:
            same = self._last is not None and self._last[1] is inputs
            self._first[path] = self._last[0] if same and self._last is not None else path
        first = self._first[path]
        self._last = first, inputs
        if first == path:
            tokens = inputs.flatten(0, -2).float()
            if path not in self._sums:
                self._sums[path] = tokens.new_zeros(2 * tokens.shape[1:])
            self._sums[path].addmm_(tokens.T, tokens)
            self._tokens[path] += len(tokens)

    def second_moment(self, path: str, ranks: Ranks) -> Tensor:
        """E[x xᵀ] over the tokens of all ranks, [in_features, in_features] float32; the identity where there were
        none. Every rank asks for the same paths in the same order."""
        weight, first = self.linears[path].weight, self._first.get(path, path)
        identity = torch.eye(weight.shape[1], device=weight.device)
        total = self._sums[first].clone() if first in self._sums else torch.zeros_like(identity)
        tokens = torch.tensor([float(self._tokens[first])], device=weight.device)
        ranks.sum_(total, tokens)
        return total / tokens if tokens else identity


def _moments(ranks: Ranks, observed: Mapping[ExpertBank, ObservedBank]) -> dict[ExpertBank, dict[str, InputMoments]]:
    for module in observed.values():
        ranks.max_(module.peaks)
        for moments in module.moments.values():
            sum_fields_(ranks, moments)
    found = {bank: module.moments for bank, module in observed.items()}
    for module in observed.values():
        module.watch_()  # what is handed over does not change when the layer runs again
    return found
