"""What the CPU's integer products cost in the predictions: `python eval/integer_products.py ORIGINAL PACKED …`.

In 16 bits, hidden states are rounded to int8 before they meet the codes (kernels/kbvq_kernels/integer_panel.h), on
processors with matrix tiles those of at most 16 tokens of an expert: there --window has to be short. Scores windows of
unseen text in bfloat16 with integer and with float32 products: KL(original in float32 ‖ packed), nats per token, and
the paired difference.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kbvq_eval.windows import text_windows
from kbvq_kernels import cpu

TEXT = Path(__file__).resolve().parent.parent / "tests" / "data" / "validation.txt"


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, window: Tensor) -> Tensor:
    return model(window[None], use_cache=False).logits.float().log_softmax(-1)[0]


def divergences(packed: PreTrainedModel, windows: Tensor, wanted: list[Tensor], *, integers: bool) -> Tensor:
    """Mean KL of every window, [windows]."""
    used = 0
    products = {True: cpu._integer_products, False: cpu._float_products}

    def counted(*arguments: object) -> object:
        nonlocal used
        used += 1
        return products[integers](*arguments)

    cpu._integer_products = cpu._float_products = counted
    try:
        found = [log_probabilities(packed, window) for window in windows]
    finally:
        cpu._integer_products, cpu._float_products = products[True], products[False]
    if not used:
        raise SystemExit("no expert was computed by the CPU decoder; is there a C++ compiler?")
    return torch.stack(
        [F.kl_div(q, p, reduction="sum", log_target=True) / len(p) for q, p in zip(found, wanted, strict=True)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("packed", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=800)
    parser.add_argument("--window", type=int, default=16, help="tokens of one")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.original)
    windows = text_windows(TEXT.read_text(encoding="utf-8"), tokenizer, options.window)
    order = torch.randperm(len(windows.tokens), generator=torch.Generator().manual_seed(0))
    tokens = windows.tokens[order[: options.windows]]
    original = AutoModelForCausalLM.from_pretrained(options.original, dtype=torch.float32).eval()
    wanted = [log_probabilities(original, window) for window in tokens]
    print("| packed | KL, integers | KL, float32 | difference ± s.e. |\n|---|---|---|---|")
    for folder in options.packed:
        packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        one, other = (divergences(packed, tokens, wanted, integers=flag) for flag in (True, False))
        error = (one - other).std() / len(one) ** 0.5
        print(f"| {folder.name} | {one.mean():.5f} | {other.mean():.5f} | {(one - other).mean():+.5f} ± {error:.5f} |")


if __name__ == "__main__":
    main()
