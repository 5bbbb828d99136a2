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


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled searches, built on first use; None, and a warning, when that cannot be."""
    return compiled_library("cpu_encode", task="codes are searched", otherwise="torch")


def _arguments(*tensors: Tensor | None, sizes: tuple[int, ...]) -> list[ctypes.c_void_p | ctypes.c_long]:
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    return [*pointers, *(ctypes.c_long(size) for size in sizes)]


def trellis_encode(values: Tensor, weights: Tensor | None, codewords: Tensor, bits: int, reach: int) -> Tensor:
    """Codes of tail-biting sequences, uint8 [num_sequences, length]: `TrellisCode.encode` of kbvq.

    values, and weights or None for 1: [num_sequences, length], finite. codewords: of every state, at least MIN_GROUPS
    << bits. reach: values on each side of the seam by which it is found, at most length / 2.
    """
    count, length = values.shape
    values, codewords = values.contiguous(), codewords.contiguous()
    weights = None if weights is None else weights.contiguous()
    codes = torch.empty(count, length, dtype=torch.uint8)
    sizes = count, length, bits, len(codewords) >> bits, reach, torch.get_num_threads()
    library().kbvq_trellis_encode(*_arguments(values, weights, codewords, codes, sizes=sizes))
    return codes


def trellis_paths(values: Tensor, weights: Tensor, codewords: Tensor, bits: int, seams: Tensor | None) -> Tensor:
    """States of the best paths, int64 [num_sequences, length]: `TrellisCode.best_path` of kbvq.

    Arguments as in `trellis_encode`, values in the order of the states. seams: int64 [num_sequences] or None.
    """
    count, length = values.shape
    values, weights, codewords = values.contiguous(), weights.contiguous(), codewords.contiguous()
    seams = None if seams is None else seams.contiguous()
    states = torch.empty(count, length, dtype=torch.int64)
    sizes = count, length, bits, len(codewords) >> bits
    library().kbvq_trellis_paths(*_arguments(values, weights, codewords, seams, states, sizes=sizes))
    return states
