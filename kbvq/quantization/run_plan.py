"""What a run will do and need, from the config and the headers of the shards alone: the dry run.

Nothing here reads a weight. Bytes follow from shapes; seconds from the shapes and a short measurement of this machine.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from torch import nn

from kbvq.errors import ConfigError
from kbvq.method.dense_matrix import WEIGHTS_AT_A_TIME
from kbvq.method.projection import quantize_projection
from kbvq.method.vector_quantization import CODED_AT_ONCE
from kbvq.models.dense_parts import NOTHING, DenseParts
from kbvq.models.layer_stream import LayerStream
from kbvq.models.moe_adapters import ExpertBank
from kbvq.quantization.block_tuning import TOKENS_PER_STEP
from kbvq.quantization.distillation import TOKENS_OF_LOGITS, trainable_dense, tuning_windows
from kbvq.quantization.progress import format_seconds
from kbvq.recipes import CODES, MAX_BITS, Recipe
from kbvq.storage.checkpoint import check_disk_space
from kbvq.structures import PROJECTIONS, WEIGHT, BankFormat, InputMoments, MatrixFormat

TOKENS_PER_BATCH = 8192
"""Tokens that run through a layer at once during calibration."""

PROBE_BYTES = 1 << 29
"""Memory for the disturbed activations from which the sensitivities are measured."""

PROBE_SHARE = 0.25
"""Most of a run's forward passes that may go into disturbed activations: there are as many of them as projections, and
each walks through all layers behind its own."""

Clock = Callable[[], float]

_PROGRAM = 560 << 20  # what Python, torch and transformers take (eval/memory_benchmark.py, with threads and buffers)
_SPILLED = ("statistics", "factors")  # what of the experts goes to the disk where it is too much for the memory
_CODED_WIDTH = 256  # of the projection on which the time of coding is measured
# At that width next to nothing, at 2048 most of what fast takes: operations of an expert's factorisations by its inputs
# cubed, and of its error feedback and corrections by inputs squared times outputs (eval/speed_benchmark.py).
_FACTORS, _CORRECTIONS = 2, 10
_READ_RATE = 1e9  # bytes per second of a disk, assumed
_READS = 4  # times that the stored weights are read: hash, check, measure, quantize


@dataclass(frozen=True)
class Amount:
    """A number with the parts that it is the sum of."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class RunPlan:
    """model: what it is. num_weights: in the banks. model_weights: in all. bits: true bits per weight of the banks.
    dense_bits: of the matrices outside the banks. dense_weights: how many weights those are that are packed so.
    dense_left: paths of the matrices that stay at 16 bits all the same, and why.
    output_bytes: of the packed checkpoint. source_bytes: of the original.
    memory: bytes at the peak of the busiest layer, on the device that computes; of the whole run. least_memory: what it
    can do with, the statistics of the experts being on the disk. disk: bytes beside the model itself. seconds: by
    stage. statistics_at_once: bytes of the statistics of all experts that are gathered in one pass over the windows;
    not infinite where they are on the disk because the memory is too small for all of them.
    """

    model: str
    num_layers: int
    num_banks: int
    num_experts: int
    num_weights: int
    model_weights: int
    recipe: str
    bits: float
    dense_bits: int
    dense_weights: int
    dense_left: dict[str, str]
    output_bytes: int
    source_bytes: int
    memory: Amount
    least_memory: float
    disk: Amount
    seconds: dict[str, float]
    statistics_at_once: float

    @property
    def model_bits(self) -> float:
        """Bits per weight of the whole model, everything stored."""
        return 8 * self.output_bytes / self.model_weights

    @property
    def spills(self) -> bool:
        """Whether the statistics of the experts are on the disk."""
        return self.statistics_at_once < math.inf

    def lines(self) -> list[str]:
        """For people."""
        dense = []
        if self.dense_bits < 16:
            dense = [f"  dense      {self.dense_weights / 1e9:.2f} billion weights at {self.dense_bits} bits"]
        if self.dense_left:
            reasons = Counter(self.dense_left.values())
            dense += [f"             {count} matrices left at 16 bits: {why}" for why, count in reasons.items()]
        spilled, least = [], []
        if self.least_memory < 0.95 * self.memory.total:
            least = [f"             {_gigabytes(self.least_memory)} with statistics on the disk, by --max-memory"]
        if self.spills:
            spilled = [f"             statistics of the experts there, {_gigabytes(self.statistics_at_once)} at a time"]
        return [
            f"{self.model}: {self.num_layers} layers, recipe {self.recipe}",
            f"  quantized  {self.num_weights / 1e9:.2f} of {self.model_weights / 1e9:.2f} billion weights: "
            f"{self.num_experts} experts in {self.num_banks} banks",
            *dense,
            f"  size       {_gigabytes(self.output_bytes)} after {_gigabytes(self.source_bytes)}; "
            f"{self.bits:.3f} true bits per expert weight, {self.model_bits:.3f} of the whole model",
            f"  memory     {_amount(self.memory)}",
            *least,
            f"  disk       {_amount(self.disk)}",
            *spilled,
            f"  time       about {format_seconds(sum(self.seconds.values()))}: "
            + ", ".join(f"{name} {format_seconds(value)}" for name, value in self.seconds.items()),
        ]

    def check(self, output: Path, *, max_memory: int | None, device: torch.device) -> None:
        """Raises ConfigError or CheckpointError when the memory or the disk cannot do; says what would help."""
        limit = memory_limit(max_memory, device)
        if self.memory.total > limit:
            whose = "this machine has" if max_memory is None else "--max-memory allows"
            statistics = ""
            if self.spills:
                statistics = f", with {_gigabytes(self.disk.parts['statistics'])} of statistics on the disk already"
            elif device.type != "cpu":
                statistics = " (--device cpu keeps the statistics on the disk)"
            raise ConfigError(
                f"{self.model}: the run needs about {_amount(self.memory)} of memory{statistics}, and {whose} "
                f"{_gigabytes(limit)}. Use a machine with more, or another recipe (calibration text takes next to "
                "none, it is on the disk; more processes take as much each); --max-memory SIZE says that so much may "
                "be taken"
            )
        check_disk_space(output, int(self.disk.total))


def make_plan(
    stream: LayerStream,
    formats: Sequence[BankFormat],
    recipe: Recipe,
    *,
    samples: int,
    sequence_length: int,
    parts: DenseParts = NOTHING,
    limit: float = math.inf,
    clock: Clock = time.perf_counter,
) -> RunPlan:
    """The plan of a run with so many calibration windows. formats: of the recipe; with a budget the largest ones.
    parts: what is packed outside the banks. limit: bytes of memory; when the statistics of all experts do not fit, they
    go to the disk, if the run computes on the CPU. clock: by which this machine is measured."""
    banks, config = stream.banks, stream.text_config
    num_weights = sum(_num_weights(bank) for bank in banks)
    packed = sum(getattr(f, p).num_bytes for f in formats for p in PROJECTIONS)
    if recipe.budget:
        packed = min(packed, int(recipe.bits * num_weights / 8))
    dense_weights = sum(format.weight.num_weights for format in parts.formats)
    output = stream.dense_bytes + packed
    output += sum(format.weight.num_bytes - stream.written_bytes(f"{format.path}.{WEIGHT}") for format in parts.formats)
    of_window = sequence_length * stream.stream_width * stream.dtype.itemsize
    activations, tuning = samples * of_window, tuning_windows(recipe, samples, sequence_length) * of_window
    moments = _moments_of_run(stream, recipe, samples, sequence_length, parts)
    memory, on_disk, at_once = _most(moments), 0.0, math.inf
    spilled = _spilled(stream, moments, limit)
    on_cpu = stream.device.type == "cpu"
    if on_cpu and memory.total > limit:
        memory, on_disk, at_once = spilled
    return RunPlan(
        model=f"{type(stream.model).__name__} ({config.model_type})",
        num_layers=stream.num_layers,
        num_banks=len(banks),
        num_experts=sum(bank.num_experts for bank in banks),
        num_weights=num_weights,
        model_weights=sum(p.numel() for p in stream.model.parameters()),
        recipe=recipe.name,
        bits=8 * packed / num_weights,
        dense_bits=recipe.dense_bits,
        dense_weights=dense_weights,
        dense_left=parts.left,
        output_bytes=output,
        source_bytes=stream.source_bytes,
        memory=memory,
        least_memory=min(memory.total, spilled[0].total if on_cpu else math.inf),
        disk=Amount(
            {
                "output": output,
                # Both sets of activations before a layer and behind it, and the inputs that a bank is matched to; in
                # the first pass one and the embeddings.
                "activations": (5 if recipe.matching else 4) * activations,
                "disturbed activations": 2 * disturbed_bytes(stream, samples, sequence_length) if recipe.budget else 0,
                "activations for tuning": 2 * tuning,
                "banks until they are tuned": packed if recipe.distillation_steps else 0,
                "moments of Adam": 8 * sum(_trained(stream, recipe)) if on_cpu else 0,
                "statistics": on_disk,
            }
        ),
        seconds=_seconds(stream, recipe, samples * sequence_length, parts, at_once, clock),
        statistics_at_once=at_once,
    )


def probed_windows(stream: LayerStream, samples: int, sequence_length: int) -> int:
    """Windows whose disturbed activations are kept for every projection: as many as fit and are worth their time, and
    one at least."""
    in_memory = PROBE_BYTES // _disturbed_bytes_per_window(stream, sequence_length)
    # A window is walked through each layer about four times, and disturbed at two rates by two projections of each bank
    # through half of the layers.
    in_time = int(PROBE_SHARE * samples * 4 / (4 * len(stream.banks) / 2))
    return max(1, min(TOKENS_PER_BATCH // sequence_length, samples, in_memory, in_time))


def disturbed_bytes(stream: LayerStream, samples: int, sequence_length: int) -> int:
    return probed_windows(stream, samples, sequence_length) * _disturbed_bytes_per_window(stream, sequence_length)


def _disturbed_bytes_per_window(stream: LayerStream, sequence_length: int) -> int:
    """A copy of the activations for both projections of every bank at both rates that are probed."""
    return 4 * len(stream.banks) * sequence_length * stream.stream_width * stream.dtype.itemsize


def _moments_of_run(
    stream: LayerStream, recipe: Recipe, samples: int, sequence_length: int, parts: DenseParts
) -> list[dict[str, float]]:
    """What is in memory at the moments of a run that may need most, in bytes by what holds it.

    Activations are mapped from the disk and not counted, but for the batch that runs.
    """
    disturbed = disturbed_bytes(stream, samples, sequence_length) if recipe.budget else 0
    moments = [phase for i in range(stream.num_layers) for phase in _layer_moments(stream, recipe, i, disturbed, parts)]
    if ends := parts.ends:
        weights = sum(format.weight.num_weights for format in ends)
        size = stream.dtype.itemsize
        moments.append({"embedding and head": 3 * size * weights, "matrices": _dense_bytes(ends)})
    if recipe.distillation_steps:
        tuned = _tuning_bytes(stream, recipe, sequence_length)
        if inside := parts.inside:
            tuned["matrices"] = _dense_bytes(inside)
        moments.append(tuned)
    return moments


def _most(moments: Sequence[dict[str, float]]) -> Amount:
    return Amount({"program": _PROGRAM} | max(moments, key=lambda held: sum(held.values())))


def _spilled(stream: LayerStream, moments: Sequence[dict[str, float]], limit: float) -> tuple[Amount, float, float]:
    """Memory and disk that are needed with the statistics of all experts on the disk but for those of one, and how many
    bytes of them there may be in memory within the limit, or within what is needed if that is more."""
    one = max(_gathered_bytes(bank) // bank.num_experts for bank in stream.banks)
    rest = [{name: size for name, size in held.items() if name not in _SPILLED} for held in moments]
    memory = _most([held | {"statistics": one} for held in rest])
    # While they are gathered there is nothing beside them but what runs.
    running = ("layer", "batch", "disturbed activations")
    at_once = max(limit, memory.total) - _PROGRAM - max(sum(held.get(name, 0) for name in running) for held in moments)
    on_disk = max(sum(held.get(name, 0) for name in _SPILLED) for held in moments)
    return memory, on_disk, max(at_once, one)


def _layer_moments(
    stream: LayerStream, recipe: Recipe, index: int, disturbed: int, parts: DenseParts
) -> list[dict[str, float]]:
    """What is in memory at the moments of a decoder layer's work that may need most (sensitivity, layer_quantization),
    in bytes by what holds it."""
    size, width = stream.dtype.itemsize, stream.stream_width
    layer = stream.model.get_submodule(stream.layers_path)[index]
    banks = [bank for bank in stream.banks if bank.decoder_layer == index]
    weights = sum(_num_weights(bank) for bank in banks)
    used = _used_width(stream, banks)
    held: dict[str, float] = {
        # As read, and a copy: with the channels of each expert in order while they are sorted, then as decoded.
        "layer": size * (sum(p.numel() for p in layer.parameters()) + weights),
        # Inputs and outputs of the layer's parts, and what each expert that a token meets is given and gives.
        "batch": 4 * TOKENS_PER_BATCH * (8 * width + used),
    }
    of = {p: [_moment_bytes(bank, p) for bank in banks] for p in PROJECTIONS}
    matched = recipe.matching and index > 0  # in the first layer of a model the inputs are the original's
    found: list[dict[str, float]] = []
    if recipe.budget and banks:
        both = sum(map(sum, of.values()))
        probe = held | {"disturbed activations": disturbed}
        found.append(probe | {"statistics": both})
        found += [
            probe
            | {
                "statistics": both,
                "factors": _moment_bytes(bank, p),
                "noise": 4 * 2 * _size(bank, p) + 8 * 6 * bank.projection_shape(p)[2] ** 2,
            }
            for bank in banks
            for p in PROJECTIONS
        ]
    # Of the original: of both projections where its inputs are those of the student, else those of down.
    teacher = sum(of["down_proj"]) + (0 if matched else sum(of["gate_up_proj"]))
    if recipe.matching:
        found.append(held | {"statistics": teacher, "attention": _attention_bytes(layer, width, banks)})
    if matrices := parts.of_layer(index):
        found.append(held | {"statistics": teacher, "matrices": _dense_bytes(matrices)})
    for projection in PROJECTIONS:
        statistics = sum(of[projection]) + (0 if recipe.matching else teacher)
        paired = [4 * bank.num_experts * bank.hidden_size * bank.projection_shape(projection)[2] for bank in banks]
        goals = recipe.matching and (matched or projection == "down_proj")
        for place, bank in enumerate(banks):
            copies = 4 * _size(bank, projection)
            of_tier = copies if recipe.expert_rates and recipe.budget and bank.num_experts > 1 else 0
            if goals:  # the bank's, and for gate and up what they would give for the inputs that are wanted
                n, outputs = bank.projection_shape(projection)[2], bank.projection_shape(projection)[1]
                targets = copies * (2 if projection == "gate_up_proj" else 1) + 8 * 3 * n * (n + outputs)
                found.append(held | {"statistics": statistics + sum(paired[place:]), "goals": targets})
            found.append(
                held
                | {
                    "statistics": statistics + goals * sum(paired[place + 1 :]),
                    "goals": goals * copies,
                    "factors": _moment_bytes(bank, projection) if recipe.error_feedback else 0,
                    "coding": _coding_bytes(bank, projection, recipe) + (0 if goals else copies) + of_tier,
                }
            )
    return found or [held]


def _used_width(stream: LayerStream, banks: Sequence[ExpertBank]) -> int:
    """Channels between and behind the projections of the experts that a token meets in these banks."""
    top_k = getattr(stream.text_config, "num_experts_per_tok", None) or 2
    return sum((top_k if b.kind == "routed" else 1) * (b.intermediate_size + b.hidden_size) for b in banks)


def _attention_bytes(layer: nn.Module, width: int, banks: Sequence[ExpertBank]) -> float:
    """Memory while the output projection of the layer's attention is fitted (attention_matching); which of the linear
    maps that is turns out when the layer runs: bounded by the widest."""
    inside = tuple(bank.path.partition(f".{bank.decoder_layer}.")[2] for bank in banks)
    candidates = [
        module.in_features
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == width and not name.startswith(inside)
    ]
    widest = max(candidates, default=0)
    sums, solved = 4 * widest * (widest + width), 8 * 3 * widest * (widest + width)
    return sums + solved + 4 * TOKENS_PER_BATCH * width * len(candidates)


def memory_limit(max_memory: int | None, device: torch.device) -> int:
    """Bytes that a run may take: what it was given, else what there is."""
    return available_memory(device) if max_memory is None else max_memory


def available_memory(device: torch.device) -> int:
    """Bytes that a run can have there: free ones, and those that the system would give up."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if sys.platform == "linux":
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(1024 * int(fields["MemAvailable"].split()[0]))
        group = Path("/sys/fs/cgroup/memory.max")
        if group.exists() and (text := group.read_text().strip()) != "max":
            limits.append(int(text))
    return min(limits)


def _num_weights(bank: ExpertBank) -> int:
    return sum(_size(bank, projection) for projection in PROJECTIONS)


def _size(bank: ExpertBank, projection: str) -> int:
    return prod(bank.projection_shape(projection))


def _moment_bytes(bank: ExpertBank, projection: str) -> int:
    """Of the second moments of its inputs, in float32."""
    experts, _, inputs = bank.projection_shape(projection)
    return 4 * experts * inputs * inputs


def _coding_bytes(bank: ExpertBank, projection: str, recipe: Recipe) -> int:
    """Memory while a projection is coded, beside its weights in float32, its statistics and their factors."""
    experts, outputs, inputs = bank.projection_shape(projection)
    copy, has_basis = 4 * experts * outputs * inputs, max(recipe.ranks(inputs)) > 0
    # Scaled, in coding order and the errors, of the experts that are coded together.
    together = 3 * max(4 * outputs * inputs, min(copy, 4 * CODED_AT_ONCE))
    if recipe.codebook != "trellis":
        together += (
            2 * copy
        )  # scaled; later indices of 8 bytes for every vector, and once more as they are put together
    # Without the shared basis; of that once more while it is replaced by the one as stored.
    copies = max(3 * copy * has_basis, copy * has_basis + together)
    # One expert's factor is made in float64, and the moment and the factor are there in float32 too.
    return copies + 8 * 4 * inputs**2


def _gathered_bytes(bank: ExpertBank) -> int:
    """Statistics of all experts that are gathered together, at most: of both projections, or of one with what it is to
    give."""
    alone = [_moment_bytes(bank, projection) for projection in PROJECTIONS]
    wanted = [4 * bank.num_experts * bank.hidden_size * bank.projection_shape(p)[2] for p in PROJECTIONS]
    return max(sum(alone), *map(sum, zip(alone, wanted, strict=True)))


def _dense_bytes(matrices: Sequence[MatrixFormat]) -> int:
    """Memory for the statistics of these matrices, and while one of them is coded, beside its weights."""
    widest = max(format.weight.in_features for format in matrices)
    largest = max(format.weight.num_weights for format in matrices)
    statistics = sum(4 * format.weight.in_features**2 for format in matrices)
    # Scaled, in coding order, the errors, two decoded forms and products with them, and indices of 8 bytes.
    return statistics + 24 * widest**2 + 4 * 10 * min(largest, WEIGHTS_AT_A_TIME) + largest


def _tuning_bytes(stream: LayerStream, recipe: Recipe, sequence_length: int) -> dict[str, float]:
    """End-to-end tuning has the dense part of the model in memory, and what its docstring says. On a CPU Adam's moments
    and the packed codes of a trellis are mapped from the disk and not counted."""
    num_weights = sum(_num_weights(bank) for bank in stream.banks)
    others = sum(p.numel() for p in stream.model.parameters()) - num_weights
    largest = max(_num_weights(bank) for bank in stream.banks)
    trained = _trained(stream, recipe)
    tokens = max(TOKENS_PER_STEP, sequence_length)
    layers = {bank.decoder_layer for bank in stream.banks}
    used = max(_used_width(stream, [bank for bank in stream.banks if bank.decoder_layer == i]) for i in layers)
    on_disk = stream.device.type == "cpu"
    # A table has an index of 4 bytes for every vector.
    codes = num_weights * 1.0
    if recipe.codebook == "trellis":
        codes = 0.0 if on_disk else num_weights * (recipe.bits if recipe.budget else MAX_BITS) / 8
    return {
        "dense weights": (others - sum(trained)) * stream.dtype.itemsize,
        "tuned weights": 4 * sum(trained) + 4 * max(trained, default=0),
        "moments of Adam": 0 if on_disk else 8 * sum(trained),
        "codes of all banks": codes,
        "decoded layer and its gradients": 12 * largest,
        # The inputs of all layers, what one of them keeps for its backward pass, and the gradients of that.
        "activations": 4 * tokens * (stream.stream_width * (stream.num_layers + 32) + 6 * used),
        # Of both models, their logarithms and what their gradients take.
        "logits": 4 * 6 * TOKENS_OF_LOGITS * stream.text_config.vocab_size,
    }


def _trained(stream: LayerStream, recipe: Recipe) -> list[int]:
    """Elements of each dense parameter that end-to-end tuning trains."""
    if not recipe.distillation_steps or not recipe.dense_rate:
        return []
    found = trainable_dense(stream.model, stream.layers_path, [bank.path for bank in stream.banks])
    return [parameter.numel() for parameter in found.values()]


@dataclass(frozen=True)
class Speed:
    """Of this machine. flops: per second, of a product of matrices. per_weight: seconds to code a weight."""

    flops: float
    per_weight: float


def machine_speed(recipe: Recipe, device: torch.device, clock: Clock = time.perf_counter) -> Speed:
    """Measured in about a second."""
    return Speed(_flops(device, clock), _coding_seconds(recipe, device, clock))


@lru_cache
def _flops(device: torch.device, clock: Clock, size: int = 768) -> float:
    matrix = torch.rand(size, size, device=device)
    return 2 * size**3 / _best_seconds(lambda: (matrix @ matrix)[0, 0].item(), clock)


@lru_cache
def _coding_seconds(recipe: Recipe, device: torch.device, clock: Clock) -> float:
    """Seconds for one weight more: what two projections take of which one has more experts. Codebooks are trained on a
    sample, whose time both have, and compiled code is built before either is timed."""
    few, many = 2, 6
    _code_random(recipe, device, 1)
    times = {
        experts: _best_seconds(lambda n=experts: _code_random(recipe, device, n), clock, times=1)
        for experts in (few, many)
    }
    return max(times[many] - times[few], 0.1 * times[many]) / ((many - few) * _CODED_WIDTH**2)


def _code_random(recipe: Recipe, device: torch.device, experts: int) -> None:
    """Quantize random weights for random inputs."""
    generator = torch.Generator().manual_seed(0)
    size = _CODED_WIDTH
    weights, inputs = (torch.randn(experts, size, size, generator=generator).to(device) for _ in range(2))
    moments = InputMoments.zeros(experts, size, device)
    for expert in range(experts):
        moments.add_(expert, inputs[expert], torch.ones(size, device=device))
    bits = None if not recipe.budget else min(CODES[recipe.codebook], key=lambda rate: abs(rate - recipe.bits))
    format = recipe.projection_format(experts, size, size, bits=bits)
    quantize_projection(weights, moments, moments, format, recipe, seed=0)


def _best_seconds(work: Callable[[], object], clock: Clock, times: int = 3) -> float:
    best = float("inf")
    for _ in range(times):
        started = clock()
        work()
        best = min(best, clock() - started)
    return best


def _seconds(
    stream: LayerStream, recipe: Recipe, tokens: int, parts: DenseParts, statistics_at_once: float, clock: Clock
) -> dict[str, float]:
    """By stage, from the products that a token takes part in and the weights that are coded."""
    speed = machine_speed(recipe, stream.device, clock)
    config = stream.text_config
    top_k = getattr(config, "num_experts_per_tok", 2)
    dense = sum(p.numel() for p in stream.model.get_submodule(stream.layers_path).parameters())
    dense -= sum(_num_weights(bank) for bank in stream.banks)
    forward = moments = 0
    for bank in stream.banks:
        used = top_k if bank.kind == "routed" else 1
        forward += 2 * used * _num_weights(bank) // bank.num_experts
        moments += 2 * used * (bank.hidden_size**2 + bank.intermediate_size**2)
    forward += 2 * dense
    passes = 4 if recipe.error_feedback or recipe.bcos else 3  # teacher, student before gate/up, before down, behind
    passes += recipe.matching  # the experts of the original on the inputs of the student's tokens
    passes += bool(parts.formats)  # to see the inputs of the matrices
    gathered = max((_gathered_bytes(bank) for bank in stream.banks), default=0)
    more_passes = math.ceil(max(gathered / statistics_at_once, 1)) - 1  # each for another group of experts
    passes += 3 * more_passes
    watched = 2.0 if recipe.matching else 1.5  # the teacher's moments, and the student's of each projection: once more
    seconds = {"preparing": _READS / 2 * stream.source_bytes / _READ_RATE}
    reading = stream.source_bytes / _READ_RATE
    if recipe.budget:
        seconds["measuring layer"] = tokens * ((1 + more_passes) * forward + moments) / speed.flops + reading
    wide = 0.0
    if recipe.error_feedback:
        shapes = [bank.projection_shape(projection) for bank in stream.banks for projection in PROJECTIONS]
        wide = sum(experts * n**2 * (_FACTORS * n + _CORRECTIONS * outputs) for experts, outputs, n in shapes)
    seconds["quantizing layer"] = (
        (tokens * (passes * forward + watched * moments) + wide) / speed.flops
        + speed.per_weight * sum(_num_weights(bank) for bank in stream.banks)
        + speed.per_weight * sum(format.weight.num_weights for format in parts.formats)  # about as fast
        + reading
    )
    if recipe.distillation_steps:
        steps = recipe.distillation_steps * 2048
        seconds["distilling"] = steps * 4 * forward / speed.flops
    return seconds


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes < 1e11 else f"{num_bytes / 1e9:,.0f} GB"


def _amount(amount: Amount) -> str:
    parts = [f"{name} {_gigabytes(value)}" for name, value in amount.parts.items() if value]
    return f"{_gigabytes(amount.total)} ({', '.join(parts)})"
