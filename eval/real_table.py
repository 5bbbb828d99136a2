"""The table of real models: kbvq and the other tools on a testbed of eval/real_model.py, and on the bundled model.

    python eval/real_table.py --models OUT --work DIR --model one carved --bits 2 3 --seed 0

Every row is a quantized checkpoint scored against its original on unseen text: KL(original ‖ quantized) and ΔNLL in
nats per token, top-1 agreement, true bits per expert weight, the ranks of the shared bases (rank × projections), CPU
time and peak memory of what made it. kbvq's rows are made here, those of other tools by eval/peers/run.py in DIR;
`--ablate fast` adds a row for each part that is left out of that recipe (docs/results/ablation.md). Choices are made on
the validation text; the test text is for the table alone. Rows that the JSON file has already are kept, so that an
interrupted run goes on. The first table of the README is written anew unless another file is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from readme_tables import score_cells, write_table
from transformers import AutoModelForCausalLM, AutoTokenizer

import kbvq
from kbvq.quantization.pipeline import QuantizeOptions, quantize_model
from kbvq.recipes import make_recipe
from kbvq.storage.checkpoint import inspect_checkpoint
from kbvq.structures import PROJECTIONS
from kbvq_eval.baseline import BaselineCache
from kbvq_eval.divergence import score_windows
from kbvq_eval.windows import text_windows

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "tests" / "models" / "tiny-qwen3-moe"
DATA = ROOT / "tests" / "data"
RESULTS = ROOT / "docs" / "results" / "real.json"
WINDOW = 256
CALIBRATION_WINDOWS = 128


@dataclass(frozen=True)
class Row:
    """One way of kbvq to quantize: a recipe at so many bits, and what is changed in it."""

    label: str
    recipe: str
    bits: float
    changes: dict[str, object] = field(default_factory=dict)


def kbvq_rows(group: int) -> list[Row]:
    """Rows that compete at `group` code bits: at the true bits of integers in groups of 64, at those of llama.cpp's
    smallest type of that group, and with all rates alike."""
    integers, smallest = group + 0.28, {2: 2.0625, 3: 3.0625}[group]
    return [
        Row("fast", "fast", integers),
        Row("default", "default", integers),
        Row("best", "best", integers),
        Row("default, fewer bits", "default", smallest),
        Row("default, all rates alike", "default", group, {"budget": False}),
    ]


PARTS = {
    "IDRE": {"idre": False},
    "BCOS": {"bcos": False},
    "IDRE and BCOS": {"idre": False, "bcos": False},
    "routing weights": {"routing_weighted": False},
    "column scales": {"column_scale": False},
    "matching": {"matching": False},
}
"""What an ablation leaves out of a recipe."""


def ablations(group: int, recipe: str) -> list[Row]:
    """A recipe at the true bits of integers in groups of 64, as it is and without each of PARTS."""
    return [Row(f"{recipe} without {part}", recipe, group + 0.28, changes) for part, changes in PARTS.items()]


PEERS = {
    2: ("rtn", "gptqmodel", "llmcompressor", "autoround", "autoround-best", "autoround-mixed")
    + tuple(f"llamacpp-{name}" for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K")),
    3: ("rtn", "gptqmodel", "llmcompressor", "autoround")
    + tuple(f"llamacpp-{name}" for name in ("IQ3_XXS", "IQ3_S", "Q3_K")),
}
SCORES = ("kl", "kl_stderr", "delta_nll", "delta_nll_stderr", "agreement", "perplexity", "baseline_perplexity")


def quantize(model: Path, row: Row, seed: int, samples: int, output: Path) -> None:
    quantize_model(
        QuantizeOptions(
            model=str(model),
            output=output,
            calibration=str(DATA / "calibration.txt"),
            recipe=make_recipe(row.recipe, row.bits, **row.changes),
            samples=samples,
            sequence_length=WINDOW,
            seed=seed,
            device="cpu",
        ),
        kbvq_version=kbvq.__version__,
    )


def measure(
    model: Path, row: Row, seed: int, samples: int, baseline: BaselineCache, kept: Path | None
) -> dict[str, object]:
    """Quantize in a process of its own, whose time and memory are those of the recipe alone; load; score.

    kept: where the checkpoint stays, if it is to. ranks: of the bases that the experts share, how many projections have
    which.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = kept or Path(folder) / "packed"
        job = dataclasses.asdict(row) | {"model": str(model), "seed": seed, "samples": samples, "output": str(output)}
        process = subprocess.Popen([sys.executable, __file__, "--quantize", json.dumps(job)])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{row.label} on {model} ended with status {process.returncode}")
        record = json.loads((output / "kbvq_run.json").read_text(encoding="utf-8"))
        quantized = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        scores = score_windows(quantized, baseline.tokens, baseline=baseline).summary()
        banks = inspect_checkpoint(output)["banks"]
    ranks = Counter(bank[projection]["rank"] for bank in banks for projection in PROJECTIONS)
    return {
        "tool": f"kbvq {row.label}",
        "ranks": dict(sorted(ranks.items())),
        "bits_per_weight": record["bits_per_weight"],
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,  # Linux reports KiB
    } | {name: scores[name] for name in SCORES}


def measure_peer(model: Path, peer: str, group: int, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """Run a peer, and take over its row.

    Its bits are those without padding, where it appears at its best; of mixed widths, what is stored.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "peers.json"
        command = [sys.executable, ROOT / "eval/peers/run.py", "--work", options.work, "--model", model]
        command += ["--peer", peer, "--bits", group, "--seed", seed, "--results", results]
        command += ["--test", DATA / f"{options.text}.txt", "--windows", options.windows]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.run(list(map(str, command)), check=True, env=environment)
        row = json.loads(results.read_text(encoding="utf-8"))["rows"][0]
    costs = {name: row[name] for name in ("cpu_seconds", "peak_rss_bytes") if name in row}
    bits = row["bits_per_weight" if peer.endswith("-mixed") else "minimal_bits"]
    return {"tool": peer, "bits_per_weight": bits} | costs | {n: row["scores"][n] for n in SCORES}


def markdown(rows: list[dict]) -> str:
    """A table for each model and text, one line per tool: means over seeds, in brackets least and greatest KL."""
    parts = []
    for table in dict.fromkeys((row["model"], row["text"], row["samples"]) for row in rows):
        found = [row for row in rows if (row["model"], row["text"], row["samples"]) == table]
        model, text, samples = table
        title = f"{model}, {text} text ({found[0]['predicted_tokens']} tokens), calibrated on {samples} windows"
        parts += [f"## {title}", ""]
        parts.append("| | group | true bits | KL | ΔNLL ± s.e. | top-1, % | ranks | seeds | CPU s | peak GiB |")
        parts.append("|---|---|---|---|---|---|---|---|---|---|")
        for group, tool in dict.fromkeys((row["group"], row["tool"]) for row in found):
            runs = [row for row in found if (row["group"], row["tool"]) == (group, tool)]
            mean = {
                name: statistics.fmean(run[name] for run in runs)
                for name in (*SCORES, "bits_per_weight", "cpu_seconds", "peak_rss_bytes")
                if all(run.get(name) is not None for run in runs)
            }
            spread = f" ({min(r['kl'] for r in runs):.4f}–{max(r['kl'] for r in runs):.4f})" if len(runs) > 1 else ""
            ranks = ", ".join(f"{rank} × {count}" for rank, count in runs[0].get("ranks", {}).items())
            cost = " | "
            if "cpu_seconds" in mean:
                cost = f"{mean['cpu_seconds']:.0f} | {mean['peak_rss_bytes'] / 2**30:.2f}"
            parts.append(
                f"| {tool} | {group} | {mean['bits_per_weight']:.3f} | {mean['kl']:.4f}{spread} | "
                f"{mean['delta_nll']:+.4f} ± {mean['delta_nll_stderr']:.4f} | {100 * mean['agreement']:.1f} | "
                f"{ranks} | {len(runs)} | {cost} |"
            )
        parts.append("")
    return "\n".join(parts)


SHOWN = {
    "AutoRound 0.16.1, group 64, 200 iterations": ("autoround", "autoround"),
    "llama.cpp IQ2_XS and IQ3_XXS, importance matrix": ("llamacpp-IQ2_XS", "llamacpp-IQ3_XXS"),
    "kbvq `default`": ("kbvq default", "kbvq default"),
    "kbvq `best`": ("kbvq best", "kbvq best"),
}
"""Rows of the README's table: the tool at 2 and the one at 3 bits."""

MODELS = {
    "one": "one expert a layer",
    "dealt": "8 experts that share its neurons, all active",
    "carved": "8 routed experts and a shared one, carved out of it",
    "upcycled": "4 experts upcycled from it",
}


def readme_table(rows: list[dict]) -> str:
    """The README's table: both rates side by side, means over seeds, test text and CALIBRATION_WINDOWS windows."""
    lines = [
        "| SmolLM2-135M as | | true bits | KL | ΔNLL ± s.e. | top-1 | true bits | KL | ΔNLL ± s.e. | top-1 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    key = {"text": "test", "samples": CALIBRATION_WINDOWS}
    for model, description in MODELS.items():
        for name, tools in SHOWN.items():
            found = {}
            for group, tool in zip((2, 3), tools, strict=True):
                wanted = key | {"model": model, "tool": tool, "group": group}
                found[group] = [row for row in rows if wanted.items() <= row.items()]
            if not any(found.values()):
                continue
            cells = [description, name]
            for runs in found.values():
                cells += score_cells(runs, 3)
            lines.append("| " + " | ".join(cells) + " |")
            description = ""
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="what eval/real_model.py wrote; not needed for the bundled model")
    parser.add_argument("--model", nargs="+", default=["one", "dealt", "carved", "upcycled", "bundled"])
    parser.add_argument("--work", type=Path, help="environments and checkpoints of other tools (eval/peers/run.py)")
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 3), default=[2, 3])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--ablate", nargs="+", default=[], choices=("fast", "default"), help="recipes to take apart")
    parser.add_argument(
        "--samples", type=int, default=CALIBRATION_WINDOWS, help="windows of 256 tokens to calibrate on"
    )
    parser.add_argument("--only", nargs="+", help="tools to measure: labels of kbvq's rows, names of peers")
    parser.add_argument("--text", choices=("validation", "test"), default="validation")
    parser.add_argument("--windows", type=int, default=48, help="of 256 tokens, that are scored")
    parser.add_argument("--keep", type=Path, help="folder in which kbvq's checkpoints stay (for eval/task_table.py)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quantize", help=argparse.SUPPRESS)  # see measure
    options = parser.parse_args()
    if options.quantize:
        job = json.loads(options.quantize)
        row = Row(*(job[field.name] for field in dataclasses.fields(Row)))
        quantize(Path(job["model"]), row, job["seed"], job["samples"], Path(job["output"]))
        return
    results: dict = {"results": []}
    if options.output.exists():
        results = json.loads(options.output.read_text(encoding="utf-8"))
    versions = {"kbvq": kbvq.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for name in options.model:
        measure_model(name, options, results, versions)
    if options.output.resolve() == RESULTS:
        write_table("a real model", readme_table(results["results"]))
    print(markdown(results["results"]))


def measure_model(name: str, options: argparse.Namespace, results: dict, versions: dict[str, str]) -> None:
    """Measure the rows of one model that `results` does not have, and write them down one by one."""
    model = BUNDLED if name == "bundled" else options.models / name
    text = (DATA / f"{options.text}.txt").read_text(encoding="utf-8")
    windows = text_windows(text, AutoTokenizer.from_pretrained(model), WINDOW).tokens[: options.windows]
    baseline = None
    for seed in options.seed:
        for group in options.bits:
            rows = [row for recipe in options.ablate for row in ablations(group, recipe)]
            own = {row.label: row for row in kbvq_rows(group) + rows}
            peers = PEERS[group] if options.work else ()
            for tool in (*own, *peers):
                key = {"model": name, "text": options.text, "group": group, "seed": seed, "samples": options.samples}
                label = f"kbvq {tool}" if tool in own else tool
                same = [row for row in results["results"] if row["tool"] == label and key.items() <= row.items()]
                if same or (options.only and tool not in options.only):
                    continue
                if tool in own:
                    if baseline is None:
                        original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
                        baseline = BaselineCache.of_model(original, windows)
                        del original
                    kept = options.keep and options.keep / f"{name}-{tool.replace(' ', '-')}-{group}-{seed}"
                    row = measure(model, own[tool], seed, options.samples, baseline, kept)
                else:
                    row = measure_peer(model, tool, group, seed, options)
                row |= key | {"predicted_tokens": windows.numel() - len(windows), "versions": versions}
                results["results"].append(row)
                order = ("model", "text", "samples", "group", "tool", "seed")
                results["results"].sort(key=lambda row: tuple(row[part] for part in order))
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                options.output.with_suffix(".md").write_text(markdown(results["results"]), encoding="utf-8")
                print(f"{name} {label}: {row['bits_per_weight']:.3f} bits, KL {row['kl']:.4f}", flush=True)


if __name__ == "__main__":
    main()
