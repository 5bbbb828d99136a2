"""The windows of calibration text that a run of some seed draws."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kbvq.models.calibration_text import calibration_windows, load_texts

TEXT = Path(__file__).resolve().parent.parent / "tests" / "data" / "calibration.txt"


def drawn_windows(
    tokenizer: PreTrainedTokenizerBase, samples: int, *, length: int, seed: int = 0, text: Path = TEXT
) -> Tensor:
    """[samples, length] int64; those of `kbvq quantize` with these --samples, --sequence-length and --seed."""
    return calibration_windows(
        load_texts(str(text)),
        tokenizer,
        samples=samples,
        sequence_length=length,
        seed=seed,
        vocab_size=len(tokenizer),
    )
