"""Negative log-likelihood of a model on token windows and, in the same pass, its divergence from a baseline.

Everything is kept per window, so that two models are compared on the same text: the standard error of a paired
difference is some ten times smaller than that of either mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kbvq.errors import ConfigError, NumericalError
from kbvq_eval.baseline import BaselineCache, chosen_experts, routed_paths
from kbvq_eval.windows import window_batches

ROW_ELEMENTS = 1 << 25
"""Logits turned to float32 log-probabilities at a time (128 MiB a copy): bounds memory at any window and vocabulary."""


@dataclass(frozen=True)
class WindowScores:
    """Scores of a model, each [num_windows] float64 on CPU and a mean over the window's predicted tokens.

    nll: negative log-likelihood in nats. With a baseline also baseline_nll, kl = KL(baseline ‖ model) in nats, and
    agreement = share of tokens where both have the same most likely next token. router_agreement: by path of a bank,
    the share of the experts that the baseline chose that the model chose too; empty where either has no banks there.
    """

    nll: Tensor
    baseline_nll: Tensor | None = None
    kl: Tensor | None = None
    agreement: Tensor | None = None
    router_agreement: dict[str, float] = field(default_factory=dict)

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


@torch.no_grad()
def score_windows(
    model: nn.Module,
    tokens: Tensor,
    *,
    baseline: BaselineCache | None = None,
    batch_size: int | None = None,
) -> WindowScores:
    """Score `model` on windows [num_windows, window] int64; against `baseline`, of the same windows, if one is given.

    model: causal language model of transformers (logits in any dtype, evaluated here in float32), in evaluation mode.
    batch_size: windows per forward, default 1024 tokens' worth. Raises ConfigError when the vocabularies or windows
    differ, NumericalError on logits that are not finite.
    """
    if baseline is not None and not torch.equal(baseline.tokens, tokens):
        raise ConfigError("the baseline cache was made on other windows; make it from the windows that are scored")
    device = model.get_input_embeddings().weight.device
    shared = [] if baseline is None else [path for path in routed_paths(model) if path in baseline.routing]
    batches = []
    with chosen_experts(model, shared, tokens) as chosen:
        for start, stop in window_batches(tokens, batch_size, "perplexity"):
            logits = model(input_ids=tokens[start:stop].to(device), use_cache=False).logits[:, :-1]
            if baseline is not None and start == 0:
                baseline = baseline.to(logits.device)
            reference = None if baseline is None else baseline.logits(start, stop, logits.device)
            scores = _token_scores(logits, tokens[start:stop, 1:], reference)
            bad = (~scores.isfinite()).any(0).any(-1).nonzero()
            if len(bad):
                raise NumericalError(
                    f"window {start + bad[0].item()}: logits of the model or its baseline are not finite; "
                    "evaluate in another dtype, or look for damaged weights"
                )
            batches.append(scores.mean(-1))
    routing = {} if baseline is None else baseline.routing
    agreement = {path: _overlap(experts, routing[path]) for path, experts in chosen.by_path().items()}
    return WindowScores(*torch.cat(batches, dim=1), router_agreement=agreement)


def _overlap(chosen: Tensor, reference: Tensor) -> float:
    """Mean share of the reference's experts that were chosen, order aside; both [windows, window, top_k]."""
    return (reference[..., :, None] == chosen[..., None, :]).any(-1).double().mean().item()


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


def _row_slices(rows: Tensor) -> Iterator[slice]:
    """Slices of [rows, vocab_size] of at most ROW_ELEMENTS elements, or one row."""
    step = max(1, ROW_ELEMENTS // rows.shape[-1])
    return (slice(start, start + step) for start in range(0, len(rows), step))
