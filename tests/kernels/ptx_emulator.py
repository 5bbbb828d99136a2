"""Executes the PTX of kbvq_kernels/ptx.py in Triton's interpreter, which has no inline assembly of its own.

Reads the very strings that ptxas gets and knows the instructions in them, as the PTX manual defines them. Element i of
a tensor is thread i of its program, lane i % 32. Shared memory is that of the program that allocated last, for the
interpreter runs one after the other; it starts poisoned. An access outside of it, or without the alignment that the
hardware wants, fails.
"""

from __future__ import annotations

import ctypes
import re

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

SHARED_BASE = 1024
POISON = 0xAB


def widened(pairs: np.ndarray, kind: str) -> np.ndarray:
    """uint32 [..] of two 16-bit floats each: float32 [.., 2]."""
    halves = torch.from_numpy(np.ascontiguousarray(pairs).view(np.int16).reshape(*pairs.shape, 2))
    return halves.view(torch.bfloat16 if kind.startswith("bf16") else torch.float16).float().numpy()


def narrowed(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 [.., 2], rounded to nearest even, as uint32 [..]."""
    halves = torch.from_numpy(values).to(torch.bfloat16 if kind.startswith("bf16") else torch.float16)
    return halves.view(torch.int16).numpy().view(np.uint32)[..., 0]


class Machine:
    """Registers by name, each uint64 or float32 [threads], of one asm statement; shared memory outlives it."""

    shared = np.empty(0, np.uint8)

    def __init__(self, threads: int, registers: dict[str, np.ndarray]):
        self.threads, self.registers = threads, registers

    def value(self, operand: str) -> np.ndarray:
        if operand in self.registers:
            return self.registers[operand]
        if operand == "%laneid":
            return np.arange(self.threads, dtype=np.uint64) % 32
        return np.full(self.threads, int(operand, 0), np.uint64)

    def run(self, asm: str) -> None:
        for statement in re.sub(r"^\{ | \}$", "", asm).split(";"):
            if statement.strip():
                self.execute(statement.strip())

    def execute(self, statement: str) -> None:
        guard = np.ones(self.threads, bool)
        if statement.startswith("@"):
            name, statement = statement[1:].split(" ", 1)
            guard = self.registers[name].astype(bool)
        opcode, rest = statement.split(" ", 1)
        if opcode == ".reg":
            return
        if opcode == ".shared":
            alignment, name, size = re.fullmatch(r"\.align (\d+) \.b8 (\w+)\[(\d+)\]", rest).groups()
            assert int(alignment) == 16 and int(size) <= 48 * 1024
            Machine.shared = np.full(int(size), POISON, np.uint8)
            self.registers[name] = np.full(self.threads, SHARED_BASE, np.uint64)
            return
        operands = [part.strip(" {}[]") for part in rest.split(",")]
        kind = opcode.split(".")
        if kind[0] in ("mov", "cvt"):
            self.registers[operands[0]] = self.value(operands[1])
        elif opcode == "and.b32":
            self.registers[operands[0]] = self.value(operands[1]) & self.value(operands[2])
        elif opcode == "mad.lo.u32":
            a, b, c = map(self.value, operands[1:])
            self.registers[operands[0]] = (a * b + c) & 0xFFFFFFFF
        elif opcode == "shf.r.wrap.b32":
            low, high, shift = map(self.value, operands[1:])
            self.registers[operands[0]] = ((high << 32 | low) >> (shift & 31)) & 0xFFFFFFFF
        elif opcode == "setp.ne.s32":
            self.registers[operands[0]] = self.value(operands[1]) != self.value(operands[2])
        elif kind[0] in ("ld", "st"):
            self.access(kind, operands, guard)
        elif kind[0] == "fma":
            a, b, c = (widened(self.value(name).astype(np.uint32), kind[2]) for name in operands[1:])
            self.registers[operands[0]] = narrowed(a * b + c, kind[2]).astype(np.uint64)
        elif opcode.startswith("mma.sync.aligned.m16n8k16.row.col.f32."):
            self.multiply(opcode.split(".")[-2], operands)
        else:
            raise NotImplementedError(statement)

    def access(self, kind: list[str], operands: list[str], guard: np.ndarray) -> None:
        """ld and st, in global and shared memory, of one to four registers of 4 or 8 bytes."""
        load, size = kind[0] == "ld", int(kind[-1][1:]) // 8
        names, address = (operands[:-1], operands[-1]) if load else (operands[1:], operands[0])
        assert len(names) == (int(kind[-2][1:]) if re.fullmatch(r"v\d", kind[-2]) else 1)
        threads = np.flatnonzero(guard)
        at = self.value(address)[threads].astype(np.int64)
        assert (at % (size * len(names)) == 0).all(), f"misaligned {'.'.join(kind)}"
        for i, name in enumerate(names):
            place = at + i * size
            if kind[1] == "global":
                assert load
                data = [int.from_bytes(ctypes.string_at(int(p), size), "little") for p in place]
                self.registers[name][threads] = np.array(data, np.uint64)
                continue
            inside = (place >= SHARED_BASE) & (place + size <= SHARED_BASE + len(Machine.shared))
            assert inside.all(), "outside of the shared memory"
            where = (place - SHARED_BASE)[:, None] + np.arange(size)
            if load:
                data = Machine.shared[where].view(np.uint32 if size == 4 else np.uint64)[:, 0]
                self.registers[name][threads] = data
            else:
                values = self.value(name)[threads].astype(np.uint32 if size == 4 else np.uint64)
                Machine.shared[where] = values.view(np.uint8).reshape(-1, size)

    def multiply(self, kind: str, operands: list[str]) -> None:
        """mma.m16n8k16 of every warp, by the fragment tables of the PTX manual."""
        d, a, b, c = operands[:4], operands[4:8], operands[8:10], operands[10:14]
        warps, lane = self.threads // 32, np.arange(32)
        g, t = lane // 4, lane % 4
        a_values = [widened(self.value(name).astype(np.uint32).reshape(warps, 32), kind) for name in a]
        b_values = [widened(self.value(name).astype(np.uint32).reshape(warps, 32), kind) for name in b]
        rows, columns = np.zeros((warps, 16, 16), np.float32), np.zeros((warps, 16, 8), np.float32)
        total = np.zeros((warps, 16, 8), np.float32)
        for i in range(2):
            for register in range(4):
                rows[:, g + 8 * (register % 2), 2 * t + i + 8 * (register // 2)] = a_values[register][..., i]
            for register in range(2):
                columns[:, 2 * t + i + 8 * register, g] = b_values[register][..., i]
            for register in range(4):
                if register % 2 == i:
                    total[:, g + 8 * (register // 2), 2 * t + i] = self.value(c[register]).reshape(warps, 32)
        total += rows @ columns
        for register, name in enumerate(d):
            place = total[:, g + 8 * (register // 2), 2 * t + register % 2]
            self.registers[name] = np.ascontiguousarray(place).reshape(-1)


class Results:
    def __init__(self, results: list[TensorHandle]):
        self.results = results

    def get_result(self, index: int) -> TensorHandle:
        return self.results[index]


def create_inline_asm(self, asm, constraints, values, types, is_pure, pack) -> Results:
    """What Triton's interpreter calls for tl.inline_asm_elementwise."""
    kinds, shape = constraints.split(","), np.broadcast_shapes(*(value.data.shape for value in values))
    threads, outputs = int(np.prod(shape)), sum(kind.startswith("=") for kind in kinds)
    poison = {"f": np.float32(np.nan), "r": np.uint64(0xABABABAB), "l": np.uint64(0xABABABABABABABAB)}
    registers = {f"${i}": np.full(threads, poison[kinds[i][-1]]) for i in range(outputs)}
    for i, value in enumerate(values, outputs):
        data = np.broadcast_to(value.data, shape).reshape(-1)
        size = {"f": np.float32, "r": np.uint32, "l": np.uint64}[kinds[i]]
        assert data.itemsize == np.dtype(size).itemsize, f"operand {i} of {asm} has {data.itemsize} bytes"
        registers[f"${i}"] = data.view(size) if kinds[i] == "f" else data.view(size).astype(np.uint64)
    machine = Machine(threads, registers)
    machine.run(asm)
    results = []
    for i, dtype in enumerate(types):
        # unsigned registers of 64 bits to what Triton holds
        to, view = {"f": (np.float32, np.float32), "r": (np.uint32, np.int32), "l": (np.uint64, np.int64)}[kinds[i][-1]]
        data = machine.registers[f"${i}"].astype(to).view(view)
        results.append(TensorHandle(data.reshape(shape), dtype.scalar))
    return Results(results)


def install() -> None:
    InterpreterBuilder.create_inline_asm = create_inline_asm
    # Compiled code joins Python's tuples and Triton's; the interpreter's do not know each other.
    tl.tuple.__add__ = lambda self, other: tl.tuple([*self.values, *other])
    tl.tuple.__radd__ = lambda self, other: tl.tuple([*other, *self.values])
