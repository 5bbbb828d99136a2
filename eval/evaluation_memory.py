"""Peak memory of `kbvq eval --baseline` against the size of the models: `python eval/evaluation_memory.py`.

A random mixture of experts and a copy of it with noise, each the other's size, are compared on the CPU by a process of
its own, in the dtype of their files. The peak is that of all resident pages (VmHWM), those of mapped files with them.
Linux only. Writes docs/results/evaluation_memory.md.
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
import json, sys
from kbvq.cli import main
status = main(sys.argv[1:]) if len(sys.argv) > 1 else 0
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"status": status, "peak": 1024 * int(peak)}))
"""


def peak_bytes(*arguments: str) -> int:
    """Of a process that runs this command line, or only imports it without arguments."""
    path = os.pathsep.join(str(ROOT / name) for name in (".", "eval", "kernels"))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", _PROBE, *arguments], capture_output=True, text=True, env=environment)
    if run.returncode:
        raise SystemExit(run.stderr)
    result = json.loads(run.stdout.splitlines()[-1])
    if result["status"]:
        raise SystemExit(run.stderr)
    return result["peak"]


def make_models(folder: Path, layers: int, dtype: torch.dtype) -> int:
    """The model and its noisy copy; returns the bytes of one."""
    config = AutoConfig.from_pretrained(MODEL, num_hidden_layers=layers, moe_intermediate_size=2048, hidden_size=512)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name in ("baseline", "model"):
        model.save_pretrained(folder / name, max_shard_size="200MB")
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.01 * torch.randn(parameter.shape[-1:], dtype=parameter.dtype))
    return sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))


def evaluate(layers: int, dtype: str) -> tuple[int, int]:
    """Bytes of one model, and the peak of the evaluation."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_models(folder, layers, getattr(torch, dtype))
        (folder / "text.txt").write_text((ROOT / "tests/data/test.txt").read_text(encoding="utf-8")[:12000])
        return size, peak_bytes(
            "eval", f"{folder}/model", "--baseline", f"{folder}/baseline", "--perplexity", f"{folder}/text.txt",
            "--window", "128", "--dtype", dtype, "--device", "cpu", "--quiet",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 24], help="some 200 MB each in float32")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "evaluation_memory.md")
    options = parser.parse_args()
    imports = peak_bytes()
    lines = ["| | one model, MiB | peak, MiB | less imports | of one model |", "|---|---|---|---|---|"]
    for dtype in options.dtype:
        for layers in options.layers:
            size, peak = evaluate(layers, dtype)
            mebibytes = " | ".join(f"{count / (1 << 20):.0f}" for count in (size, peak, peak - imports))
            lines.append(f"| {dtype} | {mebibytes} | {(peak - imports) / size:.2f} |")
    lines += ["", "Made by `python eval/evaluation_memory.py`: model and baseline of equal size, all resident pages."]
    text = "\n".join(lines) + "\n"
    options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
