"""KL of a checkpoint on the windows it was calibrated on, beside that on unseen text: how much of it is fitted.

    python eval/fitted_text.py --original DIR --checkpoint DIR --seed 0 --samples 128

The seed and the number of windows must be those of the run that made the checkpoint; `--windows` of each text are
scored. What is lower on its own windows than on others was fitted to them, and more text or a stronger pull
(kbvq.method.target_weights) would help.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from drawn_windows import drawn_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

import kbvq  # noqa: F401  (lets transformers load packed checkpoints)
from kbvq_eval.baseline import BaselineCache
from kbvq_eval.divergence import score_windows
from kbvq_eval.windows import text_windows

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, default=DATA / "calibration.txt")
    parser.add_argument("--unseen", type=Path, default=DATA / "validation.txt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=32)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.original)
    fitted = drawn_windows(
        tokenizer, options.samples, length=options.length, seed=options.seed, text=options.calibration
    )
    unseen = text_windows(options.unseen.read_text(encoding="utf-8"), tokenizer, options.length).tokens
    original, quantized = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (options.original, options.checkpoint)
    )
    for name, windows in (("calibrated on", fitted), ("unseen", unseen)):
        tokens = windows[: options.windows]
        scores = score_windows(quantized, tokens, baseline=BaselineCache.of_model(original, tokens)).summary()
        print(f"{name}: KL {scores['kl']:.4f} ± {scores['kl_stderr']:.4f}, {tokens.numel()} tokens", flush=True)


if __name__ == "__main__":
    main()
