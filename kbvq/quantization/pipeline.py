"""The layer loop: from a model folder and calibration text to a packed checkpoint.

One decoder layer is in memory at a time. Two sets of activations walk through the model side by side: the teacher's,
by the original weights, and the student's, by the layers quantized so far, so that each layer is quantized for the
inputs it will really see and corrected toward the outputs it should have had.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

from kbvq.errors import ConfigError
from kbvq.models.calibration import LayerRunner
from kbvq.models.calibration_text import calibration_windows, load_texts
from kbvq.models.layer_stream import LayerStream, resolve_model_folder
from kbvq.models.moe_adapters import ExpertBank
from kbvq.quantization.block_tuning import windows_per_step
from kbvq.quantization.distillation import distill
from kbvq.quantization.layer_quantization import quantize_layer
from kbvq.quantization.planning import BudgetPlan, budget_plan, check_budget, uniform_plan
from kbvq.quantization.sensitivity import Sensitivity, Site, divergence, probe_layer
from kbvq.recipes import Recipe
from kbvq.storage.checkpoint import FORMAT_VERSION, PackedCheckpointWriter, check_disk_space
from kbvq.structures import PROJECTIONS, BankFormat, PackedBank

logger = logging.getLogger("kbvq")

TOKENS_PER_BATCH = 8192
"""Tokens that run through a layer at once during calibration."""

PROBE_BYTES = 1 << 28
"""Memory for the disturbed activations from which the sensitivities are measured."""


@dataclass(frozen=True)
class QuantizeOptions:
    """What a run was asked to do.

    calibration: text file, folder or hub data set (see calibration_text). sequence_length: tokens per window, None for
    the smaller of 2048 and what the model takes. device: "cpu", "cuda", "cuda:1", …; None for cuda where there is one.
    """

    model: str
    output: Path
    calibration: str
    recipe: Recipe
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0
    device: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"--samples {self.samples}: at least one calibration window is needed")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise ConfigError(f"--sequence-length {self.sequence_length}: at least 2 tokens are needed")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"--seed {self.seed}: must be from 0 to 2147483647")


def quantize_model(options: QuantizeOptions, *, kbvq_version: str) -> dict[str, object]:
    """Quantize the experts of a checkpoint and write the packed one to `options.output`.

    Everything that can be refused is refused before the first layer is read. The output appears whole or not at all.
    Returns the record of the run, as written beside the checkpoint.
    Raises KbvqError subclasses; see the functions called.
    """
    started = time.perf_counter()
    device = _device(options.device)
    folder = resolve_model_folder(options.model)
    stream = LayerStream(folder, dtype=_compute_dtype(device), device=device)
    plan = check_budget if options.recipe.budget else uniform_plan
    formats = plan(stream.banks, options.recipe, stream.config.hidden_act)
    writer = PackedCheckpointWriter(options.output, overwrite=options.overwrite)
    check_disk_space(options.output.parent, _output_bytes(stream, formats))
    token_ids = _calibration_windows(options, stream, folder)
    stream.check_finite()

    windows = _Windows(stream, token_ids)
    budget: BudgetPlan | None = None
    if options.recipe.budget:
        budget = _plan_within_budget(stream, windows, options)
        formats = budget.formats
    teacher = student = windows.embedded
    layers: list[dict[str, object]] = []
    seconds: list[float] = []
    writer.add_shard(stream.outer_tensors())
    waiting: list[PackedBank] = []  # for end-to-end tuning, after which alone they can be written
    for index in tqdm(range(stream.num_layers), desc="quantizing", unit="layer", disable=None):
        layer_started = time.perf_counter()
        with stream.layer(index) as layer:
            result = quantize_layer(
                layer,
                f"{stream.layers_path}.{index}",
                {
                    bank: format
                    for bank, format in zip(stream.banks, formats, strict=True)
                    if bank.decoder_layer == index
                },
                options.recipe,
                run=windows.runner(layer, index),
                teacher=teacher,
                student=student,
                seed=options.seed,
            )
        teacher, student = result.teacher, result.student
        if options.recipe.distillation_steps:
            waiting += result.banks
        else:
            _write_layer(writer, stream, index, result.banks)
        layers.append({"layer": index, "output_error": _relative_error(student, teacher), "banks": result.reports})
        seconds.append(time.perf_counter() - layer_started)
        _log_layer(layers[-1], seconds[-1])
    if options.recipe.distillation_steps:
        waiting = distill(stream, waiting, token_ids, teacher, options.recipe, seed=options.seed)
        owner = {bank.path: bank.decoder_layer for bank in stream.banks}
        for index in range(stream.num_layers):
            _write_layer(writer, stream, index, [bank for bank in waiting if owner[bank.path] == index])

    num_weights = sum(getattr(f, p).num_weights for f in formats for p in PROJECTIONS)
    bits = 8 * sum(getattr(f, p).num_bytes for f in formats for p in PROJECTIONS) / num_weights
    code_bits = 8 * sum(getattr(f, p).code_bytes for f in formats for p in PROJECTIONS) / num_weights
    record: dict[str, object] = {
        "recipe": options.recipe.to_dict(),
        "calibration": {
            "source": Path(options.calibration).name,
            "samples": len(token_ids),
            "sequence_length": token_ids.shape[1],
            "seed": options.seed,
        },
        "compute_dtype": str(stream.dtype).removeprefix("torch."),
        "bits_per_weight": bits,
        "code_bits": code_bits,
        "experts_with_few_tokens": _few_tokens(layers, options.recipe.few_tokens),
        "layers": layers,
    }
    if budget is not None:
        record["budget"] = budget.record
    writer.finish(
        config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
        banks=formats,
        source_folder=folder,
        quantization_config={
            "quant_method": "kbvq",
            "format_version": FORMAT_VERSION,
            "kbvq_version": kbvq_version,
            "recipe": options.recipe.to_dict(),
            "bits_per_weight": bits,
            "code_bits": code_bits,
            "banks": [bank.to_dict() for bank in formats],
        },
        run_record=record,
        timing={"total_seconds": time.perf_counter() - started, "layer_seconds": seconds, "device": str(device)},
    )
    return record


def _write_layer(writer: PackedCheckpointWriter, stream: LayerStream, index: int, banks: list[PackedBank]) -> None:
    """One shard with a decoder layer: its tensors as stored, and its packed banks."""
    tensors = stream.layer_tensors(index)
    for bank in banks:
        tensors |= bank.state_dict()
    writer.add_shard(tensors)


def _plan_within_budget(stream: LayerStream, windows: _Windows, options: QuantizeOptions) -> BudgetPlan:
    """Walk through the original model once, to measure how sensitive its predictions are to errors in each
    projection."""
    recipe, hidden_states = options.recipe, windows.embedded
    disturbed: dict[Site, Tensor] = {}
    growth: dict[Site, dict[tuple[int, int], float]] = {}
    bias_shares: dict[Site, float] = {}
    peaks: dict[ExpertBank, Tensor] = {}
    for index in tqdm(range(stream.num_layers), desc="measuring", unit="layer", disable=None):
        with stream.layer(index) as layer, torch.no_grad():
            probe = probe_layer(
                layer,
                f"{stream.layers_path}.{index}",
                [bank for bank in stream.banks if bank.decoder_layer == index],
                recipe,
                run=windows.runner(layer, index),
                inputs=hidden_states,
                disturbed=disturbed,
                num_probed=windows.num_probed,
                bits=round(recipe.bits),
                seed=options.seed + index,
            )
        hidden_states = probe.outputs
        growth |= probe.growth
        bias_shares |= probe.bias_shares
        peaks |= probe.peaks
    reference = hidden_states[: windows.num_probed]
    with stream.head(), torch.no_grad():
        sensitivities = {
            site: Sensitivity(divergence(stream.logits, reference, states), growth[site], bias_shares[site])
            for site, states in disturbed.items()
        }
    plan = budget_plan(stream.banks, recipe, stream.config.hidden_act, sensitivities, peaks)
    rows = plan.record["projections"]
    counts = Counter(row["code_bits"] for row in rows)  # type: ignore[attr-defined]
    logger.info("code bits: %s", ", ".join(f"{n} projections with {bits}" for bits, n in sorted(counts.items())))
    return plan


class _Windows:
    """The calibration windows on their way through the model, a batch at a time."""

    def __init__(self, stream: LayerStream, token_ids: Tensor) -> None:
        self.stream = stream
        self.batch_size = max(1, TOKENS_PER_BATCH // token_ids.shape[1])
        self.layer_kwargs: dict[int, list[dict]] = {}  # by rows of the batch: the last one may have fewer
        # Tuning takes fewer windows at a time; like the last batch, those need arguments of their own.
        tuned = token_ids[: windows_per_step(token_ids.shape[1], len(token_ids))]
        self.layer_kwargs[len(tuned)] = stream.layer_inputs(tuned)[1]
        # So are the windows that are probed: the activations of all projections are kept for them (sensitivity).
        copies = 2 * len(stream.banks) * token_ids.shape[1] * stream.config.hidden_size * stream.dtype.itemsize
        self.num_probed = max(1, min(self.batch_size, len(token_ids), PROBE_BYTES // copies))
        self.layer_kwargs[self.num_probed] = stream.layer_inputs(token_ids[: self.num_probed])[1]
        batches = []
        for batch in token_ids.split(self.batch_size):
            hidden_states, self.layer_kwargs[len(batch)] = stream.layer_inputs(batch)
            batches.append(hidden_states.cpu())
        self.embedded = torch.cat(batches)

    def runner(self, layer: nn.Module, index: int) -> LayerRunner:
        """Decoder layer `index` as a function of the activations of all windows."""
        return LayerRunner(
            layer,
            lambda rows: self.layer_kwargs[rows][index],
            batch_size=self.batch_size,
            device=self.stream.device,
        )


def _device(name: str | None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
    return device


def _compute_dtype(device: torch.device) -> torch.dtype:
    """Activations and layer weights during calibration: bfloat16 on a GPU, float32 on a CPU, where it is no slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _output_bytes(stream: LayerStream, formats: list[BankFormat]) -> int:
    """Upper estimate of the packed checkpoint: what is not quantized as it was, and the packed banks."""
    packed = sum(getattr(f, p).num_bytes for f in formats for p in PROJECTIONS)
    replaced = sum(getattr(f, p).num_weights for f in formats for p in PROJECTIONS) * stream.source_dtype.itemsize
    return stream.source_bytes - replaced + packed + (16 << 20)


def _calibration_windows(options: QuantizeOptions, stream: LayerStream, folder: Path) -> Tensor:
    longest = getattr(stream.config, "max_position_embeddings", 2048)
    length = options.sequence_length or min(2048, longest)
    if length > longest:
        raise ConfigError(f"--sequence-length {length}: the model takes at most {longest} tokens")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # 16 characters a token is more than any tokenizer needs: enough text to draw from, without reading on for hours.
    texts = load_texts(options.calibration, max_characters=16 * options.samples * length)
    return calibration_windows(
        texts,
        tokenizer,
        samples=options.samples,
        sequence_length=length,
        seed=options.seed,
        vocab_size=stream.config.vocab_size,
    )


def _relative_error(student: Tensor, teacher: Tensor) -> float:
    """Σ (student − teacher)² / Σ teacher² of a layer's outputs."""
    pairs = zip(student, teacher, strict=True)
    error = sum(float((s.float() - t.float()).square().sum()) for s, t in pairs)
    return error / sum(float(t.float().square().sum()) for t in teacher)


def _few_tokens(layers: list[dict], floor: int) -> dict[str, list[int]]:
    """Experts with fewer calibration tokens than `floor`, by bank, after a warning."""
    few = {
        report["path"]: [expert for expert, count in enumerate(report["tokens"]) if count < floor]
        for layer in layers
        for report in layer["banks"]
    }
    few = {path: experts for path, experts in few.items() if experts}
    if few:
        logger.warning(
            "%d experts saw fewer than %d calibration tokens: their moments were shrunk toward those of all experts of "
            "their layer. More --samples would help; kbvq_run.json lists them.",
            sum(map(len, few.values())),
            floor,
        )
    return few


def _log_layer(layer: dict, seconds: float) -> None:
    parts = [
        f"{report['path'].rpartition('.')[2]}.{projection} error {report[projection]['relative_error']:.4f} "
        f"(+{report[projection]['bits_above_limit']:.2f} bits)"
        for report in layer["banks"]
        for projection in PROJECTIONS
    ]
    logger.info(
        "layer %d: output error %.5f; %s; %.1f s", layer["layer"], layer["output_error"], ", ".join(parts), seconds
    )
