"""report.html: one file that shows what a quantization did, and needs nothing else to be shown."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kbvq.errors import ConfigError
from kbvq.reporting.run_report import ProjectionRow, RunReport, read_run
from kbvq.reporting.templates import render
from kbvq.structures import TIERS, bank_path

logger = logging.getLogger("kbvq")

REPORT = "report.html"
MEBIBYTE = 1 << 20
LAYER_LIMIT = 128
"""Rows of a table that are shown at once; longer ones start folded."""


@dataclass(frozen=True)
class Table:
    """columns: their heads. rows: cells as text; the first of each row names it."""

    caption: str
    columns: list[str]
    rows: list[list[str]]

    @property
    def folded(self) -> bool:
        return len(self.rows) > 12


@dataclass(frozen=True)
class Section:
    """text: what is shown and how to read it. missing: why there is nothing, then picture and table are empty. svg:
    with `alt`, what it shows in words."""

    id: str
    title: str
    text: str
    svg: str = ""
    alt: str = ""
    table: Table | None = None
    missing: str = ""
    quotes: list[dict[str, str]] = field(default_factory=list)


def write_report(folder: Path) -> Path:
    """Write report.html of a packed checkpoint into its folder, from what the folder holds; returns its path.

    Raises CheckpointError when it is no packed checkpoint, ConfigError when matplotlib is not installed.
    """
    path = Path(folder) / REPORT
    path.write_text(render("report.html", report_context(read_run(Path(folder)))), encoding="utf-8")
    return path


def report_context(run: RunReport) -> dict[str, Any]:
    """What the template is filled with."""
    try:
        import kbvq.reporting.plots  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the report needs matplotlib ({error}); pip install 'kbvq[report]'") from error
    sections = [
        _sizes(run),
        _bits(run),
        _errors(run),
        _limits(run),
        _sensitivities(run),
        _spectra(run),
        _tokens(run),
        _expert_errors(run),
        _routers(run),
        _evaluation(run),
        _continuations(run),
        _timeline(run),
        _configuration(run),
    ]
    return {"run": run, "facts": _facts(run), "sections": sections}


def _facts(run: RunReport) -> list[tuple[str, str]]:
    size = run.size
    facts = [
        ("bits per expert weight", f"{run.summary['bits_per_weight']:.3f}"),
        ("in codes alone", f"{run.summary['code_bits']:.3f}"),
        ("of the whole model", f"{run.summary['model_bits_per_weight']:.3f}"),
        ("size on disk", f"{size.after / MEBIBYTE:,.1f} MiB"),
        ("before", f"{size.before / MEBIBYTE:,.1f} MiB"),
    ]
    if run.predicted_kl is not None:
        facts.append(("predicted KL, nats per token", f"{run.predicted_kl:.4f}"))
    for name, text in (run.evaluation.get("perplexity") or {}).items():
        if "kl" in text:
            facts.append((f"measured KL on {name}", f"{text['kl']:.4f}"))
    if run.total_seconds:
        facts.append(("seconds", f"{run.total_seconds:,.0f}"))
    return facts


def _sizes(run: RunReport) -> Section:
    from kbvq.reporting.plots import stacked_bars

    rows = []
    for size in (*run.sizes, run.size):
        share = f"{100 * size.after / max(size.before, 1):.1f} %"
        rows.append([size.part, f"{size.before / MEBIBYTE:,.2f}", f"{size.after / MEBIBYTE:,.2f}", share])
    table = Table("Size by part, MiB", ["part", "before", "after", "share of before"], rows)
    svg = stacked_bars(
        "sizes",
        ["before", "after"],
        {s.part: (s.before / MEBIBYTE, s.after / MEBIBYTE) for s in run.sizes},
        "MiB",
    )
    alt = f"Two bars: {run.size.before / MEBIBYTE:,.1f} MiB before, {run.size.after / MEBIBYTE:,.1f} MiB after."
    return Section("sizes", "Size", "What each part takes on disk, before and after.", svg, alt, table)


def _bits(run: RunReport) -> Section:
    from kbvq.reporting.plots import grouped_bars

    svg = grouped_bars(
        "bits",
        _labels(run.projections),
        {"everything stored": [r.bits for r in run.projections], "codes alone": [r.code_bits for r in run.projections]},
        "bits per weight",
    )
    table = Table(
        "True bits by projection",
        ["projection", "bits", "codes", "codebook", "rank"],
        [[r.name, f"{r.bits:.3f}", f"{r.code_bits:.3f}", r.codebook, str(r.rank)] for r in run.projections],
    )
    bits = [row.bits for row in run.projections]
    alt = f"Bars of {min(bits):.2f} to {max(bits):.2f} bits per weight, by layer and projection."
    text = "Bits per weight with everything stored in place of the weights, by layer and projection."
    return Section("bits", "True bits by layer", text, svg, alt, table)


def _errors(run: RunReport) -> Section:
    from kbvq.reporting.plots import grouped_bars

    title = "Predicted and real error"
    text = (
        "Predicted: the KL divergence that this projection alone was measured to cause at its bits. Real: the "
        "squared error of its outputs relative to their energy. The two have different units; a projection whose "
        "error is small may still be the one that the predictions depend on most."
    )
    if all(row.error is None and row.predicted_kl is None for row in run.projections):
        return _missing("errors", title, text, "the run record has no errors")
    series = {
        "predicted KL, nats": [r.predicted_kl for r in run.projections],
        "relative error": [r.error for r in run.projections],
    }
    series = {name: values for name, values in series.items() if any(value is not None for value in values)}
    svg = grouped_bars("errors", _labels(run.projections), series, "nats, or share", log=True)
    table = Table(
        "Predicted and real error by projection; relative error of each layer's output after it",
        ["projection", "predicted KL", "relative error", "layer's output"],
        [
            [
                r.name,
                _number(r.predicted_kl),
                _number(r.error),
                _number(run.layer_errors.get(-1 if r.layer is None else r.layer)),
            ]
            for r in run.projections
        ],
    )
    return Section("errors", title, text, svg, _range_alt("relative errors", [r.error for r in run.projections]), table)


def _limits(run: RunReport) -> Section:
    from kbvq.reporting.plots import grouped_bars

    title = "Distance from the limit"
    text = (
        "Half the binary logarithm of the weighted error over that of the best possible code of the same bits for "
        "Gaussian weights: so many bits per weight a perfect code would save."
    )
    values = [row.above_limit for row in run.projections]
    if all(value is None for value in values):
        return _missing("limit", title, text, "the run record has no distances")
    svg = grouped_bars("limit", _labels(run.projections), {"bits above the limit": values}, "bits above the limit")
    table = Table(
        "Bits above the Shannon limit",
        ["projection", "bits above"],
        [[r.name, _number(r.above_limit, 3)] for r in run.projections],
    )
    return Section("limit", title, text, svg, _range_alt("bits above the limit", values), table)


def _sensitivities(run: RunReport) -> Section:
    from kbvq.reporting.plots import heat_map

    title = "Sensitivities"
    text = "The KL divergence that each projection alone is predicted to cause at each number of code bits."
    rows = [row for row in run.projections if row.sensitivity]
    if not rows:
        return _missing("sensitivities", title, text, "they are measured for a bit budget only, which this run had not")
    rates = sorted({rate for row in rows for rate in row.sensitivity})
    values = [[row.sensitivity.get(rate, float("nan")) for rate in rates] for row in rows]
    columns = [f"{rate:g}" for rate in rates]
    svg = heat_map(
        "sensitivities", _labels(rows), values, axis="code bits", columns=columns, unit="predicted KL, nats", log=True
    )
    table = Table(
        "Predicted KL by code bits",
        ["projection", *columns],
        [[r.name, *map(_number, v)] for r, v in zip(rows, values, strict=True)],
    )
    worst = max(rows, key=lambda row: max(row.sensitivity.values()))
    return Section(
        "sensitivities", title, text, svg, f"Heat map; the most sensitive projection is {worst.name}.", table
    )


def _spectra(run: RunReport) -> Section:
    from kbvq.reporting.plots import curves

    title = "Spectrum and rank"
    text = (
        "Share of the energy of a projection's outputs in its strongest input directions: the steeper at the left, "
        "the more a shared basis of low rank can take out. The table has the rank that was chosen."
    )
    rows = [row for row in run.projections if row.spectrum]
    if not rows:
        return _missing("spectrum", title, text, "the run record has no spectra")
    series = {
        label: [(100 * index / (len(row.spectrum) - 1), 100 * share) for index, share in enumerate(row.spectrum)]
        for label, row in zip(_labels(rows), rows, strict=True)
    }
    svg = curves("spectrum", series, x_axis="strongest input directions, %", y_axis="share of the energy, %")
    table = Table(
        "Energy in the strongest directions, and the chosen rank",
        ["projection", "rank", "quarter of directions", "half of directions"],
        [
            [r.name, str(r.rank), *(f"{100 * r.spectrum[len(r.spectrum) // part]:.1f} %" for part in (4, 2))]
            for r in rows
        ],
    )
    return Section("spectrum", title, text, svg, f"{len(rows)} rising curves, one for each projection.", table)


def _tokens(run: RunReport) -> Section:
    from kbvq.reporting.plots import heat_map

    title = "Tokens per expert"
    text = (
        "Calibration tokens that the router sent to each expert. F: fewer than the floor, so its statistics lean on "
        "those of its layer. S: a super expert, whose outputs the model depends on; its layer keeps more bits."
    )
    banks = [bank for bank in run.banks if len(bank.tokens) > 1]
    if not banks:
        return _missing("tokens", title, text, "the run record has no token counts")
    marks = {
        "F": [(row, expert) for row, bank in enumerate(banks) for expert in bank.starved],
        "S": [(row, expert) for row, bank in enumerate(banks) for expert in bank.super],
    }
    labels = [_short(bank.path) for bank in banks]
    svg = heat_map("tokens", labels, [bank.tokens for bank in banks], axis="expert", unit="tokens", marks=marks)
    table = Table(
        "Tokens by bank",
        ["bank", "fewest", "most", "experts with few", "super experts"],
        [[b.path, f"{min(b.tokens):,}", f"{max(b.tokens):,}", _indices(b.starved), _indices(b.super)] for b in banks],
    )
    alt = (
        f"Heat map of {min(min(b.tokens) for b in banks):,} to {max(max(b.tokens) for b in banks):,} tokens per expert."
    )
    return Section("tokens", title, text, svg, alt, table)


def _expert_errors(run: RunReport) -> Section:
    from kbvq.reporting.plots import heat_map

    title = "Error by expert"
    text = "Weighted error of each expert's outputs relative to their energy."
    of_bank: dict[tuple[str, str], dict[int, float]] = {}
    for row in run.projections:
        experts = row.experts or range(len(row.by_expert))
        errors = zip(experts, row.by_expert, strict=bool(row.by_expert))
        of_bank.setdefault((bank_path(row.bank), row.projection), {}).update(errors)
    rows = {
        site: [error for _, error in sorted(by_expert.items())]
        for site, by_expert in of_bank.items()
        if len(by_expert) > 1
    }
    if not rows:
        return _missing("experts", title, text, "the run record has no errors of single experts")
    values = list(rows.values())
    labels = [_label(*site) for site in rows]
    svg = heat_map("experts", labels, values, axis="expert", unit="relative error", log=True)
    table = Table(
        "Error by expert",
        ["projection", "least", "greatest", "expert with the greatest"],
        [[".".join(site), _number(min(v)), _number(max(v)), str(v.index(max(v)))] for site, v in rows.items()],
    )
    return Section("experts", title, text, svg, _range_alt("relative errors", [e for v in values for e in v]), table)


def _routers(run: RunReport) -> Section:
    from kbvq.reporting.plots import grouped_bars

    title = "Router agreement"
    text = (
        "Share of the experts that the original model's router chose and the quantized model's did not: the picture. "
        "The table has the share that both chose."
    )
    texts = run.evaluation.get("perplexity") or {}
    found = {name: entry["router_agreement"] for name, entry in texts.items() if entry.get("router_agreement")}
    if not found:
        return _missing("routers", title, text, _HOW_TO_MEASURE)
    paths = list(dict.fromkeys(path for agreement in found.values() for path in agreement))
    series = {
        name: [None if path not in agreement else 1 - agreement[path] for path in paths]
        for name, agreement in list(found.items())[:4]
    }
    svg = grouped_bars("routers", [_short(path) for path in paths], series, "share chosen differently")
    table = Table(
        "Experts chosen alike",
        ["bank", *found],
        [[path, *(_number(agreement.get(path), 4) for agreement in found.values())] for path in paths],
    )
    shares = [1 - value for agreement in found.values() for value in agreement.values()]
    return Section("routers", title, text, svg, _range_alt("shares chosen differently", shares), table)


def _evaluation(run: RunReport) -> Section:
    title, text = "Evaluation", "On text that calibration did not see, with standard errors."
    rows = evaluation_rows(run.evaluation)
    if not rows:
        return _missing("evaluation", title, text, _HOW_TO_MEASURE)
    return Section(
        "evaluation", title, text, table=Table("Before and after", ["", "original", "quantized", "difference"], rows)
    )


def evaluation_rows(evaluation: dict[str, Any]) -> list[list[str]]:
    """[metric, original, quantized, difference] of what `kbvq eval` measured."""
    rows = []
    for name, text in (evaluation.get("perplexity") or {}).items():
        window = f"{name}, windows of {text.get('window')}"
        before = text.get("baseline_perplexity")
        change = "" if before is None else f"{text['perplexity'] - before:+.3f}"
        rows.append([f"token perplexity, {window}", _number(before), _number(text["perplexity"]), change])
        if "kl" in text:
            rows.append([f"KL(original ‖ quantized), {window}", "", "", _with_error(text["kl"], text.get("kl_stderr"))])
            rows.append(
                [f"top-1 agreement, {window}", "", "", _with_error(text["agreement"], text.get("agreement_stderr"))]
            )
    metrics = [
        (f"{task} {name}", metric)
        for task, entry in (evaluation.get("tasks") or {}).items()
        if entry.get("part_of", task) == task
        for name, metric in entry["metrics"].items()
    ]
    for name, metric in [*metrics, *(evaluation.get("means") or {}).items()]:
        row = [name]
        for column, sign in (("baseline", ""), ("model", ""), ("difference", "+")):
            cell = metric.get(column)
            row.append("" if cell is None else _with_error(cell["value"], cell["stderr"], sign))
        rows.append(row)
    return rows


def _continuations(run: RunReport) -> Section:
    title, text = "Continuations", "Greedy continuations of the same beginnings, before and after."
    generation = run.evaluation.get("generation") or {}
    after = (generation.get("model") or {}).get("continuations") or []
    if not after:
        return _missing("continuations", title, text, f"{_HOW_TO_MEASURE} --generation")
    before = (generation.get("baseline") or {}).get("continuations") or []
    quotes = [
        {
            "prompt": found["prompt"],
            "after": found["continuation"],
            "before": next((b["continuation"] for b in before if b["prompt"] == found["prompt"]), "not measured"),
        }
        for found in after
    ]
    return Section("continuations", title, text, quotes=quotes)


def _timeline(run: RunReport) -> Section:
    from kbvq.reporting.plots import timeline

    title, text = "Timeline", f"What the run spent its time on{'' if run.device is None else f', on {run.device}'}."
    if not run.steps:
        return _missing("timeline", title, text, "the checkpoint came without its times")
    svg = timeline("timeline", [(step.name, step.start, step.seconds) for step in run.steps])
    names = list(dict.fromkeys(step.name for step in run.steps))
    spent = {name: [step.seconds for step in run.steps if step.name == name] for name in names}
    table = Table(
        "Seconds by kind of step",
        ["step", "times", "seconds", "longest"],
        [[name, str(len(s)), f"{sum(s):,.1f}", f"{max(s):,.1f}"] for name, s in spent.items()],
    )
    alt = f"{len(run.steps)} steps; {max(spent, key=lambda name: sum(spent[name]))} took the most time."
    return Section("timeline", title, text, svg, alt, table)


def _configuration(run: RunReport) -> Section:
    text = "Everything that the run was asked for and what it ran with."
    parts = {
        "recipe": run.record.get("recipe"),
        "calibration": run.record.get("calibration"),
        "source": run.record.get("source"),
        "environment": run.record.get("environment"),
    }
    rows = [[f"{part}: {key}", str(value)] for part, entries in parts.items() for key, value in _flat(entries or {})]
    rows += [[key, str(run.record[key])] for key in ("compute_dtype",) if key in run.record]
    if not rows:
        return _missing("configuration", "Configuration", text, "the checkpoint came without kbvq_run.json")
    return Section(
        "configuration", "Configuration", text, table=Table("Configuration and versions", ["what", "value"], rows)
    )


def _flat(entries: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in sorted(entries.items()):
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return rows


_HOW_TO_MEASURE = "not measured: kbvq eval DIR --baseline MODEL --perplexity TEXT --report"


def _missing(id: str, title: str, text: str, why: str) -> Section:
    return Section(id, title, text, missing=why)


def _short(path: str) -> str:
    """The layer of a bank's path, with what is not simply its experts: "3", or "3 shared"; and the tier behind the
    first: "3 tier 2"."""
    bank, _, tier = path.partition(f".{TIERS}.")
    numbers = [part for part in bank.split(".") if part.isdigit()]
    name = (numbers[0] if numbers else bank) + (" shared" if "shared" in bank else "")
    return f"{name} tier {int(tier) + 2}" if tier else name


def _label(bank: str, projection: str) -> str:
    return f"{_short(bank)} {projection.removesuffix('_proj').replace('_', '/')}"


def _labels(rows: Sequence[ProjectionRow]) -> list[str]:
    return [_label(row.bank, row.projection) for row in rows]


def _number(value: float | None, digits: int = 4) -> str:
    if value is None or value != value:
        return "not recorded"
    return f"{value:.{digits}f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2e}"


def _with_error(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _indices(indices: list[int]) -> str:
    return ", ".join(map(str, indices)) or "none"


def _range_alt(what: str, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"Picture of {what} from {_number(min(known))} to {_number(max(known))}." if known else f"No {what}."
