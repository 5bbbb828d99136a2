"""Peak memory of quantization against depth, width and number of experts: `python eval/memory_benchmark.py`.

Random models of the bundled one's family are quantized, each in a process of its own. The peak must not follow the
depth, and must be within what the plan says for the width and the experts. Two peaks are measured: of all resident
memory, pages of files included, which the system takes back when it needs them, and of what is in no file, sampled;
the plan is about the latter. The last row allows no more memory than the least that the run can do with, so that
statistics of the experts go to the disk. Linux only. Writes docs/results/memory.md.
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
    "depth": [(layers, 256, 128, 8) for layers in (4, 16)],
    "width": [(2, hidden, hidden // 4, 4) for hidden in (512, 1024, 2048)],
    "experts": [(2, 512, 128, experts) for experts in (16, 64, 128)],
}
"""By what grows: layers, hidden size, intermediate size, experts."""

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
    peaks = peak_memory(
        "quantize", "--model", options.model, "--output", str(options.output), "--calibration", options.calibration,
        "--recipe", recipe, "--bits", str(BITS), "--samples", str(SAMPLES), "--device", "cpu", "--quiet",
        "--max-memory", str(options.max_memory),
    )  # fmt: skip
    return size, plan, *peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grow", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "memory.md")
    options = parser.parse_args()
    peak, own = peak_memory()
    columns = "layers|hidden|intermediate|experts|model on disk|planned|most of it|peak|of it in no file|in files"
    lines = ["| " + columns.replace("|", " | ") + " |", "|---" * (columns.count("|") + 1) + "|"]
    lines.append(f"| none: imports alone | | | | | | | {peak / MEGABYTE:.0f} | {own / MEGABYTE:.0f} | |")
    runs = [(shape, False) for name in options.grow for shape in SHAPES[name]]
    for shape, least in [*runs, (runs[-1][0], True)]:
        with tempfile.TemporaryDirectory() as folder:
            size, plan, peak, own = measure(Path(folder), shape, options.recipe, least=least)
        largest = max((name for name in plan.memory.parts if name != "program"), key=plan.memory.parts.__getitem__)
        on_disk = f"{plan.disk.parts['statistics'] / MEGABYTE:.0f} of statistics" if plan.spills else ""
        cells = [*map(str, shape), *(f"{number / MEGABYTE:.0f}" for number in (size, plan.memory.total)), largest]
        cells += [f"{peak / MEGABYTE:.0f}", f"{own / MEGABYTE:.0f}", on_disk]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    note = (
        f"\n\nMiB. Made by `python eval/memory_benchmark.py`: recipe {options.recipe}, bfloat16 on disk, float32 in "
        f"memory, {SAMPLES} windows\nof 256 tokens, {torch.get_num_threads()} thread. planned: by the dry run, which "
        "counts a program of 560. peak: resident, with the pages\nof files (activations, shards), which the system "
        "takes back when it needs them. The last row has no more memory than it can do with\n(`--max-memory`): "
        "statistics of the experts are in files, and the bytes of the result are those of the row above.\n"
    )
    options.output.write_text("\n".join(lines) + note, encoding="utf-8")


if __name__ == "__main__":
    main()
