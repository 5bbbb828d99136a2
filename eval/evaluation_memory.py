"""Peak memory of `kbvq eval --baseline` against the size of the models: `python eval/evaluation_memory.py`.

A random mixture of experts and a copy of it with noise are compared in bfloat16, each the other's size, in a process of
its own. Two peaks are given: of all resident pages, and of those that are not backed by a file (weights are read
through mapped files, whose pages the system takes back when it needs them). Linux only. Writes
docs/results/evaluation_memory.md.
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

_PROBE = """
import json, sys, threading, time
peaks = {"VmRSS": 0, "RssAnon": 0}
def watch():
    while True:
        for line in open("/proc/self/status"):
            name, _, rest = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], 1024 * int(rest.split()[0]))
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
from kbvq.cli import main
status = main(sys.argv[1:]) if len(sys.argv) > 1 else 0
print(json.dumps({"status": status, **peaks}))
"""


def peaks(*arguments: str) -> dict[str, int]:
    """Peak bytes of a process that runs this command line, or only imports it without arguments."""
    path = os.pathsep.join(str(ROOT / name) for name in (".", "eval", "kernels"))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", _PROBE, *arguments], capture_output=True, text=True, env=environment)
    if run.returncode:
        raise SystemExit(run.stderr)
    result = json.loads(run.stdout.splitlines()[-1])
    if result["status"]:
        raise SystemExit(run.stderr)
    return result


def make_models(folder: Path, layers: int) -> int:
    """The model and its noisy copy; returns the bytes of one."""
    config = AutoConfig.from_pretrained(MODEL, num_hidden_layers=layers, moe_intermediate_size=2048, hidden_size=512)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name in ("baseline", "model"):
        model.save_pretrained(folder / name, max_shard_size="200MB")
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.01 * torch.randn(parameter.shape[-1:], dtype=parameter.dtype))
    return sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="some 100 MB a layer")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "evaluation_memory.md")
    options = parser.parse_args()
    imports = peaks()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_models(folder, options.layers)
        (folder / "text.txt").write_text((ROOT / "tests/data/test.txt").read_text(encoding="utf-8")[:12000])
        found = peaks(
            "eval", f"{folder}/model", "--baseline", f"{folder}/baseline", "--perplexity", f"{folder}/text.txt",
            "--window", "128", "--dtype", "bfloat16", "--device", "cpu", "--quiet",
        )  # fmt: skip
    mebibyte = 1 << 20
    lines = ["| | MiB | less imports, of one model |", "|---|---|---|", f"| one model | {size / mebibyte:.0f} | |"]
    lines.append(f"| imports alone, resident | {imports['VmRSS'] / mebibyte:.0f} | |")
    for label, field in (("all resident pages", "VmRSS"), ("not backed by a file", "RssAnon")):
        share = (found[field] - imports[field]) / size
        lines.append(f"| peak, {label} | {found[field] / mebibyte:.0f} | {share:.2f} |")
    note = "\n\nMade by `python eval/evaluation_memory.py`: model and baseline of equal size, bfloat16.\n"
    text = "\n".join(lines) + note
    options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
