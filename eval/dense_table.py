"""What the bits of the matrices outside the experts cost: `python eval/dense_table.py`.

Quantizes a model with one recipe and its attention, embedding and head at 16, 8 and 4 bits, loads each checkpoint with
transformers and scores it against the original on all windows of a text: mean KL(original ‖ quantized) per token,
paired ΔNLL with its standard error over windows, top-1 agreement, bits and bytes of the whole model. Rows that the JSON
file already has are kept. Writes docs/results/dense.json and dense.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import kbvq
from kbvq.quantization.pipeline import QuantizeOptions, quantize_model
from kbvq.recipes import DENSE_BITS, make_recipe
from kbvq.storage.checkpoint import inspect_checkpoint
from kbvq_eval.baseline import BaselineCache
from kbvq_eval.divergence import score_windows
from kbvq_eval.windows import text_windows

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "models" / "tiny-qwen3-moe"
DATA = ROOT / "tests" / "data"


def measure(
    model: Path, calibration: Path, baseline: BaselineCache, recipe: str, bits: float, dense_bits: int, window: int
) -> dict[str, object]:
    """Quantize, load and score once."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "packed"
        options = QuantizeOptions(
            model=str(model),
            output=output,
            calibration=str(calibration),
            recipe=make_recipe(recipe, bits, dense_bits=dense_bits),
            sequence_length=window,
            device="cpu",
        )
        record = quantize_model(options, kbvq_version=kbvq.__version__)
        seconds = time.process_time() - started
        summary = inspect_checkpoint(output)
        packed = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        scores = score_windows(packed, baseline.tokens, baseline=baseline).summary()
    matrices = record.get("dense", {}).get("matrices", [])
    return {
        "model": model.name,
        "recipe": recipe,
        "bits": bits,
        "dense_bits": dense_bits,
        "expert_bits_per_weight": summary["bits_per_weight"],
        "dense_bits_per_weight": _mean_bits(summary["dense"]),
        "model_bits_per_weight": summary["model_bits_per_weight"],
        "model_bytes": summary["model_bytes"],
        "largest_relative_error": max((row["relative_error"] for row in matrices), default=0.0),
        **{name: scores[name] for name in ("kl", "kl_stderr", "delta_nll", "delta_nll_stderr", "agreement")},
        "cpu_seconds": seconds,
    }


def _mean_bits(dense: list[dict]) -> float:
    weights = sum(row["weights"] for row in dense)
    return 8 * sum(row["bytes"] for row in dense) / weights if weights else 16.0


def markdown(results: list[dict], versions: dict[str, str]) -> str:
    lines = [
        "# Matrices outside the experts",
        "",
        "| model | recipe | `--dense-bits` | true bits: experts | outside | whole model | MB | mean KL | ΔNLL ± s.e. | "
        "top-1 | largest error | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        lines.append(
            f"| {row['model']} | {row['recipe']} | {row['dense_bits']} | {row['expert_bits_per_weight']:.3f} | "
            f"{row['dense_bits_per_weight']:.3f} | {row['model_bits_per_weight']:.3f} | "
            f"{row['model_bytes'] / 1e6:.2f} | {row['kl']:.5f} ± {row['kl_stderr']:.5f} | "
            f"{row['delta_nll']:+.4f} ± {row['delta_nll_stderr']:.4f} | {100 * row['agreement']:.2f} % | "
            f"{row['largest_relative_error']:.1e} | {row['cpu_seconds']:.0f} |"
        )
    described = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        "\n".join(lines)
        + "\n\nLargest error: of a packed matrix, weighted by its inputs, relative to its outputs' energy.\n"
        f"\nMade by `python eval/dense_table.py` ({described}; CPU, {torch.get_num_threads()} thread).\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, default=DATA / "calibration.txt")
    parser.add_argument("--text", type=Path, default=DATA / "test.txt")
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--recipes", nargs="+", default=["default"])
    parser.add_argument("--bits", type=float, default=2.28)
    parser.add_argument("--dense-bits", type=int, nargs="+", default=list(DENSE_BITS))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "dense.json")
    options = parser.parse_args()
    versions = {"kbvq": kbvq.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions["python"] = platform.python_version()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = text_windows(options.text.read_text(encoding="utf-8"), tokenizer, options.window)
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    baseline = BaselineCache.of_model(original, windows.tokens)
    results: list[dict] = []
    if options.output.exists():
        results = json.loads(options.output.read_text(encoding="utf-8"))["results"]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for recipe in options.recipes:
        for dense_bits in options.dense_bits:
            key = (options.model.name, recipe, options.bits, dense_bits)
            if any((r["model"], r["recipe"], r["bits"], r["dense_bits"]) == key for r in results):
                continue
            results.append(
                measure(options.model, options.calibration, baseline, recipe, options.bits, dense_bits, options.window)
            )
            content = {"versions": versions, "protocol": windows.protocol(), "results": results}
            options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            options.output.with_suffix(".md").write_text(markdown(results, versions), encoding="utf-8")
            print(json.dumps(results[-1]), flush=True)


if __name__ == "__main__":
    main()
