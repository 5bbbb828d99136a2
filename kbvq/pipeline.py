"""The layer loop: from a model folder and calibration text to a packed checkpoint.

One decoder layer is in memory at a time. Two sets of activations walk through the model side by side: the teacher's,
by the original weights, and the student's, by the layers quantized so far, so that each layer is quantized for the
inputs it will really see and corrected toward the outputs it should have had.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

import kbvq_kernels
from kbvq.block_tuning import windows_per_step
from kbvq.calibration import LayerRunner
from kbvq.calibration_text import calibration_windows, load_texts
from kbvq.checkpoint import FORMAT_VERSION, PackedCheckpointWriter, check_disk_space
from kbvq.errors import ConfigError
from kbvq.layer_quantization import quantize_layer
from kbvq.layer_stream import LayerStream, resolve_model_folder
from kbvq.moe_adapters import ExpertBank
from kbvq.recipes import Recipe
from kbvq.structures import PROJECTIONS, BankFormat, ProjectionFormat

logger = logging.getLogger("kbvq")

TOKENS_PER_BATCH = 8192
"""Tokens that run through a layer at once during calibration."""


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
    formats = [planned_bank(bank, options.recipe, stream.config.hidden_act) for bank in stream.banks]
    writer = PackedCheckpointWriter(options.output, overwrite=options.overwrite)
    check_disk_space(options.output.parent, _output_bytes(stream, formats))
    token_ids = _calibration_windows(options, stream, folder)
    stream.check_finite()

    windows = _Windows(stream, token_ids)
    teacher = student = windows.embedded
    layers: list[dict[str, object]] = []
    seconds: list[float] = []
    writer.add_shard(stream.outer_tensors())
    for index in tqdm(range(stream.num_layers), desc="quantizing", unit="layer", disable=None):
        layer_started = time.perf_counter()
        with stream.layer(index) as layer:
            result = quantize_layer(
                layer,
                f"{stream.layers_path}.{index}",
                [bank for bank in stream.banks if bank.decoder_layer == index],
                options.recipe,
                run=windows.runner(layer, index),
                teacher=teacher,
                student=student,
                seed=options.seed,
            )
        teacher, student = result.teacher, result.student
        tensors = stream.layer_tensors(index)
        for bank in result.banks:
            tensors |= bank.state_dict()
        writer.add_shard(tensors)
        layers.append({"layer": index, "output_error": _relative_error(student, teacher), "banks": result.reports})
        seconds.append(time.perf_counter() - layer_started)
        _log_layer(layers[-1], seconds[-1])

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


def planned_bank(bank: ExpertBank, recipe: Recipe, activation: str) -> BankFormat:
    """How a bank will be stored under a recipe. Raises ConfigError, naming the bank, when it cannot be stored, or when
    no kernel would serve it. activation: its name in the model's config."""

    def projection(out_features: int, in_features: int) -> ProjectionFormat:
        try:
            format = recipe.projection_format(bank.num_experts, out_features, in_features)
        except ConfigError as error:
            raise ConfigError(f"{bank.path}: {error}") from error
        if reason := kbvq_kernels.supports(**format.to_dict(), activation=activation):
            raise ConfigError(f"{bank.path}: the kernels cannot serve it: {reason}")
        return format

    return BankFormat(
        bank.path,
        bank.kind,
        gate_up_proj=projection(2 * bank.intermediate_size, bank.hidden_size),
        down_proj=projection(bank.hidden_size, bank.intermediate_size),
    )


class _Windows:
    """The calibration windows on their way through the model, a batch at a time."""

    def __init__(self, stream: LayerStream, token_ids: Tensor) -> None:
        self.stream = stream
        self.batch_size = max(1, TOKENS_PER_BATCH // token_ids.shape[1])
        self.layer_kwargs: dict[int, list[dict]] = {}  # by rows of the batch: the last one may have fewer
        # Tuning takes fewer windows at a time; like the last batch, those need arguments of their own.
        tuned = token_ids[: windows_per_step(token_ids.shape[1], len(token_ids))]
        self.layer_kwargs[len(tuned)] = stream.layer_inputs(tuned)[1]
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
