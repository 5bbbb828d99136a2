"""The searches of the encoder, compiled for the CPU. Who calls them keeps a way without a compiler.

Tensors are float32 on the CPU unless said otherwise; threads: torch.get_num_threads(). The result of a sequence depends
on neither the number of threads nor the sequences beside it.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from kbvq_kernels.build import compiled_library

MIN_GROUPS = 8
"""States over branches of the smallest trellis that is searched here."""

VECTOR_DIMS = (2, 4, 8)
CODEWORDS = 8
"""Dimensions of the tables that are searched here, and what the number of their codewords is a multiple of."""


@functools.cache
def trellis_library() -> ctypes.CDLL | None:
    """The compiled search of a trellis, built on first use; None, and a warning, when that cannot be."""
    return compiled_library("cpu_trellis", task="trellis codes are searched", otherwise="torch")


@functools.cache
def feedback_library() -> ctypes.CDLL | None:
    """The compiled search in tables with error feedback; like `trellis_library`."""
    return compiled_library("cpu_feedback", task="codewords are searched", otherwise="torch")


def _arguments(*tensors: Tensor | None, sizes: tuple[int, ...]) -> list[ctypes.c_void_p | ctypes.c_long]:
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    return [*pointers, *(ctypes.c_long(size) for size in sizes)]


def trellis_encode(values: Tensor, weights: Tensor | None, codewords: Tensor, bits: int, reach: int) -> Tensor:
    """Codes of tail-biting sequences, uint8 [num_sequences, length]: `TrellisCode.encode` of kbvq.

    values, and weights or None for 1: [num_sequences, length], finite. codewords: of every state, at least MIN_GROUPS
    << bits. reach: values on each side of a seam by which it is found, at most length / 2; and at most 1024, since
    sequences of 2 · 2048 values and more are searched in parts.
    """
    count, length = values.shape
    values, codewords = values.contiguous(), codewords.contiguous()
    weights = None if weights is None else weights.contiguous()
    codes = torch.empty(count, length, dtype=torch.uint8)
    sizes = count, length, bits, len(codewords) >> bits, reach, torch.get_num_threads()
    trellis_library().kbvq_trellis_encode(*_arguments(values, weights, codewords, codes, sizes=sizes))
    return codes


def trellis_paths(
    values: Tensor, weights: Tensor, codewords: Tensor, bits: int, before: Tensor | None, last: Tensor | None
) -> Tensor:
    """States of the best paths, int64 [num_sequences, length]: `TrellisCode.best_path` of kbvq.

    Arguments as in `trellis_encode`, values in the order of the states. before, last: int64 [num_sequences] or None.
    """
    count, length = values.shape
    values, weights, codewords = values.contiguous(), weights.contiguous(), codewords.contiguous()
    before, last = (None if ends is None else ends.contiguous() for ends in (before, last))
    states = torch.empty(count, length, dtype=torch.int64)
    sizes = count, length, bits, len(codewords) >> bits
    trellis_library().kbvq_trellis_paths(*_arguments(values, weights, codewords, before, last, states, sizes=sizes))
    return states


class _TrellisBlock(ctypes.Structure):
    """KbvqTrellisBlock of cpu_trellis.cpp."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in "weights carried factor codewords scale mass codes error".split()
    ] + [
        (name, ctypes.c_long)
        for name in (
            "experts rows width states weights_expert weights_row factor_expert factor_row codes_expert codes_row "
            "error_expert error_row"
        ).split()
    ]


def trellis_block(
    weights: Tensor,
    carried: Tensor,
    factor: Tensor,
    codewords: Tensor,
    scale: Tensor,
    mass: Tensor,
    codes: Tensor,
    error: Tensor,
    *,
    bits: int,
    reach: int,
) -> bool:
    """Codes a block of channels of every expert, one after the other down the rows: the inner loop of kbvq's
    `encode_with_feedback`. False for targets that are not finite.

    weights, carried, factor, scale, error: as in `feedback_block`. codewords, bits, reach: as in `trellis_encode`, for
    sequences of all rows. mass: [E, rows] >= 0, how much a row counts. codes: uint8 [E, rows, width], written.
    """
    experts, rows, width = weights.shape
    factor, codewords, scale, mass = (t.contiguous() for t in (factor, codewords, scale, mass))
    views = weights, factor, codes, error
    _check_views(weights, carried, views)
    tensors = weights, carried, factor, codewords, scale, mass, codes, error
    block = _TrellisBlock(
        *(t.data_ptr() for t in tensors),
        *(experts, rows, width, len(codewords)),
        *(stride for view in views for stride in view.stride()[:-1]),
    )
    function = trellis_library().kbvq_trellis_block
    function.restype = ctypes.c_bool
    return function(ctypes.byref(block), *map(ctypes.c_long, (bits, reach, torch.get_num_threads())))


def _check_views(weights: Tensor, carried: Tensor, views: tuple[Tensor, ...]) -> None:
    if carried.shape != weights.shape or not carried.is_contiguous() or any(v.stride(-1) != 1 for v in views):
        raise ValueError("a block needs a contiguous `carried` and views with a contiguous last dimension")


class _Block(ctypes.Structure):
    """KbvqBlock of cpu_feedback.cpp."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in "weights carried factor inverses tables scale codes error normal right".split()
    ] + [
        (name, ctypes.c_long)
        for name in (
            "experts rows width codewords books is_signed weights_expert weights_row factor_expert factor_row "
            "codes_plane codes_expert codes_row error_expert error_row"
        ).split()
    ]


def feedback_block(
    weights: Tensor,
    carried: Tensor,
    factor: Tensor,
    tables: Tensor,
    scale: Tensor,
    codes: Tensor,
    error: Tensor,
    sums: tuple[Tensor, Tensor] | None,
) -> None:
    """Codes a block of channels of every expert, group by group: the inner loop of kbvq's `encode_with_feedback`.

    weights: [E, rows, width]. carried: [E, rows, width] contiguous, (W − Ŵ) M of the channels before the block;
    overwritten. factor: M within the block, [E, width, width] upper triangular. tables: [1 or E, codewords, d], d in
    VECTOR_DIMS. scale: [E, rows] > 0. codes: int64 [1 or 2, E, rows, width / d], written: the codeword and, if there
    are two, a word of sign bits. error: W − Ŵ, as weights, written. sums: None, or float32 [books · codewords, d, d]
    and [.., d], to which the normal equations of each codeword are added, Σ scale² S G S and Σ scale² S G t.

    weights, error and codes may be views whose last dimension is contiguous.
    """
    experts, rows, width = weights.shape
    books, codewords, dim = tables.shape
    diagonal = factor.unflatten(1, (-1, dim)).unflatten(3, (-1, dim)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    identity = torch.eye(dim).expand(diagonal.shape)
    inverses = torch.linalg.solve_triangular(diagonal, identity, upper=True).contiguous()
    factor, tables, scale = factor.contiguous(), tables.contiguous(), scale.contiguous()
    views = weights, factor, codes, error
    _check_views(weights, carried, views)
    tensors = weights, carried, factor, inverses, tables, scale, codes, error, *(sums or (None, None))
    strides = (stride for view in views for stride in view.stride()[:-1])
    block = _Block(
        *(None if t is None else t.data_ptr() for t in tensors),
        *(experts, rows, width, codewords, books, len(codes) == 2),
        *strides,
    )
    threads = ctypes.c_long(torch.get_num_threads())
    feedback_library().kbvq_feedback_block(ctypes.byref(block), ctypes.c_long(dim), threads)
