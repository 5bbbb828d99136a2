"""Everything that a packed checkpoint tells about how it was made, gathered for the report and the model card.

Checkpoints of other versions, and runs without some measurement, lack fields: those are None or empty here, and
shown as not recorded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbvq.errors import CheckpointError
from kbvq.storage.checkpoint import METRICS, RUN_RECORD, TIMING, inspect_checkpoint, read_headers
from kbvq.structures import WEIGHT, MatrixFormat, bank_path, tensor_name

EVALUATION = "kbvq_eval.json"
"""What `kbvq eval --report` measured, beside the checkpoint; like the report and the card outside the manifest."""

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_DENSE_PARTS = (
    ("attention", (".self_attn.", ".attention.", ".linear_attn.")),
    ("embeddings and head", ("embed_tokens", "lm_head", "wte")),
    ("routers", (".gate.", ".router.")),
)
_OTHERS = "norms and others"


@dataclass(frozen=True)
class Size:
    """Bytes of a part of the model before and after."""

    part: str
    before: int
    after: int


@dataclass(frozen=True)
class ProjectionRow:
    """One quantized projection of a bank or tier. experts: of a tier, those that it holds. bits: everything stored.
    predicted_kl: by the measured sensitivity, at its code bits. error: weighted, relative to the energy of its outputs.
    by_expert: the same of each expert. spectrum: share of the energy of its targets in the strongest directions, at
    even steps from none to all of them."""

    bank: str
    experts: list[int]
    layer: int | None
    projection: str
    bits: float
    code_bits: float
    rank: int
    codebook: str
    error: float | None
    above_limit: float | None
    predicted_kl: float | None
    sensitivity: dict[float, float]
    by_expert: list[float]
    spectrum: list[float]

    @property
    def name(self) -> str:
        return f"{self.bank}.{self.projection}"


@dataclass(frozen=True)
class BankRow:
    """tokens: calibration tokens of each expert. starved, super: indices of experts with too few, and of super
    experts."""

    path: str
    tokens: list[int]
    starved: list[int]
    super: list[int]


@dataclass(frozen=True)
class Step:
    """A step of the run, in seconds from its start."""

    name: str
    start: float
    seconds: float


@dataclass(frozen=True)
class RunReport:
    """name: of the folder. summary: of `inspect_checkpoint`. record: kbvq_run.json. evaluation: of `kbvq eval`, or
    empty."""

    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    record: dict[str, Any]
    sizes: list[Size]
    projections: list[ProjectionRow]
    banks: list[BankRow]
    layer_errors: dict[int, float]
    steps: list[Step]
    total_seconds: float | None
    device: str | None
    evaluation: dict[str, Any]

    @property
    def predicted_kl(self) -> float | None:
        """Sum of what each projection alone is predicted to cause."""
        values = [row.predicted_kl for row in self.projections]
        known = [value for value in values if value is not None]
        return sum(known) if known and len(known) == len(values) else None

    @property
    def size(self) -> Size:
        return Size("whole model", sum(s.before for s in self.sizes), sum(s.after for s in self.sizes))

    @property
    def recipe(self) -> dict[str, Any]:
        return {"name": None} | (self.record.get("recipe") or {})

    @property
    def base_model(self) -> str | None:
        return self.record.get("source", {}).get("name")


def read_run(folder: Path) -> RunReport:
    """Gather what is in a packed checkpoint's folder. Raises CheckpointError when it is none."""
    folder = Path(folder)
    summary = inspect_checkpoint(folder)
    config = _read(folder / "config.json")
    record, timing = _read(folder / RUN_RECORD), _read(folder / TIMING)
    steps = _steps(folder / METRICS, timing)
    layers = record.get("layers") or []
    return RunReport(
        name=folder.resolve().name,
        config={key: value for key, value in config.items() if key != "quantization_config"},
        summary={key: value for key, value in summary.items() if key != "banks"},
        record=record,
        sizes=_sizes(folder, config, summary),
        projections=_projections(summary, record),
        banks=_banks(record),
        layer_errors={layer["layer"]: layer["output_error"] for layer in layers if "output_error" in layer},
        steps=steps,
        total_seconds=timing.get("total_seconds"),
        device=timing.get("device"),
        evaluation=_read(folder / EVALUATION),
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; fetch it again, or delete it") from error
    return data if isinstance(data, dict) else {}


def _bank_projections(bank: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {key: value for key, value in bank.items() if isinstance(value, dict) and "bits_per_weight" in value}


def _sizes(folder: Path, config: dict[str, Any], summary: dict[str, Any]) -> list[Size]:
    """The packed banks by kind, then the other parts, packed or as they were, by the names of their tensors."""
    item_bytes = _ITEM_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    paths = []
    for bank in summary["banks"]:
        part = f"{bank['kind']} experts"
        paths.append(f"{bank['path']}.")
        for projection in _bank_projections(bank).values():
            before[part] = before.get(part, 0) + item_bytes * projection["weights"]
            after[part] = after.get(part, 0) + projection["bytes"]
    packed = tuple(paths)
    matrices = [MatrixFormat.from_dict(matrix) for matrix in config.get("quantization_config", {}).get("dense", [])]
    replaced = {tensor_name(m.path, WEIGHT, "codes"): item_bytes * m.weight.num_weights for m in matrices}
    beside = {name for matrix in matrices for name in matrix.tensors()} - replaced.keys()
    for name, header in read_headers(folder).items():
        if not name.startswith(packed):
            part = next((part for part, marks in _DENSE_PARTS if any(m in f".{name}" for m in marks)), _OTHERS)
            own = 0 if name in beside else header.num_bytes
            before[part] = before.get(part, 0) + replaced.get(name, own)
            after[part] = after.get(part, 0) + header.num_bytes
    order = [part for part in before if part.endswith("experts")] + [part for part, _ in _DENSE_PARTS] + [_OTHERS]
    return [Size(part, before[part], after[part]) for part in order if part in before]


def _projections(summary: dict[str, Any], record: dict[str, Any]) -> list[ProjectionRow]:
    reports = {bank["path"]: (layer["layer"], bank) for layer in record.get("layers") or [] for bank in layer["banks"]}
    planned = {(row["bank"], row["projection"]): row for row in (record.get("budget") or {}).get("projections") or []}
    rows = []
    for bank in summary["banks"]:
        layer, of_bank = reports.get(bank["path"], (None, {}))
        for projection, stored in _bank_projections(bank).items():
            report, plan = of_bank.get(projection) or {}, planned.get((bank["path"], projection)) or {}
            predicted = plan.get("predicted_divergence")
            sensitivity = {float(rate): kl for rate, kl in predicted.items()} if isinstance(predicted, dict) else {}
            rows.append(
                ProjectionRow(
                    bank=bank["path"],
                    experts=list(bank["experts"]),
                    layer=layer,
                    projection=projection,
                    bits=stored["bits_per_weight"],
                    code_bits=stored["code_bits"],
                    rank=stored["rank"],
                    codebook=stored["codebook"],
                    error=report.get("relative_error"),
                    above_limit=report.get("bits_above_limit"),
                    predicted_kl=sensitivity.get(float(plan.get("code_bits", -1))),
                    sensitivity=sensitivity,
                    by_expert=list(report.get("relative_error_by_expert") or []),
                    spectrum=list(report.get("spectrum") or []),
                )
            )
    return rows


def _banks(record: dict[str, Any]) -> list[BankRow]:
    starved = record.get("experts_with_few_tokens") or {}
    found = (record.get("budget") or {}).get("super_experts") or {}
    counts: dict[str, dict[int, int]] = {}
    for report in (bank for layer in record.get("layers") or [] for bank in layer["banks"] if "tokens" in bank):
        experts = report.get("experts") or range(len(report["tokens"]))
        counts.setdefault(bank_path(report["path"]), {}).update(zip(experts, report["tokens"], strict=True))
    return [
        BankRow(path, [tokens for _, tokens in sorted(own.items())], starved.get(path, []), found.get(path, []))
        for path, own in counts.items()
    ]


def _steps(metrics: Path, timing: dict[str, Any]) -> list[Step]:
    """From the lines of kbvq_metrics.jsonl, or the seconds of the layers where there is no such file."""
    lines: list[tuple[str, float]] = []
    if metrics.is_file():
        for text in metrics.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if "seconds" in line:
                lines.append((str(line.get("stage") or "step"), float(line["seconds"])))
    else:
        lines = [("quantizing layer", seconds) for seconds in timing.get("layer_seconds") or []]
    steps, clock = [], 0.0
    for name, seconds in lines:
        steps.append(Step(name, clock, seconds))
        clock += seconds
    return steps
