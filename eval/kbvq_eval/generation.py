"""How fast a model reads and writes, what memory it takes, and what it writes."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFILL_TOKENS = 512
PROMPT_TOKENS = 32
NEW_TOKENS = 32
PROMPTS = 3
REPEATS = 3


@torch.no_grad()
def measure_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> dict[str, Any]:
    """Prefill and decode rates of a batch of one, memory, and greedy continuations.

    tokens: windows of a text, [num_windows, window] int64. prefill_tokens_per_second: median of REPEATS forwards of
    the first window, cut to PREFILL_TOKENS, after one that is not counted. decode_tokens_per_second: tokens after the
    first, over the continuations of PROMPTS windows' first PROMPT_TOKENS tokens, with a cache. weight_bytes:
    parameters and buffers. memory_bytes: of the device, or resident in the process (Linux; None elsewhere).
    """
    device = model.get_input_embeddings().weight.device
    prompt = tokens[:1, :PREFILL_TOKENS].to(device)
    model(input_ids=prompt)
    prefill = [_seconds(lambda: model(input_ids=prompt), device) for _ in range(REPEATS)]
    length = min(PROMPT_TOKENS, tokens.shape[1] // 2)
    new_tokens = min(NEW_TOKENS, tokens.shape[1] - length)
    continuations, seconds = [], 0.0
    for window in tokens[:PROMPTS, :length]:
        written, spent = _continue(model, window[None].to(device), new_tokens)
        seconds += spent
        continuations.append({"prompt": tokenizer.decode(window), "continuation": tokenizer.decode(written)})
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return {
        "prefill_tokens": prompt.shape[1],
        "prefill_tokens_per_second": prompt.shape[1] / statistics.median(prefill),
        "decode_tokens_per_second": len(continuations) * (new_tokens - 1) / seconds if new_tokens > 1 else None,
        "weight_bytes": sum(tensors.values()),
        "memory_bytes": torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes(),
        "continuations": continuations,
    }


def resident_bytes() -> int | None:
    """Resident memory of this process; None where the system has no /proc."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
    return 1024 * int(lines["VmRSS"].split()[0])


def _continue(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[Tensor, float]:
    """Greedy continuation [new_tokens], without a stop, and the seconds of all its tokens but the first."""
    output = model(input_ids=prompt, use_cache=True)
    written = [output.logits[:, -1:].argmax(-1)]
    if prompt.device.type == "cuda":
        torch.cuda.synchronize(prompt.device)
    started = time.perf_counter()
    for _ in range(new_tokens - 1):
        output = model(input_ids=written[-1], past_key_values=output.past_key_values, use_cache=True)
        written.append(output.logits[:, -1:].argmax(-1))
    result = torch.cat(written, dim=1)[0].cpu()
    return result, time.perf_counter() - started


def _seconds(run: Any, device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
