"""Text to token windows, the way quantization papers measure perplexity.

The whole text is tokenized once with the tokenizer's defaults and cut into non-overlapping windows; each window is
scored on its own, so its first token has no prediction. This is neither lm-eval's `word_perplexity` (per original
word) nor a strided perplexity: the three differ by tens of percent and must not be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from kbvq.errors import ConfigError

DEFAULT_WINDOW = 2048

TOKENS_PER_BATCH = 1024
"""Tokens of one forward where no batch size is given."""


@dataclass(frozen=True)
class TextWindows:
    """Non-overlapping windows of one text.

    tokens: [num_windows, window] int64.
    text_tokens: tokens of the whole text; the remainder after the last full window is not scored.
    bos: whether the tokenizer put a beginning-of-sequence token before the text (the first window alone has it).
    """

    tokens: Tensor
    text_tokens: int
    bos: bool

    def protocol(self) -> dict[str, int | bool | str]:
        """What a perplexity must be quoted with."""
        num_windows, window = self.tokens.shape
        return {
            "protocol": "paper: concatenated text, non-overlapping windows, mean NLL per predicted token",
            "window": window,
            "stride": window,
            "windows": num_windows,
            "predicted_tokens": num_windows * (window - 1),
            "text_tokens": self.text_tokens,
            "bos": self.bos,
        }


def default_window(config: PreTrainedConfig) -> int:
    """2048 tokens, or the longest sequence the model was built for if that is shorter."""
    return min(DEFAULT_WINDOW, getattr(config.get_text_config(), "max_position_embeddings", DEFAULT_WINDOW))


def text_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, window: int, max_windows: int | None = None
) -> TextWindows:
    """Cut `text` into windows of `window` tokens, the first `max_windows`; ConfigError if it does not fill one."""
    if window < 2:
        raise ConfigError(f"window is {window}; it needs at least 2 tokens, one to predict from and one to predict")
    ids = tokenizer(text, verbose=False)["input_ids"]
    count = len(ids) // window
    if count == 0:
        raise ConfigError(
            f"the text has {len(ids)} tokens, less than one window of {window}; use a longer text or a smaller window"
        )
    count = min(count, max_windows or count)
    bos = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    return TextWindows(torch.tensor(ids[: count * window]).view(count, window), len(ids), bos)


def window_batches(tokens: Tensor, batch_size: int | None, description: str | None) -> Iterator[tuple[int, int]]:
    """(start, stop) of the batches of windows [num_windows, window], with a progress bar if it has a description."""
    num_windows, window = tokens.shape
    step = batch_size or max(1, TOKENS_PER_BATCH // window)
    for start in tqdm(range(0, num_windows, step), desc=description, disable=None if description else True):
        yield start, min(start + step, num_windows)
