"""Runs what kbvq_kernels launches: compiles each kernel as its launcher asks, executes its PTX on CPU tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import ModuleType

import numpy as np
import torch
import triton
from torch import Tensor

from kbvq_kernels import aot

from .faults import Faults
from .machine import Counts, Machine
from .memory import GlobalMemory, SharedMemory
from .memory import Tensor as TensorBytes
from .program import Program, parse

BATCH_THREADS = 8192
"""Threads that are executed at once: enough for numpy, little memory."""

POISON = np.frombuffer(np.random.default_rng(0).bytes(4096), np.uint8)


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor, uint8."""
    if not tensor.is_contiguous():
        raise ValueError(f"a kernel got a tensor of strides {tensor.stride()}")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


@contextlib.contextmanager
def without_ptxas() -> Iterator[None]:
    """Within the block Triton stops at PTX; the rest takes as long again. What it keeps goes to a cache of its own, for
    Triton 3.6 would take it for complete."""

    def stages(backend=None, stages=None, options=None, language=None, capability=None):
        if stages is not None:
            stages["cubin"] = lambda ptx, metadata: b""
        return "ptx only", "ptx only"

    runtime, cache_ = triton.knobs.runtime, triton.knobs.cache
    replaced = runtime.add_stages_inspection_hook, cache_.dir
    runtime.add_stages_inspection_hook, cache_.dir = stages, f"{cache_.dir}-ptx"
    try:
        yield
    finally:
        runtime.add_stages_inspection_hook, cache_.dir = replaced


@cache
def program_of(ptx: str) -> Program:
    return parse(ptx)


class Emulator:
    """A card: executes launches, and collects their faults.

    made: the tensors that torch.empty gave a launcher, by address, and which of their bytes a kernel has written.
    launched: each launch, its program, what it executed, if asked for, and how many faults it had.
    only: of a launch, which of its programs to run, None for all.
    """

    def __init__(
        self,
        capability: int,
        poison: np.ndarray = POISON,
        counting: bool = False,
        only: Callable[[aot.Launch], np.ndarray] | None = None,
    ):
        self.capability, self.poison, self.counting, self.only = capability, poison, counting, only
        self.faults = Faults()
        self.launched: list[tuple[aot.Launch, Program, Counts | None, int]] = []
        self.made: dict[int, tuple[Tensor, np.ndarray]] = {}

    @contextlib.contextmanager
    def installed(self, modules: Sequence[ModuleType] = aot.KERNEL_MODULES) -> Iterator[None]:
        """Within the block the kernels of the modules run here, and torch.empty gives ones: NaN, or -1."""
        replaced = torch.empty

        def empty(*arguments, **keywords):
            out = replaced(*arguments, **keywords)
            if out.numel():
                raw_bytes(out)[:] = 255
                self.made[out.data_ptr()] = out, np.zeros(out.nbytes, bool)
            return out

        torch.empty = empty
        try:
            with aot.intercept(self.run, self.capability, modules):
                yield
        finally:
            torch.empty = replaced

    def run(self, entry: aot.Launch, compiled: triton.compiler.CompiledKernel | None = None) -> None:
        """Run one launch, in place; compiled: what is known of it already. An integer argument of 1 is no parameter:
        Triton makes it a constant."""
        if compiled is None:
            with without_ptxas():
                compiled = aot.compile_launch(entry, self.capability)
        passed = {p.name: entry.arguments[p.name] for p in entry.kernel.params if not p.is_constexpr}
        passed = {name: value for name, value in passed.items() if isinstance(value, Tensor) or value != 1}
        first = len(self.faults.found)
        counts = self.execute(
            compiled.asm["ptx"], entry.grid, compiled.metadata.num_warps, compiled.metadata.shared,
            list(passed.values()), list(passed), self.only and self.only(entry),
        )  # fmt: skip
        self.launched.append((entry, program_of(compiled.asm["ptx"]), counts, len(self.faults.found) - first))

    def execute(
        self,
        ptx: str,
        grid: Sequence[int],
        warps: int,
        shared_bytes: int,
        values: Sequence[Tensor | int],
        names: Sequence[str] | None = None,
        only: np.ndarray | None = None,
    ) -> Counts | None:
        """Run one kernel on tensors and integers, in place; only: the programs to run, of all by number. What was
        executed, if asked for."""
        program = program_of(ptx)
        tensors: list[TensorBytes] = []
        pointers: list[int] = []
        sources: dict[int, int] = {}
        holders: list[Tensor] = []
        for i, value in enumerate(values):
            if not isinstance(value, Tensor):
                pointers.append(int(value))
                continue
            place = value.data_ptr()
            if place not in sources:
                sources[place] = len(tensors)
                name = names[i] if names else f"argument {i}"
                tensors.append(self._bytes(name, value))
                holders.append(value)
            pointers.append(GlobalMemory.address(sources[place]) + place % 16)
        pointers += [0] * (len(program.parameters) - len(pointers))  # Triton's scratch, of which no kernel has any
        x, y, z = (*grid, 1, 1)[:3]
        numbers = np.arange(x * y * z) if only is None else only
        coordinates = np.stack([numbers % x, numbers // x % y, numbers // x // y], -1)
        memory = GlobalMemory(tensors, self.poison, self.faults)
        counts = Counts() if self.counting else None
        batch = max(1, BATCH_THREADS // (32 * warps))
        for start in range(0, len(numbers), batch):
            part = coordinates[start : start + batch]
            shared = SharedMemory(program, shared_bytes, len(part), warps, self.poison, self.faults)
            Machine(program, part, (x, y, z), warps, pointers, memory, shared, self.poison, self.faults, counts).run()
        for tensor, holder in zip(tensors, holders, strict=True):
            if (tensor.owner >= 0).any():
                raw_bytes(holder)[:] = tensor.data[tensor.start : tensor.end]
            if holder.data_ptr() in self.made:
                made = self.made[holder.data_ptr()][1]
                made[: holder.nbytes] = np.repeat(tensor.written, tensor.cell)
        return counts

    def _bytes(self, name: str, value: Tensor) -> TensorBytes:
        cell = value.element_size()
        written = np.ones(value.numel(), bool)
        if value.data_ptr() in self.made:
            written = self.made[value.data_ptr()][1][: value.nbytes].reshape(-1, cell).all(1)
        return TensorBytes(name, raw_bytes(value), value.data_ptr() % 16, cell, written, self.poison)

    def unwritten(self, value: Tensor) -> int:
        """Bytes of a tensor of torch.empty that no kernel wrote."""
        made = self.made.get(value.data_ptr())
        return 0 if made is None else int((~made[1][: value.nbytes]).sum())

    def check(self) -> None:
        """Raises AssertionError with every fault."""
        lines = self.faults.lines()
        if lines:
            raise AssertionError("\n".join(lines))
