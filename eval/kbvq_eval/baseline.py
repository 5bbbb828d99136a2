"""A baseline's predictions, kept so that models can be scored against them without the baseline in memory.

Kept are the inputs of its output head and the head itself, from which its logits follow exactly: at a vocabulary of
150,000 and a hidden size of 2048, a hundredth of what the logits take. They are gathered from a loaded model or, for
the families that kbvq knows, one decoder layer at a time, so that the baseline is never in memory at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from kbvq.errors import CheckpointError, ConfigError
from kbvq.models.calibration import LayerRunner
from kbvq.models.layer_stream import LayerStream
from kbvq_eval.windows import window_batches

ROUTED_TOKENS = 1 << 16
"""The experts that were chosen are kept for about so many tokens: enough for shares within half a percent."""

_DISAGREEMENT = 1e-3
"""Greatest difference, by the largest logit, between a model's logits and what its head makes of the head's inputs."""


@dataclass(frozen=True)
class BaselineCache:
    """What a baseline predicts on one set of windows.

    tokens: [num_windows, window] int64. states: inputs of the output head, [num_windows, window, hidden_size], in the
        baseline's dtype, in memory or mapped from a file. weight, bias: the head's, [vocab_size, hidden_size] and
        [vocab_size] or None.
    routing: by path of a bank of routed experts, the experts chosen for each token of the first windows,
        [windows, window, top_k] int16; empty where the baseline has none.
    """

    tokens: Tensor
    states: Tensor
    weight: Tensor
    bias: Tensor | None
    routing: dict[str, Tensor]

    def logits(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Of windows [start, stop) and all their positions but the last: [stop - start, window - 1, vocab_size]."""
        weight, bias = self.weight.to(device), None if self.bias is None else self.bias.to(device)
        # All positions and then a slice, as the model does it: the shape decides the order of summation.
        return F.linear(self.states[start:stop].to(device), weight, bias)[:, :-1]

    def to(self, device: torch.device) -> BaselineCache:
        """The same with the head on `device`; the states stay where they are."""
        bias = None if self.bias is None else self.bias.to(device)
        return BaselineCache(self.tokens, self.states, self.weight.to(device), bias, self.routing)

    @classmethod
    @torch.no_grad()
    def of_model(
        cls, model: nn.Module, tokens: Tensor, *, batch_size: int | None = None, folder: Path | None = None
    ) -> BaselineCache:
        """From a causal language model of transformers in evaluation mode. folder: where the states are mapped, None
        for memory. Raises ConfigError when the model changes what its head gives, so that the head is not enough."""
        head = model.get_output_embeddings()
        states = _new_states(tokens, head.weight.shape[1], head.weight.dtype, folder)
        device = model.get_input_embeddings().weight.device
        with head_inputs(model) as inputs, chosen_experts(model, routed_paths(model), tokens) as routing:
            for start, stop in window_batches(tokens, batch_size, "baseline"):
                logits = model(input_ids=tokens[start:stop].to(device), use_cache=False).logits
                states[start:stop] = inputs.pop()
                if start == 0:
                    _check_head(F.linear(states[:stop].to(logits.device), head.weight, head.bias), logits)
        return cls(tokens, states, _copy(head.weight), _copy(head.bias), routing.by_path())._written(folder)

    @classmethod
    @torch.no_grad()
    def streamed(
        cls,
        source: Path,
        tokens: Tensor,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        batch_size: int | None = None,
        folder: Path | None = None,
    ) -> BaselineCache:
        """From a model folder, one decoder layer in memory at a time. Raises as `LayerStream` and `of_model`."""
        stream = LayerStream(source, dtype=dtype, device=device)
        states = _new_states(tokens, stream.text_config.hidden_size, dtype, folder)
        batches = list(window_batches(tokens, batch_size, None))
        layer_kwargs: dict[int, list[dict]] = {}  # by rows of the batch: the last one may have fewer
        for start, stop in batches:
            embedded, layer_kwargs[stop - start] = stream.layer_inputs(tokens[start:stop])
            states[start:stop] = embedded
        routing: dict[str, Tensor] = {}
        for index in tqdm(range(stream.num_layers), desc="baseline", unit="layer", disable=None):
            paths = [bank.path for bank in stream.banks if bank.kind == "routed" and bank.decoder_layer == index]
            with stream.layer(index) as layer, chosen_experts(stream.model, paths, tokens) as chosen:
                run = LayerRunner(
                    layer,
                    lambda rows, index=index: layer_kwargs[rows][index],
                    batch_size=batches[0][1],
                    device=stream.device,
                )
                for start, stop in batches:
                    states[start:stop] = run.batch(states[start:stop])
            routing |= chosen.by_path()
        head = stream.model.get_output_embeddings()
        with stream.head(), head_inputs(stream.model) as inputs:
            for start, stop in batches:
                logits = stream.logits(states[start:stop].to(stream.device))
                states[start:stop] = inputs.pop()
                if start == 0:
                    _check_head(F.linear(states[:stop].to(logits.device), head.weight, head.bias), logits)
            weight, bias = _copy(head.weight), _copy(head.bias)
        return cls(tokens, states, weight, bias, routing)._written(folder)

    @classmethod
    def open(cls, folder: Path, tokens: Tensor) -> BaselineCache:
        """What was gathered with `folder`. Raises CheckpointError when it is not there, or of other windows."""
        try:
            stored = json.loads((folder / "baseline.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "head.safetensors")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} holds no complete predictions of a baseline: {error}") from error
        if not torch.equal(tensors["tokens"], tokens):
            raise CheckpointError(f"{folder} holds a baseline's predictions on other windows; delete it")
        dtype = getattr(torch, stored["dtype"])
        states = _mapped(folder, (*tokens.shape, tensors["weight"].shape[1]), dtype)
        routing = {name.removeprefix("routing."): t for name, t in tensors.items() if name.startswith("routing.")}
        return cls(tokens, states, tensors["weight"], tensors.get("bias"), routing)

    def _written(self, folder: Path | None) -> BaselineCache:
        if folder is not None:
            tensors = {"tokens": self.tokens, "weight": self.weight}
            tensors |= {f"routing.{path}": chosen for path, chosen in self.routing.items()}
            if self.bias is not None:
                tensors["bias"] = self.bias
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "head.safetensors")
            # Last: with this file the folder is complete.
            content = {"dtype": str(self.states.dtype).removeprefix("torch.")}
            (folder / "baseline.json").write_text(json.dumps(content), encoding="utf-8")
        return self


class ChosenExperts:
    """What the routers of a model choose for the first `num_windows` windows of `window` tokens."""

    def __init__(self, tokens: Tensor) -> None:
        self.window = tokens.shape[1]
        self.num_windows = min(len(tokens), max(1, ROUTED_TOKENS // self.window))
        self._batches: dict[str, list[Tensor]] = {}

    def record(self, path: str, top_k_index: Tensor) -> None:
        """The choices of the next tokens at a bank, [..., top_k]."""
        batches = self._batches.setdefault(path, [])
        if sum(map(len, batches)) < self.num_windows * self.window:
            batches.append(top_k_index.flatten(0, -2).to("cpu", torch.int16))

    def by_path(self) -> dict[str, Tensor]:
        """[num_windows, window, top_k] int16 for each bank."""
        rows = {path: torch.cat(batches) for path, batches in self._batches.items()}
        return {path: r.view(-1, self.window, r.shape[-1])[: self.num_windows].clone() for path, r in rows.items()}


@contextmanager
def chosen_experts(model: nn.Module, paths: Iterable[str], tokens: Tensor) -> Iterator[ChosenExperts]:
    """Record the experts chosen at the banks of these paths while the windows `tokens` run through the block.

    A bank is called with (hidden states, expert indices [..., top_k], routing weights), packed or not.
    """
    recorder = ChosenExperts(tokens)
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, arguments, path=path: recorder.record(path, arguments[1])
        )
        for path in paths
    ]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def routed_paths(model: nn.Module) -> list[str]:
    """Module paths of the banks of routed experts of a model, packed or not: those called with expert indices."""
    return [
        path
        for path, module in model.named_modules()
        if path.endswith(".experts") and not isinstance(module, nn.ModuleList)
    ]


@contextmanager
def head_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list that gets the inputs of the model's output head at each forward while the block runs."""
    inputs: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def _check_head(computed: Tensor, logits: Tensor) -> None:
    difference = (computed - logits).abs().max()
    if not difference <= _DISAGREEMENT * logits.abs().max():
        raise ConfigError(
            f"the baseline's logits differ by {difference:.2e} from what its output head gives: it scales or caps "
            "them, or they are not finite, and its predictions cannot be kept"
        )


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu().clone()


def _new_states(tokens: Tensor, hidden_size: int, dtype: torch.dtype, folder: Path | None) -> Tensor:
    shape = (*tokens.shape, hidden_size)
    if folder is None:
        return torch.empty(shape, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "baseline.json").unlink(missing_ok=True)
    return _mapped(folder, shape, dtype)


def _mapped(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor over a file of the folder, made if it is not there: its pages need not stay in memory."""
    return torch.from_file(str(folder / "states.bin"), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
