"""Checkpoints side by side, ours and other tools': one table and one picture. `kbvq compare`.

Each is loaded by its own loader (loading.py; the tool's package must be installed, which is checked of all before the
first is measured), and scored against the same predictions of one baseline, which are computed once. What is finished
is kept in the output folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kbvq.errors import ConfigError
from kbvq.models.layer_stream import resolve_model_folder
from kbvq_eval.loading import LoadedModel
from kbvq_eval.parts import FinishedParts
from kbvq_eval.run import Measurement
from kbvq_eval.stored import Size, size, stored
from kbvq_eval.texts import load_text


@dataclass(frozen=True)
class Compared:
    """One checkpoint. method: what quantized it, by its configuration, None for nothing. scores: of
    `WindowScores.summary`."""

    name: str
    method: str | None
    size: Size
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

    Options as of `kbvq_eval.run.evaluate`. Raises ConfigError for fewer than two models, for two of one name, and
    without matplotlib.
    """
    names = [Path(model).name for model in models]
    if len(models) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"compare needs models whose folders have different names, not {', '.join(names)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the picture needs matplotlib ({error}); pip install 'kbvq[report]'") from error
    text = load_text(perplexity)
    folders = {model: _folder(model) for model in (baseline, *models)}
    original = LoadedModel(baseline, device, dtype)
    # All before the first is measured: each says what its loader lacks, and whether its vocabulary is the baseline's.
    measurements = [
        Measurement(
            model=LoadedModel(model, device, dtype, vocabulary=original.tokenizer),
            baseline=original,
            texts={text.name: text},
            window=window,
            tasks=None,
            limit=None,
            batch_size=batch_size,
            generation=False,
        )
        for model in models
    ]
    parts = FinishedParts(output / "parts")
    weights = stored(folders[baseline])
    rows = []
    for measurement, model, name in zip(measurements, models, names, strict=True):
        scores = measurement.run(parts)["perplexity"][text.name]
        rows.append(Compared(name, measurement.model.method, size(folders[model], weights), scores))
    table = markdown(rows)
    (output / "comparison.md").write_text(table, encoding="utf-8")
    content = json.dumps([asdict(row) for row in rows], indent=1)
    (output / "comparison.json").write_text(content + "\n", encoding="utf-8")
    draw(rows, output / "comparison.svg")
    print(table)
    return rows


def _folder(model: str) -> Path:
    """Where the files of a model are: its folder, that of the hub's cache, or the .gguf file itself."""
    return Path(model) if model.endswith(".gguf") else resolve_model_folder(model)


def markdown(rows: Sequence[Compared]) -> str:
    """One line for each checkpoint, the least KL first."""
    lines = ["| | by | true bits | whole model, bits | size, MiB | KL | ΔNLL | top-1 | perplexity |", "|" + "---|" * 9]
    for row in sorted(rows, key=lambda row: row.scores["kl"]):
        bits, model_bits = (_number(value, ".3f") for value in (row.size.bits, row.size.model_bits))
        mib = _number(_mib(row.size), ",.1f")
        kl, delta = _with_error(row.scores, "kl", 5), _with_error(row.scores, "delta_nll", 4)
        agreement, perplexity = f"{100 * row.scores['agreement']:.2f} %", f"{row.scores['perplexity']:.3f}"
        cells = (row.name, row.method or "–", bits, model_bits, mib, kl, delta, agreement, perplexity)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Compared], path: Path) -> None:
    """KL against true bits and against the whole size, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    places = {
        "bits per expert weight, everything stored": [row.size.bits for row in rows],
        "size of the whole model, MiB": [_mib(row.size) for row in rows],
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


def _mib(size: Size) -> float | None:
    return None if size.num_bytes is None else size.num_bytes / (1 << 20)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _with_error(scores: dict[str, Any], name: str, digits: int) -> str:
    stderr = scores.get(f"{name}_stderr")
    return f"{scores[name]:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")
