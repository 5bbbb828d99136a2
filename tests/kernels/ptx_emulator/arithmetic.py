"""Instructions that compute registers of a thread from registers of the same thread, as the PTX manual defines them.

`compute` takes and gives arrays over threads: unsigned integers of the register's width, bool for predicates. Floats
are computed in float64 and rounded once, to nearest even; approximations are rounded exactly, to which the hardware
adds an error of an ulp or two.
"""

from __future__ import annotations

import numpy as np

from .program import Instruction

COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def dtype(kind: str) -> np.dtype:
    """Of an instruction type such as b32, s64, f32; pred is bool."""
    if kind == "pred":
        return np.dtype(bool)
    return np.dtype({"b": "uint", "u": "uint", "s": "int", "f": "float"}[kind[0]] + kind[1:])


def widened(bits: np.ndarray, kind: str) -> np.ndarray:
    """16-bit floats, as their bits, to float32."""
    bits = np.asarray(bits).astype(np.uint16)
    if kind.startswith("bf16"):
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def narrowed(values: np.ndarray, kind: str) -> np.ndarray:
    """float64 or float32, rounded to nearest even, to the bits of 16-bit floats."""
    if kind.startswith("f16"):
        return values.astype(np.float16).view(np.uint16)
    exact = np.asarray(values, np.float64)
    single = exact.astype(np.float32)
    bits = single.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FFF), rounded)


def pairs(bits: np.ndarray, kind: str) -> np.ndarray:
    """Two 16-bit floats of each uint32 (low first): float32 [.., 2]."""
    return widened(np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2), kind)


def paired(values: np.ndarray, kind: str) -> np.ndarray:
    """[.., 2] to the uint32 of two 16-bit floats."""
    return np.ascontiguousarray(narrowed(values, kind)).view(np.uint32)[..., 0]


def _read(value: np.ndarray, kind: str) -> np.ndarray:
    """A register or an immediate, as its instruction type; floats as float64 (packed ones: float32 [.., 2])."""
    if kind in ("f16x2", "bf16x2"):
        return pairs(value.astype(np.uint32), kind).astype(np.float64)
    if kind in ("f16", "bf16"):
        return widened(value, kind).astype(np.float64)
    if kind == "tf32":
        return (value & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    to = dtype(kind)
    if to.kind == "f":
        return value.view(to).astype(np.float64)
    if to.kind == "b":
        return value.astype(bool)
    return value.astype(f"uint{8 * to.itemsize}").view(to)


def _write(value: np.ndarray, kind: str) -> np.ndarray:
    """What `_read` gives, to the unsigned integers of a register of this type."""
    if kind in ("f16x2", "bf16x2"):
        return paired(value, kind)
    if kind in ("f16", "bf16"):
        return narrowed(value, kind)
    if kind == "tf32":  # rounds half away from zero
        bits = value.astype(np.float32).view(np.uint32)
        return (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    to = dtype(kind)
    if to.kind == "b":
        return value.astype(bool)
    value = np.asarray(value).astype(to)
    bits = value.view(f"uint{8 * to.itemsize}")
    if kind == "f32":  # hardware has one NaN
        bits = np.where(np.isnan(value), np.uint32(0x7FFFFFFF), bits)
    return bits


def _shift(parts, a, b, bits: int):
    amount = np.minimum(b.astype(np.uint64), np.uint64(bits))
    small = np.minimum(amount, np.uint64(bits - 1))
    if parts[0] == "shl":
        return np.where(amount == bits, a.dtype.type(0), a << small.astype(a.dtype))
    shifted = a >> small.astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(amount == bits, a.dtype.type(0), shifted)


def _permute_bytes(a, b, selector):
    source = np.stack([a, b], -1).astype(np.uint32).view(np.uint8).reshape(len(a), 8)
    out = np.zeros((len(a), 4), np.uint8)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = source[np.arange(len(a)), nibble & np.uint32(7)]
        sign = (byte.view(np.int8) >> 7).view(np.uint8)
        out[:, i] = np.where(nibble & np.uint32(8), sign, byte)
    return out.view(np.uint32)[:, 0]


def _bit_field(kind: str, a, start, length):
    """bfe: length bits of a from start on."""
    bits = 8 * a.dtype.itemsize
    start, length = np.minimum(start & 255, bits).astype(int), np.minimum(length & 255, bits).astype(int)
    length = np.minimum(length, bits - start)
    up = bits - start - length
    moved = np.where(up >= bits, a.dtype.type(0), a << np.minimum(up, bits - 1).astype(a.dtype))
    signed = moved.view(f"int{bits}") if kind[0] == "s" else moved.view(f"uint{bits}")
    down = bits - length
    result = signed >> np.minimum(down, bits - 1).astype(signed.dtype)
    return np.where(length == 0, result.dtype.type(0), result)


def _lop3(a, b, c, table):
    out = np.zeros_like(a)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        out |= np.where(table >> i & 1, term, np.uint32(0)).astype(a.dtype)
    return out


def _convert(parts, value):
    to, source = parts[-2], parts[-1]
    x = _read(value, source)
    if to[0] in "us" and source[0] in "fb" and source not in ("b16", "b32", "b64", "b8"):
        rounding = next((p for p in parts if p in ("rni", "rzi", "rmi", "rpi")), None)
        x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](x)
        limits = np.iinfo(dtype(to))
        x = np.clip(np.nan_to_num(x), limits.min, limits.max)
    if "rna" in parts and to == "tf32":
        return _write(x, "tf32")
    if to[0] == "f" and ("rzi" in parts or "rni" in parts):
        x = np.trunc(x) if "rzi" in parts else np.rint(x)
    if to in ("s8", "s16"):  # the register is wider, perhaps
        return x.astype(dtype(to)).astype(np.int64).view(np.uint64)
    return _write(x, to)


def _float_operation(name: str, x: list[np.ndarray]):
    if name == "fma" or name == "mad":
        return x[0] * x[1] + x[2]
    if name in ("add", "sub", "mul", "div"):
        return {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[name](*x)
    if name in ("max", "min"):
        return np.fmax(*x) if name == "max" else np.fmin(*x)
    if name == "rsqrt":
        return 1 / np.sqrt(x[0])
    single = {"neg": np.negative, "abs": np.abs, "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal,
              "sqrt": np.sqrt, "tanh": np.tanh, "sin": np.sin, "cos": np.cos}  # fmt: skip
    return single[name](x[0])


def _integer_operation(name: str, parts: tuple[str, ...], x: list[np.ndarray]):
    kind, bits = x[0].dtype, 8 * x[0].dtype.itemsize
    if name in ("mul", "mad"):
        if "wide" in parts:
            wide = f"{'int' if kind.kind == 'i' else 'uint'}{2 * bits}"
            product = x[0].astype(wide) * x[1].astype(wide)
        elif "hi" in parts and bits == 32:
            wide = "int64" if kind.kind == "i" else "uint64"
            product = (x[0].astype(wide) * x[1].astype(wide) >> np.array(32, wide)).astype(kind)
        elif "lo" in parts:
            product = x[0] * x[1]
        else:
            raise NotImplementedError(".".join(parts))
        return product if name == "mul" else product + x[2]
    if name in ("add", "sub"):
        return x[0] + x[1] if name == "add" else x[0] - x[1]
    if name in ("and", "or", "xor"):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name](*x)
    if name in ("max", "min"):
        return np.maximum(*x) if name == "max" else np.minimum(*x)
    if name in ("div", "rem"):
        divisor = np.where(x[1] == 0, 1, x[1]).astype(kind)
        quotient = (np.abs(x[0].astype(object)) // np.abs(divisor.astype(object))).astype(kind)
        quotient = np.where((x[0] < 0) != (divisor < 0), -quotient, quotient) if kind.kind == "i" else quotient
        return quotient if name == "div" else x[0] - quotient * divisor
    if name == "popc":
        return np.unpackbits(x[0].view(np.uint8).reshape(len(x[0]), -1), axis=1).sum(1).astype(np.uint32)
    if name == "clz":
        high = np.unpackbits(np.ascontiguousarray(x[0].byteswap()).view(np.uint8).reshape(len(x[0]), -1), axis=1)
        return np.where(high.any(1), high.argmax(1), bits).astype(np.uint32)
    if name == "brev":
        flipped = np.unpackbits(x[0].view(np.uint8).reshape(len(x[0]), -1), axis=1, bitorder="little")
        return np.packbits(flipped[:, ::-1], axis=1, bitorder="little").view(kind)[:, 0]
    return {"neg": np.negative, "not": np.invert, "abs": np.abs}[name](x[0])


def compute(instruction: Instruction, values: list[np.ndarray]) -> np.ndarray:
    """The result, as register bits; values: of the operands after the first, likewise.

    Raises NotImplementedError, or KeyError, for an instruction that is not known.
    """
    parts = instruction.parts
    name, kind = parts[0], parts[-1]
    if name == "mov":
        return values[0]
    if name == "cvt":
        if len(values) == 2:  # two floats to a packed pair, the first in the upper half
            both = np.stack([_read(values[1], kind), _read(values[0], kind)], -1)
            return _write(both, parts[-2])
        return _convert(parts, values[0])
    if name == "setp":
        a, b = _read(values[0], kind), _read(values[1], kind)
        compare = parts[1]
        unordered = compare.endswith("u") and compare != "u"
        result = COMPARISONS[compare[:-1] if unordered else compare](a, b)
        nan = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(len(a), bool)
        return np.where(nan, unordered, result)
    if name == "selp":
        return np.where(values[2], values[0], values[1])
    if name in ("shl", "shr"):
        a = _read(values[0], kind)
        return _write(_shift(parts, a, values[1].astype(np.uint32), 8 * a.dtype.itemsize), kind)
    if name == "shf":
        low, high, shift = (v.astype(np.uint64) for v in values)
        shift = shift & np.uint64(31) if "wrap" in parts else np.minimum(shift, np.uint64(32))
        both = high << np.uint64(32) | low
        moved = both >> shift if "r" in parts else both << shift >> np.uint64(32)
        return moved.astype(np.uint32)
    if name == "prmt":
        if len(parts) != 2:
            raise NotImplementedError(instruction.text)
        return _permute_bytes(*(v.astype(np.uint32) for v in values))
    if name == "bfe":
        return _write(_bit_field(kind, values[0], values[1], values[2]), kind)
    if name == "lop3":
        return _lop3(*values[:3], int(values[3][0]))
    operands = [_read(value, kind) for value in values]
    if kind in ("f16", "f16x2", "bf16", "bf16x2", "f32", "f64"):
        return _write(_float_operation(name, operands), kind)
    if kind == "pred":
        logic = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}
        return logic[name](*operands)
    if "wide" in parts and name == "mad":
        kind = kind[0] + str(2 * int(kind[1:]))
        operands[2] = _read(values[2], kind)
    elif "wide" in parts:
        kind = kind[0] + str(2 * int(kind[1:]))
    elif name in ("popc", "clz"):
        kind = "u32"
    return _write(_integer_operation(name, parts, operands), kind)
