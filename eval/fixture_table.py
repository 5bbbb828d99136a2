"""The bundled model's table in the README: recipes and the parts of the paper on the bundled model, at true bits.

    python eval/fixture_table.py --bits 2 3 --seeds 0 1 2

Quantizes the model of tests/models with each row's recipe, loads the checkpoint with transformers and scores it
against the original on all windows of tests/data/test.txt: mean KL(original ‖ quantized) per token, paired ΔNLL with
its standard error over windows, top-1 agreement. The seed draws the calibration windows and starts the codebooks. Rows
that the JSON file already has are kept, so that an interrupted run goes on; `--fresh` measures all again. The table of
the README is written anew unless another file is given.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from readme_tables import SCORES, score_cells, write_table
from transformers import AutoModelForCausalLM, AutoTokenizer

import kbvq
from kbvq.quantization.pipeline import QuantizeOptions, quantize_model
from kbvq.recipes import make_recipe
from kbvq.structures import bank_path
from kbvq_eval.baseline import BaselineCache
from kbvq_eval.divergence import score_windows
from kbvq_eval.windows import text_windows

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "models" / "tiny-qwen3-moe"
DATA = ROOT / "tests" / "data"
RESULTS = ROOT / "docs" / "results" / "fixture.json"
WINDOW = 256


@dataclass(frozen=True)
class Row:
    """One row of the table: a recipe, and what is changed in it."""

    label: str
    recipe: str
    changes: dict[str, object]
    bits: float | None = None
    """What --bits is set to; None for the group's code bits."""
    samples: int = 128
    """Calibration windows."""


# At 3 bits an expert's own codebook of 4096 codewords would cost this small model 2.7 bits per weight, and k-means on
# all vectors hours; there the rows of the paper share one codebook per layer and projection, trained on a subset.
_THREE_BITS = {"codebook_scope": "bank", "max_vectors_per_codeword": 32, "kmeans_iterations": 20}

PAPER = (
    Row("plain VQ", "paper", {"idre": False, "bcos": False}),
    Row("+ IDRE", "paper", {"bcos": False}),
    Row("+ BCOS", "paper", {"idre": False}),
    Row("paper: IDRE + BCOS", "paper", {}),
    Row("paper with plain SVD (no KLT)", "paper", {"klt": False}),
)
UNIFORM = {"budget": False}


def rows(group: int) -> list[Row]:
    """Rows of one group: the paper and uniform rates at `group` code bits, our recipes at the true bits of the peers
    with groups of 64, and budgets at what the uniform rates take."""
    extra = _THREE_BITS if group == 3 else {}
    equal, uniform = group + 0.28, {2: 2.138, 3: 3.134}[group]
    return [
        *(Row(row.label, row.recipe, row.changes | extra) for row in PAPER),
        Row("fast", "fast", {}, equal),
        Row("default", "default", {}, equal),
        Row("best", "best", {}, equal),
        Row("fast, all rates alike, 48 windows", "fast", UNIFORM, samples=48),  # in a GPTQ's time
        Row("default, all rates alike", "default", UNIFORM),
        Row("default, same bits by budget", "default", {}, uniform),
        Row("default, rq", "default", {"codebook": "rq", "refits": 2}, equal),
        Row("default, rq-grouped", "default", {"codebook": "rq-grouped", "refits": 2}, equal),
        *([Row("default, rq-moe", "default", {"codebook": "rq-moe", "refits": 2}, equal)] if group == 2 else []),
    ]


def label_at(bits: int, label: str) -> str:
    """A row's label for the table: at 3 bits the paper's rows say what they change (_THREE_BITS)."""
    shared = bits == 3 and label in {row.label for row in PAPER}
    return f"{label}, a codebook per layer and projection" if shared else label


FIRST_SCREEN = ("plain VQ", "+ IDRE", "+ BCOS", "paper: IDRE + BCOS", "fast", "default", "best")
"""Rows of the README."""


def quantize(row: Row, group: int, seed: int, output: Path) -> None:
    quantize_model(
        QuantizeOptions(
            model=str(MODEL),
            output=output,
            calibration=str(DATA / "calibration.txt"),
            recipe=make_recipe(row.recipe, group if row.bits is None else row.bits, **row.changes),
            samples=row.samples,
            sequence_length=WINDOW,
            seed=seed,
            device="cpu",
        ),
        kbvq_version=kbvq.__version__,
    )


def measure(row: Row, bits: int, seed: int, text: str, baseline: BaselineCache) -> dict[str, object]:
    """Quantize in a process of its own, whose time and memory are those of the recipe alone; load; score."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "packed"
        command = [sys.executable, __file__, "--quantize", row.label, str(bits), str(seed), str(output)]
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{row.label} at {bits} bits ended with status {process.returncode}")
        seconds = time.perf_counter() - started
        record = json.loads((output / "kbvq_run.json").read_text(encoding="utf-8"))
        model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        scores = score_windows(model, baseline.tokens, baseline=baseline).summary()
    return {
        "bits": bits,
        "label": row.label,
        "seed": seed,
        "text": text,
        "bits_per_weight": record["bits_per_weight"],
        **{
            name: scores[name]
            for name in ("kl", "kl_stderr", "delta_nll", "delta_nll_stderr", "agreement", "perplexity")
        },
        "bits_above_limit_by_projection": bits_above_limit(record["layers"]),
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,  # Linux reports KiB
    }


def bits_above_limit(layers: list[dict]) -> list[float]:
    """By bank and projection, the mean over its experts of what the run record has for their tiers."""
    sums: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for report in (report for layer in layers for report in layer["banks"]):
        for projection in ("gate_up_proj", "down_proj"):
            found = len(report["tokens"]), report[projection]["bits_above_limit"]
            sums.setdefault((bank_path(report["path"]), projection), []).append(found)
    return [sum(n * bits for n, bits in own) / sum(n for n, _ in own) for own in sums.values()]


def cost(runs: list[dict]) -> str:
    """CPU seconds and peak GiB, means over the runs that have them."""
    measured = [run for run in runs if "cpu_seconds" in run]
    if not measured:
        return " | "
    seconds = statistics.mean(run["cpu_seconds"] for run in measured)
    return f"{seconds:.0f} | {statistics.mean(run['peak_rss_bytes'] for run in measured) / 2**30:.2f}"


def markdown(results: list[dict], versions: dict[str, str]) -> str:
    """One line per row, mean over seeds."""
    lines = [
        "| | group | true bits | mean KL | ΔNLL ± s.e. | top-1 agreement | above limit | seeds | CPU s | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for bits, label in dict.fromkeys((result["bits"], result["label"]) for result in results):
        runs = [result for result in results if (result["bits"], result["label"]) == (bits, label)]
        mean = {name: statistics.mean(run[name] for run in runs) for name in SCORES}
        spread = f" ({min(r['kl'] for r in runs):.5f}–{max(r['kl'] for r in runs):.5f})" if len(runs) > 1 else ""
        above = statistics.mean(value for run in runs for value in run["bits_above_limit_by_projection"])
        lines.append(
            f"| {label_at(bits, label)} | {bits} | {mean['bits_per_weight']:.3f} | {mean['kl']:.5f}{spread} | "
            f"{mean['delta_nll']:+.4f} ± {mean['delta_nll_stderr']:.4f} | {100 * mean['agreement']:.2f} % | "
            f"{above:.2f} | {len(runs)} | {cost(runs)} |"
        )
    threads = torch.get_num_threads()
    described = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        "\n".join(lines)
        + "\n\nBits above the Shannon limit: ½ log₂ of the weighted error over the Gaussian bound at the true bits.\n\n"
        + limits_table(results)
        + f"\n\nMade by `python eval/fixture_table.py` ({described}; {threads} CPU thread).\n"
    )


def limits_table(results: list[dict]) -> str:
    """Bits above the Shannon limit by layer and projection, means over seeds."""
    layers = len(results[0]["bits_above_limit_by_projection"]) // 2
    names = [f"{layer} {projection}" for layer in range(layers) for projection in ("gate/up", "down")]
    lines = ["| | group | true bits | mean | " + " | ".join(names) + " |", "|---|---|---|---|" + "---|" * len(names)]
    for bits, label in dict.fromkeys((result["bits"], result["label"]) for result in results):
        runs = [result for result in results if (result["bits"], result["label"]) == (bits, label)]
        columns = zip(*(run["bits_above_limit_by_projection"] for run in runs), strict=True)
        values = [statistics.mean(column) for column in columns]
        cells = " | ".join(f"{value:.2f}" for value in values)
        true_bits = statistics.mean(run["bits_per_weight"] for run in runs)
        lines.append(
            f"| {label_at(bits, label)} | {bits} | {true_bits:.3f} | {statistics.mean(values):.2f} | {cells} |"
        )
    return "\n".join(lines)


def readme_table(results: list[dict]) -> str:
    """The README's table: both rates side by side, means over seeds."""
    lines = [
        "| bundled MoE, unseen text | true bits | KL | ΔNLL ± s.e. | top-1 | true bits | KL | ΔNLL ± s.e. | top-1 |",
        "|---|---|---|---|---|---|---|---|---|",
        "| original (bfloat16) | 16 | 0 | 0 | 100 % | 16 | 0 | 0 | 100 % |",
    ]
    for label in FIRST_SCREEN:
        cells = [label]
        for bits in (2, 3):
            runs = [result for result in results if (result["bits"], result["label"]) == (bits, label)]
            cells += score_cells(runs, 4)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--text", default="test", choices=("test", "validation"), help="choices are made on validation")
    parser.add_argument("--only", nargs="+", help="labels of the rows to measure")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quantize", nargs=4, help=argparse.SUPPRESS)  # label, group, seed, output: see measure
    parser.add_argument("--fresh", action="store_true", help="measure rows again that the file already has")
    options = parser.parse_args()
    if options.quantize:
        label, group, seed, output = options.quantize
        row = next(row for row in rows(int(group)) if row.label == label)
        quantize(row, int(group), int(seed), Path(output))
        return

    versions = {"kbvq": kbvq.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions["python"] = platform.python_version()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    windows = text_windows((DATA / f"{options.text}.txt").read_text(encoding="utf-8"), tokenizer, WINDOW)
    original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    baseline = BaselineCache.of_model(original, windows.tokens)
    results = []
    if options.output.exists():
        results = json.loads(options.output.read_text(encoding="utf-8"))["results"]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for bits in options.bits:
            for row in rows(bits):
                if options.only and row.label not in options.only:
                    continue
                place = (bits, row.label, seed, options.text)
                others = [r for r in results if (r["bits"], r["label"], r["seed"], r["text"]) != place]
                if len(others) < len(results) and not options.fresh:
                    continue
                results = others
                measured = measure(row, bits, seed, options.text, baseline)
                results.append(measured)
                order = {(b, r.label): place for b in options.bits for place, r in enumerate(rows(b))}
                results.sort(key=lambda r: (r["bits"], order.get((r["bits"], r["label"]), len(order)), r["seed"]))
                content = {"versions": versions, "protocol": windows.protocol(), "results": results}
                options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
                options.output.with_suffix(".md").write_text(markdown(results, versions), encoding="utf-8")
                print(markdown([measured], versions).splitlines()[2], flush=True)
    if options.text == "test" and options.output.resolve() == RESULTS:
        write_table("the bundled model", readme_table(results))
    print(markdown(results, versions))


if __name__ == "__main__":
    main()
