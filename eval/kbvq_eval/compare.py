"""Checkpoints side by side, ours and other tools': one table and one picture. `kbvq compare`.

Each is loaded by its own loader, through transformers (the tool's package must be installed), and scored against the
same predictions of one baseline, which are computed once. What is finished is kept in the output folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kbvq.errors import ConfigError
from kbvq.storage.checkpoint import inspect_checkpoint, read_headers
from kbvq_eval.parts import FinishedParts
from kbvq_eval.run import LoadedModel, Measurement, is_packed
from kbvq_eval.texts import load_text

EXPERT_MARKS = (".experts.", ".shared_expert.", ".shared_experts.", ".block_sparse_moe.experts.")


@dataclass(frozen=True)
class Compared:
    """One checkpoint. bits: true bits per expert weight, None where they cannot be counted. file_bytes:
    of all its weights. scores: of `WindowScores.summary`."""

    name: str
    bits: float | None
    file_bytes: int | None
    scores: dict[str, Any]


def compare(
    models: Sequence[str],
    *,
    baseline: str,
    perplexity: str,
    output: Path,
    window: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Compared]:
    """Score every model; print the table, and write it, its numbers and its picture to the folder `output`.

    Options as of `kbvq_eval.run.evaluate`. Raises ConfigError for fewer than two models or two of one name.
    """
    names = [Path(model).name for model in models]
    if len(models) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"compare needs models whose folders have different names, not {', '.join(names)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    text = load_text(perplexity)
    parts = FinishedParts(output / "parts")
    weights = expert_bytes(Path(baseline))
    rows = []
    for model, name in zip(models, names, strict=True):
        measured = Measurement(
            model=LoadedModel(model, device, dtype),
            baseline=LoadedModel(baseline, device, dtype),
            texts={text.name: text},
            window=window,
            tasks=None,
            limit=None,
            batch_size=batch_size,
            generation=False,
        ).run(parts)
        scores = measured["perplexity"][text.name]
        bits = true_bits(Path(model), None if weights is None else weights[1])
        rows.append(Compared(name, bits, measured["model"]["file_bytes"], scores))
    table = markdown(rows)
    (output / "comparison.md").write_text(table, encoding="utf-8")
    content = [{"name": r.name, "bits": r.bits, "file_bytes": r.file_bytes, "scores": r.scores} for r in rows]
    (output / "comparison.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw(rows, output / "comparison.svg")
    print(table)
    return rows


def expert_bytes(folder: Path) -> tuple[int, int] | None:
    """(bytes, number of elements) of the tensors of a checkpoint's experts, by their names; None where it is no folder
    of safetensors or has none."""
    if not folder.is_dir() or not list(folder.glob("*.safetensors")):
        return None
    found = [header for name, header in read_headers(folder).items() if any(mark in name for mark in EXPERT_MARKS)]
    if not found:
        return None
    return sum(header.num_bytes for header in found), sum(math.prod(header.shape) for header in found)


def true_bits(model: Path, num_weights: int | None) -> float | None:
    """Bits per expert weight with everything that is stored under the experts' names; num_weights: the baseline's."""
    if is_packed(str(model)):
        return inspect_checkpoint(model)["bits_per_weight"]
    stored = expert_bytes(model)
    return None if stored is None or num_weights is None else 8 * stored[0] / num_weights


def markdown(rows: Sequence[Compared]) -> str:
    """One line for each checkpoint, the least KL first."""
    lines = ["| | true bits | size, MiB | KL | ΔNLL | top-1 | perplexity |", "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row.scores["kl"]):
        bits = "–" if row.bits is None else f"{row.bits:.3f}"
        size = "–" if row.file_bytes is None else f"{row.file_bytes / (1 << 20):,.1f}"
        kl, delta = _with_error(row.scores, "kl", 5), _with_error(row.scores, "delta_nll", 4)
        agreement, perplexity = f"{100 * row.scores['agreement']:.2f} %", f"{row.scores['perplexity']:.3f}"
        lines.append(f"| {row.name} | {bits} | {size} | {kl} | {delta} | {agreement} | {perplexity} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Compared], path: Path) -> None:
    """KL against true bits and against the whole size, as SVG. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"the picture needs matplotlib ({error}); pip install 'kbvq[report]'") from error
    figure = Figure(figsize=(9, 4), layout="constrained")
    places = {
        "bits per expert weight, everything stored": [row.bits for row in rows],
        "size of all weights, MiB": [None if row.file_bytes is None else row.file_bytes / (1 << 20) for row in rows],
    }
    for axes, (label, values) in zip(figure.subplots(1, 2, sharey=True), places.items(), strict=True):
        for row, value in zip(rows, values, strict=True):
            if value is not None:
                axes.plot(value, max(row.scores["kl"], 1e-7), "o", color="#0072b2")
                axes.annotate(row.name, (value, max(row.scores["kl"], 1e-7)), xytext=(5, 3), textcoords="offset points")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("KL(original ‖ model), nats per token")
    figure.savefig(path, metadata={"Date": None})


def _with_error(scores: dict[str, Any], name: str, digits: int) -> str:
    stderr = scores.get(f"{name}_stderr")
    return f"{scores[name]:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")
