"""The processes of one run: one, or as many as `torchrun` or `accelerate launch` started.

The engine is torch.distributed (NCCL between GPUs, gloo between CPUs). Every process runs the same steps; windows and
experts are shared out, sums are added up, and the first process alone writes. With one process nothing is sent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kbvq.errors import KbvqError, RanksError

_PATIENCE = timedelta(hours=12)
"""How long the others wait while the first process alone reads, hashes or writes; a process that ends is noticed at
once."""


class Ranks:
    """index: of this process, from 0. count: of all. device: where tensors must be to be sent."""

    def __init__(self, index: int = 0, count: int = 1, device: torch.device | str = "cpu") -> None:
        self.index, self.count, self.device = index, count, torch.device(device)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def share(self, total: int) -> range:
        """What this process takes of so many windows or experts: a run of neighbours, as even as can be."""
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)

    def batches(self, windows: int, batch_size: int) -> Iterator[slice]:
        """The batches of so many windows that this process runs."""
        starts = range(0, windows, batch_size)
        for number in self.share(len(starts)):
            yield slice(starts[number], starts[number] + batch_size)

    def sum_(self, *tensors: Tensor) -> None:
        """Add these tensors up over all processes, in place; the result is the same everywhere."""
        if self.count > 1:
            with _meeting():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def max_(self, tensor: Tensor) -> None:
        """The largest of all processes for each element, in place."""
        if self.count > 1:
            with _meeting():
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX)

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            self.sum_(torch.zeros(1, device=self.device))

    def first(self, function: Callable[[], Any]) -> Any:
        """What `function` returns in the first process, which alone calls it: JSON-ready data, for all of them.

        A KbvqError there is raised everywhere.
        """
        if self.count == 1:
            return function()
        answer: dict[str, Any] = {}
        failure: Exception | None = None
        if self.is_first:
            try:
                answer = {"result": function()}
            except KbvqError as error:
                answer, failure = {"error": type(error).__name__, "message": str(error)}, error
        content = torch.tensor(list(json.dumps(answer).encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor([len(content)], device=self.device)
        with _meeting():
            dist.broadcast(length, src=0)
            if not self.is_first:
                content = torch.empty(int(length), dtype=torch.uint8, device=self.device)
            dist.broadcast(content, src=0)
        if failure is not None:
            raise failure
        answer = json.loads(bytes(content.tolist()))
        if "error" in answer:
            classes = {cls.__name__: cls for cls in KbvqError.__subclasses__()}
            raise classes.get(answer["error"], KbvqError)(answer["message"])
        return answer["result"]


ONE = Ranks()
"""A run of one process."""


def launched_ranks() -> int:
    """How many processes the launcher started, from the environment that torchrun and accelerate set."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_index() -> int:
    """Which of them this process is, from 0."""
    return int(os.environ.get("RANK", "0"))


def join_ranks(device: torch.device) -> Ranks:
    """Meet the other processes of the launcher; without one, or with one process, there is nobody to meet."""
    if launched_ranks() == 1:
        return Ranks(device=device)
    if not dist.is_initialized():
        with _meeting():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


@contextmanager
def _meeting() -> Iterator[None]:
    """Raises RanksError where the other processes cannot be reached, most often because one of them has ended."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed has no class of its own for a lost connection
        raise RanksError(
            f"the other processes of the run cannot be reached ({str(error).partition(chr(10))[0]}); see what they "
            "say. What the run had finished is kept; the same command goes on from there, on any number of processes"
        ) from error
