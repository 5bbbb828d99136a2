"""A run: from a model folder and calibration text to a packed checkpoint, in stages that can be interrupted anywhere.

One decoder layer is in memory at a time. Two sets of activations walk through the model side by side: the teacher's,
by the original weights, and the student's, by the layers quantized so far, so that each layer is quantized for the
inputs it will really see and corrected toward the outputs it should have had.

What is done to a layer is elsewhere (sensitivity, layer_quantization, distillation): functions of a layer, activations
and statistics. Here is what they get and where their results go; `stages` has the loop, and says how to add a pass.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from kbvq.errors import ConfigError
from kbvq.models.calibration import ActivationStore, LayerRunner, StatisticsStore, WatchedLinears
from kbvq.models.calibration_text import calibration_windows, load_texts
from kbvq.models.dense_parts import NOTHING, DenseParts, find_dense_parts
from kbvq.models.devices import choose_device
from kbvq.models.layer_stream import LayerStream, resolve_model_folder
from kbvq.models.model_headers import model_headers
from kbvq.models.moe_adapters import ExpertBank
from kbvq.models.ranks import ONE, Ranks, join_ranks
from kbvq.quantization.block_tuning import windows_per_step
from kbvq.quantization.dense import decoded, pack_matrix, pack_whole_, tied_moment
from kbvq.quantization.distillation import distill, tuning_windows
from kbvq.quantization.fingerprint import run_fingerprint
from kbvq.quantization.layer_quantization import quantize_layer
from kbvq.quantization.planning import budget_plan, check_budget, uniform_plan
from kbvq.quantization.run_plan import TOKENS_PER_BATCH, RunPlan, make_plan, memory_limit, probed_windows
from kbvq.quantization.sensitivity import Energies, Sensitivity, divergences, probe_layer, probed_rates
from kbvq.quantization.stages import Carry, Stage, Step, run_stages
from kbvq.recipes import Recipe
from kbvq.storage.checkpoint import (
    FORMAT_VERSION,
    METRICS,
    RUN_RECORD,
    TIMING,
    PackedCheckpointWriter,
    read_file_headers,
    whole_model,
)
from kbvq.storage.files import read_json, write_tensors
from kbvq.storage.provenance import provenance
from kbvq.storage.records import StoredFile
from kbvq.storage.work_folder import CHECKPOINT, WorkFolder
from kbvq.storage.work_folder import METRICS as WORK_METRICS
from kbvq.structures import (
    PROJECTIONS,
    WEIGHT,
    BankFormat,
    PackedBank,
    PackedMatrix,
    ProjectionFormat,
    bank_path,
)

logger = logging.getLogger("kbvq")

CARRIED = (BankFormat, Energies, ExpertBank, ProjectionFormat)
"""The dataclasses that steps carry on."""


@dataclass(frozen=True)
class QuantizeOptions:
    """What a run was asked to do.

    calibration: text file, folder or hub data set (see calibration_text). sequence_length: tokens per window, None for
    the smaller of 2048 and what the model takes. device: "cpu", "cuda", "cuda:1", …; None for cuda where there is one.
    fresh: start anew where an interrupted run could go on. max_memory: bytes that it may take, None for what is free.
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
    fresh: bool = False
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"--samples {self.samples}: at least one calibration window is needed")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise ConfigError(f"--sequence-length {self.sequence_length}: at least 2 tokens are needed")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"--seed {self.seed}: must be from 0 to 2147483647")


@dataclass(frozen=True)
class Prepared:
    """A run as far as it goes without reading a weight. formats: of the banks, with a budget the largest ones. parts:
    what is packed outside of them."""

    stream: LayerStream
    ranks: Ranks
    formats: list[BankFormat]
    parts: DenseParts
    plan: RunPlan


def prepare_run(options: QuantizeOptions, folder: Path) -> Prepared:
    """Open the model, choose formats, and plan. Raises KbvqError subclasses for what cannot be quantized."""
    device = choose_device(options.device)
    ranks = join_ranks(device)
    stream = LayerStream(folder, dtype=_compute_dtype(device), device=device)
    choose = check_budget if options.recipe.budget else uniform_plan
    formats = choose(stream.banks, options.recipe)
    parts = dense_parts(stream, options.recipe)
    length = _sequence_length(options, stream)
    plan = make_plan(
        stream,
        formats,
        options.recipe,
        samples=options.samples,
        sequence_length=length,
        parts=parts,
        limit=memory_limit(options.max_memory, device),
    )
    return Prepared(stream, ranks, formats, parts, plan)


def dense_parts(stream: LayerStream, recipe: Recipe) -> DenseParts:
    """What the recipe packs outside the banks."""
    if recipe.dense_bits == 16:
        return NOTHING
    return find_dense_parts(
        stream.model,
        stream.banks,
        recipe.dense_bits,
        keeps_float32=stream.keeps_float32,
        is_tied=stream.is_tied,
    )


def dry_run(options: QuantizeOptions) -> RunPlan:
    """The plan of a run, checked against this machine; no weight is read or downloaded and nothing is written.

    Raises KbvqError subclasses as `quantize_model` would before its first layer, but for the calibration text.
    """
    with model_headers(options.model) as folder:
        prepared = prepare_run(options, folder)
    prepared.plan.check(options.output, max_memory=options.max_memory, device=prepared.stream.device)
    return prepared.plan


def quantize_model(options: QuantizeOptions, *, kbvq_version: str) -> dict[str, Any]:
    """Quantize the experts of a checkpoint and write the packed one to `options.output`.

    Everything that can be refused is refused before the first layer is read. The output appears whole or not at all;
    what is finished so far is in `<output>.partial`, and the same call goes on from there (WorkFolder).
    Returns the record of the run, as written beside the checkpoint.
    Raises KbvqError subclasses; see the functions called.
    """
    prepared = prepare_run(options, resolve_model_folder(options.model))
    stream, ranks, plan = prepared.stream, prepared.ranks, prepared.plan
    with WorkFolder(options.output, overwrite=options.overwrite, ranks=ranks) as work:
        token_ids = _windows(options, stream)
        fingerprint = {}
        if ranks.is_first:
            logger.info("%s", "\n".join(plan.lines()))
            fingerprint = run_fingerprint(stream, token_ids, options.recipe, seed=options.seed, version=kbvq_version)
        if work.resume(fingerprint, CARRIED, fresh=options.fresh):
            work.move_to_output()
        else:
            plan.check(options.output, max_memory=options.max_memory, device=stream.device)
            statistics = StatisticsStore(work.scratch, plan.statistics_at_once) if plan.spills else StatisticsStore()
            run = Run(stream, token_ids, options, prepared.formats, work, ranks, prepared.parts, statistics)
            seconds = run_stages(run.stages(plan.seconds), work, shown=ranks.is_first)
            ranks.first(lambda: run.finish(seconds, kbvq_version))
            work.complete()
    return read_json(options.output / RUN_RECORD)


class Run:
    """The stages of one run. Between steps everything is in the carry:

    embedded: the embeddings of all windows, [windows, tokens, hidden_size], by the original and by the packed embedding
    (one tensor twice, where that is not packed or not yet); until the model is measured.
    hidden: the same behind the layers measured so far. disturbed, energies: by (bank, projection),
        peaks: by bank; see sensitivity.
    formats: of all banks, once they are chosen. budget: the record of that choice.
    teacher, student: activations behind the layers quantized so far. layers: their records. further: the original's
        activations of the windows that are for end-to-end tuning alone, or None.
    shards: files of the checkpoint. waiting: files of layers that end-to-end tuning is still to change. embedding: file
    of the packed embedding, or None. matrices: the records of all packed matrices.
    """

    def __init__(
        self,
        stream: LayerStream,
        token_ids: Tensor,
        options: QuantizeOptions,
        formats: list[BankFormat],
        work: WorkFolder,
        ranks: Ranks = ONE,
        parts: DenseParts = NOTHING,
        statistics: StatisticsStore | None = None,
    ) -> None:
        """token_ids: of the calibration windows, and behind them of those for end-to-end tuning (_windows). parts: what
        is packed outside the banks. statistics: where those of the experts go."""
        self.stream, self.options, self.recipe = stream, options, options.recipe
        self.formats, self.work, self.ranks, self.parts = formats, work, ranks, parts
        self.token_ids, self.further_ids = token_ids.tensor_split([options.samples])
        self.windows = Windows(stream, self.token_ids, work, ranks, statistics)
        self.further = Windows(stream, self.further_ids, work, ranks) if len(self.further_ids) else None
        self.writer = PackedCheckpointWriter(work.checkpoint, num_shards=stream.num_layers + 1)

    def stages(self, seconds: Mapping[str, float]) -> list[Stage]:
        """The row of stages; seconds: that each takes, as estimated."""
        layers, recipe = self.stream.num_layers, self.recipe
        row = [("preparing", 1, self.prepare)]
        if recipe.budget:
            row += [("measuring layer", layers, self.measure), ("planning", 1, self.plan)]
        row += [("quantizing layer", layers, self.quantize)]
        if self.parts.head is not None:
            row += [("quantizing head", 1, self.quantize_head)]
        if recipe.distillation_steps:
            row += [("distilling", 1, self.distill)]
        return [Stage(name, steps, step, seconds.get(name, 1.0) / steps) for name, steps, step in row]

    def prepare(self, index: int, carry: Carry) -> Step:
        """Check every weight, embed the windows, and store what is outside the layers, unless some of it is still to be
        packed."""
        self.ranks.first(self.stream.check_finite)
        embedded = self.windows.embed()
        start: Carry = {"embedding": None, "matrices": [], "shards": [], "formats": self.formats}
        start["further"] = None if self.further is None else self.further.embed()
        start["embedded"] = (embedded, embedded)
        if self.parts.embedding is None:
            if self.parts.head is None:
                start["shards"] = [self._write_shard(0, self.stream.outer_tensors)]
        elif not self._packs_with_head:
            start |= self._pack_embedding(embedded, None)
        if self.recipe.budget:
            start |= {"hidden": embedded, "disturbed": {}, "energies": {}, "peaks": {}}
        else:
            start |= self._first_activations(start["embedded"])
        return Step(start)

    @property
    def _packs_with_head(self) -> bool:
        """Whether the embedding is packed once the inputs of the head that is tied to it are known, which a run without
        the measuring pass does not know before its layers are quantized."""
        return self.recipe.budget and self.parts.embedding is not None and bool(self.parts.embedding.tied_head)

    def _pack_embedding(self, embedded: Tensor, second_moment: Tensor | None) -> Carry:
        """Pack the embedding, embed the windows with it, and store what is outside the layers, unless the head is still
        to be packed. embedded: the windows' original embeddings. second_moment: as of `pack_matrix`."""
        stream, format = self.stream, self.parts.embedding
        assert format is not None
        name = f"{format.path}.{WEIGHT}"
        matrix, report = pack_matrix(stream.weight(name), second_moment, format, seed=self.options.seed)
        stream.layer_inputs(self.token_ids[:1])  # brings the original into memory, if layers were there since
        stream.replace_(name, decoded(matrix))
        packed = matrix.state_dict()
        made: Carry = {"embedded": (embedded, self.windows.embed()), "matrices": [report]}
        made["embedding"] = self.work.store("embedding.safetensors", lambda path: write_tensors(path, packed))
        if self.parts.head is None:
            made["shards"] = [self._write_shard(0, lambda: stream.outer_tensors() | packed)]
        return made

    def _head_moment(self, path: str, states: Tensor) -> Tensor:
        """Second moment of what the head at `path` gets of these outputs of the last layer, of all windows."""
        with self.stream.head(), torch.no_grad():
            head = self.stream.model.get_submodule(path)
            with WatchedLinears({path: head}) as watched:
                for part in self.windows.parts():
                    self.stream.head_inputs(states[part].to(self.stream.device))
            return watched.second_moment(path, self.ranks)

    def measure(self, index: int, carry: Carry) -> Step:
        """How sensitive the model's predictions are to errors in each projection of a layer."""
        stream, disturbed = self.stream, dict(carry["disturbed"])
        with stream.layer(index) as layer, torch.no_grad():
            probe = probe_layer(
                layer,
                f"{stream.layers_path}.{index}",
                [bank for bank in stream.banks if bank.decoder_layer == index],
                self.recipe,
                run=self.windows.runner(layer, index),
                inputs=carry["hidden"],
                disturbed=disturbed,
                num_probed=self.windows.num_probed,
                rates=probed_rates(self.recipe),
                seed=self.options.seed + index,
            )
        found = {name: carry[name] | getattr(probe, name) for name in ("energies", "peaks")}
        return Step({**carry, **found, "hidden": probe.outputs, "disturbed": disturbed})

    def plan(self, index: int, carry: Carry) -> Step:
        """Choose the formats of all banks within the budget, and pack an embedding that is the head too."""
        stream = self.stream
        reference = carry["hidden"][: self.windows.num_probed]
        with stream.head(), torch.no_grad():
            measured = divergences(stream.logits, reference, carry["disturbed"])
        rates = probed_rates(self.recipe)
        sensitivities = {
            site: Sensitivity({rate: measured[site, rate] for rate in rates}, energies)
            for site, energies in carry["energies"].items()
        }
        plan = budget_plan(stream.banks, self.recipe, sensitivities, carry["peaks"])
        counts = Counter(row["code_bits"] for row in plan.record["projections"])  # type: ignore[attr-defined]
        tiers = len(plan.formats) - len(stream.banks)
        text = ", ".join(f"{n} projections with {bits} code bits" for bits, n in sorted(counts.items()))
        text += f", {tiers} further tiers of experts among them" if tiers else ""
        kept = {name: carry[name] for name in ("embedding", "further", "matrices", "shards")}
        chosen = {"formats": plan.formats, "budget": plan.record}
        embedded = carry["embedded"]
        if self._packs_with_head:
            moment = tied_moment(self._head_moment(self.parts.embedding.tied_head, carry["hidden"]))
            packed = self._pack_embedding(embedded[0], moment)
            embedded = packed.pop("embedded")
            kept |= packed
        return Step(kept | chosen | self._first_activations(embedded), text)

    def quantize(self, index: int, carry: Carry) -> Step:
        """Quantize the matrices and banks of a layer and carry both sets of activations on."""
        stream = self.stream
        banks = {
            bank: [format for format in carry["formats"] if format.bank == bank.path]
            for bank in stream.banks
            if bank.decoder_layer == index
        }
        carry = dict(carry)
        with stream.layer(index) as layer:
            if self.further is not None:
                carry["further"] = self.further.runner(layer, index)(carry["further"])
            result = quantize_layer(
                layer,
                f"{stream.layers_path}.{index}",
                banks,
                self.recipe,
                run=self.windows.runner(layer, index),
                teacher=carry["teacher"],
                student=carry["student"],
                seed=self.options.seed,
                matrices=() if self.recipe.distillation_steps else self.parts.of_layer(index),
            )
        made = {bank.path: bank.format for bank in result.banks}
        carry["formats"] = [made.get(format.path, format) for format in carry["formats"]]
        carry["matrices"] = [*carry["matrices"], *result.matrix_reports]
        if self.recipe.distillation_steps:
            tensors = _packed_tensors(result.banks) | result.dense
            if tensors:
                name = f"layer-{index:05d}.safetensors"
                waiting = self.work.store(name, lambda path: write_tensors(path, tensors))
                carry["waiting"] = [*carry["waiting"], waiting]
        else:
            packed = [*result.banks, *result.matrices]
            carry["shards"] = [*carry["shards"], self._write_layer(index, packed, result.dense)]
        record = {
            "layer": index,
            "output_error": _relative_error(result.student, result.teacher, self.work),
            "banks": result.reports,
        }
        carry |= {"teacher": result.teacher, "student": result.student, "layers": [*carry["layers"], record]}
        return Step(carry, _layer_text(record), {"output_error": record["output_error"]})

    def quantize_head(self, index: int, carry: Carry) -> Step:
        """Quantize the head for the inputs that it gets in the quantized model, and store what is outside the layers.

        End-to-end tuning comes after it and compares predictions that the original head makes of both models.
        """
        stream, format = self.stream, self.parts.head
        assert format is not None
        second_moment = self._head_moment(format.path, carry["student"])
        weight = stream.weight(f"{format.path}.{WEIGHT}")
        matrix, report = pack_matrix(weight, second_moment, format, seed=self.options.seed)
        packed = matrix.state_dict()
        if carry["embedding"] is not None:
            packed |= load_file(self.work.path / carry["embedding"].name)
        shard = self._write_shard(0, lambda: stream.outer_tensors() | packed)
        text = f"error {report['relative_error']:.5f}"
        return Step(carry | {"shards": [*carry["shards"], shard], "matrices": [*carry["matrices"], report]}, text)

    def distill(self, index: int, carry: Carry) -> Step:
        """Tune the whole model on the original's predictions, pack the matrices of the layers for the inputs that they
        get then, and store the layers. The matrices come last because tuning changes them, which is most of its gain.
        """
        waiting: dict[str, Tensor] = {}
        for file in carry["waiting"]:
            waiting |= load_file(self.work.path / file.name)
        banks = [PackedBank.from_tensors(format, waiting) for format in carry["formats"]]
        dense = {name: waiting[name] for name in waiting.keys() - _packed_tensors(banks).keys()}
        if carry["embedding"] is not None:
            stored = load_file(self.work.path / carry["embedding"].name)
            embedding = PackedMatrix.from_tensors(self.parts.embedding, stored)
            dense[f"{embedding.path}.{WEIGHT}"] = decoded(embedding)
        # On text that no layer was fitted to, where there is any: what was fitted to the other looks better than it is.
        fresh = self.further is not None
        token_ids, teacher = (self.further_ids, carry["further"]) if fresh else (self.token_ids, carry["teacher"])
        inside = self.parts.inside
        matrices: list[PackedMatrix] = []
        reports: list[dict[str, object]] = []

        def pack(model: nn.Module, mixed: AbstractContextManager) -> None:
            packed, records = pack_whole_(model, inside, self.token_ids, mixed, seed=self.options.seed)
            matrices.extend(packed)
            reports.extend(records)

        tuned, dense = distill(
            self.stream,
            banks,
            dense,
            token_ids,
            teacher,
            self.recipe,
            seed=self.options.seed,
            new_tensor=self.work.scratch if self.stream.device.type == "cpu" else torch.zeros,
            then=pack if inside else None,
        )
        owner = {bank.path: bank.decoder_layer for bank in self.stream.banks} | self.parts.decoder_layers
        shards = [
            self._write_layer(
                layer,
                [bank for bank in tuned if owner[bank.format.bank] == layer]
                + [matrix for matrix in matrices if owner[matrix.path] == layer],
                dense,
            )
            for layer in range(self.stream.num_layers)
        ]
        done = {"shards": [*carry["shards"], *shards], "matrices": [*carry["matrices"], *reports], "waiting": []}
        return Step(carry | done)

    def finish(self, seconds: dict[str, list[float]], kbvq_version: str) -> None:
        """Complete the checkpoint from what the last step carried."""
        carry, recipe, options = self.work.carry, self.recipe, self.options
        formats = carry["formats"]
        bits = _bits([getattr(f, p).num_bytes for f in formats for p in PROJECTIONS], formats)
        code_bits = _bits([getattr(f, p).code_bytes for f in formats for p in PROJECTIONS], formats)
        record: dict[str, Any] = {
            "recipe": recipe.to_dict(),
            "calibration": {
                "source": Path(options.calibration).name,
                "samples": len(self.token_ids),
                "tuning_samples": len(self.further_ids),
                "sequence_length": self.token_ids.shape[1],
                "seed": options.seed,
            },
            "compute_dtype": str(self.stream.dtype).removeprefix("torch."),
            "bits_per_weight": bits,
            "code_bits": code_bits,
            "experts_with_few_tokens": _few_tokens(carry["layers"], recipe.few_tokens),
            "layers": carry["layers"],
        }
        if recipe.dense_bits < 16:
            record["dense"] = {"bits": recipe.dense_bits, "matrices": carry["matrices"], "left": self.parts.left}
        shards = [self.work.checkpoint / self.writer.shard_name(index) for index in range(self.writer.num_shards)]
        record["whole_model"] = whole_model(read_file_headers(shards), [*formats, *self.parts.formats])
        record |= provenance(options.model, self.stream.folder, self.token_ids)
        if "budget" in carry:
            record["budget"] = carry["budget"]
        self.writer.finish(
            config=json.loads((self.stream.folder / "config.json").read_text(encoding="utf-8")),
            packed=[*formats, *self.parts.formats],
            source_folder=self.stream.folder,
            quantization_config={
                "quant_method": "kbvq",
                "format_version": FORMAT_VERSION,
                "kbvq_version": kbvq_version,
                "recipe": recipe.to_dict(),
                "bits_per_weight": bits,
                "code_bits": code_bits,
                "banks": [bank.to_dict() for bank in formats],
                **({"dense": [matrix.to_dict() for matrix in self.parts.formats]} if self.parts.formats else {}),
            },
            run_record=record,
            unhashed={
                TIMING: {
                    "total_seconds": sum(map(sum, seconds.values())),
                    "layer_seconds": seconds["quantizing layer"],
                    "device": str(self.stream.device),
                },
                METRICS: self.work.path / WORK_METRICS,
            },
        )

    def _first_activations(self, embedded: tuple[Tensor, Tensor]) -> Carry:
        teacher, student = embedded
        return {"teacher": teacher, "student": student, "layers": [], "waiting": []}

    def _write_layer(
        self, index: int, packed: list[PackedBank | PackedMatrix], dense: Mapping[str, Tensor]
    ) -> StoredFile:
        """One shard with a decoder layer: its tensors as stored but for those in `dense`, and what is packed of it."""
        return self._write_shard(index + 1, lambda: self.stream.layer_tensors(index, dense) | _packed_tensors(packed))

    def _write_shard(self, index: int, tensors: Callable[[], dict[str, Tensor]]) -> StoredFile:
        name = f"{CHECKPOINT}/{self.writer.shard_name(index)}"
        return self.work.store(name, lambda path: self.writer.write_shard(index, tensors()))


class Windows:
    """The calibration windows on their way through the model, a batch at a time."""

    def __init__(
        self,
        stream: LayerStream,
        token_ids: Tensor,
        store: WorkFolder,
        ranks: Ranks = ONE,
        statistics: StatisticsStore | None = None,
    ) -> None:
        self.stream, self.token_ids, self.store, self.ranks = stream, token_ids, store, ranks
        self.statistics = statistics
        self.batch_size = max(1, TOKENS_PER_BATCH // token_ids.shape[1])
        # The windows that are probed: the activations of all projections are kept for them (sensitivity).
        self.num_probed = probed_windows(stream, *token_ids.shape)
        # The layers' arguments depend on the rows of a batch; the last one may have fewer, and tuning takes fewer.
        rows = {1, min(self.batch_size, len(token_ids)), self.num_probed}  # one: LayerRunner.sample
        rows |= {len(token_ids) % self.batch_size or self.batch_size}
        rows |= {windows_per_step(token_ids.shape[1], len(token_ids))}
        self.layer_kwargs = {
            count: stream.layer_inputs(token_ids[:count])[1] for count in rows if count <= len(token_ids)
        }

    def embed(self) -> Tensor:
        """What the first layer gets of all windows, [windows, tokens, hidden_size]; where a model has several residual
        streams, all of them."""
        width = self.stream.layer_inputs(self.token_ids[:1])[0].shape[2:]
        embedded = self.store.empty((*self.token_ids.shape, *width), self.stream.dtype)
        for part in self.parts():
            embedded[part] = self.stream.layer_inputs(self.token_ids[part])[0].cpu()
            self.store.release()
        self.ranks.wait()
        return embedded

    def parts(self) -> Iterator[slice]:
        """The windows of each batch that this process runs."""
        return self.ranks.batches(len(self.token_ids), self.batch_size)

    def runner(self, layer: nn.Module, index: int) -> LayerRunner:
        """Decoder layer `index` as a function of the activations of all windows."""
        return LayerRunner(
            layer,
            lambda rows: self.layer_kwargs[rows][index],
            batch_size=self.batch_size,
            device=self.stream.device,
            store=self.store,
            statistics=self.statistics,
            ranks=self.ranks,
        )


def _compute_dtype(device: torch.device) -> torch.dtype:
    """Activations and layer weights during calibration: bfloat16 on a GPU, float32 on a CPU, where it is no slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _sequence_length(options: QuantizeOptions, stream: LayerStream) -> int:
    longest = getattr(stream.text_config, "max_position_embeddings", 2048)
    length = options.sequence_length or min(2048, longest)
    if length > longest:
        raise ConfigError(f"--sequence-length {length}: the model takes at most {longest} tokens")
    return length


def _windows(options: QuantizeOptions, stream: LayerStream) -> Tensor:
    """The windows that the layers are calibrated on, `options.samples`, and behind them those that end-to-end tuning
    has to itself: one for each that it sees, or none where the text has not even as many as for calibration."""
    length, recipe = _sequence_length(options, stream), options.recipe
    further = tuning_windows(recipe, options.samples, length)
    tokenizer = AutoTokenizer.from_pretrained(stream.folder)
    # 16 characters a token is more than any tokenizer needs: enough text to draw from, without reading on for hours.
    texts = load_texts(options.calibration, max_characters=16 * (options.samples + further) * length)
    windows = calibration_windows(
        texts,
        tokenizer,
        samples=options.samples,
        sequence_length=length,
        seed=options.seed,
        vocab_size=stream.text_config.vocab_size,
        further=further,
    )
    if len(windows) - options.samples < min(options.samples, further):
        logger.info("the calibration text has too few windows for end-to-end tuning to have its own; it sees the same")
        windows = windows[: options.samples]
    return windows


def _relative_error(student: Tensor, teacher: Tensor, store: ActivationStore) -> float:
    """Σ (student − teacher)² / Σ teacher² of a layer's outputs."""
    error = energy = 0.0
    for s, t in zip(student, teacher, strict=True):
        error += float((s.float() - t.float()).square().sum())
        energy += float(t.float().square().sum())
        store.release()
    return error / energy


def _few_tokens(layers: list[dict], floor: int) -> dict[str, list[int]]:
    """Experts with fewer calibration tokens than `floor`, by bank, after a warning."""
    few: dict[str, list[int]] = {}
    for report in (report for layer in layers for report in layer["banks"]):
        counts = report["tokens"]
        experts = report.get("experts") or range(len(counts))
        found = [expert for expert, count in zip(experts, counts, strict=True) if count < floor]
        if found:
            bank = bank_path(report["path"])
            few[bank] = sorted(few.get(bank, []) + found)
    if few:
        logger.warning(
            "%d experts saw fewer than %d calibration tokens: their moments were shrunk toward those of all experts of "
            "their layer. More --samples would help; kbvq_run.json lists them.",
            sum(map(len, few.values())),
            floor,
        )
    return few


def _layer_text(layer: dict) -> str:
    parts = [
        f"{report['path'].rpartition('.')[2]}.{projection} error {report[projection]['relative_error']:.4f} "
        f"(+{report[projection]['bits_above_limit']:.2f} bits)"
        for report in layer["banks"]
        for projection in PROJECTIONS
    ]
    return ", ".join([f"output error {layer['output_error']:.5f}", *parts])


def _bits(num_bytes: list[int], formats: list[BankFormat]) -> float:
    """Bits per weight of so many bytes."""
    return 8 * sum(num_bytes) / sum(getattr(f, p).num_weights for f in formats for p in PROJECTIONS)


def _packed_tensors(packed: Iterable[PackedBank | PackedMatrix]) -> dict[str, Tensor]:
    return {name: tensor for part in packed for name, tensor in part.state_dict().items()}
