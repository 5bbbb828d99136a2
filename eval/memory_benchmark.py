"""Peak memory of quantization against the size of the model: `python eval/memory_benchmark.py`.

Random models of the bundled one's shape with 4, 16 and 64 layers are quantized, each in a process of its own; the peak
resident memory must not follow the size. Linux only. Writes docs/results/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "models" / "tiny-qwen3-moe"

# VmHWM belongs to the process image; ru_maxrss would start from the memory of the process that forked this one.
_PROBE = """
import json, sys
from kbvq.cli import main
status = main(sys.argv[1:]) if len(sys.argv) > 1 else 0
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"status": status, "peak": 1024 * int(peak)}))
"""


def make_model(folder: Path, layers: int) -> int:
    """A random model of that depth; returns its bytes on disk."""
    config = AutoConfig.from_pretrained(MODEL, num_hidden_layers=layers)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="50MB")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def peak_memory(*arguments: str) -> int:
    """Peak resident bytes of a process that runs this command line, or only imports it without arguments."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", _PROBE, *arguments], capture_output=True, text=True, env=environment)
    result = json.loads(run.stdout.splitlines()[-1])
    if result["status"]:
        raise SystemExit(run.stderr)
    return result["peak"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "memory.md")
    options = parser.parse_args()
    megabyte = 1 << 20
    lines = ["| layers | model on disk, MiB | peak memory, MiB |", "|---|---|---|"]
    lines.append(f"| none: imports alone | | {peak_memory() / megabyte:.0f} |")
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as folder:
            size = make_model(Path(folder) / "model", layers)
            peak = peak_memory(
                "quantize", "--model", f"{folder}/model", "--output", f"{folder}/packed", "--quiet", "--device", "cpu",
                "--calibration", str(ROOT / "tests" / "data" / "calibration.txt"), "--samples", "32",
            )  # fmt: skip
        lines.append(f"| {layers} | {size / megabyte:.0f} | {peak / megabyte:.0f} |")
        print(lines[-1], flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    note = "\n\nMade by `python eval/memory_benchmark.py`: bfloat16 on disk, float32 in memory, 32 windows of 256.\n"
    options.output.write_text("\n".join(lines) + note, encoding="utf-8")


if __name__ == "__main__":
    main()
