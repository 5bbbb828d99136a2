"""Quantize a model's experts with other tools and measure what is left: `python eval/peers/run.py --work DIR`.

Each tool runs in an environment of its own below --work, made on first use from its requirements file, and sees the
same calibration windows. Its packed checkpoint is read back into a dense one (packed_formats.py), which checks that
every expert was quantized and nothing else was; the dense checkpoint is compared with the original on the test text.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from ggml import build_library
from packed_formats import (
    GGML_TYPES,
    dense_checkpoint,
    expert_name,
    ggml_bits,
    load_checkpoint,
    minimal_bits,
    round_to_nearest,
)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kbvq.models.calibration_text import calibration_windows, load_texts
from kbvq_eval.baseline import BaselineCache
from kbvq_eval.divergence import score_windows
from kbvq_eval.windows import text_windows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GROUP_SIZE = 64
NUM_WINDOWS = 128
WINDOW = 256
RECOMMENDED_WINDOWS = 512
"""What AutoRound's authors advise at 2 bits, of the same text."""

NAMES = {
    "rtn": "round to nearest",
    "gptqmodel": "GPTQModel, GPTQ with activation order",
    "llmcompressor": "llm-compressor, GPTQ",
    "autoround": "AutoRound, 200 iterations",
    "autoround-best": "AutoRound, as recommended for 2 bits",
    "autoround-mixed": "AutoRound, mixed bits",
} | {f"llamacpp-{name}": f"llama.cpp {name}, importance matrix" for name in GGML_TYPES}
"""Peer -> how the table calls it. What stands before the hyphen is the tool, the rest one of its settings."""

BUILD_ENVIRONMENT = {"BUILD_CUDA_EXT": "0"}
"""GPTQModel is built from source where it has no wheel; without this it looks for a CUDA compiler."""

logger = logging.getLogger("peers")


def competes(peer: str, bits: int) -> bool:
    """Whether a peer has something to show at a width: llama.cpp's types have one each, AutoRound's advice is for 2."""
    tool, _, variant = peer.partition("-")
    return GGML_TYPES[variant] == bits if tool == "llamacpp" else bits == 2 or not variant


def environment(tool: str, work: Path) -> Path:
    """The Python of the tool's environment, made from requirements-<tool>.txt unless that was done before."""
    requirements = HERE / f"requirements-{tool}.txt"
    lines = requirements.read_text(encoding="utf-8")
    digest = hashlib.sha256(lines.encode()).hexdigest()
    folder = work / "environments" / tool
    stamp, python = folder / "made-from", folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == digest:
        return python
    logger.info("making the environment %s", folder)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet"]
    # torch goes first and alone, at its pinned version: nothing that follows can then choose another build of it.
    torch_line = next(line for line in lines.splitlines() if line.startswith("torch=="))
    subprocess.run([*install, torch_line], check=True)
    subprocess.run([*install, "-r", requirements], check=True, env=os.environ | BUILD_ENVIRONMENT)
    if tool == "llamacpp":
        build_library(python, folder)
    stamp.write_text(digest, encoding="utf-8")
    return python


def run_tool(
    peer: str, bits: int, seed: int, folder: Path, *, model: Path, calibration: Path, work: Path
) -> dict[str, Any]:
    """Run a peer on the model; its checkpoint goes to `folder`/packed. Returns its facts and what the process used."""
    tool, _, variant = peer.partition("-")
    python = environment(tool, work)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = calibration_windows(
        load_texts(str(calibration)),
        tokenizer,
        samples=RECOMMENDED_WINDOWS if peer == "autoround-best" else NUM_WINDOWS,
        sequence_length=WINDOW,
        seed=seed,
        vocab_size=len(tokenizer),
    )
    save_file({"tokens": windows}, folder / "windows.safetensors")
    command = [python, HERE / f"quantize_{tool}.py", "--model", model, "--bits", bits, "--seed", seed]
    command += ["--variant", variant]
    command += [
        "--windows",
        folder / "windows.safetensors",
        "--output",
        folder / "packed",
        "--facts",
        folder / "tool.json",
    ]
    threads = torch.get_num_threads()
    variables = {
        "OMP_NUM_THREADS": str(threads),
        # GPTQModel refuses to start with fewer than 2.
        "GPTQMODEL_CPU_WORKERS": str(max(2, threads)),
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / "tool.log").open("wb") as log:
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=os.environ | variables
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{peer} ended with status {process.returncode}; its output is in {folder / 'tool.log'}")
    facts = json.loads((folder / "tool.json").read_text(encoding="utf-8"))
    # Linux reports ru_maxrss in KiB.
    return facts | {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_rss_bytes": usage.ru_maxrss * 1024}


def quantize(
    peer: str, bits: int, seed: int, folder: Path, *, model: Path, calibration: Path, work: Path
) -> dict[str, Any]:
    """Write the dense checkpoint `folder`/dense of a peer and return its row, without the scores."""
    original = load_checkpoint(model)
    row: dict[str, Any] = {"peer": peer, "bits": bits, "seed": seed}
    tool, _, variant = peer.partition("-")
    row["minimal_bits"] = ggml_bits(variant) if tool == "llamacpp" else minimal_bits(bits, GROUP_SIZE)
    if peer == "rtn":
        dense = {
            name: round_to_nearest(weight, bits, GROUP_SIZE) if expert_name(name) else weight
            for name, weight in original.items()
        }
        row |= {"bits_per_weight": row["minimal_bits"]}
    else:
        row |= run_tool(peer, bits, seed, folder, model=model, calibration=calibration, work=work)
        dense, size = dense_checkpoint(load_checkpoint(folder / "packed"), original, bits=bits)
        row |= {"bits_per_weight": size.bits_per_weight, "expert_bytes": dict(sorted(size.num_bytes.items()))}
    (folder / "dense").mkdir(parents=True, exist_ok=True)
    # float32 holds the 16-bit tensors and the products of code and scale exactly.
    save_file(
        {name: tensor.float() for name, tensor in dense.items()},
        folder / "dense" / "model.safetensors",
        {"format": "pt"},
    )
    for file in ("config.json", "generation_config.json"):
        shutil.copy(model / file, folder / "dense" / file)
    return row


def score(dense: Path, baseline: BaselineCache) -> dict[str, float | None]:
    """Means and standard errors of `WindowScores.summary` of a dense checkpoint, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    return score_windows(model, baseline.tokens, baseline=baseline).summary()


def table(rows: list[dict[str, Any]]) -> str:
    """One line of Markdown for each peer and width: means over seeds ± their standard deviation where there
    are several; in brackets the standard error of the first seed's ΔNLL over windows."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["bits"], row["peer"]].append(row)
    lines = [
        "| bits | tool | stored bits | minimal bits | seeds | KL | ΔNLL | top-1, % | seconds | CPU s | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = list(NAMES)
    for (bits, peer), group in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        first = group[0]
        cells = [
            str(bits),
            NAMES[peer],
            f"{first['bits_per_weight']:.3f}",
            f"{first['minimal_bits']:.3f}",
            str(len(group)),
            _mean_spread([row["scores"]["kl"] for row in group], 5),
            _mean_spread([row["scores"]["delta_nll"] for row in group], 4)
            + f" ({first['scores']['delta_nll_stderr']:.4f})",
            _mean_spread([100 * row["scores"]["agreement"] for row in group], 2),
        ]
        if "seconds" in first:
            cells += [_mean_spread([row[name] for row in group], 0) for name in ("seconds", "cpu_seconds")]
            cells += [_mean_spread([row["peak_rss_bytes"] / 2**30 for row in group], 2)]
        else:
            cells += ["", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean_spread(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3), default=[2, 3])
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="draws the calibration windows (default: 0)")
    parser.add_argument("--work", type=Path, required=True, help="folder for environments and checkpoints, gigabytes")
    parser.add_argument("--model", type=Path, default=ROOT / "tests/models/tiny-qwen3-moe")
    parser.add_argument("--calibration", type=Path, default=ROOT / "tests/data/calibration.txt")
    parser.add_argument("--test", type=Path, default=ROOT / "tests/data/test.txt")
    parser.add_argument("--windows", type=int, help="of the test text, that are scored (default: all)")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results/peers.json", help="rows are merged in")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work, model = args.work.resolve(), args.model.resolve()

    test = text_windows(args.test.read_text(encoding="utf-8"), AutoTokenizer.from_pretrained(model), WINDOW)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    test = dataclasses.replace(test, tokens=test.tokens[: args.windows])
    baseline = BaselineCache.of_model(original, test.tokens)
    for bits in args.bits:
        for peer in (peer for peer in args.peer if competes(peer, bits)):
            # Nothing is drawn when rounding to nearest.
            for seed in args.seed if peer != "rtn" else [0]:
                folder = work / "runs" / f"{peer}-{bits}-{seed}"
                row = quantize(peer, bits, seed, folder, model=model, calibration=args.calibration, work=work)
                row["scores"] = score(folder / "dense", baseline)
                (folder / "row.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
                logger.info("%s: %.3f bits, KL %.5f", folder.name, row["bits_per_weight"], row["scores"]["kl"])
                merge(args.results, row, test.protocol())


def merge(results: Path, row: dict[str, Any], protocol: dict[str, Any]) -> None:
    """Put a row into the results file in place of an older one of the same run, and write the table beside it."""
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"] if results.is_file() else []
    rows = [other for other in rows if any(other[key] != row[key] for key in ("peer", "bits", "seed"))] + [row]
    rows.sort(key=lambda entry: (entry["bits"], list(NAMES).index(entry["peer"]), entry["seed"]))
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps({"evaluation": protocol, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    results.with_suffix(".md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
