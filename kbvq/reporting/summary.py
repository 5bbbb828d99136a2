"""What a person reads on the screen when a run has ended: sizes, bits, expected loss and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kbvq.reporting.run_report import RunReport

_MEBIBYTE = 1 << 20


def summary_text(run: RunReport, folder: Path, documents: Sequence[Path], *, baseline: str) -> str:
    """A table of the parts' sizes, a line for each number of the whole, and the next commands.

    baseline: the original model, as the run was asked for it. documents: what was written for people to read.
    """
    rows = [("", "before", "after", "")]
    for size in (*run.sizes, run.size):
        before, after = (f"{number / _MEBIBYTE:,.1f} MiB" for number in (size.before, size.after))
        rows.append((size.part, before, after, f"{100 * size.after / max(size.before, 1):.0f} %"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    few = sum(len(bank.starved) for bank in run.banks)
    facts = {
        "true bits": f"{run.summary['bits_per_weight']:.3f} bits per expert weight with everything stored, "
        f"{run.summary['code_bits']:.3f} in codes; {run.summary['model_bits_per_weight']:.3f} of the whole model",
        "expected": ""
        if run.predicted_kl is None
        else f"KL of about {run.predicted_kl:.4f} nats per token by measured sensitivities",
        "experts": f"{few} saw few calibration tokens; more --samples would help" if few else "",
        "checkpoint": str(folder),
        "written": ", ".join(str(path) for path in documents),
        "next": f"kbvq eval {folder} --baseline {baseline} --perplexity TEXT --report",
        "": f"hf upload USER/NAME {folder} .",
    }
    return "\n".join([*(line.rstrip() for line in lines), "", *(f"{k:<11}{v}" for k, v in facts.items() if v)])
