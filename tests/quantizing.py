"""How the tests call the pipeline: a few short windows of random words, few k-means iterations."""

from pathlib import Path

import torch

import kbvq
from kbvq.quantization.pipeline import QuantizeOptions, quantize_model
from kbvq.recipes import Recipe, make_recipe


def write_text(path: Path, words: int = 3000, seed: int = 0) -> Path:
    """Random words of the tiny tokenizer."""
    ids = torch.randint(2, 128, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    path.write_text(" ".join(f"w{i}" for i in ids), encoding="utf-8")
    return path


def quantize(model: Path, output: Path, text: Path, recipe: Recipe | None = None, **changes: object) -> dict:
    """Quantize with recipe `paper` at 2 bits, or another; `changes` override the options. Returns the run's record."""
    options = {
        "model": str(model),
        "output": output,
        "calibration": str(text),
        "recipe": recipe or make_recipe("paper", 2, kmeans_iterations=5),
        "samples": 24,
        "sequence_length": 32,
        "device": "cpu",
    }
    return quantize_model(QuantizeOptions(**(options | changes)), kbvq_version=kbvq.__version__)
