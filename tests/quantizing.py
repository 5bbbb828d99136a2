"""How the tests call the pipeline: a few short windows of random words, few k-means iterations."""

from pathlib import Path

import pytest
import torch

import kbvq
from kbvq.quantization.pipeline import QuantizeOptions, Run, quantize_model
from kbvq.quantization.stages import Carry, Step
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


class Stop(BaseException):
    """What a crash looks like to everything that catches errors."""


def interrupt(monkeypatch: pytest.MonkeyPatch, step: str, number: int = 0) -> None:
    """Let a run crash in this step, once it has done its work but before that is kept."""
    original = getattr(Run, step)

    def crash(self: Run, index: int, carry: Carry) -> Step:
        result = original(self, index, carry)
        if index == number:
            raise Stop
        return result

    monkeypatch.setattr(Run, step, crash)
