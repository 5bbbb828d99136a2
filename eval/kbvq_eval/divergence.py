"""Negative log-likelihood of a model on token windows and, in the same pass, its divergence from a baseline.

Everything is kept per window, so that two models are compared on the same text: the standard error of a paired
difference is some ten times smaller than that of either mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from kbvq.errors import ConfigError, NumericalError

ROW_ELEMENTS = 1 << 25
"""Logits turned to float32 log-probabilities at a time (128 MiB a copy): bounds memory at any window and vocabulary."""

TOKENS_PER_BATCH = 2048

WindowLogits = Callable[[int, int], Tensor]
"""(start, stop) of a range of windows -> logits, or log-probabilities, [stop - start, window - 1, vocab_size]."""


@dataclass(frozen=True)
class WindowScores:
    """Scores of a model, each [num_windows] float64 on CPU and a mean over the window's predicted tokens.

    nll: negative log-likelihood in nats. With a baseline also baseline_nll, kl = KL(baseline ‖ model) in nats, and
    agreement = share of tokens where both have the same most likely next token.
    """

    nll: Tensor
    baseline_nll: Tensor | None = None
    kl: Tensor | None = None
    agreement: Tensor | None = None

    @property
    def delta_nll(self) -> Tensor | None:
        """NLL of the model minus that of the baseline, window by window."""
        return None if self.baseline_nll is None else self.nll - self.baseline_nll

    def summary(self) -> dict[str, float | None]:
        """Means and standard errors over windows (None for a single window), and perplexities."""
        result: dict[str, float | None] = {"perplexity": self.nll.mean().exp().item()}
        if self.baseline_nll is not None:
            result["baseline_perplexity"] = self.baseline_nll.mean().exp().item()
        for name in ("nll", "baseline_nll", "delta_nll", "kl", "agreement"):
            values = getattr(self, name)
            if values is not None:
                result[name], result[f"{name}_stderr"] = mean_stderr(values)
        return result


def mean_stderr(values: Tensor) -> tuple[float, float | None]:
    """Mean of independent values and its standard error, None when there are fewer than two."""
    stderr = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return values.mean().item(), stderr


class BaselineCache:
    """A baseline's log-probabilities on one set of windows, for scoring many models against it.

    Holds [num_windows, window - 1, vocab_size] on CPU in `dtype`. float16 halves the memory; its rounding (2⁻¹¹ of each
    log-probability) has no sign, so over 88k tokens KL moved by 5e-7 and NLL by 4e-6 nats, and agreement by 5e-4
    through near ties.
    Raises ConfigError above `max_bytes`.
    """

    @torch.no_grad()
    def __init__(
        self,
        baseline: nn.Module,
        tokens: Tensor,
        *,
        batch_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        max_bytes: int = 4 << 30,
    ) -> None:
        num_windows, window = tokens.shape
        vocab_size = baseline.get_output_embeddings().weight.shape[0]
        needed = num_windows * (window - 1) * vocab_size * dtype.itemsize
        if needed > max_bytes:
            raise ConfigError(
                f"caching the baseline's log-probabilities needs {needed / 2**30:.1f} GiB, the limit is "
                f"{max_bytes / 2**30:.1f}; score fewer windows, or pass the baseline model itself"
            )
        self.tokens = tokens
        self.log_probs = torch.empty(num_windows, window - 1, vocab_size, dtype=dtype)
        logits = _model_logits(baseline, tokens)
        for start, stop in _batches(tokens, batch_size, "baseline"):
            rows, cached = logits(start, stop).flatten(0, 1), self.log_probs[start:stop].flatten(0, 1)
            for part in _row_slices(rows):
                cached[part] = rows[part].float().log_softmax(-1)

    def __call__(self, start: int, stop: int) -> Tensor:
        return self.log_probs[start:stop]


@torch.no_grad()
def score_windows(
    model: nn.Module,
    tokens: Tensor,
    *,
    baseline: nn.Module | BaselineCache | None = None,
    batch_size: int | None = None,
) -> WindowScores:
    """Score `model` on windows [num_windows, window] int64; against `baseline` if one is given.

    model, baseline: causal language models of transformers (logits in any dtype, evaluated here in float32), in
    evaluation mode; the baseline may be a BaselineCache of the same windows. batch_size: windows per forward,
    default 2048 tokens' worth. Raises ConfigError when the vocabularies or windows differ, NumericalError on logits
    that are not finite.
    """
    if isinstance(baseline, BaselineCache) and not torch.equal(baseline.tokens, tokens):
        raise ConfigError("the baseline cache was made on other windows; make it from the windows that are scored")
    model_logits = _model_logits(model, tokens)
    baseline_logits: WindowLogits | None = (
        _model_logits(baseline, tokens) if isinstance(baseline, nn.Module) else baseline
    )
    batches = []
    for start, stop in _batches(tokens, batch_size, "perplexity"):
        reference = None if baseline_logits is None else baseline_logits(start, stop)
        scores = _token_scores(model_logits(start, stop), tokens[start:stop, 1:], reference)
        bad = (~scores.isfinite()).any(0).any(-1).nonzero()
        if len(bad):
            raise NumericalError(
                f"window {start + bad[0].item()}: logits of the model or its baseline are not finite; "
                "evaluate in another dtype, or look for damaged weights"
            )
        batches.append(scores.mean(-1))
    return WindowScores(*torch.cat(batches, dim=1))


def _token_scores(logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
    """[1 or 4, windows, window - 1] float64 on CPU: NLL; with a reference also its NLL, KL and agreement."""
    if reference is not None and reference.shape != logits.shape:
        raise ConfigError(
            f"the baseline's vocabulary has {reference.shape[-1]} entries, the model's {logits.shape[-1]}; "
            "compare a model with the one it was made from"
        )
    rows, target = logits.flatten(0, 1), targets.to(logits.device).flatten()
    reference_rows = None if reference is None else reference.flatten(0, 1)
    parts = []
    for part in _row_slices(rows):
        log_q = rows[part].float().log_softmax(-1)
        scores = [F.nll_loss(log_q, target[part], reduction="none")]
        if reference_rows is not None:
            log_p = reference_rows[part].to(rows.device).float().log_softmax(-1)
            kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            agreement = (log_p.argmax(-1) == log_q.argmax(-1)).float()
            scores += [F.nll_loss(log_p, target[part], reduction="none"), kl, agreement]
        parts.append(torch.stack(scores).cpu().double())
    return torch.cat(parts, dim=1).view(-1, *targets.shape)


def _model_logits(model: nn.Module, tokens: Tensor) -> WindowLogits:
    device = model.get_input_embeddings().weight.device

    def logits(start: int, stop: int) -> Tensor:
        return model(input_ids=tokens[start:stop].to(device), use_cache=False).logits[:, :-1]

    return logits


def _row_slices(rows: Tensor) -> Iterator[slice]:
    """Slices of [rows, vocab_size] of at most ROW_ELEMENTS elements, or one row."""
    step = max(1, ROW_ELEMENTS // rows.shape[-1])
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _batches(tokens: Tensor, batch_size: int | None, description: str) -> Iterator[tuple[int, int]]:
    num_windows, window = tokens.shape
    step = batch_size or max(1, TOKENS_PER_BATCH // window)
    for start in tqdm(range(0, num_windows, step), desc=description, disable=None):
        yield start, min(start + step, num_windows)
