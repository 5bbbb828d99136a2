"""A whole run over a checkpoint of real widths on this machine: `python eval/real_width_run.py`.

    python eval/real_width_run.py --layers 2 --windows 8 --output docs/results/real_width.md

The shape of OLMoE-1B-7B (64 experts of 2048 × 1024 in each layer, 16 heads) with fewer layers and random weights with
heavy-tailed channels, saved in bfloat16 as on the hub. It is planned, quantized, verified, loaded and asked for text,
each in a process of its own on one core. Seconds are CPU seconds, so that another process beside it disturbs less.
Random weights say nothing about quality. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import torch
from plan_table import CONFIGS
from speed_benchmark import heavy_tailed
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kbvq.storage.checkpoint import METRICS
from kbvq.storage.provenance import commit, hardware

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "tests" / "models" / "tiny-qwen3-moe"
TEXT = ROOT / "tests" / "data" / "calibration.txt"

_QUANTIZE = """
from collections import defaultdict
from kbvq.cli import main
from speed_benchmark import stage_times
parts = defaultdict(float)
with stage_times(parts):
    status = main(sys.argv[1:])
report(status=status, parts=parts)
"""

_PLAN = """
from pathlib import Path
from kbvq.quantization.pipeline import QuantizeOptions, dry_run
from kbvq.recipes import make_recipe
model, output, text, recipe, bits, windows, tokens = sys.argv[1:]
plan = dry_run(QuantizeOptions(model=model, output=Path(output), calibration=text, device="cpu",
    recipe=make_recipe(recipe, float(bits)), samples=int(windows), sequence_length=int(tokens)))
report(memory=plan.memory.total, disk=plan.disk.total, seconds=sum(plan.seconds.values()),
    output_bytes=plan.output_bytes, bits=plan.bits, num_weights=plan.num_weights)
"""

_GENERATE = """
import torch, kbvq
started = time.process_time()
model, tokenizer = kbvq.load(sys.argv[1], device="cpu")
loaded = time.process_time()
ids = tokenizer("The river", return_tensors="pt").input_ids
with torch.no_grad():
    tokens = model.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)
report(load=loaded - started, generate=time.process_time() - loaded, tokens=tokens.shape[1] - ids.shape[1])
"""

# VmHWM belongs to the process image; ru_maxrss would start from the memory of the process that forked this one.
_PROBE = """
import json, sys, time
def report(**values):
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps(values | {"peak": 1024 * int(peak), "cpu": time.process_time()}))
"""


def make_model(folder: Path, layers: int, experts: int, width_divisor: int = 1) -> int:
    """The checkpoint; returns its bytes. width_divisor: narrower experts, to try the script."""
    fields = CONFIGS["OLMoE-1B-7B"] | {"num_hidden_layers": layers, "num_experts": experts}
    for name in ("hidden_size", "intermediate_size"):
        fields[name] //= width_divisor  # type: ignore[operator]
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            for matrix in parameter.detach().view(-1, *parameter.shape[-2:]):
                matrix.copy_(0.02 * heavy_tailed(*matrix.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size="1GB")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def child(script: str, *arguments: object) -> dict[str, float]:
    """What a process of its own reports, with its peak resident bytes and its CPU seconds."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "eval"))),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", _PROBE + script, *map(str, arguments)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if run.returncode:
        raise SystemExit(f"a process failed: {' '.join(map(str, arguments))}")
    return json.loads(run.stdout.splitlines()[-1])


def table(numbers: dict) -> str:
    """numbers: as main gathers them."""
    plan, run, loaded, gigabyte = numbers["plan"], numbers["run"], numbers["loaded"], 1e9
    lines = [
        "# A whole run at real widths",
        "",
        f"OLMoE-1B-7B's shape with {numbers['layers']} of its 16 layers and {numbers['experts']} of its 64 experts: "
        f"{plan['num_weights'] / 1e9:.2f}·10⁹ weights in experts, {numbers['source_bytes'] / gigabyte:.2f} GB in "
        "bfloat16, random with heavy-tailed channels. Recipe "
        f"{numbers['recipe']}, {plan['bits']:.3f} true bits per expert weight, {numbers['windows']} windows of "
        f"{numbers['tokens']} tokens, one thread.",
        "",
        "| stage | steps | CPU s | s | peak memory, GB |",
        "|---|---|---|---|---|",
    ]
    for stage in dict.fromkeys(line["stage"] for line in numbers["metrics"]):
        own = [line for line in numbers["metrics"] if line["stage"] == stage]
        cpu, seconds = (sum(line[name] for line in own) for name in ("cpu_seconds", "seconds"))
        peak = max(line["peak_memory"] for line in own)
        lines.append(f"| {stage} | {len(own)} | {cpu:.0f} | {seconds:.0f} | {peak / gigabyte:.2f} |")
    per_weight = 1e6 * run["cpu"] / plan["num_weights"]
    lines += [
        f"| the process | | {run['cpu']:.0f} | | {run['peak'] / gigabyte:.2f} |",
        f"| planned | | | {plan['seconds']:.0f} | {plan['memory'] / gigabyte:.2f} |",
        f"| load | | {loaded['load']:.1f} | | |",
        f"| generate {loaded['tokens']} tokens | | {loaded['generate']:.1f} | | {loaded['peak'] / gigabyte:.2f} |",
        "",
        f"{per_weight:.2f} µs of CPU a weight, everything. Of that, CPU s: "
        + ", ".join(f"{name} {value:.0f}" for name, value in sorted(run["parts"].items(), key=lambda x: -x[1]))
        + ".",
        "",
        f"The packed checkpoint has {numbers['packed_bytes'] / gigabyte:.2f} GB ({plan['output_bytes'] / gigabyte:.2f} "
        "planned); `kbvq verify` finds every file as written.",
        "",
        f"Made by `python eval/real_width_run.py --layers {numbers['layers']} --experts {numbers['experts']} --windows "
        f"{numbers['windows']} --tokens {numbers['tokens']}` on {date.today()} at commit "
        f"{numbers['commit']}, torch {torch.__version__}, {numbers['hardware']['processor']} with "
        f"{numbers['hardware']['cores']} cores, load {os.getloadavg()[0]:.0f} at the end.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64, help="of each layer")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--bits", type=float, default=2.25)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a window")
    parser.add_argument("--width-divisor", type=int, default=1, help="a narrower model, to try the script")
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoints (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "real_width.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() if options.work is None else nullcontext(options.work) as name:
        folder = Path(name)
        model, packed = folder / "model", folder / "packed"
        size = make_model(model, options.layers, options.experts, options.width_divisor)
        plan = child(_PLAN, model, packed, TEXT, options.recipe, options.bits, options.windows, options.tokens)
        run = child(
            _QUANTIZE, "quantize", "--model", model, "--output", packed, "--device", "cpu", "--calibration", TEXT,
            "--recipe", options.recipe, "--bits", options.bits, "--samples", options.windows,
            "--sequence-length", options.tokens,
        )  # fmt: skip
        if run["status"]:
            raise SystemExit("the run was refused")
        child("from kbvq.cli import main\nreport(status=main(sys.argv[1:]))", "verify", packed)
        numbers = {
            "layers": options.layers,
            "experts": options.experts,
            "recipe": options.recipe,
            "windows": options.windows,
            "tokens": options.tokens,
            "source_bytes": size,
            "packed_bytes": sum(path.stat().st_size for path in packed.glob("*.safetensors")),
            "plan": plan,
            "run": run,
            "loaded": child(_GENERATE, packed),
            "metrics": [json.loads(line) for line in (packed / METRICS).read_text(encoding="utf-8").splitlines()],
            "commit": commit(),
            "hardware": hardware(),
        }
    options.output.with_suffix(".json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    text = table(numbers)
    options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
