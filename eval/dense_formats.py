"""Formats for the matrices outside the experts, compared on the bundled model: `python eval/dense_formats.py`.

Each Linear of the model outside its experts, the head among them, is coded in every format under the second moment of
its inputs on calibration text. Reported is the squared output error relative to the outputs' energy, mean over the
matrices, with the bits per weight that are stored. Then the tied embedding alone is coded, its error as a head weighted
so many times that as an embedding, and the KL of both on validation text reported. Writes
docs/results/dense_formats.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from drawn_windows import TEXT, drawn_windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kbvq.codes.packing import dequantize_expert
from kbvq.method.dense_matrix import quantize_matrix
from kbvq.method.error_feedback import upper_factor
from kbvq.method.projection import quantize_projection
from kbvq.method.rate_distortion import weighted_error
from kbvq.models.calibration import WatchedLinears
from kbvq.models.ranks import ONE
from kbvq.quantization.dense import tied_moment
from kbvq.recipes import dense_format, make_recipe
from kbvq.structures import InputMoments, PackedProjection
from kbvq_eval.baseline import BaselineCache
from kbvq_eval.divergence import score_windows
from kbvq_eval.windows import text_windows

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "models" / "tiny-qwen3-moe"
UNSEEN = ROOT / "tests" / "data" / "validation.txt"
WINDOWS, WINDOW = 32, 256
SHARES = (0, 1, 3, 10, 30)

Coded = tuple[Tensor, float]
"""A decoded weight, and the bits per weight that it takes."""


def integers(weight: Tensor, moment: Tensor, bits: int, group: int, feedback: bool) -> Coded:
    """Integers with a float16 scale for each `group` weights of a row, by their largest; rounded, or with the error of
    a column fed back into those after it (GPTQ, columns in order)."""
    factor = upper_factor(moment, 0.003) if feedback else torch.eye(weight.shape[1])
    largest = 2 ** (bits - 1) - 1
    error = torch.zeros_like(weight)
    scale = torch.ones_like(weight[:, 0])
    for column in range(weight.shape[1]):
        target = weight[:, column] + error[:, :column] @ factor[:column, column] / factor[column, column]
        if column % group == 0:
            scale = (weight[:, column : column + group].abs().amax(1) / largest).clamp_min(1e-8).half().float()
        quantized = (target / scale).round().clamp(-largest, largest) * scale
        error[:, column] = weight[:, column] - quantized
    return weight - error, bits + 16 / group


def pairs(weight: Tensor, moment: Tensor, bits: int) -> Coded:
    """What `--dense-bits` stores."""
    return _decoded(quantize_matrix(weight, moment, dense_format(*weight.shape, bits), seed=0)[0])


def trellis(weight: Tensor, moment: Tensor) -> Coded:
    """The experts' code at 4 bits, with scales of rows and columns."""
    recipe = make_recipe("default", 4, budget=False, idre=False, bcos=False, matching=False)
    moments = InputMoments(
        moment[None], torch.zeros(1, len(moment)), torch.ones(1).long(), torch.ones(1), torch.ones(1)
    )
    format = recipe.projection_format(1, *weight.shape, bits=4, rank=0, bias=False)
    return _decoded(quantize_projection(weight[None], moments, moments, format, recipe, seed=0))


def _decoded(packed: PackedProjection) -> Coded:
    format = packed.format
    return dequantize_expert(format, packed.tensors, 0), 8 * format.num_bytes / format.num_weights


FORMATS: dict[str, Callable[[Tensor, Tensor], Coded]] = {
    "4 bits, a scale for 64 weights, rounded": lambda w, m: integers(w, m, 4, 64, False),
    "the same with error feedback": lambda w, m: integers(w, m, 4, 64, True),
    "pairs of weights, `--dense-bits 4`": lambda w, m: pairs(w, m, 4),
    "trellis of 4 bits": trellis,
    "8 bits, a scale for a row, rounded": lambda w, m: integers(w, m, 8, w.shape[1], False),
    "the same with error feedback ": lambda w, m: integers(w, m, 8, w.shape[1], True),
    "pairs of weights, two stages, `--dense-bits 8`": lambda w, m: pairs(w, m, 8),
}


def tied_lines(model: PreTrainedModel, moment: Tensor, tokens: Tensor) -> list[str]:
    """Table of the KL that the tied embedding costs alone; moment: of the head's inputs, tokens: unseen windows. The
    model is as it was afterwards."""
    baseline = BaselineCache.of_model(model, tokens)
    weight = model.get_input_embeddings().weight
    original = weight.clone()
    lines = ["| head's error, times | KL at 4 bits | at 8 bits |", "|---|---|---|"]
    for share in SHARES:
        found = []
        for bits in (4, 8):
            format = dense_format(*weight.shape, bits)
            packed, _ = quantize_matrix(original, tied_moment(moment, share), format, seed=0)
            weight.copy_(dequantize_expert(format, packed.tensors, 0))
            scores = score_windows(model, tokens, baseline=baseline).summary()
            found.append(f"{scores['kl']:.5f} ± {scores['kl_stderr']:.5f}")
        lines.append(f"| {share} | {' | '.join(found)} |")
        print(lines[-1], flush=True)
    weight.copy_(original)
    return lines


@torch.no_grad()
def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokens = drawn_windows(tokenizer, WINDOWS, length=WINDOW)
    linears = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    with WatchedLinears(linears) as watched:
        for part in tokens.split(8):
            model(part, use_cache=False)
    moments = {path: watched.second_moment(path, ONE) for path in linears}
    lines = ["# Formats outside the experts", "", "| format | bits per weight | error |", "|---|---|---|"]
    for name, code in FORMATS.items():
        errors, bits, weights = 0.0, 0.0, 0
        for path, module in linears.items():
            weight = module.weight.detach()
            decoded, stored = code(weight, moments[path])
            errors += weighted_error(weight - decoded, moments[path]) / weighted_error(weight, moments[path])
            bits += stored * weight.numel()
            weights += weight.numel()
        lines.append(f"| {name.strip()} | {bits / weights:.2f} | {errors / len(linears):.2e} |")
        print(lines[-1], flush=True)
    unseen = text_windows(UNSEEN.read_text(encoding="utf-8"), tokenizer, WINDOW, WINDOWS).tokens
    lines += ["", *tied_lines(model, moments["lm_head"], unseen)]
    note = (
        f"\n\nMade by `python eval/dense_formats.py`: {len(linears)} matrices of the bundled model, {WINDOWS} windows\n"
        f"of {WINDOW} tokens of {TEXT.name}. Error: squared, of the outputs, relative to their energy; mean over the\n"
        "matrices. Bits: everything stored, over all their weights. The second table: the tied embedding coded alone,\n"
        f"its error as a head weighted so many times that as an embedding, {WINDOWS} windows of {UNSEEN.name}.\n"
    )
    (ROOT / "docs" / "results" / "dense_formats.md").write_text("\n".join(lines) + note, encoding="utf-8")


if __name__ == "__main__":
    main()
