"""Executes a PTX program on all threads of many programs of a grid at once, instruction by instruction.

A register is an array over threads. Threads that branch apart wait for each other where the one with the lowest
place in the program catches up (compilers lay code out so that this is where paths meet). What an instruction does to
the threads of a warp together needs all of its lanes at one place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from . import matrix
from .arithmetic import compute, dtype
from .faults import Faults
from .memory import GlobalMemory, SharedMemory, elements
from .program import Address, Instruction, Program

IGNORED = {"bar.warp.sync", "fence.proxy.async.shared::cta", "wgmma.fence.sync.aligned",
           "wgmma.commit_group.sync.aligned", "griddepcontrol.wait", "griddepcontrol.launch_dependents"}  # fmt: skip
"""Order within a warp, which runs in step here, and what only makes products start."""

CONTROL = {"bra", "ret", "exit", "bar", "barrier"}
TOGETHER = {"mma", "wgmma", "ldmatrix", "stmatrix", "shfl", "vote", "redux"}
"""Instructions of a whole warp."""


@dataclass
class Counts:
    """What was executed, by the place of the instruction in the program.

    executed: how many warps came there, with any of their lanes, whatever its guard said. cycles: of the unit of L1
    cache and shared memory, for the data. In shared memory other words of one bank come one after the other; in the
    cache four lines of 128 bytes are found a cycle, and 128 bytes that differ are read, from whichever lines: that
    those may meet in banks too is left out.
    """

    executed: Counter[int] = field(default_factory=Counter)
    cycles: Counter[int] = field(default_factory=Counter)

    def instructions(self, program: Program, places: Iterable[int] | None = None, memory: str | None = None) -> int:
        """Instructions that warps executed: at these places, None for all; of those only what accesses this memory."""
        return sum(
            self.executed[place]
            for place in (range(len(program.instructions)) if places is None else places)
            if memory is None or program.instructions[place].memory == memory
        )


class Machine:
    """Some programs of a grid.

    coordinates: of each program, [programs, 3]; arguments: by position, pointers as addresses. poison: bytes that
    uninitialised registers hold.
    """

    def __init__(
        self,
        program: Program,
        coordinates: np.ndarray,
        grid: tuple[int, int, int],
        warps: int,
        arguments: list[int],
        memory: GlobalMemory,
        shared: SharedMemory,
        poison: np.ndarray,
        faults: Faults,
        counts: Counts | None = None,
    ):
        self.program, self.memory, self.shared, self.faults = program, memory, shared, faults
        self.warps, self.arguments, self.poison, self.counts, self.grid = warps, arguments, poison, counts, grid
        threads = 32 * warps
        self.coordinates = coordinates
        self.block = np.repeat(np.arange(len(coordinates)), threads)
        self.number = np.repeat(np.arange(len(coordinates)), threads)  # as block, but kept when others are forgotten
        self.thread = np.tile(np.arange(threads), len(coordinates))
        self.alive = np.ones(len(self.thread), bool)
        self.registers: dict[str, np.ndarray] = {}
        self.missing: dict[str, np.ndarray] = {}
        self.mask: np.ndarray | None = None
        self.multiplying: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.copying: list[list[tuple]] = [[]]

    # ---- control flow

    def run(self) -> None:
        """Until every thread has returned."""
        targets = set(self.program.labels.values())
        groups: dict[int, np.ndarray] = {0: np.ones(len(self.thread), bool)}
        waiting: dict[int, np.ndarray] = {}
        with np.errstate(all="ignore"):
            while groups or waiting:
                if not groups:
                    self._deadlock(waiting)
                    return
                place = min(groups)
                mask = groups.pop(place)
                while True:
                    if place in targets and place in groups:
                        mask = mask | groups.pop(place)
                    if place in targets and groups and min(groups) < place:
                        groups[place] = mask
                        break
                    if place == len(self.program.instructions):
                        self.alive &= ~mask
                        break
                    instruction = self.program.instructions[place]
                    if instruction.parts[0] not in CONTROL or ".".join(instruction.parts) in IGNORED:
                        self._execute(place, instruction, mask)
                        place += 1
                        continue
                    self._count(place, mask)
                    for where, threads in self._control(place, instruction, mask, waiting).items():
                        groups[where] = groups[where] | threads if where in groups else threads
                    if not groups:
                        groups = self._keep_alive(groups, waiting)
                    elif (alive := self.alive.reshape(-1, 32 * self.warps).any(1)).sum() < 0.75 * len(alive):
                        groups = self._keep_alive(groups, waiting)
                    break

    def _control(self, place, instruction: Instruction, mask, waiting) -> dict[int, np.ndarray]:
        """Where the threads of the mask go on."""
        taken = mask
        if instruction.guard:
            name, negated = instruction.guard
            self._require(instruction, name, mask)
            taken = mask & (self.registers[name] ^ negated)
        kind = instruction.parts[0]
        rest = mask & ~taken
        if kind == "bra":
            to = {self.program.labels[instruction.operands[0]]: taken}
        elif kind in ("ret", "exit"):
            self.alive &= ~taken
            to = {}
        else:
            if instruction.operands != (0,):
                raise NotImplementedError(instruction.text)
            waiting[place] = waiting[place] | taken if place in waiting else taken
            to = {place + 1: self._release(place, instruction, waiting)}
        if place + 1 in to:
            rest = rest | to[place + 1]
        to[place + 1] = rest
        return {where: threads for where, threads in to.items() if threads.any()}

    def _release(self, place: int, instruction: Instruction, waiting) -> np.ndarray:
        """Threads that may pass: of programs all of whose threads wait here."""
        here = waiting.pop(place)
        by_program = here.reshape(-1, 32 * self.warps)
        complete, alive = by_program.all(1), self.alive.reshape(by_program.shape)
        gone = by_program.any(1) & ~complete & (by_program | ~alive).all(1)
        self.faults.add(
            "divergence", instruction, gone, lambda i: f"threads of program {i} returned before the barrier"
        )
        complete |= gone
        self.shared.epoch[complete] += 1
        passed = (by_program & complete[:, None]).reshape(-1)
        if (here & ~passed).any():
            waiting[place] = here & ~passed
        return passed

    def _deadlock(self, waiting) -> None:
        for place, mask in waiting.items():
            self.faults.add(
                "divergence", self.program.instructions[place], mask, lambda i: f"{self.where(i)} waits for ever"
            )

    def _keep_alive(self, groups, waiting) -> dict[int, np.ndarray]:
        """Forget programs that have returned."""
        alive = self.alive.reshape(-1, 32 * self.warps).any(1)
        if not len(alive) or alive.all() or any(self.copying):
            return groups
        keep = np.repeat(alive, 32 * self.warps)
        self.shared.keep(np.flatnonzero(alive))
        self.thread, self.number, self.alive = self.thread[keep], self.number[keep], self.alive[keep]
        self.block = np.repeat(np.arange(alive.sum()), 32 * self.warps)
        self.registers = {name: value[keep] for name, value in self.registers.items()}
        self.missing = {name: value[keep] for name, value in self.missing.items()}
        for place in list(waiting):
            waiting[place] = waiting[place][keep]
        return {place: mask[keep] for place, mask in groups.items()}

    # ---- operands

    def where(self, i: int) -> str:
        number = self.number[i]
        return f"program {tuple(int(c) for c in self.coordinates[number])} thread {self.thread[i]}"

    def _require(self, instruction: Instruction, name: str, mask: np.ndarray) -> None:
        """A fault where a register is read that no instruction has set."""
        missing = self.missing.get(name)
        if missing is not None:
            self.faults.add("uninitialised register", instruction, missing & mask, lambda i: f"{name}, {self.where(i)}")
        elif name not in self.registers:
            self.faults.add("uninitialised register", instruction, mask, lambda i: f"{name}, {self.where(i)}")
            self._poison(name)

    def _poison(self, name: str) -> None:
        kind = np.dtype(self.program.register_class(name))
        threads = len(self.thread)
        self.registers[name] = np.resize(self.poison, threads * kind.itemsize).view(kind)[:threads]
        if kind.kind == "b":
            self.registers[name] = np.resize(self.poison, threads) & 1 == 1

    def _special(self, name: str) -> np.ndarray | None:
        threads = len(self.thread)
        axis = "xyz".find(name[-1])
        if name.startswith("%tid."):
            return (self.thread if axis == 0 else np.zeros(threads)).astype(np.uint32)
        if name.startswith("%ctaid."):
            return self.coordinates[self.number, axis].astype(np.uint32)
        if name.startswith("%nctaid."):
            return np.full(threads, self.grid[axis], np.uint32)
        if name == "%laneid":
            return (self.thread % 32).astype(np.uint32)
        if name == "%warpid":
            return (self.thread // 32).astype(np.uint32)
        if name in self.shared.names:
            return np.full(threads, self.shared.names[name], np.uint64)
        return None

    def value(self, instruction: Instruction, operand, kind: np.dtype, mask: np.ndarray) -> np.ndarray:
        """An operand over threads; kind: dtype of an immediate."""
        if isinstance(operand, int):
            if kind.kind == "b":
                return np.full(len(self.thread), operand != 0)
            bits = operand & ((1 << 8 * kind.itemsize) - 1)
            return np.full(len(self.thread), bits, kind)
        if isinstance(operand, tuple):  # a wider register in parts, the lowest first
            size = kind.itemsize // len(operand)
            parts = [self.value(instruction, part, elements(size), mask) for part in operand]
            return np.stack(parts, -1).view(elements(kind.itemsize))[:, 0]
        special = self._special(operand) if self.program.register_class(operand) is None else None
        if special is not None:
            return special
        if self.program.register_class(operand) is None:
            raise ValueError(f"unknown name {operand} in {instruction.text}")
        self._require(instruction, operand, mask)
        return self.registers[operand]

    def set(self, name: str | None, value: np.ndarray, mask: np.ndarray, reached: np.ndarray) -> None:
        """mask: threads that get the value. reached: those that are here, though perhaps their guard is false: their
        register, if it has no value, holds poison from here on, which the kernel means to be of no consequence."""
        if name is None:
            return
        kind = np.dtype(self.program.register_class(name))
        if value.dtype != kind:
            value = value.astype(kind)
        if mask.all():
            self.registers[name] = value
            self.missing.pop(name, None)
            return
        if name not in self.registers:
            self._poison(name)
            self.missing[name] = np.ones(len(self.thread), bool)
        self.registers[name] = np.where(mask, value, self.registers[name])
        if name in self.missing:
            self.missing[name] = self.missing[name] & ~reached
            if not self.missing[name].any():
                del self.missing[name]

    # ---- execution

    def _count(self, place: int, mask: np.ndarray) -> None:
        if self.counts is not None:
            self.counts.executed[place] += int(mask.reshape(-1, 32).any(1).sum())

    def _execute(self, place: int, instruction: Instruction, reached: np.ndarray) -> None:
        self._count(place, reached)
        self.place = place
        mask = reached
        if instruction.guard:
            name, negated = instruction.guard
            self._require(instruction, name, reached)
            mask = reached & (self.registers[name] ^ negated)
        name = instruction.parts[0]
        if ".".join(instruction.parts) in IGNORED:
            return
        if name in TOGETHER:
            lanes = mask.reshape(-1, 32)
            some = lanes.any(1) & ~lanes.all(1)
            self.faults.add(
                "divergence", instruction, some, lambda i: f"lanes are missing in the warp of {self.where(32 * i)}"
            )
            getattr(self, f"_{name}")(instruction, mask)
        elif name == "createpolicy":  # a hint for caches
            self.set(instruction.operands[0], np.zeros(len(self.thread), np.uint64), mask, reached)
        elif name in ("ld", "st", "atom", "cp"):
            getattr(self, f"_{name}")(instruction, mask, reached)
        elif name == "mov" and isinstance(instruction.operands[0], tuple):
            wide = self.value(instruction, instruction.operands[1], dtype(instruction.type), mask)
            names = instruction.operands[0]
            parts = np.ascontiguousarray(wide).view(elements(wide.itemsize // len(names))).reshape(-1, len(names))
            for i, part in enumerate(names):
                self.set(part, parts[:, i].copy(), mask, reached)
        else:
            values = [
                self.value(instruction, operand, self._immediate(instruction, i), mask)
                for i, operand in enumerate(instruction.operands[1:], 1)
            ]
            self.set(instruction.operands[0], compute(instruction, values), mask, reached)

    @staticmethod
    def _immediate(instruction: Instruction, i: int) -> np.dtype:
        """Dtype of operand i if it is an immediate."""
        name, kind = instruction.parts[0], instruction.type
        if kind == "pred" or (name == "selp" and i == 3):
            return np.dtype(bool)
        if name in ("shl", "shr") and i == 2 or name in ("bfe", "shf", "prmt", "lop3"):
            return np.dtype("uint32")
        if kind in ("f16x2", "bf16x2", "tf32"):
            return np.dtype("uint32")
        if kind in ("f16", "bf16"):
            return np.dtype("uint16")
        return elements(dtype(kind).itemsize * (2 if name == "mad" and "wide" in instruction.parts and i == 3 else 1))

    def _address(self, instruction: Instruction, address: Address, mask: np.ndarray) -> np.ndarray:
        base = self.value(instruction, address.base, np.dtype("uint64"), mask)
        return base.astype(np.uint64) + np.uint64(address.offset & (2**64 - 1))

    def _ld(self, instruction: Instruction, mask, reached) -> None:
        into, address, *_ = instruction.operands
        names = into if isinstance(into, tuple) else (into,)
        kind = dtype(instruction.type)
        if instruction.parts[1] == "param":
            value = self.arguments[self.program.parameters[address.base]]
            bits = value & ((1 << 8 * kind.itemsize) - 1)
            self.set(into, np.full(len(self.thread), bits, elements(kind.itemsize)), mask, reached)
            return
        rows = np.flatnonzero(mask)
        at = self._address(instruction, address, mask)[rows]
        data = self._load(instruction, at, len(names), kind.itemsize, rows)
        for i, name in enumerate(names):
            full = np.zeros(len(self.thread), kind)
            full[rows] = data[:, i].view(kind)
            target = np.dtype(self.program.register_class(name)) if name else kind
            # a signed value is extended by its sign to the register
            full = full.astype(f"int{8 * target.itemsize}").view(target) if kind.kind == "i" else full
            self.set(name, full.view(elements(full.itemsize)), mask, reached)

    def _load(self, instruction: Instruction, at, count: int, size: int, rows) -> np.ndarray:
        def where(i):
            return self.where(rows[i])

        if instruction.parts[1] == "global":
            self._lines(at, count * size, rows)
            return self.memory.load(instruction, at, count, size, self._programs()[rows], where)
        if not instruction.parts[1].startswith("shared"):
            raise NotImplementedError(instruction.text)
        at = at.astype(np.int64)
        self._wavefronts(at, count * size, rows)
        return self.shared.load(instruction, at, count, size, self.block[rows], self.thread[rows] // 32, where)

    def _programs(self) -> np.ndarray:
        x, y, z = self.coordinates[self.number].T
        return ((z * self.grid[1] + y) * self.grid[0] + x).astype(np.int32)

    def _st(self, instruction: Instruction, mask, reached) -> None:
        address, source, *_ = instruction.operands
        parts = source if isinstance(source, tuple) else (source,)
        kind = elements(dtype(instruction.type).itemsize)
        rows = np.flatnonzero(mask)
        at = self._address(instruction, address, mask)[rows]
        columns = [self.value(instruction, part, kind, mask)[rows].astype(kind) for part in parts]
        self._store(instruction, at, np.stack(columns, -1), rows)

    def _store(self, instruction: Instruction, at, values, rows) -> None:
        def where(i):
            return self.where(rows[i])

        if instruction.parts[0] == "st" and instruction.parts[1] == "global":
            self._lines(at, values.shape[1] * values.itemsize, rows)
            self.memory.store(instruction, at, values, self._programs()[rows], where)
            return
        if "shared" not in ".".join(instruction.parts):
            raise NotImplementedError(instruction.text)
        at = at.astype(np.int64)
        self._wavefronts(at, values.shape[1] * values.itemsize, rows)
        self.shared.store(instruction, at, values, self.block[rows], self.thread[rows] // 32, where)

    def _atom(self, instruction: Instruction, mask, reached) -> None:
        if instruction.parts[1] != "shared" or instruction.parts[-2] != "add" or instruction.type[0] not in "us":
            raise NotImplementedError(instruction.text)
        name, address, source = instruction.operands
        kind = elements(dtype(instruction.type).itemsize)
        rows = np.flatnonzero(mask)
        at = self._address(instruction, address, mask)[rows].astype(np.int64)
        values = self.value(instruction, source, kind, mask)[rows].astype(kind)
        before = self.shared.add(
            instruction, at, values, self.block[rows], self.thread[rows] // 32, lambda i: self.where(rows[i])
        )
        full = np.zeros(len(self.thread), kind)
        full[rows] = before
        self.set(name, full, mask, reached)

    def _cp(self, instruction: Instruction, mask, reached) -> None:
        """cp.async: what is copied comes when it is waited for, and not before."""
        operation = instruction.parts[2]
        if operation == "commit_group":
            self.copying.append([])
            return
        if operation in ("wait_group", "wait_all"):
            keep = 1 + (instruction.operands[0] if operation == "wait_group" else 0)
            while len(self.copying) > keep:
                for store, at, values, rows in self.copying.pop(0):
                    self._store(store, at, values, rows)
            return
        if operation not in ("ca", "cg") or instruction.parts[3:5] != ("shared", "global"):
            raise NotImplementedError(instruction.text)
        into, source, size, *rest = instruction.operands
        rows = np.flatnonzero(mask)
        at = self._address(instruction, into, mask)[rows]
        values = np.zeros((len(rows), size), np.uint8)
        length = self.value(instruction, rest[0] if rest else size, np.dtype("uint32"), mask)[rows]
        for part in np.unique(length[length > 0]):  # the rest is filled with zeros
            some = np.flatnonzero(length == part)
            places = self._address(instruction, source, mask)[rows[some]]
            self._lines(places, int(part), rows[some])
            loaded = self.memory.load(
                instruction, places, int(part), 1, self._programs()[rows[some]],
                lambda i, some=some: self.where(rows[some[i]]),
            )  # fmt: skip
            values[some[:, None], np.arange(part)] = loaded
        self.copying[-1].append((instruction, at, values.view(np.uint32), rows))

    # ---- together

    def _gather(self, instruction: Instruction, operand, mask) -> np.ndarray:
        """A vector of registers of all warps, uint32 [warps, registers, 32]."""
        names = operand if isinstance(operand, tuple) else (operand,)
        values = [self.value(instruction, name, np.dtype("uint32"), mask).reshape(-1, 32) for name in names]
        return np.stack(values, 1)

    def _spread(self, operand, values: np.ndarray, mask) -> None:
        names = operand if isinstance(operand, tuple) else (operand,)
        for i, name in enumerate(names):
            self.set(name, np.ascontiguousarray(values[:, i]).reshape(-1), mask, mask)

    def _mma(self, instruction: Instruction, mask) -> None:
        shape, kind = instruction.parts[3], instruction.parts[-2]
        if (shape, kind) not in (("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")):
            raise NotImplementedError(instruction.text)
        into, a, b, c = instruction.operands
        operands = [self._gather(instruction, operand, mask) for operand in (a, b, c)]
        self._spread(into, matrix.multiply(kind, *operands), mask)

    def _wgmma(self, instruction: Instruction, mask) -> None:
        if instruction.parts[1] == "wait_group":
            # Until here the products may read shared memory.
            for block, warp, cells in self.multiplying:
                self.shared.note_read(block, warp, cells)
            self.multiplying = []
            return
        if instruction.parts[1] != "mma_async":
            raise NotImplementedError(instruction.text)
        shape, kind = instruction.parts[4], instruction.parts[-1]
        columns = int(shape.split("n")[1].split("k")[0])
        size, depth = (4, 8) if kind == "tf32" else (2, 16)
        into, a, b, scale, one, other, *transposed = instruction.operands
        assert (one, other) == (1, 1)
        groups = np.flatnonzero(mask.reshape(-1, 128).all(1))
        first = groups * 128
        descriptor = self.value(instruction, b, np.dtype("uint64"), mask)[first]
        values = self._matrix(instruction, descriptor, depth, columns, size, bool(transposed and transposed[-1]), first)
        if isinstance(a, tuple):
            registers = self._gather(instruction, a, mask).reshape(-1, 4, len(a), 32)[groups]
            rows = matrix.rows_of_a(registers.reshape(-1, len(a), 32), kind).reshape(len(groups), 64, depth)
        else:
            descriptor = self.value(instruction, a, np.dtype("uint64"), mask)[first]
            bits = self._matrix(instruction, descriptor, depth, 64, size, bool(transposed and transposed[0]), first)
            rows = matrix.values_of_b(bits, kind).transpose(0, 2, 1)
        values = matrix.values_of_b(values, kind)
        keep = self.value(instruction, scale, np.dtype(bool), mask)
        added = mask & keep  # elsewhere the product replaces what the sums were
        sums = self._gather(instruction, into, added).reshape(-1, 4, len(into), 32)
        c = np.where(keep[first][:, None, None, None], sums[groups], np.uint32(0))
        sums[groups] = matrix.multiply_group(rows, values, c)
        self._spread(into, sums.reshape(-1, len(into), 32), mask)

    def _matrix(self, instruction: Instruction, descriptor, depth, columns, size, transposed, first) -> np.ndarray:
        """An operand of wgmma in shared memory, uint [groups, depth, columns]; it is read by all four warps."""
        places = matrix.descriptor_places(descriptor, depth, columns, size, transposed)
        flat = places.reshape(len(places), -1)
        block, warp = np.repeat(self.block[first], flat.shape[1]), np.repeat(self.thread[first] // 32, flat.shape[1])

        def where(i):
            return self.where(first[i // flat.shape[1]])

        # Cells may be larger than an element: whole 16-byte rows are aligned.
        at = flat.reshape(-1)
        chunk = at // 16 * 16
        data = self.shared.load(instruction, chunk, 16 // size, size, block, warp, where)
        for other in range(1, 4):
            self.shared.note_read(block, warp + other, self.shared._cells(chunk, 16))
        self.multiplying += [(block, warp + i, self.shared._cells(chunk, 16)) for i in range(4)]
        return data[np.arange(len(at)), at % 16 // size].reshape(places.shape)

    def _ldmatrix(self, instruction: Instruction, mask) -> None:
        into, address = instruction.operands
        count = int(next(p for p in instruction.parts if p in ("x1", "x2", "x4"))[1:])
        data, warps = self._matrix_rows(instruction, address, count, mask), len(mask) // 32
        matrices = data.reshape(warps, count, 8, 8)
        if "trans" in instruction.parts:
            matrices = matrices.transpose(0, 1, 3, 2)
        halves = np.ascontiguousarray(matrices).reshape(warps, count, 32, 2)
        self._spread(into, halves.view(np.uint32)[..., 0], mask)

    def _matrix_rows(self, instruction: Instruction, address: Address, count: int, mask) -> np.ndarray:
        """Rows of 16 bytes whose addresses the first 8 * count lanes hold, uint16 [warps * 8 * count, 8]."""
        out = np.zeros((len(mask) // 32, 32, 8), np.uint16)
        rows = np.flatnonzero(mask & (self.thread % 32 < 8 * count))
        at = self._address(instruction, address, mask)[rows].astype(np.int64)
        self._wavefronts(at, 16, rows)
        out.reshape(-1, 8)[rows] = self.shared.load(
            instruction, at, 8, 2, self.block[rows], self.thread[rows] // 32, lambda i: self.where(rows[i])
        )
        return out[:, : 8 * count].reshape(-1, 8)

    def _stmatrix(self, instruction: Instruction, mask) -> None:
        address, source = instruction.operands
        values = self._gather(instruction, source, mask)
        warps, count, _ = values.shape
        matrices = np.ascontiguousarray(values).view(np.uint16).reshape(warps, count, 8, 8)
        if "trans" in instruction.parts:
            matrices = matrices.transpose(0, 1, 3, 2)
        rows = np.flatnonzero(mask & (self.thread % 32 < 8 * count))
        at = self._address(instruction, address, mask)[rows].astype(np.int64)
        data = np.zeros((warps, 32, 8), np.uint16)
        data[:, : 8 * count] = matrices.reshape(warps, 8 * count, 8)
        self._wavefronts(at, 16, rows)
        self.shared.store(
            instruction, at, data.reshape(-1, 8)[rows], self.block[rows], self.thread[rows] // 32,
            lambda i: self.where(rows[i]),
        )  # fmt: skip

    def _shfl(self, instruction: Instruction, mask) -> None:
        into, source, b, c, _ = instruction.operands
        predicate = None
        if isinstance(into, str) and "|" in into:
            into, predicate = into.split("|")
        u32 = np.dtype("uint32")
        value, b, c = (self.value(instruction, x, u32, mask).reshape(-1, 32) for x in (source, b, c))
        lane = np.arange(32)
        low, segment = c & 31, (c >> 8) & 31
        lowest = lane & segment
        highest = lowest | (low & ~segment)
        mode, b = instruction.parts[2], (b & 31).astype(np.int64)
        source_lane = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
        inside = source_lane >= highest if mode == "up" else source_lane <= highest
        source_lane = np.where(inside, source_lane, lane) & 31
        self.set(into, np.take_along_axis(value, source_lane, 1).reshape(-1), mask, mask)
        if predicate:
            self.set(predicate, inside.reshape(-1), mask, mask)

    def _vote(self, instruction: Instruction, mask) -> None:
        into, source, *_ = instruction.operands
        values = self.value(instruction, source, np.dtype(bool), mask).reshape(-1, 32)
        mode = instruction.parts[2]
        if mode == "ballot":
            result = (values.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
        elif mode in ("any", "all"):
            result = values.any(1) if mode == "any" else values.all(1)
        else:
            raise NotImplementedError(instruction.text)
        self.set(into, np.repeat(result, 32), mask, mask)

    def _redux(self, instruction: Instruction, mask) -> None:
        into, source, _ = instruction.operands
        values = self.value(instruction, source, np.dtype("uint32"), mask).reshape(-1, 32)
        values = values.view(np.int32) if instruction.type == "s32" else values
        operation = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
        result = operation[instruction.parts[2]].reduce(values, axis=1).astype(values.dtype).view(np.uint32)
        self.set(into, np.repeat(result, 32), mask, mask)

    def _wavefronts(self, at: np.ndarray, size: int, rows: np.ndarray) -> None:
        """Count the cycles of the banks: 128 bytes at a time, other words of one bank one after the other."""
        if self.counts is None or not len(rows):
            return
        lanes = min(32, 128 // max(4, size))
        part = rows // 32 * (32 // lanes) + self.thread[rows] % 32 // lanes
        words = max(1, size // 4)
        word = at[:, None] // 4 + np.arange(words)
        key = np.unique(part[:, None].astype(np.int64) << 32 | word)
        bank = (key >> 32) * 32 + key % 32
        _, per_bank = np.unique(bank, return_counts=True)
        which = np.unique(bank) // 32
        most = np.zeros(part.max() + 1, np.int64)
        np.maximum.at(most, which, per_bank)
        self.counts.cycles[self.place] += int(most.sum())

    def _lines(self, at: np.ndarray, size: int, rows: np.ndarray) -> None:
        """Count the cycles of the L1 cache for global memory; see Counts."""
        if self.counts is None or not len(rows):
            return
        word = (at[:, None] // np.uint64(4) + np.arange(max(1, size // 4), dtype=np.uint64)).astype(np.int64)
        words = np.unique((rows // 32)[:, None].astype(np.int64) << 48 | word & (1 << 48) - 1)
        lines = np.unique(words >> 5)
        each = np.stack([np.bincount(words >> 48) / 32, np.bincount(lines >> 43) / 4]).max(0)
        self.counts.cycles[self.place] += float(np.maximum(each, each > 0).sum())
