"""Global and shared memory as the emulator has them: who may touch which bytes, and in which order.

Global: each tensor lies a tebibyte from the next, so that no error of an index leads from one into another. Shared:
the parts of a program lie SHARED_GAP bytes apart.

Both know which bytes nobody has written, and who has read and written them last, by cell: the smallest unit that a
kernel moves there (global: an element of the tensor).
"""

from __future__ import annotations

import numpy as np

from .faults import Faults
from .program import Instruction, Program

TENSOR_SHIFT = 40
SHARED_BASE, SHARED_GAP = 1024, 1024
"""Hardware keeps the first KiB of shared memory for itself; swizzled tiles count on multiples of 1 KiB."""


def elements(size: int) -> np.dtype:
    return np.dtype(f"uint{8 * size}")


class Tensor:
    """Bytes of one tensor, with poison around, and their history.

    start: how far beyond a multiple of 16 the first byte lies.
    written: which of the cells have a value. owner, reader: program that wrote, and read, a cell last, -1 for none;
    several: cells that more than one program has read.
    """

    def __init__(self, name: str, data: np.ndarray, start: int, cell: int, written: np.ndarray, poison: np.ndarray):
        self.name, self.start, self.end, self.cell = name, start, start + data.nbytes, cell
        self.data = np.resize(poison, -(-data.nbytes // 16) * 16 + 32)
        self.data[start : self.end] = data
        self.written = written
        self.owner = np.full(len(written), -1, np.int32)
        self.reader = np.full(len(written), -1, np.int32)
        self.several = np.zeros(len(written), bool)
        if not written.all():
            cells = start + np.flatnonzero(~written)[:, None] * cell + np.arange(cell)
            self.data[cells] = np.resize(poison, cells.shape)

    def cells(self, offset: np.ndarray, size: int) -> np.ndarray:
        """Cells of accesses of `size` bytes, [n, cells of each]."""
        return (offset[:, None] - self.start) // self.cell + np.arange(max(1, size // self.cell))


class GlobalMemory:
    """The tensors of a launch."""

    def __init__(self, tensors: list[Tensor], poison: np.ndarray, faults: Faults):
        self.tensors, self.poison, self.faults = tensors, poison, faults

    @staticmethod
    def address(tensor: int) -> int:
        return (tensor + 1) << TENSOR_SHIFT

    def _places(self, instruction: Instruction, at: np.ndarray, size: int, where) -> np.ndarray:
        """Which accesses of `size` bytes are aligned and inside of a tensor; faults of the others."""
        misaligned = at % np.uint64(size) != 0
        self.faults.add("misaligned", instruction, misaligned, lambda i: f"address {self.name(at[i])}, {where(i)}")
        tensor = (at >> np.uint64(TENSOR_SHIFT)).astype(np.int64) - 1
        offset = (at & np.uint64((1 << TENSOR_SHIFT) - 1)).astype(np.int64)
        starts, ends = (np.array([getattr(t, name) for t in self.tensors]) for name in ("start", "end"))
        inside = (tensor >= 0) & (tensor < len(ends))
        tensor = np.where(inside, tensor, 0)
        inside &= (offset >= starts[tensor]) & (offset + size <= ends[tensor])
        self.faults.add("out of bounds", instruction, ~inside, lambda i: f"address {self.name(at[i])}, {where(i)}")
        return inside & ~misaligned

    def name(self, at: int) -> str:
        at = int(at)
        tensor, offset = (at >> TENSOR_SHIFT) - 1, at & ((1 << TENSOR_SHIFT) - 1)
        if offset >> (TENSOR_SHIFT - 1):  # before the start of the next
            tensor, offset = tensor + 1, offset - (1 << TENSOR_SHIFT)
        if 0 <= tensor < len(self.tensors):
            found = self.tensors[tensor]
            return f"{found.name} + {offset - found.start} of {found.end - found.start} bytes"
        return hex(at)

    def load(self, instruction: Instruction, at: np.ndarray, count: int, size: int, program: np.ndarray, where):
        """count elements of `size` bytes from each address, [n, count]; poison where that is not allowed."""
        out = np.resize(self.poison, (len(at), count * size)).view(elements(size))
        good = self._places(instruction, at, count * size, where)
        for tensor, rows, offset in self._split(at, good):
            out[rows] = tensor.data.view(elements(size))[offset[:, None] // size + np.arange(count)]
            cells = tensor.cells(offset, count * size)
            self.faults.add(
                "uninitialised memory", instruction, ~tensor.written[cells].all(1),
                lambda i, rows=rows: f"address {self.name(at[rows[i]])}, {where(rows[i])}",
            )  # fmt: skip
            mine, owner = program[rows][:, None], tensor.owner[cells]
            self.faults.add(
                "race", instruction, ((owner >= 0) & (owner != mine)).any(1),
                lambda i, rows=rows: f"{self.name(at[rows[i]])} is written by another program, {where(rows[i])}",
            )  # fmt: skip
            before = tensor.reader[cells]
            tensor.several[cells[(before >= 0) & (before != mine)]] = True
            tensor.reader[cells] = mine
        return out

    def store(self, instruction: Instruction, at: np.ndarray, values: np.ndarray, program: np.ndarray, where) -> None:
        """values: uint [n, count]."""
        count, size = values.shape[1], values.itemsize
        good = self._places(instruction, at, count * size, where)
        for tensor, rows, offset in self._split(at, good):
            places = offset[:, None] // size + np.arange(count)
            cells = tensor.cells(offset, count * size)
            if tensor.cell > size:
                self.faults.add("misaligned", instruction, np.ones(len(rows), bool), lambda i: "part of an element")
            data, mine = tensor.data.view(elements(size)), program[rows][:, None]
            owner, reader = tensor.owner[cells], tensor.reader[cells]
            differs = (data[places] != values[rows]).any(1)
            other = ((owner >= 0) & (owner != mine)).any(1) & differs
            other |= ((reader >= 0) & ((reader != mine) | tensor.several[cells])).any(1) & differs
            data[places] = values[rows]
            other |= (data[places] != values[rows]).any(1)
            self.faults.add(
                "race", instruction, other,
                lambda i, rows=rows: f"{self.name(at[rows[i]])}, which another thread uses, {where(rows[i])}",
            )  # fmt: skip
            tensor.owner[cells], tensor.written[cells] = mine, True

    def _split(self, at: np.ndarray, good: np.ndarray):
        """(tensor, rows, offsets) of the accesses by tensor."""
        which = (at >> np.uint64(TENSOR_SHIFT)).astype(np.int64) - 1
        for tensor in np.unique(which[good]):
            rows = np.flatnonzero(good & (which == tensor))
            offset = (at[rows] & np.uint64((1 << TENSOR_SHIFT) - 1)).astype(np.int64)
            yield self.tensors[tensor], rows, offset


class SharedMemory:
    """Shared memory of many programs, uint8 [programs, bytes].

    epoch: barriers that a program has passed. An access conflicts with one of another warp in the same epoch, unless
    both read or the value stays the same. Atomic operations count as those of one more warp.
    """

    def __init__(
        self, program: Program, dynamic_bytes: int, programs: int, warps: int, poison: np.ndarray, faults: Faults
    ):
        self.faults, self.warps, self.poison = faults, warps, poison
        self.names: dict[str, int] = {}
        self.parts: list[tuple[int, int]] = []
        sizes = dict(program.static) | ({program.dynamic: (1024, dynamic_bytes)} if program.dynamic else {})
        end = SHARED_BASE
        for name, (_, size) in sizes.items():
            self.names[name] = end
            self.parts.append((end, end + size))
            end = -(-(end + size + SHARED_GAP) // 1024) * 1024
        moved = [i.bytes() for i in program.instructions if i.parts[0] in ("ld", "st", "atom") and "shared" in i.parts]
        moved += [i.operands[2] for i in program.instructions if i.parts[:2] == ("cp", "async") and "shared" in i.parts]
        self.cell = min([16, *moved])
        cells = end // self.cell
        self.valid = np.zeros(cells, bool)
        for start, stop in self.parts:
            self.valid[start // self.cell : stop // self.cell] = True
        self.data = np.resize(poison, (programs, end))
        self.written = np.zeros((programs, cells), bool)
        self.epoch = np.zeros(programs, np.int32)
        self.last_write = np.full((programs, cells), -1, np.int32)
        self.last_read = np.full((programs, cells), -1, np.int32)
        self.writes = np.full((programs, warps + 1, cells), -1, np.int32)
        self.reads = np.full((programs, warps + 1, cells), -1, np.int32)

    def keep(self, programs: np.ndarray) -> None:
        """Forget all but these programs."""
        for name in ("data", "written", "epoch", "last_write", "last_read", "writes", "reads"):
            setattr(self, name, getattr(self, name)[programs])

    def _good(self, instruction: Instruction, at: np.ndarray, size: int, where) -> np.ndarray:
        misaligned = at % size != 0
        self.faults.add("misaligned", instruction, misaligned, lambda i: f"shared address {at[i]}, {where(i)}")
        first, last = at // self.cell, (at + size - 1) // self.cell
        inside = (at >= 0) & (last < len(self.valid))
        first, last = np.where(inside, first, 0), np.where(inside, last, 0)
        inside &= self.valid[first] & self.valid[last]
        self.faults.add(
            "out of bounds", instruction, ~inside, lambda i: f"shared address {at[i]} of {self.parts}, {where(i)}"
        )
        return inside & ~misaligned

    def _cells(self, at: np.ndarray, size: int) -> np.ndarray:
        return at[:, None] // self.cell + np.arange(size // self.cell)

    def _others(self, history: np.ndarray, program: np.ndarray, warp: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Whether another warp has done this in the present epoch, [n]; history: [programs, warps + 1, cells]."""
        same = history[program[:, None, None], np.arange(self.warps + 1)[:, None], cells[:, None]]
        same = same == self.epoch[program][:, None, None]
        same[np.arange(len(warp)), warp] = False
        return same.any((1, 2))

    def _conflicts(self, latest, history, program, warp, cells) -> np.ndarray:
        """As _others; latest: the last epoch of each cell, which spares most of the work."""
        conflict = np.zeros(len(program), bool)
        near = (latest[program[:, None], cells] == self.epoch[program][:, None]).any(1)
        if near.any():
            rows = np.flatnonzero(near)
            conflict[rows] = self._others(history, program[rows], warp[rows], cells[rows])
        return conflict

    def load(
        self, instruction: Instruction, at: np.ndarray, count: int, size: int, program: np.ndarray, warp: np.ndarray,
        where,
    ) -> np.ndarray:  # fmt: skip
        """count elements of `size` bytes from each address, [n, count]; poison where that is not allowed."""
        out = np.resize(self.poison, (len(at), count * size)).view(elements(size))
        good = self._good(instruction, at, count * size, where)
        if not good.all():
            rows = np.flatnonzero(good)
            if len(rows):
                again = self.load(
                    instruction, at[rows], count, size, program[rows], warp[rows], lambda i: where(rows[i])
                )
                out[rows] = again
            return out
        data = self.data.view(elements(size))
        out = data[program[:, None], at[:, None] // size + np.arange(count)]
        cells = self._cells(at, count * size)
        missing = ~self.written[program[:, None], cells]
        if instruction.used is not None:
            used = [instruction.used >> (i * self.cell) & ((1 << self.cell) - 1) for i in range(cells.shape[1])]
            missing &= np.array(used) != 0
        self.faults.add(
            "uninitialised memory", instruction, missing.any(1), lambda i: f"shared address {at[i]}, {where(i)}"
        )
        self.faults.add(
            "race", instruction, self._conflicts(self.last_write, self.writes, program, warp, cells),
            lambda i: f"shared address {at[i]} is written by another warp since the last barrier, {where(i)}",
        )  # fmt: skip
        self.note_read(program, warp, cells)
        return out

    def note_read(self, program: np.ndarray, warp: np.ndarray, cells: np.ndarray) -> None:
        epoch = self.epoch[program][:, None]
        self.last_read[program[:, None], cells] = epoch
        self.reads[program[:, None], warp[:, None], cells] = epoch

    def store(
        self, instruction: Instruction, at: np.ndarray, values: np.ndarray, program: np.ndarray, warp: np.ndarray, where
    ) -> None:
        """values: uint [n, count]."""
        count, size = values.shape[1], values.itemsize
        good = self._good(instruction, at, count * size, where)
        if not good.all():
            rows = np.flatnonzero(good)
            if len(rows):
                self.store(instruction, at[rows], values[rows], program[rows], warp[rows], lambda i: where(rows[i]))
            return
        data, places = self.data.view(elements(size)), at[:, None] // size + np.arange(count)
        cells = self._cells(at, count * size)
        differs = (data[program[:, None], places] != values).any(1)
        conflict = self._conflicts(self.last_write, self.writes, program, warp, cells)
        conflict |= self._conflicts(self.last_read, self.reads, program, warp, cells)
        data[program[:, None], places] = values
        conflict = conflict & differs | (data[program[:, None], places] != values).any(1)
        self.faults.add(
            "race", instruction, conflict,
            lambda i: f"shared address {at[i]} is used by another thread since the last barrier, {where(i)}",
        )  # fmt: skip
        self.note_write(program, warp, cells)

    def note_write(self, program: np.ndarray, warp: np.ndarray, cells: np.ndarray) -> None:
        epoch = self.epoch[program][:, None]
        self.written[program[:, None], cells] = True
        self.last_write[program[:, None], cells] = epoch
        self.writes[program[:, None], warp[:, None], cells] = epoch

    def add(
        self, instruction: Instruction, at: np.ndarray, values: np.ndarray, program: np.ndarray, warp: np.ndarray, where
    ) -> np.ndarray:
        """Atomic addition of uint [n], in the order of the threads; what was there before."""
        atomic = np.full_like(warp, self.warps)
        size = values.itemsize
        before = self.load(instruction, at, 1, size, program, atomic, where)[:, 0]
        reads = self._conflicts(self.last_read, self.reads, program, atomic, self._cells(at, size))
        self.faults.add(
            "race", instruction, reads, lambda i: f"shared address {at[i]} is read by another warp, {where(i)}"
        )
        key = program.astype(np.int64) * self.data.shape[1] + at
        order = np.argsort(key, kind="stable")
        sums = np.cumsum(values[order], dtype=values.dtype)
        first = np.r_[True, key[order][1:] != key[order][:-1]]
        start = (sums - values[order])[first][np.cumsum(first) - 1]
        result = np.empty_like(values)
        result[order] = before[order] + (sums - values[order] - start)
        np.add.at(self.data.view(elements(size)), (program, at // size), values)
        self.note_write(program, atomic, self._cells(at, size))
        return result
