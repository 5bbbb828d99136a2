"""Tokens a second of whole models on a CPU: packed and not, by transformers, and GGUF files by llama.cpp, in turn.

    python eval/generation_speed.py --models ORIGINAL PACKED … --gguf FILE.gguf --llama-bench build/bin/llama-bench

Models are loaded in bfloat16. Prefill: 512 tokens at once; decode: 32 tokens, one by one, after a prompt of 32, with a
cache, in a batch of one. The best of several rounds, in each of which every model has its turn. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kbvq  # noqa: F401  # registers the packed format
from kbvq.storage.provenance import commit, hardware
from kbvq_eval.generation import NEW_TOKENS, PREFILL_TOKENS, measure_generation
from kbvq_eval.windows import text_windows

TEXT = Path(__file__).resolve().parent.parent / "tests" / "data" / "validation.txt"


def llama_bench(program: Path, gguf: Path, threads: int) -> tuple[float, float]:
    """Tokens a second of prefill and of decode."""
    command = [program, "-m", gguf, "-t", threads, "-p", PREFILL_TOKENS, "-n", NEW_TOKENS, "-r", 1, "-o", "json"]
    out = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
    rates = {(row["n_prompt"], row["n_gen"]): row["avg_ts"] for row in json.loads(out)}
    return rates[PREFILL_TOKENS, 0], rates[0, NEW_TOKENS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", default=[], help="folders that transformers loads")
    parser.add_argument("--gguf", type=Path, nargs="+", default=[])
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's program of that name; needed for --gguf")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.gguf and not options.llama_bench:
        parser.error("--gguf needs --llama-bench, the program that runs them")
    loaded = {}
    for folder in options.models:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = text_windows(TEXT.read_text(encoding="utf-8"), tokenizer, PREFILL_TOKENS).tokens[:3]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        loaded[folder.name] = model, tokenizer, tokens
    machine = hardware()
    print(f"{machine['processor']}, {machine['cores']} cores, torch {torch.__version__}, commit {commit()}\n")
    print("| model | threads | weights, MB | prefill, tokens/s | decode, tokens/s |\n|---|---|---|---|---|")
    for threads in options.threads:
        torch.set_num_threads(threads)
        rates: dict[str, list[tuple[float, float]]] = defaultdict(list)
        sizes = {file.name: file.stat().st_size for file in options.gguf}
        for _ in range(options.rounds):
            for name, parts in loaded.items():
                found = measure_generation(*parts)
                sizes[name] = found["weight_bytes"]
                rates[name].append((found["prefill_tokens_per_second"], found["decode_tokens_per_second"]))
            for file in options.gguf:
                rates[file.name].append(llama_bench(options.llama_bench, file, threads))
        for name, found in rates.items():
            prefill, decode = (max(column) for column in zip(*found, strict=True))
            print(f"| {name} | {threads} | {sizes[name] / 1e6:.1f} | {prefill:.0f} | {decode:.1f} |", flush=True)


if __name__ == "__main__":
    main()
