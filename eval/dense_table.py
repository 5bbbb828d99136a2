"""What the bits of the matrices outside the experts cost: `python eval/dense_table.py`.

Packs attention, embedding and head of a model at 8 and 4 bits and leaves its experts as they are ("experts at 16
bits"); then quantizes the experts with a recipe, and the others at 16, 8 and 4 bits, as `kbvq quantize` does. Each is
scored against the original on windows of a text: mean KL(original ‖ quantized) per token, paired ΔNLL with its standard
error over windows, top-1 agreement, bits and bytes of the whole model. One seed. Rows that the JSON file already has
are kept, with the date and, where it is known, the commit that they were measured at. Writes docs/results/dense.json
and dense.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kbvq
from kbvq.models.calibration import WatchedLinears
from kbvq.models.calibration_text import calibration_windows
from kbvq.models.layer_stream import LayerStream
from kbvq.models.ranks import ONE
from kbvq.quantization.dense import decoded, pack_matrix, pack_whole_, tied_moment
from kbvq.quantization.pipeline import QuantizeOptions, dense_parts, quantize_model
from kbvq.recipes import DENSE_BITS, make_recipe
from kbvq.storage.checkpoint import inspect_checkpoint
from kbvq.storage.provenance import commit
from kbvq_eval.baseline import BaselineCache
from kbvq_eval.divergence import score_windows
from kbvq_eval.windows import text_windows

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "models" / "tiny-qwen3-moe"
DATA = ROOT / "tests" / "data"


SCORES = ("kl", "kl_stderr", "delta_nll", "delta_nll_stderr", "agreement")


@torch.no_grad()
def measure_alone(folder: Path, calibration: Tensor, baseline: BaselineCache, dense_bits: int) -> dict[str, object]:
    """The matrices packed for the inputs that they have in the original, the experts as they are."""
    started = time.process_time()
    stream = LayerStream(folder, dtype=torch.float32, device="cpu")
    parts = dense_parts(stream, make_recipe("default", 2, dense_bits=dense_bits))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    packed, records = [], []
    if parts.embedding is not None:
        embedding = model.get_submodule(parts.embedding.path)
        moment = None
        if head := parts.embedding.tied_head:
            with WatchedLinears({head: model.get_submodule(head)}) as watched:
                for part in calibration.split(8):
                    model(part, use_cache=False)
            moment = tied_moment(watched.second_moment(head, ONE))
        matrix, record = pack_matrix(embedding.weight, moment, parts.embedding, seed=0)
        embedding.weight.copy_(decoded(matrix))
        packed, records = [matrix], [record]
    linears = [format for format in parts.formats if format.kind == "linear"]
    more, of_linears = pack_whole_(model, linears, calibration, nullcontext(), seed=0)
    formats = [matrix.weight.format for matrix in [*packed, *more]]
    weights = sum(parameter.numel() for parameter in model.parameters())
    num_bytes = 2 * weights + sum(format.num_bytes - 2 * format.num_weights for format in formats)
    seconds = time.process_time() - started
    scores = score_windows(model, baseline.tokens, baseline=baseline).summary()
    return {
        "model": folder.name,
        "recipe": "experts at 16 bits",
        "bits": 16.0,
        "dense_bits": dense_bits,
        "expert_bits_per_weight": 16.0,
        "dense_bits_per_weight": 8 * sum(f.num_bytes for f in formats) / sum(f.num_weights for f in formats),
        "model_bits_per_weight": 8 * num_bytes / weights,
        "model_bytes": num_bytes,
        "largest_relative_error": max(row["relative_error"] for row in [*records, *of_linears]),
        **{name: scores[name] for name in SCORES},
        "cpu_seconds": seconds,
    }


def measure(
    model: Path,
    calibration: Path,
    baseline: BaselineCache,
    recipe: str,
    bits: float,
    dense_bits: int,
    window: int,
    samples: int,
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
            samples=samples,
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
        **{name: scores[name] for name in SCORES},
        "cpu_seconds": seconds,
    }


def _mean_bits(dense: list[dict]) -> float:
    weights = sum(row["weights"] for row in dense)
    return 8 * sum(row["bytes"] for row in dense) / weights if weights else 16.0


def markdown(results: list[dict], setting: str) -> str:
    lines = [
        "# Matrices outside the experts",
        "",
        "| model | recipe | `--dense-bits` | true bits: experts | outside | whole model | MB | mean KL | ΔNLL ± s.e. | "
        "top-1 | largest error | CPU s | measured |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        lines.append(
            f"| {row['model']} | {row['recipe']} | {row['dense_bits']} | {row['expert_bits_per_weight']:.3f} | "
            f"{row['dense_bits_per_weight']:.3f} | {row['model_bits_per_weight']:.3f} | "
            f"{row['model_bytes'] / 1e6:.2f} | {row['kl']:.5f} ± {row['kl_stderr']:.5f} | "
            f"{row['delta_nll']:+.4f} ± {row['delta_nll_stderr']:.4f} | {100 * row['agreement']:.2f} % | "
            f"{row['largest_relative_error']:.1e} | {row['cpu_seconds']:.0f} | "
            f"{', '.join(filter(None, (row['date'], row['commit'])))} |"
        )
    return (
        "\n".join(lines)
        + "\n\nLargest error: of a packed matrix, weighted by its inputs, relative to its outputs' energy.\n"
        f"\nMade by `python eval/dense_table.py`: {setting}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, default=DATA / "calibration.txt")
    parser.add_argument("--text", type=Path, default=DATA / "test.txt")
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--windows", type=int, help="of the text that are scored (default: all)")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--recipes", nargs="*", default=["default"])
    parser.add_argument("--bits", type=float, default=2.28)
    parser.add_argument("--dense-bits", type=int, nargs="+", default=list(DENSE_BITS))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "dense.json")
    options = parser.parse_args()
    versions = {"kbvq": kbvq.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions["python"] = platform.python_version()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = text_windows(options.text.read_text(encoding="utf-8"), tokenizer, options.window)
    tokens = windows.tokens[: options.windows]
    text = options.calibration.read_text(encoding="utf-8")
    calibration = calibration_windows(
        [text],
        tokenizer,
        samples=options.samples,
        sequence_length=options.window,
        seed=0,
        vocab_size=len(tokenizer),
    )
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    baseline = BaselineCache.of_model(original, tokens)
    setting = (
        f"{options.samples} calibration windows, {len(tokens)} windows of {options.window} tokens of "
        f"{options.text.name}; CPU, {torch.get_num_threads()} thread; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    results: list[dict] = []
    if options.output.exists():
        results = json.loads(options.output.read_text(encoding="utf-8"))["results"]
    options.output.parent.mkdir(parents=True, exist_ok=True)

    def keep(recipe: str, bits: float, dense_bits: int, row: Callable[[], dict]) -> None:
        key = (options.model.name, recipe, bits, dense_bits)
        if any((r["model"], r["recipe"], r["bits"], r["dense_bits"]) == key for r in results):
            return
        results.append(row() | {"date": str(date.today()), "commit": commit()})
        content = {"setting": setting, "protocol": windows.protocol(), "results": results}
        options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(markdown(results, setting), encoding="utf-8")
        print(json.dumps(results[-1]), flush=True)

    for dense in options.dense_bits:
        if dense < 16:
            alone = partial(measure_alone, options.model, calibration, baseline, dense)
            keep("experts at 16 bits", 16.0, dense, alone)
    for recipe in options.recipes:
        for dense in options.dense_bits:
            arguments = (options.model, options.calibration, baseline, recipe, options.bits, dense)
            keep(recipe, options.bits, dense, partial(measure, *arguments, options.window, options.samples))


if __name__ == "__main__":
    main()
