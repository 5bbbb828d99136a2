"""Peak memory of quantization against depth, width and number of experts: `python eval/memory_benchmark.py`.

Random models of the bundled one's family are quantized, each in a process of its own. The peak must not follow the
depth, and must be within what the plan says for the width and the experts. Two peaks are measured: of all resident
memory, pages of files included, which the system takes back when it needs them, and of what is in no file, sampled;
the plan is about the latter. The last row allows no more memory than the least that the run can do with, so that
statistics of the experts go to the disk. Rows of other shapes in memory.json are kept; writes it and memory.md, in
docs/results. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kbvq.quantization.pipeline import QuantizeOptions, prepare_run
from kbvq.quantization.run_plan import RunPlan
from kbvq.recipes import make_recipe

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "models" / "tiny-qwen3-moe"
TEXT = ROOT / "tests" / "data" / "calibration.txt"
SAMPLES, BITS = 32, 2.25
MEGABYTE = 1 << 20

SHAPES = {
    "depth": [(layers, 256, 128, 16) for layers in (4, 16)],
    "width": [(2, hidden, hidden // 4, 4) for hidden in (1024, 2048)],
    "experts": [(2, 512, 128, experts) for experts in (16, 64)],
    "least": [(2, 512, 128, 64)],
    "tuning": [(layers, 256, 128, 16) for layers in (4, 16)],
}
"""By what grows: layers, hidden size, intermediate size, experts; least: with no more memory than it can do with;
tuning: with the recipe best, which tunes the whole model at the end, here in four steps."""

# VmHWM belongs to the process image; ru_maxrss would start from the memory of the process that forked this one.
_PROBE = """
import json, sys, threading
from kbvq.cli import main

def field(name):
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name)))

own, done = [field("RssAnon")], threading.Event()

def watch():
    while not done.wait(0.005):
        own.append(field("RssAnon"))

watcher = threading.Thread(target=watch)
watcher.start()
status = main(sys.argv[1:]) if len(sys.argv) > 1 else 0
done.set()
watcher.join()
print(json.dumps({"status": status, "peak": field("VmHWM"), "own": max(own)}))
"""


def make_model(folder: Path, layers: int, hidden: int, intermediate: int, experts: int) -> int:
    """A random model of that shape; returns its bytes on disk."""
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "moe_intermediate_size": intermediate}
    config = AutoConfig.from_pretrained(MODEL, **shape, num_experts=experts)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="50MB")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def peak_memory(*arguments: str) -> tuple[int, int]:
    """Peak bytes of a process that runs this command line, or only imports it without arguments: resident ones, and
    those in no file."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    run = subprocess.run([sys.executable, "-c", _PROBE, *arguments], capture_output=True, text=True, env=environment)
    if run.returncode or not run.stdout:
        raise SystemExit(run.stderr)
    result = json.loads(run.stdout.splitlines()[-1])
    if result["status"]:
        raise SystemExit(run.stderr)
    return result["peak"], result["own"]


def measure(folder: Path, shape: Sequence[int], recipe: str, *, least: bool = False) -> tuple[int, RunPlan, int, int]:
    """Bytes of the model of that shape, the plan of its run, and the run's peaks. least: with no more memory than that
    which it can do with."""
    size = make_model(folder / "model", *shape)
    options = QuantizeOptions(
        str(folder / "model"),
        folder / "packed",
        str(TEXT),
        make_recipe(recipe, BITS),
        samples=SAMPLES,
        device="cpu",
        max_memory=1 if least else 1 << 50,
    )
    plan = prepare_run(options, folder / "model").plan
    if least:
        options = replace(options, max_memory=int(plan.memory.total) + 1)
        plan = prepare_run(options, folder / "model").plan
    # The memory of end-to-end tuning is that of one step.
    changes = ["--set", "distillation_steps=4"] if recipe == "best" else []
    peaks = peak_memory(
        "quantize", "--model", options.model, "--output", str(options.output), "--calibration", options.calibration,
        "--recipe", recipe, "--bits", str(BITS), "--samples", str(SAMPLES), "--device", "cpu", "--quiet",
        "--max-memory", str(options.max_memory), *changes,
    )  # fmt: skip
    return size, plan, *peaks


def key(name: str, shape: Sequence[int]) -> tuple[str, tuple[int, ...], bool]:
    """Recipe, shape and whether the memory is the least, of a row of SHAPES[name]."""
    return "best" if name == "tuning" else "default", tuple(shape), name == "least"


def markdown(kept: dict) -> str:
    """The page from what is kept in JSON."""
    columns = (
        "recipe|layers|hidden|intermediate|experts|model on disk|planned|most of it|peak|of it in no file|in files"
    )
    lines = ["| " + columns.replace("|", " | ") + " |", "|---" * (columns.count("|") + 1) + "|"]
    peak, own = (f"{kept['imports'][name] / MEGABYTE:.0f}" for name in ("peak", "own"))
    lines.append(f"| none: imports alone | | | | | | | | {peak} | {own} | |")
    for row in kept["rows"]:
        numbers = {name: f"{row[name] / MEGABYTE:.0f}" for name in ("size", "planned", "peak", "own", "on_disk")}
        cells = [row["recipe"], *map(str, row["shape"]), numbers["size"], numbers["planned"], row["largest"]]
        cells += [numbers["peak"], numbers["own"], f"{numbers['on_disk']} of statistics" if row["least"] else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + (
        "\n\nMiB. Made by `python eval/memory_benchmark.py`: bfloat16 on disk, float32 in memory, "
        f"{SAMPLES} windows of 256\ntokens, one thread. planned: by the dry run, which counts a program of 560. peak: "
        "resident, with the pages of files (activations,\nshards), which the system takes back when it needs them. The "
        "row with statistics in files had no more memory than the run\ncan do with (`--max-memory`).\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grow", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "memory.json")
    options = parser.parse_args()
    kept = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    kept["imports"] = dict(zip(("peak", "own"), peak_memory(), strict=True))
    order = [key(name, shape) for name, shapes in SHAPES.items() for shape in shapes]
    for grown, shape in [(name, shape) for name in options.grow for shape in SHAPES[name]]:
        facts = dict(zip(("recipe", "shape", "least"), key(grown, shape), strict=True))
        with tempfile.TemporaryDirectory() as folder:
            size, plan, peak, own = measure(Path(folder), shape, facts["recipe"], least=facts["least"])
        parts = {name: part for name, part in plan.memory.parts.items() if name != "program"}
        row = facts | {"size": size, "planned": plan.memory.total, "peak": peak, "own": own}
        row |= {"largest": max(parts, key=parts.__getitem__), "on_disk": plan.disk.parts["statistics"]}
        rows = {(old["recipe"], tuple(old["shape"]), old["least"]): old for old in kept["rows"]}
        rows[key(grown, shape)] = row
        kept["rows"] = [rows[known] for known in order if known in rows]
        print(row, flush=True)
        options.output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(markdown(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
