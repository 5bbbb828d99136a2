"""What the threads of a warp, or of four, do together with matrices, by the fragment tables of the PTX manual."""

from __future__ import annotations

import numpy as np

from .arithmetic import pairs, widened

LANE = np.arange(32)
GROUP, THREAD = LANE // 4, LANE % 4


def _single(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint32 to float32: of tf32 the hardware reads the upper 19 bits."""
    return (bits & np.uint32(0xFFFFE000) if kind == "tf32" else bits).view(np.float32)


def rows_of_a(registers: np.ndarray, kind: str) -> np.ndarray:
    """Operand A of 16 rows: uint32 [warps, 4 registers, 32 lanes] to float32 [warps, 16, 16 (tf32: 8)]."""
    warps = len(registers)
    if kind == "tf32":
        a = np.empty((warps, 16, 8), np.float32)
        for i in range(4):
            a[:, GROUP + 8 * (i % 2), THREAD + 4 * (i // 2)] = _single(registers[:, i], kind)
        return a
    a = np.empty((warps, 16, 16), np.float32)
    for i in range(4):
        both = pairs(registers[:, i], kind)
        for j in range(2):
            a[:, GROUP + 8 * (i % 2), 2 * THREAD + j + 8 * (i // 2)] = both[..., j]
    return a


def columns_of_b(registers: np.ndarray, kind: str) -> np.ndarray:
    """Operand B of 8 columns: uint32 [warps, 2, 32] to float32 [warps, 16 (tf32: 8), 8]."""
    warps = len(registers)
    if kind == "tf32":
        b = np.empty((warps, 8, 8), np.float32)
        for i in range(2):
            b[:, THREAD + 4 * i, GROUP] = _single(registers[:, i], kind)
        return b
    b = np.empty((warps, 16, 8), np.float32)
    for i in range(2):
        both = pairs(registers[:, i], kind)
        for j in range(2):
            b[:, 2 * THREAD + j + 8 * i, GROUP] = both[..., j]
    return b


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In float64, to be rounded to float32 once it is added: hardware keeps some bits less than that."""
    return np.matmul(a.astype(np.float64), b.astype(np.float64))


def multiply(kind: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """mma.sync m16n8k16 (tf32: m16n8k8): uint32 [warps, registers, 32] each; the four sums, uint32 [warps, 4, 32]."""
    total = product(rows_of_a(a, kind), columns_of_b(b, kind))
    out = np.empty_like(c)
    for i in range(4):
        at = total[:, GROUP + 8 * (i // 2), 2 * THREAD + i % 2]
        out[:, i] = (c[:, i].view(np.float32) + at).astype(np.float32).view(np.uint32)
    return out


def descriptor_places(descriptor: np.ndarray, rows: int, columns: int, size: int, transposed: bool) -> np.ndarray:
    """Shared addresses of the elements of B of a wgmma, int64 [n, rows (K), columns (N)], `size` bytes each.

    A descriptor holds, each over 16, where the tile starts, its leading and its stride byte offset, and the swizzle.
    An atom is 8 rows of 128, 64, 32 or (no swizzle) 16 bytes, laid out row by row; rows are columns of B, unless
    transposed, where they are rows. Atoms follow each other at the stride offset across the 8-row groups and at the
    leading offset along the row. Swizzles exchange 16-byte chunks by the address bits above them.
    """
    start, leading, stride = (
        (descriptor >> np.uint64(s) & np.uint64(0x3FFF)).astype(np.int64) << 4 for s in (0, 16, 32)
    )
    mode = int(descriptor[0] >> np.uint64(62))
    assert (descriptor >> np.uint64(62) == mode).all() and not (descriptor >> np.uint64(49) & np.uint64(7)).any()
    width = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    k, n = np.arange(rows)[:, None], np.arange(columns)[None, :]
    along, across = (n, k) if transposed else (k, n)
    byte = along * size
    group, line, atom, inside = across // 8, across % 8, byte // width, byte % width
    if mode == 0 and transposed:
        raise NotImplementedError("wgmma of a transposed operand without swizzle")
    place = (
        start[:, None, None]
        + (line * width + inside)[None]
        + group[None] * stride[:, None, None]
        + atom[None] * leading[:, None, None]
    )
    if mode:
        bits = {128: 7, 64: 3, 32: 1}[width]
        place = place ^ ((place >> 7 & bits) << 4)
    return place


def values_of_b(bits: np.ndarray, kind: str) -> np.ndarray:
    """Elements as read from shared memory, to float32."""
    return _single(bits, kind) if kind == "tf32" else widened(bits, kind)


def multiply_group(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """wgmma of 64 rows, of which each of four warps has 16: a float32 [groups, 64, K], b float32 [groups, K, columns],
    c uint32 [groups, 4, columns / 2, 32]; the sums, like c."""
    columns = b.shape[2]
    total = product(a, b).reshape(len(a), 4, 16, columns)
    out = np.empty_like(c)
    for i in range(columns // 2):
        at = total[:, :, GROUP + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * THREAD + i % 2]
        out[:, :, i] = (c[:, :, i].view(np.float32) + at).astype(np.float32).view(np.uint32)
    return out
