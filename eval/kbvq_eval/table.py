"""The result of an evaluation as one plain-text table."""

from __future__ import annotations

from typing import Any

Row = tuple[str, str, str, str]
"""Name, baseline, model, difference."""


def format_table(result: dict[str, Any]) -> str:
    """Render the dict of `kbvq_eval.run.evaluate`: what was measured and how, then one row per metric."""
    rows: list[tuple[str, ...]] = [("", "baseline", "model", "difference")]
    for name, text in result["perplexity"].items():
        rows += _text_rows(name if len(result["perplexity"]) > 1 else "", text)
    rows += _task_rows(result["tasks"], result["means"]) + _generation_rows(result["generation"])
    if result["baseline"] is None:
        rows = [(name, model) for name, _, model, _ in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*_header(result), "", *lines])


def _header(result: dict[str, Any]) -> list[str]:
    lines = [f"model     {_describe(result['model'])}"]
    if result["baseline"] is not None:
        lines.append(f"baseline  {_describe(result['baseline'])}")
    lines.append(f"computed  in {result['dtype']} on {result['device']}")
    for text in result["perplexity"].values():
        bos = "BOS before the first" if text["bos"] else "no BOS"
        lines.append(
            f"text      {text['source']}: {text['windows']} windows of {text['window']} tokens, no overlap, {bos}"
        )
    if result["tasks"] and result["limit"] is not None:
        lines.append(f"tasks     LIMITED to the first {result['limit']} items of each")
    return lines


def _describe(model: dict[str, Any]) -> str:
    if model["bits_per_weight"] is None:
        return model["path"]
    bits = f"{model['bits_per_weight']:.3f} bits per expert weight, codes {model['code_bits']:.3f}"
    return f"{model['path']} ({bits})"


def _text_rows(name: str, text: dict[str, Any]) -> list[Row]:
    """name: put before each metric, empty where there is one text alone."""
    before = f"{name} " if name else ""
    perplexity = text["perplexity"]
    if "kl" not in text:
        return [
            (f"{before}token perplexity", "", f"{perplexity:.3f}", ""),
            (f"{before}NLL, nats/token", "", _cell(text, "nll"), ""),
        ]
    original = text["baseline_perplexity"]
    rows = [
        (f"{before}token perplexity", f"{original:.3f}", f"{perplexity:.3f}", f"{perplexity - original:+.3f}"),
        (f"{before}NLL, nats/token", _cell(text, "baseline_nll"), _cell(text, "nll"), _cell(text, "delta_nll", "+")),
        (f"{before}KL(baseline || model), nats/token", "", "", _cell(text, "kl")),
        (f"{before}top-1 agreement", "", "", _cell(text, "agreement")),
    ]
    if routers := text["router_agreement"].values():
        rows.append((f"{before}experts chosen alike", "", "", f"{sum(routers) / len(routers):.4f}"))
    return rows


def _task_rows(tasks: dict[str, Any], means: dict[str, Any]) -> list[Row]:
    """Of the tasks that were asked for, not of the members of their groups; then the means."""
    rows = []
    for task, entry in tasks.items():
        if task != entry["part_of"] and entry["part_of"] in tasks:
            continue
        items = "" if entry["items"] is None else f" ({entry['items']} of {entry['total']})"
        rows += [_metric_row(f"{task} {name}{items}", metric) for name, metric in entry["metrics"].items()]
    return rows + [_metric_row(name, metric) for name, metric in means.items()]


def _metric_row(name: str, metric: dict[str, Any]) -> Row:
    before, difference = metric.get("baseline"), metric.get("difference")
    return (
        name,
        "" if before is None else _format(before["value"], before["stderr"]),
        _format(metric["model"]["value"], metric["model"]["stderr"]),
        "" if difference is None else _format(difference["value"], difference["stderr"], "+"),
    )


def _generation_rows(generation: dict[str, Any]) -> list[Row]:
    if not generation:
        return []
    ours, theirs = generation["model"], generation.get("baseline")
    names = {
        f"prefill of {ours['prefill_tokens']} tokens, tokens/s": ("prefill_tokens_per_second", 1.0),
        "decode, batch 1, tokens/s": ("decode_tokens_per_second", 1.0),
        "weights in memory, MiB": ("weight_bytes", 1 << 20),
        "memory of the process or device, MiB": ("memory_bytes", 1 << 20),
    }
    rows = []
    for label, (name, unit) in names.items():
        values = [None if found is None else found[name] for found in (theirs, ours)]
        before, after = ("" if value is None else f"{value / unit:,.1f}" for value in values)
        ratio = f"x {values[1] / values[0]:.2f}" if all(values) else ""
        rows.append((label, before, after, ratio))
    return rows


def _cell(values: dict[str, Any], name: str, sign: str = "") -> str:
    return _format(values[name], values[f"{name}_stderr"], sign)


def _format(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
