"""The code formats on one projection of the bundled model: weighted error, KL and processor time, one row a codebook.

    python eval/weight_codes.py                   # about a minute of one core
    python eval/weight_codes.py --only rq rq-moe  # keeps the other rows of the file

Gate and up of one layer's busiest experts are quantized at equal code bits by the recipe `default` without biases, with
each codebook, from the inputs they have on calibration text; nothing else of the model is. KL is that of the model with
these weights in place on test text: it compares codebooks and is no loss of a quantized model (fixture_table.py).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kbvq.codes.packing import dequantize_expert, expand
from kbvq.method.projection import quantize_projection, report_projection
from kbvq.recipes import make_recipe
from kbvq.structures import InputMoments
from kbvq_eval.baseline import BaselineCache
from kbvq_eval.divergence import score_windows
from kbvq_eval.windows import text_windows

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "models" / "tiny-qwen3-moe"
DATA = ROOT / "tests" / "data"
WINDOW = 256
CODEBOOKS = ("sign-vq", "rq", "rq-grouped", "rq-moe", "trellis")
REFITS = {"rq": 2, "rq-grouped": 2, "rq-moe": 2}
"""As in eval/fixture_table.py; the others have the recipe's."""


@dataclass(frozen=True)
class Problem:
    """The projection: `experts` of the bank that `module` is, and the moments of their inputs."""

    module: nn.Module
    experts: Tensor
    moments: InputMoments


def read_problem(model: PreTrainedModel, tokens: Tensor, layer: int, num_experts: int) -> Problem:
    """Moments over `tokens` [windows, tokens] of the experts that most tokens reach."""
    module = model.model.layers[layer].mlp.experts
    calls: list[tuple[Tensor, ...]] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    with torch.no_grad():
        for window in tokens:
            model(window[None])
    hook.remove()
    hidden, index, weights = (torch.cat([call[i].flatten(0, -2) for call in calls]) for i in range(3))
    count = torch.bincount(index.flatten(), minlength=len(module.gate_up_proj))
    experts = count.argsort(descending=True)[:num_experts]
    moments = InputMoments.zeros(len(experts), hidden.shape[1])
    for place, expert in enumerate(experts):
        rows, slots = (index == expert).nonzero(as_tuple=True)
        moments.add_(place, hidden[rows], weights[rows, slots], by_routing=True)
    return Problem(module, experts, moments)


def measure(problem: Problem, model: PreTrainedModel, baseline: BaselineCache, codebook: str, bits: int) -> dict:
    changes = {"refits": REFITS[codebook]} if codebook in REFITS else {}
    recipe = make_recipe("default", bits, codebook=codebook, budget=False, idre=False, bcos=False, **changes)
    parameter = problem.module.gate_up_proj
    original = parameter.detach()[problem.experts].clone()
    format = recipe.projection_format(*original.shape)
    started = time.process_time()
    packed = quantize_projection(original, problem.moments, problem.moments, format, recipe, seed=0)
    seconds = time.process_time() - started
    report = report_projection(original, packed, problem.moments, prior_tokens=recipe.prior_tokens)
    form = expand(packed.format, packed.tensors)
    with torch.no_grad():
        parameter[problem.experts] = torch.stack([dequantize_expert(*form, e) for e in range(len(original))])
        scores = score_windows(model, baseline.tokens, baseline=baseline).summary()
        parameter[problem.experts] = original
    return {
        "codebook": codebook,
        "bits_per_weight": report.bits_per_weight,
        "relative_error": report.relative_error,
        "kl": scores["kl"],
        "cpu_seconds": seconds,
    }


def markdown(rows: list[dict], setting: str) -> str:
    lines = ["# Code formats on one projection", "", f"Made by `python eval/weight_codes.py`. {setting}", ""]
    lines += ["| codebook | true bits | weighted error | KL | CPU s |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        lines.append(
            f"| `{row['codebook']}` | {row['bits_per_weight']:.3f} | {row['relative_error']:.5f} | "
            f"{row['kl']:.6f} | {row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CODEBOOKS, default=list(CODEBOOKS))
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--bits", type=int, default=2, choices=(2, 4))
    parser.add_argument("--windows", type=int, default=24, help="of 256 tokens, of both texts")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "weight_codes.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, experts_implementation="eager").eval()
    calibration, test = (
        text_windows((DATA / f"{name}.txt").read_text(encoding="utf-8"), tokenizer, WINDOW).tokens[: options.windows]
        for name in ("calibration", "test")
    )
    problem = read_problem(model, calibration, options.layer, options.experts)
    baseline = BaselineCache.of_model(model, test)
    setting = (
        f"Gate and up of the {options.experts} busiest experts of layer {options.layer} at {options.bits} code bits, "
        f"{options.windows} windows of {WINDOW} tokens of each text, one seed, one core, torch {torch.__version__}."
    )
    rows = []
    if options.output.exists():
        known = json.loads(options.output.read_text(encoding="utf-8"))
        rows = [row for row in known["rows"] if row["codebook"] not in options.only and known["setting"] == setting]
    for codebook in options.only:
        rows.append(measure(problem, model, baseline, codebook, options.bits))
        rows.sort(key=lambda row: CODEBOOKS.index(row["codebook"]))
        content = json.dumps({"setting": setting, "rows": rows}, indent=1)
        options.output.write_text(content + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(markdown(rows, setting), encoding="utf-8")
    print(markdown(rows, setting))


if __name__ == "__main__":
    main()
