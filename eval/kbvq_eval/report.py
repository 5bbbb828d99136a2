"""The result of an evaluation as one plain-text table."""

from __future__ import annotations

from typing import Any

Row = tuple[str, str, str, str]
"""Name, baseline, model, difference."""


def format_table(result: dict[str, Any]) -> str:
    """Render the dict of `kbvq_eval.run.evaluate`: what was measured and how, then one row per metric."""
    rows: list[tuple[str, ...]] = [("", "baseline", "model", "difference")]
    rows += _text_rows(result["perplexity"]) + _task_rows(result["tasks"])
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
    text = result["perplexity"]
    if text is not None:
        bos = "BOS before the first" if text["bos"] else "no BOS"
        lines.append(
            f"text      {text['file']}: {text['windows']} windows of {text['window']} tokens, no overlap, {bos}"
        )
    if result["tasks"] and result["limit"] is not None:
        lines.append(f"tasks     LIMITED to the first {result['limit']} items of each")
    return lines


def _describe(model: dict[str, Any]) -> str:
    if model["bits_per_weight"] is None:
        return model["path"]
    bits = f"{model['bits_per_weight']:.3f} bits per expert weight, codes {model['code_bits']:.3f}"
    return f"{model['path']} ({bits})"


def _text_rows(text: dict[str, Any] | None) -> list[Row]:
    if text is None:
        return []
    perplexity = text["perplexity"]
    if "kl" not in text:
        return [
            ("token perplexity", "", f"{perplexity:.3f}", ""),
            ("NLL, nats/token", "", _cell(text, "nll"), ""),
        ]
    before = text["baseline_perplexity"]
    return [
        ("token perplexity", f"{before:.3f}", f"{perplexity:.3f}", f"{perplexity - before:+.3f}"),
        ("NLL, nats/token", _cell(text, "baseline_nll"), _cell(text, "nll"), _cell(text, "delta_nll", "+")),
        ("KL(baseline || model), nats/token", "", "", _cell(text, "kl")),
        ("top-1 agreement", "", "", _cell(text, "agreement")),
    ]


def _task_rows(tasks: dict[str, Any]) -> list[Row]:
    rows = []
    for task, entry in tasks.items():
        items = "" if entry["items"] is None else f" ({entry['items']} of {entry['total']})"
        for name, metric in entry["metrics"].items():
            before, difference = metric.get("baseline"), metric.get("difference")
            rows.append(
                (
                    f"{task} {name}{items}",
                    "" if before is None else _format(before["value"], before["stderr"]),
                    _format(metric["model"]["value"], metric["model"]["stderr"]),
                    "" if difference is None else _format(difference["value"], difference["stderr"], "+"),
                )
            )
    return rows


def _cell(values: dict[str, Any], name: str, sign: str = "") -> str:
    return _format(values[name], values[f"{name}_stderr"], sign)


def _format(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
